"""What scores a completion: a task's own scorer, one of TRL's rewards, or a function of the user's, by name."""

import dataclasses
import importlib
import inspect
import os
import sys
from collections.abc import Callable

from softar.tasks import Task

REWARDS = ("accuracy_reward", "reasoning_accuracy_reward", "think_format_reward")  # of trl.rewards
BY_TRAINER = {"prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric"}


def rewards_of(names: list[str] | None, task: Task) -> list[Callable]:
    return [named_reward(name) for name in names] if names else [reward_of(task)]


def reward_of(task: Task) -> Callable:
    """The task's score as a reward function of TRL."""

    def reward(prompts, completions, **columns) -> list[float]:
        kept = [name for name in task.train.column_names if name in columns]
        rows = [{name: columns[name][i] for name in kept} for i in range(len(completions))]
        texts = [c if isinstance(c, str) else c[-1]["content"] for c in completions]
        return [task.score(text, row) for text, row in zip(texts, rows, strict=True)]

    reward.__name__ = task.name  # TRL logs it under this name
    return reward


def named_reward(name: str) -> Callable:
    """One of trl.rewards, or a function by its dotted path, seen from the working directory."""
    if name in REWARDS:
        from trl.import_utils import is_math_verify_available

        if "accuracy" in name and not is_math_verify_available():
            raise ValueError(f"reward_funcs={name!r} needs math-verify: pip install softar[rewards]")
        return getattr(importlib.import_module("trl.rewards"), name)
    module, _, function = name.rpartition(".")
    try:
        if not module:
            raise ImportError("no such name")
        if os.getcwd() not in sys.path:
            sys.path.append(os.getcwd())
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"reward_funcs={name!r}: {error}; give one of {REWARDS} or package.module.function") from error


def score_of(reward: Callable, task: Task) -> Callable[[str, dict], float]:
    """A scorer of single answers: the task's, or this reward (None, for what it cannot judge, counts 0)."""
    if task.score is not None:
        return task.score

    def score(text: str, row: dict) -> float:
        completion = text if isinstance(row["prompt"], str) else [{"role": "assistant", "content": text}]
        columns = {name: [value] for name, value in row.items() if name not in ("prompt", "completion")}
        return float(reward(prompts=[row["prompt"]], completions=[completion], **columns)[0] or 0.0)

    return score


def check_columns(names: list[str] | None, task: Task) -> None:
    """Raise ValueError where the training rows lack what the rewards will ask of them."""
    columns = task.train.column_names
    if "prompt" not in columns:
        raise ValueError(f"RL needs a column 'prompt'; {task.name!r} has {columns}")
    if task.score is None and not names:
        raise ValueError(f"{task.name!r} has no score of its own: give --reward_funcs, e.g. {REWARDS[0]}")
    for name in names or []:
        wanted = inspect.signature(named_reward(name)).parameters.values()
        needs = [p.name for p in wanted if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        if missing := [column for column in needs if column not in {*columns, *BY_TRAINER}]:
            raise ValueError(f"reward_funcs={name!r} needs the columns {missing}; {task.name!r} has {columns}")
        if name in REWARDS and isinstance(task.train[0]["prompt"], str):
            raise ValueError(f"reward_funcs={name!r} reads chats, the prompts are text: give a --system_prompt")


def as_chats(task: Task, system_prompt: str | None) -> Task:
    """With a system prompt, text prompts become conversations."""
    if system_prompt is None:
        return task

    def chat(row):
        prompt = row["prompt"]
        user = [{"role": "user", "content": prompt.strip()}] if isinstance(prompt, str) else prompt
        return {"prompt": [{"role": "system", "content": system_prompt}, *user]}

    parts = {name: rows.map(chat) for name, rows in (("train", task.train), ("test", task.test)) if rows is not None}
    return dataclasses.replace(task, **parts)
