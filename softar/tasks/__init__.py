"""Tasks: what to train on, what to hold out, and how to score an answer. Nothing is downloaded,
but by lm-eval's tasks.

A task is two datasets in TRL's prompt-completion format and a scorer. `load_task("mnns")` makes an
embedded one, `load_task("rows.jsonl")` reads your own rows, `load_task("reasoning_gym:chain_sum")`
and `load_task("lm_eval:gsm8k")` wrap others' data with their own scorers.
"""

import dataclasses
import inspect
import re
from collections.abc import Callable
from types import UnionType
from typing import get_type_hints

from ..checks import check_least, check_value, did_you_mean
from ..names import CODE, is_code, lookup, registered
from ..specs import parse_options
from .embedded import MODELS, latin, latin_prompt, mnns
from .gym import GYM, freeze, gym_task, thaw
from .harness import HARNESS, harness_task, is_known
from .own import is_own, own_task
from .reach import reach
from .task import Task, no_thought

__all__ = [
    "GYM",
    "HARNESS",
    "MODELS",
    "TASKS",
    "Task",
    "freeze",
    "latin",
    "latin_prompt",
    "load_task",
    "mnns",
    "no_thought",
    "reach",
    "thaw",
]
GROUP = "softar.tasks"  # of entry points
TASKS: dict[str, Callable[..., Task]] = {
    "mnns": mnns,
    "latin": latin,
    "latin-prompt": latin_prompt,
    "reach": reach,
}


def load_task(name: str, *, seed: int = 0, size: int | None = None) -> Task:
    """The task of that name.

    Args:
        name: one of TASKS, maybe with arguments of its function, "mnns:digits=3", "reach:layers=3,
            width=5"; a file of rows, "rows.jsonl[:score=number,prompt=COLUMN,...]"
            (softar.tasks.own; .json, .csv, .parquet, or a folder with test.* and maybe train.*);
            "reasoning_gym:NAME" (`pip install softar[rewards]`); "lm_eval:NAME[:num_fewshot=5,...]",
            or the bare name, for what lm-eval generates (`pip install softar[eval]`);
            "module:function[:key=value,...]" of your own, or what a package registered in the entry
            points softar.tasks, called with seed, size and these arguments.
        seed: selects what is held out (mnns) or what is generated (reasoning-gym); same seed, same
            rows.
        size: at most this many training rows; for reasoning-gym the number generated. None: all, or
            1000 generated.

    Raises:
        ValueError: for an unknown name (the message lists the known ones), rows that cannot be read
            (it names the line) or a size below 1.
        ImportError: where reasoning-gym or lm-eval is asked for and not installed.
    """
    check_least({"size": size}, size=1)
    if name.startswith(GYM):
        return gym_task(name.removeprefix(GYM), seed=seed, size=size)
    if name.startswith(HARNESS):
        return harness_task(name.removeprefix(HARNESS))
    if name not in TASKS and is_own(name):
        task = own_task(name)
        if size is not None and task.train is not None:
            rows = task.train.select(range(min(size, len(task.train))))
            return dataclasses.replace(task, train=rows)
        return task
    function, options = _parted(name)
    try:
        make = lookup(
            "task", function, TASKS, GROUP, hint=f", a file of rows (.jsonl, ...), '{GYM}NAME'"
        )
    except ValueError:
        if is_known(name):  # looked for last: to read lm-eval's names takes seconds
            return harness_task(name)
        raise
    task = make(**_arguments(name, make, options), seed=seed, size=size)
    if not isinstance(task, Task):
        raise ValueError(f"task={name!r} gave a {type(task).__name__}, and not a softar.tasks.Task")
    return dataclasses.replace(task, name=name) if options else task  # others make another task


def _parted(name: str) -> tuple[str, str]:
    """The name of a function that makes a task, and the options behind it; "" where none are."""
    parts = re.fullmatch(rf"({CODE.pattern}|[^:]+):(.+)", name)
    if parts is None:
        return name, ""
    function, options = parts[1], parts[parts.lastindex]
    known = function in TASKS or function in registered(GROUP) or is_code(function)
    return (function, options) if known else (name, "")


def _arguments(name: str, make: Callable[..., Task], text: str) -> dict:
    """What stands behind a colon, as arguments of the task's function."""
    options, known = parse_options(text), inspect.signature(make).parameters
    names = [each for each in known if each not in ("seed", "size", "tokenizer")]
    hints = get_type_hints(make) if options else {}
    for option, value in options.items():
        if option not in names:
            hint = did_you_mean(option, names)
            raise ValueError(f"task={name!r} takes no {option!r}{hint}: it takes {names}")
        kind = hints.get(option)
        if isinstance(kind, type | UnionType):
            check_value(f"task={name!r}: {option}", value, kind)
    return options
