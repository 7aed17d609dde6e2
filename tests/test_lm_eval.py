"""lm-eval's models: soft generation, discrete likelihoods, the diffusion bound; on local task
files."""

import dataclasses
import json
import subprocess
import sys

import pytest
import torch
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

import softar
from softar import diffusion, make_decoder
from softar.decoders.options import check_options
from softar.diffusion.lm_eval import SoftarDiffusionLM
from softar.diffusion.losses import log_likelihood
from softar.evals.lm_eval import BadArgument, SoftarLM, main, with_device
from softar.evals.sweep_summary import aggregate, plot_sweep, read_sweep
from softar.tasks import load_task
from softar.tasks.harness import is_known
from tests.test_models import write_gguf
from tests.test_tags import byte_level
from tests.tiny import Forced, model_of, tokenizer_of

PROMPTS = [
    " ".join(["<bos>", f"w{20 + i}", f"w{6 + i}", f"w{40 - i}"][: 2 + i % 3]) for i in range(12)
]
CHAT = "{% for m in messages %}<think> {{ m['content'] }} {% endfor %}{% if add_generation_prompt %}</think>{% endif %}"
MNNS = ["<bos> D5 D3 D2 D4 ->", "<bos> D1 D1 D1 D2 ->", "<bos> D9 D2 D4 D4 ->"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny random Llama with a chat template; it seldom ends a text by itself, with w63."""
    place = tmp_path_factory.mktemp("model")
    model = model_of()
    torch.nn.init.zeros_(model.lm_head.weight.data[63])
    model.generation_config.eos_token_id = 63
    model.save_pretrained(place)
    tokenizer = tokenizer_of()
    tokenizer.chat_template, tokenizer.eos_token = CHAT, "w63"
    tokenizer.save_pretrained(place)
    softar.SoftConfig(max_new_tokens=256).save(place)
    return str(place)


@pytest.fixture(scope="module")
def hf(folder):
    return HFLM(folder, device="cpu", batch_size=5)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """Two tasks as files, one generated and one of multiple choice, on twelve rows."""
    place = tmp_path_factory.mktemp("tasks")
    rows = [
        dict(question=p, gold=f"w{i}", options=["w7", "w8 w9", "w11"], label=i % 3)
        for i, p in enumerate(PROMPTS)
    ]
    (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = f"""
dataset_path: json
dataset_kwargs: {{data_files: {{test: {place / "rows.jsonl"}}}, cache_dir: {place / "cache"}}}
test_split: test
doc_to_text: "{{{{question}}}}"
"""
    (place / "generated.yaml").write_text(f"""task: generated{common}output_type: generate_until
doc_to_target: "{{{{gold}}}}"
generation_kwargs: {{until: [w49], max_gen_toks: 8}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
""")
    (place / "chosen.yaml").write_text(f"""task: chosen{common}output_type: multiple_choice
doc_to_choice: "{{{{options}}}}"
doc_to_target: label
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
""")
    return place


@pytest.fixture(scope="module")
def manager(tasks):
    return TaskManager(include_path=str(tasks), include_defaults=False)


def asked(prompts, **settings):
    return [
        Instance("generate_until", {}, (p, {"max_gen_toks": 8} | settings), i)
        for i, p in enumerate(prompts)
    ]


def likely(pairs):
    return [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]


def responses(results, task):
    return [
        sample["resps"] for sample in sorted(results["samples"][task], key=lambda s: s["doc_id"])
    ]


@pytest.mark.parametrize("chat", [False, True])
def test_hard_is_hflm_greedy_and_likelihoods_are_the_discrete_models(folder, hf, manager, chat):
    """Also with mixer=gumbel a likelihood is that of the model itself."""
    common = dict(
        tasks=["generated", "chosen"],
        task_manager=manager,
        apply_chat_template=chat,
        log_samples=True,
        limit=9,
        bootstrap_iters=0,
    )
    theirs = simple_evaluate(hf, **common)
    ours = simple_evaluate(
        "softar", model_args=f"pretrained={folder},mixer=hard", device="cpu", batch_size=3, **common
    )
    soft = simple_evaluate(
        "softar", model_args=f"model={folder},mixer=gumbel", batch_size=4, **common
    )
    assert len(responses(ours, "generated")) == 9
    assert len({str(r) for r in responses(ours, "generated")}) > 5
    assert responses(ours, "generated") == responses(theirs, "generated")
    assert responses(soft, "generated") != responses(theirs, "generated")
    for found in (ours, soft):
        for mine, other in zip(
            responses(found, "chosen"), responses(theirs, "chosen"), strict=True
        ):
            assert [r[0][1] for r in mine] == [r[0][1] for r in other]
            assert [r[0][0] for r in mine] == pytest.approx([r[0][0] for r in other], abs=1e-4)
        assert found["results"]["chosen"] == pytest.approx(theirs["results"]["chosen"])


PREFIX = "w7 w8 "
LONG = " ".join(f"w{20 + i}" for i in range(20))


def queries(kind, *pairs):
    return [Instance(kind, {}, pair, i) for i, pair in enumerate(pairs)]


def test_a_context_that_is_cut_keeps_the_prefix(folder, hf):
    """The prefix, and what of the context's end has room."""
    lm = SoftarLM(
        folder, device="cpu", batch_size=3, max_length=14, prompt_prefix=PREFIX, mixer="hard"
    )
    how = {"max_gen_toks": 8, "until": ["w49"]}
    contexts = [LONG, "w5", f"{LONG} {PREFIX}w40 w41"]  # the last one has it in what is left
    cut = [PREFIX + " ".join(LONG.split()[-4:]), f"{PREFIX}w5", f"w38 w39 {PREFIX}w40 w41"]
    found = lm.generate_until(queries("generate_until", *((c, how) for c in contexts)))
    assert found == hf.generate_until(queries("generate_until", *((c, how) for c in cut)))
    with pytest.raises(BadArgument, match="takes 2 of 2 tokens"):
        lm.generate_until(queries("generate_until", (LONG, how | {"max_gen_toks": 12})))


def test_log_likelihoods_are_behind_the_prefix(folder, hf, caplog):
    lm = SoftarLM(folder, device="cpu", batch_size=2, max_length=14, prompt_prefix=PREFIX)
    contexts = ["w5", f"w6 {PREFIX}w9", "", LONG]
    read = [f"{PREFIX}w5", contexts[1], "w7 w8", PREFIX + " ".join(LONG.split()[-11:])]
    found = lm.loglikelihood(queries("loglikelihood", *((c, " w10 w11") for c in contexts)))
    theirs = hf.loglikelihood(queries("loglikelihood", *((c, " w10 w11") for c in read)))
    assert [one[0] for one in found] == pytest.approx([one[0] for one in theirs], abs=1e-4)
    assert "prompt_prefix" not in caplog.text


def test_stop_strings_end_each_row_and_are_cut_off(folder, hf):
    whole = hf.generate_until(asked(PROMPTS), disable_tqdm=True)
    stop = whole[0].split()[3]
    assert sum(stop in text for text in whole) >= 1
    ours = SoftarLM(folder, mixer="hard", batch_size=12)
    theirs = hf.generate_until(asked(PROMPTS, until=[stop, "w999"]), disable_tqdm=True)
    assert ours.generate_until(asked(PROMPTS, until=[stop, "w999"]), disable_tqdm=True) == theirs
    assert theirs[0] == whole[0].split(stop)[0]
    # The row that has met the string is not decoded on
    steps = []
    ours.model.register_forward_hook(lambda *_: steps.append(None))
    ours.generate_until(asked(PROMPTS[:1], until=[stop]), disable_tqdm=True)
    assert len(steps) == 4


def test_a_task_sees_the_answer_and_its_stop_strings_do_not_cut_the_thought(folder):
    lm = SoftarLM(folder, budget=4, batch_size=12)
    model, tokenizer = lm.model, lm.tokenizer
    config = softar.SoftConfig(budget=4, max_new_tokens=8)
    inputs = tokenizer(PROMPTS, return_tensors="pt", padding=True)
    out = softar.generate(model, **inputs, config=config)
    answers = [tokenizer.decode(ids) for ids in out.answers]
    assert lm.generate_until(asked(PROMPTS), disable_tqdm=True) == answers
    thoughts = [tokenizer.decode(ids[2:3]) for ids in out.completions]
    apart = [i for i in range(12) if thoughts[i] not in answers[i] and len(answers[i].split()) == 4]
    assert len(apart) > 3
    for i in apart:
        assert lm.generate_until(
            asked(PROMPTS[i : i + 1], until=[thoughts[i]]), disable_tqdm=True
        ) == [answers[i]]
        stop = answers[i].split()[1]
        cut = answers[i].split(stop)[0]
        assert lm.generate_until(asked(PROMPTS[i : i + 1], until=[stop]), disable_tqdm=True) == [
            cut
        ]


def test_how_tags_are_spelled_is_nobodys_option(folder):
    with pytest.raises(BadArgument, match="unknown to --model softar") as error:
        SoftarLM(folder, speling=())
    assert "spelling" not in str(error.value)
    for options in ({"spelling": ((), (), ())}, {"bugdet": 3}):
        with pytest.raises(ValueError, match=r"takes no .*: it takes") as error:
            check_options(softar.SoftConfig, "soft", options)
        assert "'spelling'" not in str(error.value).partition("it takes")[2]
    decoding = SoftarLM(folder, think_end="</think>", batch_size=12).decoding
    assert "spelling" not in decoding and decoding["think_end"] == (4,)


@pytest.mark.parametrize(
    ("text", "until", "answer"),
    [
        ("ok</think>-5", "w", "-5"),
        ("ok</think>\n5", "\n", "5"),  # white space alone is left out, or nothing were there
        ("ok</think>-5k", "-", ""),
    ],
)
def test_what_merged_with_the_tag_begins_the_answer(text, until, answer, tmp_path, monkeypatch):
    tokenizer = byte_level("> Ċ")
    script = [*tokenizer.encode(text), tokenizer.eos_token_id]
    model_of(vocab_size=len(tokenizer), eos_token_id=script[-1]).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    lm = SoftarLM(str(tmp_path), think_end="</think>", mixer="hard")

    def generate(model, ids, mask, **options):
        options["logits_processor"] = [Forced(ids.shape[1], [script] * len(ids))]
        return softar.generate(model, ids, mask, **options)

    monkeypatch.setattr("softar.evals.lm_eval.generate", generate)
    asks = asked(["ok"], until=[until], max_gen_toks=len(script))
    assert lm.generate_until(asks, disable_tqdm=True) == [answer]


def test_stop_strings_wait_for_the_end_of_the_thought(folder):
    lm = SoftarLM(folder, budget=3, think_end="</think>", mixer="hard", batch_size=12)
    answers = lm.generate_until(asked(PROMPTS), disable_tqdm=True)
    inputs = lm.tokenizer(PROMPTS, return_tensors="pt", padding=True)
    thoughts = softar.generate(
        lm.model, **inputs, config=dataclasses.replace(lm.soft, max_new_tokens=8)
    ).completions
    apart = [
        i
        for i in range(12)
        if lm.tokenizer.decode(thoughts[i, :1]) not in answers[i].split() and answers[i]
    ]
    assert len(apart) > 3
    for i in apart:  # a string of the thought does not end the row
        stop = lm.tokenizer.decode(thoughts[i, :1])
        assert lm.generate_until(asked(PROMPTS[i : i + 1], until=[stop]), disable_tqdm=True) == [
            answers[i]
        ]
    steps = []
    lm.model.register_forward_hook(lambda *_: steps.append(None))
    tried = [
        (prompt, answer)
        for prompt, answer in zip(PROMPTS, answers)
        if len(set(answer.split())) == 4
    ]
    assert len(tried) > 3
    for prompt, answer in tried:
        stop = answer.split()[2]
        steps.clear()
        found = lm.generate_until(asked([prompt], until=[stop]), disable_tqdm=True)
        assert found == [answer.split(stop)[0]]
        assert len(steps) == 3 + 1 + 3  # the thought, its end, the answer up to the string


def test_draws_depend_on_seed_and_request_alone(folder):
    def texts(seed=None, batch_size=12, order=1, asks=1, **options):
        lm = SoftarLM(folder, mixer="gumbel", seed=seed, batch_size=batch_size, **options)
        for _ in range(asks):
            found = lm.generate_until(asked(PROMPTS[::order]), disable_tqdm=True)[::order]
        return found

    torch.manual_seed(7)  # what lm-eval does with --seed
    first = texts()
    assert texts(batch_size=5) == texts(order=-1) == texts(seed=7) == first
    assert texts(asks=2) != first
    assert texts(seed=8) != first
    torch.manual_seed(8)
    assert texts() == texts(seed=8)


def test_sampling_of_a_task_is_of_the_discrete_text(folder):
    hot = dict(do_sample=True, temperature=3.0)
    hard = SoftarLM(folder, mixer="hard", batch_size=12, seed=0)
    greedy = hard.generate_until(asked(PROMPTS), disable_tqdm=True)
    assert hard.generate_until(asked(PROMPTS, **hot), disable_tqdm=True) != greedy
    assert hard.generate_until(asked(PROMPTS, **hot, top_k=1), disable_tqdm=True) == greedy
    assert (
        hard.generate_until(asked(PROMPTS, do_sample=False, temperature=0.0), disable_tqdm=True)
        == greedy
    )
    settings, _ = SoftarLM(folder, budget=2)._settings({**hot, "top_p": 0.5}, 8)
    assert (settings.answer_temperature, settings.answer_top_p, settings.temperature) == (
        3.0,
        0.5,
        1.0,
    )
    settings, _ = SoftarLM(folder, budget=2, answer_temperature=0.7)._settings(hot, 8)
    assert settings.answer_temperature == 0.7
    # temperature 0 is greedy, whoever says it, and whatever filters stand beside it
    for how in (dict(temperature=0), dict(temperature=0.0, top_p=0.5)):
        assert (
            hard.generate_until(asked(PROMPTS, do_sample=True, **how), disable_tqdm=True) == greedy
        )
    for said in (dict(mixer="hard", temperature=0), dict(budget=2, answer_temperature=0)):
        lm = SoftarLM(folder, **said)
        for how in (hot, hot | dict(top_p=0.5, top_k=3, min_p=0.1)):
            assert lm._settings(how, 8)[0] == lm._settings({}, 8)[0]
    with pytest.raises(BadArgument, match="answer_top_p=2"):
        SoftarLM(folder, budget=2)._settings(hot | dict(top_p=2.0), 8)
    with pytest.raises(BadArgument, match="whole text is the thought"):
        SoftarLM(folder).generate_until(asked(PROMPTS, **hot), disable_tqdm=True)
    with pytest.raises(BadArgument, match="'penalty'"):
        hard.generate_until(asked(PROMPTS, penalty=2), disable_tqdm=True)
    assert hard.generate_until(asked(PROMPTS, repetition_penalty=9.0), disable_tqdm=True) != greedy


def test_names_and_the_config_beside_a_model(folder, tmp_path):
    write_gguf(tmp_path / "m.gguf")
    assert SoftarLM(str(tmp_path / "m.gguf")).model.config.hidden_size == 32
    lm = SoftarLM(model="mnns-tiny", dtype="float64", max_new_tokens=3)
    assert lm.model.dtype == torch.float64 and lm.max_gen_toks == 3
    plain = SoftarLM(folder)
    assert plain.soft == softar.SoftConfig(max_new_tokens=256)
    own = tmp_path / "own"
    plain.model.save_pretrained(own)
    plain.tokenizer.save_pretrained(own)
    # lm-eval's own length, and half of it for the thought
    tagged = SoftarLM(str(own)).soft
    assert (tagged.mixer, tagged.max_new_tokens, tagged.budget) == ("gumbel", 256, 128)
    assert (tagged.think_start, tagged.think_end) == ((3,), (4,))
    saved = softar.SoftConfig(
        mixer="gumbel", mixer_args={"tau": 0.1}, think_end="</think>", max_new_tokens=9
    )
    saved.save(own)
    assert SoftarLM(str(own)).soft == dataclasses.replace(saved, think_end=(4,))
    changed = SoftarLM(str(own), mixer="hard", top_k=None, banned=[1, 2]).soft
    assert (changed.mixer, changed.mixer_args, changed.top_k, changed.banned) == (
        "hard",
        {},
        None,
        (1, 2),
    )
    assert changed.max_new_tokens == 9


@pytest.mark.parametrize(
    "model, arguments, message",
    [
        (
            "softar",
            "pretrained=mnns-tiny,tempera=1",
            "model_args ['tempera'] are unknown to --model softar; known: add_",
        ),
        ("softar", "mixer=hard", "pretrained=None, model=None: give one of them"),
        ("softar", "pretrained=a,model=b", "pretrained='a', model='b': give one of them"),
        ("softar", "pretrained=mnns-tinny", "did you mean 'mnns-tiny'?"),
        ("softar", "pretrained=mnns-tiny,mixer=soggy", "mixer='soggy' is unknown"),
        ("softar", "pretrained=mnns-tiny,temperature=-1", "temperature=-1"),
        ("softar", "pretrained=mnns-tiny,temperature=hot", "temperature='hot' must be a number"),
        (
            "softar-diffusion",
            "model=mnns-diffusion-tiny,mixer=soft",
            "['mixer'] are unknown to --model softar-diffusion",
        ),
        ("softar-diffusion", "model=mnns-diffusion-tiny,samples=0", "samples=0 must be at least 1"),
        (
            "softar-diffusion",
            "model=mnns-diffusion-tiny,threshold=2",
            "threshold=2 must lie in (0, 1]",
        ),
        ("softar-diffusion", "model=mnns-diffusion-tiny,batch_size=auto", "batch_size='auto'"),
    ],
)
def test_wrong_arguments_are_one_line(model, arguments, message, capsys, monkeypatch):
    """lm-eval's own command is left out: it reads its thousands of task files before it opens a
    model."""
    monkeypatch.setattr(
        "lm_eval.__main__.cli_evaluate", lambda: get_model(model).create_from_arg_string(arguments)
    )
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("softar-eval: error: ") and message in line


def test_model_args_go_before_the_commands_own_options(folder):
    """lm-eval hands over its --device, cuda:0 where none is given, and its --batch_size beside
    them."""
    told = {"device": "cuda:0", "batch_size": 3, "max_batch_size": None}
    for create, arguments in (
        (SoftarLM.create_from_arg_obj, dict(pretrained=folder, device="cpu", batch_size=2)),
        (SoftarLM.create_from_arg_string, f"pretrained={folder},device=cpu,batch_size=2"),
    ):
        lm = create(arguments, told)
        assert lm.device.type == "cpu" and lm.batch_size == 2
    lm = SoftarLM.create_from_arg_obj(dict(pretrained=folder), told)
    assert lm.device.type == ("cuda" if torch.cuda.is_available() else "cpu") and lm.batch_size == 3


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has the device")
@pytest.mark.parametrize("model", ["softar", "softar-diffusion"])
def test_a_device_that_is_not_there_is_one_line(model, capsys, monkeypatch):
    name = {"softar": "mnns-tiny", "softar-diffusion": "mnns-diffusion-tiny"}[model]
    told = {"device": "cuda:0", "batch_size": 1}
    monkeypatch.setattr(
        "lm_eval.__main__.cli_evaluate",
        lambda: get_model(model).create_from_arg_obj(dict(pretrained=name, device="cuda"), told),
    )
    with pytest.raises(SystemExit) as stopped:
        main()
    (line,) = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2 and line.startswith(
        "softar-eval: error: device='cuda': there is no CUDA device"
    )


@pytest.mark.parametrize(
    "words, message",
    [
        (
            ["--tasks", "gsm9k,chosen"],
            "Tasks not found: gsm9k; `softar-eval ls tasks` lists all there are",
        ),
        (
            [],
            "No tasks specified, or no tasks found. Please verify the task names; `softar-eval ls",
        ),
        (
            ["--tasks", "empty"],
            "No tasks specified, or no tasks found. Please verify the task names; `softar-eval ls",
        ),
    ],
)
def test_an_unknown_task_is_one_line(words, message, tasks, tmp_path, capsys, monkeypatch):
    """As lm-eval's command says it; of its own thousands of task files none is read."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    plain = TaskManager.__init__
    monkeypatch.setattr(
        TaskManager,
        "__init__",
        lambda self, **given: plain(self, **given | {"include_defaults": False}),
    )
    command = [
        "softar-eval",
        "--model",
        "softar",
        "--model_args",
        "pretrained=mnns-tiny",
        "--include_path",
        str(tasks),
    ]
    monkeypatch.setattr(sys, "argv", [*command, *words])
    with pytest.raises(SystemExit) as stopped:
        main()
    said = [
        line for line in capsys.readouterr().err.splitlines() if line.startswith("softar-eval: ")
    ]
    assert (
        stopped.value.code == 2
        and len(said) == 1
        and said[0].startswith(f"softar-eval: error: {message}")
    )


def test_other_errors_keep_their_traceback(monkeypatch):
    def broken():
        raise ValueError("a bug")

    monkeypatch.setattr("lm_eval.__main__.cli_evaluate", broken)
    with pytest.raises(ValueError, match="a bug"):
        main()


@pytest.mark.rest
def test_command(tasks, tmp_path):
    """As its users call it, with one of each model; the names come from the import."""
    command = [
        sys.executable,
        "-c",
        "from softar.evals.lm_eval import main; main()",
        "--include_path",
        str(tasks),
        "--tasks",
        "chosen,generated",
        "--limit",
        "3",
        "--output_path",
        str(tmp_path),
        "--batch_size",
        "2",
        "--model",
        "softar",
        "--model_args",
        "pretrained=mnns-tiny,mixer=gumbel",
        "--seed",
        "5",
    ]
    rows = [dict(question=p, gold="S0", options=["S0", "S1 S2", "S3"], label=0) for p in MNNS]
    text = (tasks / "rows.jsonl").read_text()
    try:  # words that the embedded models know
        (tasks / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    finally:
        (tasks / "rows.jsonl").write_text(text)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "exact_match" in done.stdout and "|chosen" in done.stdout
    (file,) = tmp_path.glob("**/results_*.json")
    results = json.loads(file.read_text())
    assert (
        set(results["results"]) == {"chosen", "generated"}
        and results["config"]["model"] == "softar"
    )
    assert results["n-samples"]["chosen"]["effective"] == 3
    assert get_model("softar") is SoftarLM and get_model("softar-diffusion") is SoftarDiffusionLM


def evaluated(lm, manager, place=None, tasks=("generated", "chosen")):
    """The results as `softar-eval` writes them."""
    results = simple_evaluate(
        lm, tasks=[*tasks], task_manager=manager, bootstrap_iters=0, limit=3, log_samples=False
    )
    text = json.dumps(results, default=str)
    if place is not None:
        place.write_text(text)
    return json.loads(text)


def test_results_say_what_they_cost_and_how_they_were_decoded(folder, manager, tmp_path, caplog):
    """Costs as `compare` counts them, the whole configuration, the true device; and that answers of
    multiple choice know nothing of it. `sweep --plot` reads them."""
    kinds = {"soft": {"top_k": 4}, "softer": {"top_k": 8}, "hard": {"mixer": "hard"}}
    for name, options in kinds.items():
        opened = {"dtype": "float32"}  # which is a setting, too, as opposed to device and batch
        lm = SoftarLM(folder, device="cpu", batch_size=2, seed=3, **options, **opened)
        results = evaluated(lm, manager, tmp_path / f"results_{name}.json")
        own = results["config"]["softar"]
        assert (
            own["device"] == "cpu"
            and own["model"] == folder
            and own["settings"] == opened | options
        )
        assert (
            own["decoding"]["max_new_tokens"] == 256 and own["decoding"].items() >= options.items()
        )
        cost = own["costs"]["generated"]
        assert [*own["costs"]] == ["generated"] and cost["n"] == 3 and 1 <= cost["nfe"] <= 8
        assert cost["tokens_per_s"] > 0 and cost["token_forwards"] >= cost["nfe"]
        assert "discrete model" in own["likelihoods"]
        assert sum("log-likelihoods" in r.message for r in caplog.records) == 1
        caplog.clear()
        # the same by a decoder of compare
        spec = make_decoder(
            f"{folder}={own['decoder']}:top_k={options.get('top_k', 10)}",
            max_new_tokens=8,
            stop=("w49",),
        )
        answers = spec.decode(PROMPTS[:3])
        assert cost["nfe"] == pytest.approx(sum(a.num_forwards for a in answers) / 3)
    rows = {row["run"]: row for row in read_sweep(tmp_path)}
    assert sorted((r["role"], r["varied"]) for r in rows.values()) == [
        ("baseline", ""),
        ("soft", "top_k=4"),
        ("soft", "top_k=8"),
    ]
    points = aggregate([*rows.values()])
    assert all(point["accuracy"] == 0 and point["nfe"] >= 1 for point in points)
    assert plot_sweep(tmp_path, tmp_path / "plot.png").is_file()


def result_of(change):
    """A results file of softar-eval, with these values at these places."""
    cost = dict(n=10, nfe=5.0, tpf=1.0, token_forwards=9.0, tokens_per_s=1.0, seconds_per_row=0.1)
    own = dict(model="m", decoder="gumbel", is_soft=True, settings={}, seed=None)
    told = dict(torch_seed=1234, fewshot_seed=1234, limit=None, gen_kwargs=None)
    data = {
        "config": told | {"softar": own | {"costs": {"t": cost}}},
        "n-shot": {"t": 5},
        "chat_template_sha": None,
        "system_instruction": None,
        "fewshot_as_multiturn": False,
        "results": {"t": {"alias": "t", "exact_match,strict": 0.5}},
    }
    for place, value in change.items():
        *way, name = place.split("/")
        inner = data
        for each in way:
            inner = inner[each]
        inner[name] = value
    return data


@pytest.mark.parametrize(
    "change, varied, seeds",
    [
        ({}, [""], 1),  # the same run once more
        ({"config/softar/seed": 3}, [""], 2),
        ({"config/torch_seed": 3, "config/fewshot_seed": 3}, [""], 2),
        ({"config/fewshot_seed": 3}, [""], 2),
        ({"config/softar/settings": {"top_k": 4}}, ["top_k=null", "top_k=4"], 1),
        ({"n-shot": {"t": 0}}, ["num_fewshot=5", "num_fewshot=0"], 1),
        ({"config/limit": 8}, ["limit=null", "limit=8"], 1),
        (
            {"config/gen_kwargs": {"temperature": 0.5}},
            ["gen_kwargs=null", 'gen_kwargs={"temperature": 0.5}'],
            1,
        ),
        (
            {"chat_template_sha": "ab12cd34ef"},
            ["apply_chat_template=null", "apply_chat_template=ab12cd34"],
            1,
        ),
        ({"system_instruction": "Hi"}, ["system_instruction=null", "system_instruction=Hi"], 1),
    ],
)
def test_runs_that_lm_eval_was_told_otherwise_are_others(tmp_path, change, varied, seeds):
    for name, given in (("a", {}), ("b", change)):
        (tmp_path / f"results_{name}.json").write_text(json.dumps(result_of(given)))
    points = aggregate(read_sweep(tmp_path))
    assert [point["varied"] for point in points] == varied
    assert [point["n_seeds"] for point in points] == [seeds] * len(varied)


def test_a_tasks_own_number_of_examples_is_no_setting(tmp_path):
    one, other = result_of({}), result_of({"n-shot": {"u": 0}})
    text = json.dumps(other).replace('"t"', '"u"')
    (tmp_path / "results_a.json").write_text(json.dumps(one))
    (tmp_path / "results_b.json").write_text(text)
    points = aggregate(read_sweep(tmp_path))
    assert [(p["task"], p["varied"]) for p in points] == [("t", ""), ("u", "")]


def test_what_a_harness_task_reads_is_what_its_filter_finds(tasks):
    """So that votes are on it: gsm8k's thoughts never agree to the word."""
    found = """filter_list:
- {name: number, filter: [{function: regex, regex_pattern: "is (\\\\d+)"}, {function: take_first}]}
- {name: letter, filter: [{function: multi_choice_regex}, {function: take_first}]}
"""
    text = (tasks / "generated.yaml").read_text().replace("task: generated", "task: filtered")
    (tasks / "filtered.yaml").write_text(text + found)
    read = load_task(f"lm_eval:filtered:include={tasks},filter=number").extract
    texts = ("I think 4, it is 3.", "it is 3w49 is 5", "none")
    assert [read(text) for text in texts] == ["3", "3", ""]
    read = load_task(f"lm_eval:filtered:include={tasks},filter=letter").extract
    assert read(" (A) w49 no") == "(A)"  # of this one the row's choices are asked for


IGNORED = [r"regexes_to_ignore: [',', '\$', '(?s).*#### ', '\.$']", "ignore_case: true"]
IGNORED += ["ignore_punctuation: true", "ignore_numbers: true"]
ANSWERS = ["$1,000.", "1000", "1,000", "w3", "W3", "so w3 #### w3", "(W3)", "w4", "so, w", "20"]


@pytest.mark.parametrize("ignored", [[], IGNORED[:1], IGNORED[1:2], IGNORED[2:3], IGNORED])
def test_votes_are_one_where_the_metric_sees_one_answer(tasks, tmp_path, ignored):
    """$1,000. and 1000 were two, and lost against 20, though gsm8k's metric takes both as right."""
    rows = [json.dumps(dict(question="q", gold=answer)) + "\n" for answer in ANSWERS]
    (tmp_path / "rows.jsonl").write_text("".join(rows))
    text = (tasks / "generated.yaml").read_text().replace(str(tasks), str(tmp_path))
    text = text.replace("exact_match", ", ".join(["exact_match", *ignored]))
    (tmp_path / "generated.yaml").write_text(text)
    task = load_task(f"lm_eval:generated:include={tmp_path}")
    for row, gold in zip(task.test, ANSWERS, strict=True):
        same = [task.extract(answer) == task.extract(gold) for answer in ANSWERS]
        assert same == [task.score(answer, row) == 1 for answer in ANSWERS]
    assert (len({*map(task.extract, ANSWERS)}) < len(ANSWERS)) == bool(ignored)


def test_a_harness_task_is_a_task(tasks, folder, manager):
    """By its name in compare and sweep, with the prompts, filters, metric and lengths of lm-eval:
    the accuracy is that of `softar-eval`."""
    task = load_task(f"lm_eval:generated:include={tasks}")
    assert (task.max_new_tokens, task.stop, task.train) == (8, ("w49",), None)
    assert task.test["prompt"] == PROMPTS
    assert [task.score(text, task.test[3]) for text in ("w3", "w3w49 w1", "w4")] == [1, 1, 0]
    assert [task.extract(text) for text in (" w3 ", "w3w49 w1")] == ["w3", "w3"]
    for name, says in (
        ("generatd", "is unknown to lm-eval, did you mean 'generated'"),
        ("chosen", "is scored by likelihoods .multiple_choice., and decoders generate"),
    ):
        with pytest.raises(ValueError, match=says):
            load_task(f"lm_eval:{name}:include={tasks}")
    with pytest.raises(ValueError, match="takes no 'fewshot', did you mean 'num_fewshot'"):
        load_task(f"lm_eval:generated:include={tasks},fewshot=2")
    with pytest.raises(ValueError, match=r"filter='x' is unknown.*it has \['none'\]"):
        load_task(f"lm_eval:generated:include={tasks},filter=x")
    assert not is_known("no_such_task") and is_known("gsm8k") and is_known("mbpp:num_fewshot=3")


@pytest.mark.parametrize(
    "argv, adds",
    [
        (["softar-eval", "--model", "softar"], True),
        (["softar-eval", "--model=softar"], True),
        (["softar-eval", "--model", "softar", "--device", "cuda"], False),
        (["softar-eval", "ls", "tasks"], False),
    ],
)
def test_the_device_is_the_true_one(argv, adds, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert with_device(argv) == argv + ["--device", "cpu"] * adds


# Diffusion


def test_diffusion_results_say_what_they_cost(manager, tasks):
    lm = SoftarDiffusionLM("mnns-diffusion-tiny", device="cpu", batch_size=2, threshold=0.5)
    prompts = asked(MNNS, max_gen_toks=5)
    lm.generate_until(prompts, disable_tqdm=True)
    own = lm.get_model_info()["softar"]
    assert own["settings"] == {"threshold": 0.5} and own["decoding"]["threshold"] == 0.5
    assert (own["decoder"], own["is_soft"], own["kind"]) == ("soft-mask", True, "diffusion")
    (cost,) = own["costs"].values()
    assert cost["n"] == 3 and 1 <= cost["nfe"] <= 5 and "likelihoods" not in own


def test_diffusion_generates_as_denoise_does():
    lm = SoftarDiffusionLM("mnns-diffusion-tiny", soften="soft-token", block_length=4, batch_size=2)
    model, tokenizer = diffusion.load("mnns-diffusion-tiny")
    inputs = tokenizer(MNNS, return_tensors="pt", padding=True)
    config = diffusion.DenoiseConfig(gen_length=8, block_length=4, soften="soft-token")
    tokens = diffusion.denoise(model, **inputs, config=config).completions
    ends = [(row == tokenizer.eos_token_id).int().argmax() for row in tokens]
    texts = [tokenizer.decode(row[:end]) for row, end in zip(tokens, ends)]
    assert all(ends) and all(len(text.split()) == 4 for text in texts)
    assert lm.generate_until(asked(MNNS), disable_tqdm=True) == texts
    # 5 tokens are two blocks of 4, cut again; a gen_length of the model's goes before the task's
    five = lm.generate_until(asked(MNNS, max_gen_toks=3), disable_tqdm=True)
    assert [len(text.split()) for text in five] == [3, 3, 3]
    longer = SoftarDiffusionLM(
        "mnns-diffusion-tiny", gen_length=8, block_length=4, soften="soft-token"
    )
    assert longer.generate_until(asked(MNNS, max_gen_toks=2), disable_tqdm=True) == texts
    stop = texts[0].split()[2]
    assert lm.generate_until(asked(MNNS[:1], until=[stop]), disable_tqdm=True) == [
        texts[0].split(stop)[0]
    ]
    # So does each end that the model knows of, though no task names it: a turn's, say
    lm.model.generation_config.eos_token_id = [
        tokenizer.eos_token_id,
        tokenizer.convert_tokens_to_ids(stop),
    ]
    cut = texts[0].split(stop)[0].strip()
    assert [t.strip() for t in lm.generate_until(asked(MNNS[:1]), disable_tqdm=True)] == [cut]


@pytest.mark.parametrize(
    "model, how, left",  # a task asks for 6
    [
        ("mnns-diffusion-tiny", dict(), 58),
        ("mnns-diffusion-tiny", dict(block_length=4), 56),
        ("mnns-diffusion-tiny", dict(gen_length=12), 52),
        ("mnns-diffusion-tiny", dict(gen_length=2), 62),
        ("mnns-diffusion-tiny", dict(max_length=20, block_length=4), 12),
        ("latin-block-tiny", dict(), 54),  # in blocks of 5, of 64 positions
        ("latin-block-tiny", dict(grid="end"), 54),
    ],
)
def test_diffusion_cuts_long_contexts_to_what_the_answer_leaves(model, how, left):
    lm = SoftarDiffusionLM(model, **how)
    tokenizer, seen = lm.tokenizer, []
    word = " D4" if model.startswith("mnns") else " 4"
    generate = lm._model_generate
    lm._model_generate = lambda **asked: seen.append(asked["context"]) or generate(**asked)
    texts = [f"<bos>{word * 80}", f"<bos>{word * 70}"]
    answers = lm.generate_until(asked(texts, max_gen_toks=6), disable_tqdm=True)
    assert len(answers) == 2 and [part.shape[1] for part in seen] == [left] * 2
    assert all(part.tolist() == tokenizer(word * left)["input_ids"] for (part,) in seen)


def test_diffusion_ends_answers_where_end_ids_say():
    lm = SoftarDiffusionLM("mnns-diffusion-tiny")
    (text,) = lm.generate_until(asked(MNNS[:1]), disable_tqdm=True)
    stop = text.split()[2]
    end = lm.tokenizer.convert_tokens_to_ids(stop)
    ended = SoftarDiffusionLM("mnns-diffusion-tiny", end_ids=[end])
    (cut,) = ended.generate_until(asked(MNNS[:1]), disable_tqdm=True)
    assert cut.strip() == text.split(stop)[0].strip()


def test_diffusion_draws_depend_on_seed_and_request_alone():
    def texts(batch_size=3, **options):
        lm = SoftarDiffusionLM(
            "mnns-diffusion-tiny", temperature=2.0, batch_size=batch_size, **options
        )
        return lm.generate_until(asked(MNNS, do_sample=True), disable_tqdm=True)

    assert texts(seed=1) == texts(seed=1, batch_size=1)
    assert texts(seed=1) != texts(seed=2)
    with pytest.raises(BadArgument, match="denoised greedily"):
        SoftarDiffusionLM("mnns-diffusion-tiny").generate_until(
            asked(MNNS, do_sample=True), disable_tqdm=True
        )
    with pytest.raises(BadArgument, match="repetition_penalty"):
        SoftarDiffusionLM("mnns-diffusion-tiny").generate_until(
            asked(MNNS, repetition_penalty=2), disable_tqdm=True
        )
    with pytest.raises(BadArgument, match="leaves no room for a context in the model's 64 positi"):
        lm = SoftarDiffusionLM("mnns-diffusion-tiny", gen_length=64)
        lm.generate_until(asked(MNNS, max_gen_toks=4), disable_tqdm=True)


def test_diffusion_takes_public_samplers_whose_rows_share_their_draws():
    for how in (dict(parity="llada", select="random"), dict(parity="dllm", temperature=1.0)):
        texts = [
            SoftarDiffusionLM("mnns-diffusion-tiny", batch_size=3, seed=seed, **how).generate_until(
                asked(MNNS, until=["w"]), disable_tqdm=True
            )
            for seed in (1, 1, 2)
        ]
        assert texts[0] == texts[1] and all(texts[0])


def test_diffusion_likelihood_is_the_bound():
    lm = SoftarDiffusionLM("mnns-diffusion-tiny", samples=3, seed=0)
    model, tokenizer = lm.model, lm.tokenizer
    prompt = tokenizer(MNNS[0])["input_ids"]
    # Of one token the estimate is exact: the model's probability at a mask behind the prompt
    ((bound, _),) = lm.loglikelihood(likely([(MNNS[0], " S3")]), disable_tqdm=True)
    ids = torch.tensor([[*prompt, tokenizer.mask_token_id]])
    token = tokenizer.convert_tokens_to_ids("S3")
    assert bound == pytest.approx(model(ids).logits[0, -1].log_softmax(-1)[token].item(), abs=1e-4)
    # Of more: the Monte-Carlo estimate, the closer the more samples
    pair = (MNNS[0], " S5 S2 S4")
    answer = torch.tensor([False] * len(prompt) + [True] * 3)
    whole = torch.tensor(tokenizer(pair[0] + pair[1])["input_ids"])
    truth = log_likelihood(
        model, whole, answer, samples=3000, batch_size=300, rng=torch.Generator().manual_seed(1)
    )
    many = SoftarDiffusionLM("mnns-diffusion-tiny", samples=3000, samples_batch=300, seed=0)
    few = [lm.loglikelihood(likely([pair]), disable_tqdm=True)[0][0] for _ in range(8)]
    close = many.loglikelihood(likely([pair]), disable_tqdm=True)[0][0]
    assert len(set(few)) > 1 and max(abs(x - truth) for x in few) > 2 * abs(close - truth)
    assert close == pytest.approx(truth, abs=0.1)


def test_diffusion_says_whether_a_continuation_is_greedy():
    model, tokenizer = diffusion.load("mnns-diffusion-tiny")
    inputs = tokenizer(MNNS[:1], return_tensors="pt")
    out = diffusion.denoise(
        model, **inputs, config=diffusion.DenoiseConfig(gen_length=3, soften="hard")
    )
    greedy = " " + tokenizer.decode(out.completions[0])
    pairs = [(MNNS[0], greedy), (MNNS[0], " S1 S1 S1")]
    lm = SoftarDiffusionLM("mnns-diffusion-tiny", samples=2)
    assert [is_greedy for _, is_greedy in lm.loglikelihood(likely(pairs), disable_tqdm=True)] == [
        True,
        False,
    ]
    lm = SoftarDiffusionLM("mnns-diffusion-tiny", samples=2, check_greedy=False)
    assert [is_greedy for _, is_greedy in lm.loglikelihood(likely(pairs), disable_tqdm=True)] == [
        False,
        False,
    ]


def test_diffusion_chooses(tmp_path):
    """A trained model finds the right answer of MNNS among four twice as often as by chance,
    through a task file."""
    test = [
        row for row in softar.load_task("mnns").test if row["answer"] in ("S0", "S1", "S2", "S3")
    ][:32]
    rows = [
        dict(
            question=row["prompt"] + row["completion"].rsplit(" ", 1)[0],
            options=["S0 <eos>", "S1 <eos>", "S2 <eos>", "S3 <eos>"],
            label=int(row["answer"][1:]),
        )
        for row in test
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "mnns.yaml").write_text(f"""task: mnns_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {tmp_path / "rows.jsonl"}}}, cache_dir: {tmp_path / "cache"}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{options}}}}"
doc_to_target: label
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
""")
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    found = simple_evaluate(
        "softar-diffusion",
        model_args="model=mnns-diffusion-tiny,samples=16,check_greedy=False",
        tasks=["mnns_choice"],
        task_manager=manager,
        bootstrap_iters=0,
    )
    assert found["results"]["mnns_choice"]["acc,none"] >= 0.5
