"""recipes/grpo_diffusion.py as its users run it: the real command line, a few steps each."""

import json
import re
import runpy
import shutil

import pytest
from launched import ACCELERATE, PYTHON, ROOT, argv, assert_fails, recipe, results_of, run, run_here
from safetensors.torch import load_file
from trl import get_peft_config

from softar.diffusion import evaluate, load
from softar.diffusion.net import facts
from softar.recipe import read
from softar.tasks import load_task

CONFIGS = ROOT / "recipes" / "configs"
RECIPE = recipe("grpo_diffusion")
QUICK = dict(
    max_steps=2,
    task_size=64,
    eval_rows=12,
    per_device_train_batch_size=8,
    num_generations=4,
    logging_steps=1,
    save_steps=1,
    disable_tqdm="true",
)
ONE = dict(task="latin", model_name_or_path="latin-diffusion-tiny", steps=4, eval_forwards="4")


def options(folder, **changes):
    return argv({**QUICK, **changes, "output_dir": folder})


@pytest.mark.rest
def test_the_demo_ends_with_table_results_and_plots(tmp_path):
    command = [*PYTHON, *ACCELERATE]
    out = run(*command, RECIPE, *options(tmp_path, jobs=2)).stdout
    head, *lines = [
        [cell.strip() for cell in re.split("[│┃]", line)[1:-1]]
        for line in out.splitlines()
        if line[:1] in "│┃"
    ]
    assert head == ["training", "decoder", "stage", "4", "8", "12", "20"]
    assert [tuple(line[:3]) for line in lines] == [
        (training, decoder, stage)
        for training in ("soft-mask", "hard")
        for decoder in ("hard", "soft-mask")
        for stage in ("before", "after")
    ]
    results = results_of(tmp_path)
    assert results["schema"] == 1 and "--max_steps 2" in results["command"]
    by_line = {}
    for row in results["rows"]:
        by_line.setdefault((row["training"], row["decoder"], row["stage"]), []).append(row)
        assert (row["nfe"], row["n"], row["train_steps"]) == (row["budget"], 12, 2)
        assert (row["task"], row["algorithm"], row["seed"]) == ("latin", "GRPO", 42)
    for line in lines:
        told = [row["accuracy"] for row in by_line[tuple(line[:3])]]
        assert [*map(float, line[3:])] == pytest.approx(told, abs=6e-4)
    assert [len(row["rewards"]) for row in results["rows"] if "rewards" in row] == [2, 2]
    for name in ("accuracy.png", "rewards.png"):
        assert (tmp_path / name).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    model, _ = load(tmp_path / "soft-mask-seed42")
    assert facts(model).soft_mask == facts(load("latin-diffusion-tiny")[0]).soft_mask
    assert f"softar fill '<bos> _ _ {''}" in out and "soften=hard" in out


def test_an_interrupted_run_goes_on_as_the_same_policy(tmp_path, monkeypatch, capsys):
    changes = ONE | dict(save_total_limit=None, eval_rows=4, max_steps=4, save_steps=2)
    whole, half = tmp_path / "whole", tmp_path / "half"
    run_here(monkeypatch, RECIPE, *options(whole, **changes))
    shutil.copytree(whole, half)  # as if it had been killed after the first checkpoint
    for gone in ("checkpoint-4", "model.safetensors", "row.json", "results.json"):
        (shutil.rmtree if gone[0] == "c" else lambda path: path.unlink())(half / gone)
    changes["resume_from_checkpoint"] = "true"
    other = options(half, **changes | dict(steps=5, max_steps=6))
    says = r"another policy: now steps=5, not 4\. Give the same"
    with monkeypatch.context() as patches:
        assert_fails(patches, capsys, RECIPE, other, says)
    run_here(monkeypatch, RECIPE, *options(half, **changes))
    expected = load_file(whole / "model.safetensors")
    for name, weight in load_file(half / "model.safetensors").items():
        assert weight.equal(expected[name]), name
    rows = [
        [(row["stage"], row["accuracy"], row.get("rewards")) for row in results_of(run)["rows"]]
        for run in (whole, half)
    ]
    assert rows[0] == rows[1] and len(rows[0]) == 4


def test_evaluations_are_greedy_in_tokens_and_slots(tmp_path, monkeypatch):
    """Whatever the policy draws; the table says so."""
    decoded, real = [], evaluate.evaluate
    monkeypatch.setattr(evaluate, "evaluate", lambda *a, **k: decoded.append(a[4]) or real(*a, **k))
    run_here(
        monkeypatch,
        RECIPE,
        *options(tmp_path, **ONE | dict(eval_rows=4, max_steps=1, alg_temp=0.3)),
    )
    assert [(how.temperature, how.alg_temp) for how in decoded] == [(0, 0)] * 4
    policy = json.loads((tmp_path / "denoise_config.json").read_text())
    assert policy["alg_temp"] == 0.3


