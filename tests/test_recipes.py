"""The recipe as its users run it: subprocesses of the real command line, a few steps each."""

import contextlib
import json
import os
import re
import signal
import time
from importlib import import_module

import pytest
import torch
import warm
from launched import ACCELERATE, ENV, PYTHON, argv, losses_of, recipe, results_of, run, run_here

import softar
import softar.recipe
import softar.sft.trainer
from softar.config import SoftConfig
from softar.evaluate import encode
from softar.tasks import load_task
from softar.thought import Kind

RECIPE = recipe("sft_soft")
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


def options(output_dir, **changes):
    return argv({**QUICK, **changes, "output_dir": output_dir})


@pytest.mark.parametrize(
    "learns",
    [
        dict(learn_min_p="true", soft_min_p=0.05, gate_gradient="soft", filter_learning_rate=0.1),
        dict(learn_top_k="true", soft_top_k=5, gate_scale_start=0.5, gate_scale_end=0.1),
        dict(learn_temperature="true", temperature_learning_rate=0.1),
        dict(learn_step_temperature="true", temperature_learning_rate=0.1),
    ],
    ids=lambda learns: next(iter(learns)),
)
def test_rows_without_mixtures_learn_no_filter(tmp_path, learns):
    """Whatever the others learn."""
    made, names = import_module("softar.recipes.sft_soft").RECIPE, "trace-soft,guided-soft"
    inputs = softar.recipe.read(made, options(tmp_path, rows="all", **learns))
    (name,) = [key for key in learns if key.startswith("learn_")]
    each = {row: softar.recipe.row_config(made, inputs, row, 42, tmp_path) for row in inputs.names}
    assert {row for row, args in each.items() if getattr(args, name)} == {*names.split(",")}


@pytest.mark.parametrize("run_name", [None, "mine"])
def test_a_row_has_a_name_for_loggers(tmp_path, run_name):
    """Where there are several in a folder; a single run keeps its own."""
    made = import_module("softar.recipes.sft_soft").RECIPE
    inputs = softar.recipe.read(made, options(tmp_path, rows="no-cot", run_name=run_name))
    name = softar.recipe.row_config(made, inputs, "no-cot", 7, tmp_path / "x").run_name
    assert name == ("no-cot-seed7" if run_name is None else "mine-no-cot-seed7")
    assert softar.recipe.row_config(made, inputs, "no-cot", 7, tmp_path).run_name == run_name


@pytest.mark.parametrize(
    "given",
    [
        dict(latents_per_step=2),
        dict(latent_stages=2, latents_per_step=2, latent_stage_steps=1, max_steps=8),
        dict(latent_step_end="w", latents_per_step=3, latent_uniform_prob=0.5),
        dict(soft_min_p=0.1, soft_top_p=0.9, soft_temperature=0.5, entropy_coef=0.1),
        dict(soft_top_k=0),
    ],
)
def test_options_of_coconut_reach_its_row_alone(tmp_path, given):
    made = import_module("softar.recipes.sft_soft").RECIPE
    names = [name for name in made.rows if not name.startswith("oracle")]
    if "soft_min_p" in given:  # without a mixture they do nothing
        names = ["trace-soft", "coconut"]
    inputs = softar.recipe.read(
        made, options(tmp_path, **dict(rows=",".join(names), max_steps=8) | given)
    )
    rows = {name: softar.recipe.row_config(made, inputs, name, 7, tmp_path) for name in names}
    options_of_latents = {k: v for k, v in given.items() if k.startswith("latent")}
    coconut = vars(rows.pop("coconut"))
    assert coconut["latent_stages"] == given.get("latent_stages", inputs.task.think_steps)
    assert coconut | options_of_latents == coconut and coconut["soft_top_k"] == 10
    for row in rows.values():
        assert (row.latent_stages, row.latents_per_step, row.latent_step_end) == (None, None, None)
        assert (row.latent_stage_steps, row.latent_uniform_prob) == (None, 0.0)
        rest = {k: v for k, v in given.items() if not k.startswith(("latent", "max_"))}
        assert vars(row) | rest == vars(row)


