"""What scores a completion: a task's own scorer, one of TRL's rewards, or a function of the user's,
by name."""

import asyncio
import dataclasses
import functools
import importlib
import inspect
import math
from collections.abc import Callable

from torch import Tensor, nn

from softar.checks import check_choice, shorten
from softar.names import HINT, is_code, load_code
from softar.tasks import Task

REWARDS = ("accuracy_reward", "reasoning_accuracy_reward", "think_format_reward")  # of trl.rewards
ROW = "dataset_row"
BY_TRAINER = {
    "prompts",
    "completions",
    "completion_ids",
    "trainer_state",
    "log_extra",
    "log_metric",
    ROW,
}
NOT_TOLD = ("prompt", "completion", "completion_ids")  # columns that TRL keeps from rewards
UNPREFIXED = "prompt_unprefixed"  # what a row's prompt was before a prefix was put there


def rewards_of(names: list[str] | None, task: Task) -> list[Callable]:
    return [named_reward(name) for name in names] if names else [reward_of(task)]


def reward_of(task: Task) -> Callable:
    """The task's score as a reward function of TRL."""

    def reward(completions, dataset_row, **columns) -> list[float]:
        texts = [c if isinstance(c, str) else c[-1]["content"] for c in completions]
        return [task.score(text, row) for text, row in zip(texts, dataset_row, strict=True)]

    reward.__name__ = task.name  # TRL logs it under this name
    return reward


def with_rows(inputs: list[dict]) -> list[dict]:
    """The rows of a batch, each with itself under the name ROW, prompt and completion too, as the data
    set has it: a scorer may read what TRL hands on to no reward."""
    given = []
    for row in inputs:
        own = {name: value for name, value in row.items() if name != UNPREFIXED}
        given.append(own | ({"prompt": row[UNPREFIXED]} if UNPREFIXED in row else {}))
    return [row | {ROW: row} for row in given]


def named_reward(name: str) -> Callable:
    """One of trl.rewards, or a function, "module:name" (or its dotted path), seen from the working
    directory, too."""
    if name in REWARDS:
        from trl.import_utils import is_math_verify_available

        if "accuracy" in name and not is_math_verify_available():
            raise ValueError(
                f"reward_funcs={name!r} needs math-verify: pip install softar[rewards]"
            )
        return getattr(importlib.import_module("trl.rewards"), name)
    module, _, function = name.rpartition(".")
    code = name if is_code(name) else f"{module}:{function}"
    if not is_code(code):
        check_choice("reward_funcs", name, REWARDS, hint=HINT)
    if not callable(reward := load_code("reward_funcs", code)):
        raise ValueError(f"reward_funcs={name!r} is a {type(reward).__name__}, and no function")
    return reward


def score_of(task: Task, trainer) -> Callable[[str, dict, list[int]], float]:
    """A scorer of single answers, of text, row and tokens: the task's, or the first reward of the
    trainer, which gets what TRL passes (None, for what it cannot judge, counts 0)."""
    if task.score is not None:
        return lambda text, row, ids: task.score(text, row)
    reward = trainer.reward_funcs[0]

    def score(text: str, row: dict, ids: list[int]) -> float:
        completion = (
            text if isinstance(row["prompt"], str) else [{"role": "assistant", "content": text}]
        )
        told = {name: [value] for name, value in row.items() if name not in NOT_TOLD}
        # what a reward logs of held-out rows is none of the training's numbers
        told |= dict(trainer_state=trainer.state, log_extra=unheard, log_metric=unheard)
        told |= dict(prompts=[row["prompt"]], completions=[completion], completion_ids=[ids])
        told[ROW] = [row]
        values = reward(**told)
        if inspect.isawaitable(values):  # in the loop that the rollouts' are awaited in
            values = asyncio.run_coroutine_threadsafe(values, trainer.async_loop).result()
        return float(values[0] or 0.0)

    return score


def unheard(*args) -> None:
    pass