def test_any_model_dataset_and_reward(tmp_path, monkeypatch, capsys):
    """Text prompts behind which masks stand, a reward by its dotted path, LoRA, a threshold."""
    (tmp_path / "data").mkdir()
    for split, n in (("train", 24), ("test", 6)):
        lines = [{"prompt": f"<bos> D{1 + i % 9} D2 ->", "wanted": f"S{i % 5}"} for i in range(n)]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (tmp_path / "data" / f"{split}.jsonl").write_text(text)
    (tmp_path / "rewards_of_fills.py").write_text(
        "def names_it(completions, wanted, **columns):\n"
        "    return [float(w in c) for c, w in zip(completions, wanted)]\n"
    )
    monkeypatch.chdir(tmp_path)
    args = options(
        "out",
        task_size=None,
        model_name_or_path="mnns-diffusion-tiny",
        dataset_name="data",
        reward_funcs="rewards_of_fills.names_it",
        gen_length=5,
        schedule="factor",
        factor=0.8,
        soften="soft-token",
        soften_args='{"k": 2}',
        use_peft="true",
        lora_target_modules="all-linear",
    )
    run_here(monkeypatch, RECIPE, *args)
    rows = results_of(tmp_path / "out")["rows"]
    assert [(row["decoder"], row["stage"]) for row in rows] == [
        (decoder, stage) for decoder in ("hard", "soft-token") for stage in ("before", "after")
    ]
    for row in rows:
        assert (row["schedule"], row["budget"], row["n"]) == ("factor", 0.8, 6)
        assert row["training"] == "custom" and 1 <= row["nfe"] <= 5
    assert (tmp_path / "out" / "adapter_config.json").exists()
    policy = json.loads((tmp_path / "out" / "denoise_config.json").read_text())
    assert policy["gen_length"] == 5 and policy["soften_args"] == {"k": 2}
    assert "custom" in capsys.readouterr().out


def test_the_task_says_how_long_answers_are(tmp_path):
    made = runpy.run_path(RECIPE)
    for task, extra, length in (
        ("latin", {}, 0),
        ("mnns", {}, 5),
        ("mnns", dict(gen_length=7), 7),
        ("mnns", dict(max_completion_length=6), 6),
    ):
        name = {"latin": "latin-diffusion-tiny", "mnns": "mnns-diffusion-tiny"}[task]
        changes = dict(task=task, model_name_or_path=name) | extra
        inputs = read(made["RECIPE"], options(tmp_path, **changes))
        said = made["fields"]("custom", inputs.training, inputs.task)
        if extra:
            assert said == {}
        else:
            assert said == {"gen_length": length}
        row = inputs.task.train[0]
        assert row["prompt"] == row.get("template", row["prompt"])
        assert ("<mask>" in row["prompt"]) == (task == "latin")


def test_squares_to_train_on_have_templates_of_their_own():
    """As many givens as the held-out ones, which stay as they are, and so do the squares."""
    task = load_task("latin", size=300)
    shown = [
        [c if t != "<mask>" else None for c, t in zip(row["answer"].split(), cells, strict=True)]
        for row in task.train
        for cells in [row["template"].split()[1:-1]]
    ]
    assert all(len(row) - row.count(None) == 5 for row in shown)
    assert len({tuple(c is None for c in row) for row in shown}) > 250
    for row, cells in zip(task.train, shown, strict=True):
        told = row["template"].split()[1:-1]
        assert all(c in (None, t) for c, t in zip(cells, told, strict=True))
        assert task.score(row["answer"], row) == 1.0
    assert not {*task.train["answer"]} & {*task.test["answer"]}