# -- the demo


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "runs"
    # one row after the other; rows in processes of their own have tests below
    return folder, run(*PYTHON, *ACCELERATE, RECIPE, *options(folder, jobs=1)).stdout


@pytest.mark.rest
def test_accelerate_launches_it_with_imports_of_its_own(tmp_path):
    changes = dict(rows="no-cot", max_steps=1, eval_rows=4)
    assert "no-cot" in run(*ACCELERATE, RECIPE, *options(tmp_path, **changes)).stdout
    assert len(results_of(tmp_path)["rows"]) == 2


@pytest.mark.rest
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


@pytest.mark.rest
def test_the_demo_writes_results_and_a_plot(demo):
    folder, _ = demo
    results = results_of(folder)
    assert set(results) == {"schema", "command", "commit", "device", "versions", "rows"}
    assert results["schema"] == 1
    assert "sft_soft.py" in results["command"] and "--max_steps 4" in results["command"]
    assert results["commit"] is None or re.fullmatch(r"[0-9a-f]{40}\+?", results["commit"])
    assert results["versions"]["torch"] == torch.__version__ and {
        "trl",
        "transformers",
        "python",
    } <= set(results["versions"])
    decoders = ["no-cot", "discrete", "trace-soft"]
    assert [(r["decoder"], r["readout"]) for r in results["rows"]] == [
        (d, r) for d in decoders for r in ("soft", "discrete")
    ]
    n = len(load_task("mnns").test)
    for row in results["rows"]:
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


@pytest.mark.rest
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


@pytest.mark.rest
def test_all_rows(tmp_path):
    out = run(
        *PYTHON, RECIPE, *options(tmp_path, rows="all", max_steps=4, jobs=1, eval_rows=50)
    ).stdout
    names = [
        "no-cot",
        "discrete",
        "discrete-traces",
        "scheduled-sampling",
        "guided-soft",
        "trace-soft",
        "coconut",
        "oracle-soft",
    ]
    assert [r["decoder"] for r in results_of(tmp_path)["rows"] if r["readout"] == "soft"] == names
    assert all(name in out for name in names)
    mixers = {name: SoftConfig.load(tmp_path / f"{name}-seed42").mixer for name in names}
    expected = dict.fromkeys(names[:4], "hard") | dict.fromkeys(names[4:], "soft")
    assert mixers == expected | {"coconut": "hidden"}
    losses = {name: tuple(losses_of(tmp_path / f"{name}-seed42", 4)) for name in names}
    assert len(set(losses.values())) == 8
    # With the gold tokens, at alpha = 1, three of them begin alike.
    assert len({losses[name][0] for name in ("discrete", "scheduled-sampling", "guided-soft")}) == 1


def test_several_seeds(tmp_path, monkeypatch, capsys):
    args = options(
        tmp_path, task="mnns", rows="no-cot", jobs=1, num_seeds=2, eval_new_tokens=3, max_steps=2
    )
    run_here(monkeypatch, RECIPE, *args)
    assert " ± " in capsys.readouterr().out
    assert [(r["seed"], r["readout"]) for r in results_of(tmp_path)["rows"]] == [
        (seed, readout) for seed in (42, 43) for readout in ("soft", "discrete")
    ]
    assert losses_of(tmp_path / "no-cot-seed42", 2) != losses_of(tmp_path / "no-cot-seed43", 2)


# -- resume