def check_columns(names: list[str] | None, task: Task) -> None:
    """Raise ValueError where the training rows lack what the rewards will ask of them."""
    columns = task.train.column_names
    told = BY_TRAINER | {*columns} - {*NOT_TOLD}
    if "prompt" not in columns:
        raise ValueError(f"RL needs a column 'prompt'; {task.name!r} has {columns}")
    if task.score is None and not names:
        raise ValueError(
            f"{task.name!r} has no score of its own: give --reward_funcs, e.g. {REWARDS[0]}"
        )
    for name in names or []:
        wanted = inspect.signature(named_reward(name)).parameters.values()
        needs = [
            p.name
            for p in wanted
            if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
        ]
        if missing := [column for column in needs if column not in told]:
            raise ValueError(
                f"reward_funcs={name!r} needs the columns {missing}, and is told {sorted(told)}: the rows of "
                f"{task.name!r} are whole in {ROW}"
            )
        if name in REWARDS and isinstance(task.train[0]["prompt"], str):
            raise ValueError(
                f"reward_funcs={name!r} reads chats, the prompts are text: give a --system_prompt"
            )


def as_chats(task: Task, system_prompt: str | None) -> Task:
    """With a system prompt, text prompts become conversations. Raises ValueError for one that has a
    system message of its own, of which most templates take one alone."""
    if system_prompt is None:
        return task

    def chat(row, number):
        prompt = row["prompt"]
        user = [{"role": "user", "content": prompt.strip()}] if isinstance(prompt, str) else prompt
        for message in user:
            if message["role"] in ("system", "developer"):
                raise ValueError(
                    f"system_prompt={system_prompt!r:.80}: row {number} of {task.name!r} has a {message['role']} "
                    f"message, {message['content']!r:.80}: leave it out, or take those out of the rows"
                )
        return {"prompt": [{"role": "system", "content": system_prompt}, *user]}

    parts = {
        name: rows.map(chat, with_indices=True)
        for name, rows in (("train", task.train), ("test", task.test))
        if rows is not None
    }
    return dataclasses.replace(task, **parts)


def with_checks(name: str, reward: Callable) -> Callable:
    """The reward function, whose mistakes become errors that name it: it raised, or did not return
    a number (or None, for a completion that it cannot score) for each completion."""
    if inspect.iscoroutinefunction(reward) or inspect.iscoroutinefunction(type(reward).__call__):

        @functools.wraps(reward, updated=())
        async def wrapped(**columns):
            try:
                values = await reward(**columns)
            except Exception as error:
                raise _raised(name, error) from error
            return _numbers(name, values, columns)
    else:

        @functools.wraps(reward, updated=())
        def wrapped(**columns):
            try:
                values = reward(**columns)
            except Exception as error:
                raise _raised(name, error) from error
            return _numbers(name, values, columns)

    return wrapped


def _raised(name: str, error: Exception) -> ValueError:
    return ValueError(
        f"the reward function {name!r} raised {type(error).__name__}: {error}. Correct it, or have it return None for "
        f"a completion that it cannot score"
    )


def _numbers(name: str, returned, columns: dict) -> list[float | None]:
    completions = columns["completions"]
    try:
        values = [None if value is None else float(value) for value in returned]
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"the reward function {name!r} returned {shorten(str(returned), 100)}: "
            f"it has to be a list of numbers"
        ) from error
    if len(values) != len(completions):
        raise ValueError(
            f"the reward function {name!r} returned {len(values)} rewards for {len(completions)} completions: it has "
            f"to return one each, in their order"
        )
    for value, completion in zip(values, completions, strict=True):
        if value is not None and not math.isfinite(value):
            text = shorten(str(completion), 100)
            raise ValueError(
                f"the reward function {name!r} returned {value} for the completion {text!r}: return a "
                f"finite number, or None for a completion that it cannot score"
            )
    return values


def check_scored(
    rewards: Tensor, names: list[str], functions: list, *, each_row: bool = False
) -> None:
    """Raise ValueError where a reward model gave NaN, or no function scored anything (`each_row`:
    scored a row).

    rewards: [rows of all processes, functions], NaN for None.
    """
    for column, name, function in zip(rewards.T, names, functions, strict=True):
        if isinstance(function, nn.Module) and not column.isfinite().all():
            rows = (~column.isfinite()).nonzero()[:, 0].tolist()
            raise ValueError(
                f"the reward model {name!r} returned NaN or infinity for rows {rows}: check its weights"
            )
    unscored = rewards.isnan().all(1)
    if unscored.all():
        raise ValueError(
            f"the reward functions {names} returned None for all {len(rewards)} completions: at least one has to score "
            f"some of them, or there is nothing to learn"
        )
    if each_row and unscored.any():
        raise ValueError(
            f"the reward functions {names} returned None for rows {unscored.nonzero()[:, 0].tolist()}: this trainer "
            f"needs a reward for each completion, return a number (0, say) for the others"
        )