# of one kind here, of another there
TEMPLATES = {"train": {"prompt": "<bos>", "template": "<bos> <mask>"}, "test": {"prompt": "<bos>"}}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (dict(rows="soft"), "rows='soft': 'soft' is unknown.*soft-mask"),
        (dict(task="latins"), "task='latins' is unknown"),
        (dict(task="reasoning_gym:chain_sum"), "has no model of its own"),
        (dict(task="mnns", model_name_or_path="mnns-tiny"), "it reads from left to right"),
        (ONE | dict(use_peft="true"), "lora_target_modules=None: .* type 'llada', give all-linear"),
        (ONE | dict(eval_forwards="4,x"), "eval_forwards='4,x': give whole numbers"),
        (ONE | dict(eval_forwards="4,8,4"), "eval_forwards='4,8,4' names 4 twice"),
        (ONE | dict(max_completion_length=20), "max_completion_length=20 does nothing with gen_le"),
        (
            dict(task="mnns", model_name_or_path="mnns-diffusion-tiny", gen_length=0),
            "gen_length=0 fills the masks of templates, and prompt 0, .* has none",
        ),
        (
            dict(task=None, dataset_name="bare", model_name_or_path="latin-diffusion-tiny")
            | dict(gen_length=0, reward_funcs="collections.Counter"),
            "prompt 0, '<bos>', has none",
        ),
        (ONE | dict(gen_length=3), "gen_length=3 puts masks behind prompts, and 'latin' has templ"),
        (
            dict(task=None, dataset_name="asked", model_name_or_path="mnns-diffusion-tiny")
            | dict(eval_forwards="4", eval_rows=None, reward_funcs="json.dumps"),
            "eval_forwards='4' does nothing without held-out rows",
        ),
        (ONE | dict(eval_forwards="4,0"), "eval_forwards='4,0': steps=0"),
        (
            ONE | dict(steps=None, threshold=0.5, schedule="threshold"),
            "eval_forwards='4': steps=4 does not go with schedule='threshold'",
        ),
        (ONE | dict(kind="a2d"), "kind=a2d does nothing for 'latin-diffusion-tiny'"),
        (ONE | dict(model_block_length=4), "model_block_length=4 does nothing"),
        (ONE | dict(system_prompt="Fill."), "system_prompt='Fill.' makes chats.*has templates"),
        (ONE | dict(load_in_4bit="true"), "load_in_4bit"),
        (ONE | dict(reward_funcs="acuracy_reward"), "'acuracy_reward'.*accuracy_reward"),
        (ONE | dict(soften_args="k=2"), "'k=2' is no JSON object"),
        (ONE | dict(soften_args="[2]"), r"'\[2\]' is no JSON object"),
        (dict(soften="soft-mask", soften_args='{"kk": 2}'), "row 'soft-mask'.*kk"),
        (
            dict(rows="hard", soften="soft-mask", soften_args='{"zz": 2}'),
            "soften='soft-mask' does nothing with the rows hard",
        ),
        (dict(rows="hard", soften_args='{"zz": 2}'), "soften_args={'zz': 2} does nothing"),
        (ONE | dict(block_length=5, steps=3), "steps=3 cannot be shared by the . blocks"),
        (ONE | dict(block_length=5, steps=8), "steps=4 cannot be shared by the 6 blocks"),
        (
            ONE | dict(model_name_or_path="latin-block-tiny", task="latin-prompt", steps=7),
            "steps=4 cannot be shared by the 5 blocks",
        ),
        (ONE | dict(num_generations=1), "num_generations=1"),
        (ONE | dict(top_k=5), "top_k=5 is not supported"),
        (ONE | dict(select="confidence"), "select='confidence' cannot be replayed"),
        (ONE | dict(schedule="p2"), "schedule='p2' cannot be replayed"),
        (ONE | dict(replay="grouped"), "for block-causal models"),
        (ONE | dict(temperature=0), "temperature=0"),
        (ONE | dict(resume_from_checkpoint="/no/such"), "resume_from_checkpoint='/no/such'"),
        (dict(config="none.yaml"), "config='none.yaml'.*latin_grpo.yaml"),
        (dict(remask="cap"), "option '--remask' is unknown"),
        (
            dict(task=None, dataset_name="data", model_name_or_path="mnns-diffusion-tiny"),
            "give all a column",
        ),
    ],
    ids=lambda value: None if isinstance(value, str) else "-".join(map(str, value.values())),
)
def test_bad_input_ends_with_one_line(tmp_path, changes, says, monkeypatch, capsys):
    if "reasoning_gym" in (changes.get("task") or ""):
        pytest.importorskip("reasoning_gym")
    if "dataset_name" in changes:
        asked = {"train": {"prompt": "<bos> D1 ->"}}
        bare = {"train": {"prompt": "<bos> <mask>"}, "test": {"prompt": "<bos>"}}
        for name, rows in (("data", TEMPLATES), ("asked", asked), ("bare", bare)):
            (tmp_path / name).mkdir()
            for split, row in rows.items():
                (tmp_path / name / f"{split}.jsonl").write_text(json.dumps(row) + "\n")
        monkeypatch.chdir(tmp_path)
        changes = changes | dict(task_size=None)
    assert_fails(monkeypatch, capsys, RECIPE, options(tmp_path / "out", **changes), says)
    assert not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.parametrize("file", ["latin_grpo", "grpo_llada8b", "grpo_modernbert_chat"])
def test_configurations_are_read_and_make_sense(file, tmp_path, monkeypatch):
    if file != "latin_grpo":
        pytest.importorskip("reasoning_gym")
    asked = []  # no hub is reachable here
    monkeypatch.setattr("softar.models.check_there", lambda name, *args, **kw: asked.append(name))
    told = ["--config", f"{file}.yaml", "--output_dir", str(tmp_path / "out")]
    inputs = read(runpy.run_path(RECIPE)["RECIPE"], told)
    training = inputs.training
    assert asked == [x for x in [inputs.model_args.model_name_or_path] if x]
    assert training.generation_batch_size % training.num_generations == 0
    assert str(training.steps) in inputs.script.eval_forwards.split(",")
    text = (CONFIGS / f"{file}.yaml").read_text()
    assert text.startswith("# ") and "output_dir: runs/grpo_" in text
    if file == "latin_grpo":
        assert inputs.names == ["soft-mask", "hard"] and training.steps == 8
    else:
        assert inputs.names == ["custom"] and isinstance(inputs.task.train[0]["prompt"], list)
        lora = get_peft_config(inputs.model_args)
        assert (lora is None) == (file == "grpo_modernbert_chat")