@pytest.mark.rest
@pytest.mark.parametrize("jobs", [1, 2])
def test_an_interrupted_run_goes_on_as_if_nothing_had_happened(tmp_path, unbroken, jobs):
    folder = tmp_path / "runs"
    first = folder / "trace-soft-seed42" / "checkpoint-20" / "trainer_state.json"
    deadline = time.monotonic() + 120
    with warm.Program(RECIPE, options(folder, **LONGER, jobs=jobs), ENV) as process:
        while not first.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        stderr = process.communicate(timeout=60)[1]
        with pytest.raises(ProcessLookupError):  # rows in processes of their own have ended too
            os.killpg(process.pid, 0)
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

    run(*PYTHON, RECIPE, *options(folder, **LONGER, jobs=1, resume_from_checkpoint="true"))
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
    folders = (
        [tmp_path] if rows is None else [tmp_path / f"{name}-seed42" for name in rows.split(",")]
    )
    plain, resumed = softar.sft.trainer.SoftSFTTrainer.train, []

    def fake(*names):
        for checkpoint in (folder / name for folder in folders for name in names):
            checkpoint.mkdir(parents=True)
            (checkpoint / "trainer_state.json").write_text("{}")
            (checkpoint.parent / "row.json").write_text('[{"train_steps": 2}]')

    def interrupted(trainer, resume_from_checkpoint):
        resumed.append(resume_from_checkpoint)
        raise KeyboardInterrupt

    def start(train, code=None, **changes):
        changes = dict(task="mnns", rows=rows, jobs=1, max_steps=2, eval_new_tokens=3) | changes
        monkeypatch.setattr("softar.sft.trainer.SoftSFTTrainer.train", train)
        with (
            contextlib.nullcontext() if code is None else pytest.raises(SystemExit, match=str(code))
        ):
            run_here(monkeypatch, RECIPE, *options(tmp_path, **changes))
        return capsys.readouterr().out

    def checkpoints():
        return [
            {str(p.relative_to(folder)) for p in folder.glob("**/checkpoint-*")}
            for folder in folders
        ]

    fake("checkpoint-1", "checkpoint-2")
    out = start(interrupted, 130)
    assert all(f"earlier run are now in {folder / '_earlier'}" in out for folder in folders)
    assert checkpoints() == [{"_earlier/checkpoint-1", "_earlier/checkpoint-2"}] * len(folders)
    start(interrupted, 130, resume_from_checkpoint="true")
    # not from what the earlier run had left, the finished rows neither
    assert resumed == [None, None]
    start(interrupted, 130)
    # nothing took their place
    assert checkpoints() == [{"_earlier/checkpoint-1", "_earlier/checkpoint-2"}] * len(folders)
    assert "earlier" not in start(plain)
    assert checkpoints() == [
        {"checkpoint-2", "_earlier/checkpoint-1", "_earlier/checkpoint-2"}
    ] * len(folders)
    start(plain)
    assert checkpoints() == [{"checkpoint-2", "_earlier/checkpoint-2"}] * len(folders)
    before = [
        (folder / "checkpoint-2" / "trainer_state.json").stat().st_mtime_ns for folder in folders
    ]
    assert "earlier" not in start(plain, resume_from_checkpoint="true")
    assert [
        (p / "checkpoint-2" / "trainer_state.json").stat().st_mtime_ns for p in folders
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
    run(*PYTHON, RECIPE, *options(folder, **LONGER, jobs=1))
    return folder


# -- two processes


@pytest.mark.rest
@pytest.mark.skipif(torch.cuda.is_available(), reason="on GPUs two processes need two")
def test_two_processes_train_as_one_with_the_same_global_batch(tmp_path):
    changes = dict(
        rows="trace-soft,guided-soft",
        eval_strategy="steps",
        eval_steps=4,
        learn_temperature="true",
        per_device_eval_batch_size=512,
    )
    two = options(tmp_path / "two", **changes, per_device_train_batch_size=8)
    out = run(*PYTHON, RECIPE, *two, processes=2).stdout
    assert out.count("results: ") == 1  # the main process alone reports
    run(*PYTHON, RECIPE, *options(tmp_path / "one", **changes, per_device_train_batch_size=16))
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
    for key in ("eval_loss", "eval_gold_loss"):
        one, two = ([e[key] for e in history if key in e] for history in histories)
        assert one == pytest.approx(two, rel=1e-4) and len(one) == 1
