"""Any dataset of reasoning-gym with its own scorer, as a task: "reasoning_gym:NAME"."""

import json
import random

from datasets import Dataset

from ..checks import close_names
from .task import Task

GYM = "reasoning_gym:"
GYM_SIZE = 1000  # rows generated where the caller names no size


def gym_task(name: str, *, seed: int, size: int | None) -> Task:
    """A reasoning-gym dataset: prompt = question and a newline, completion = answer, `entry` = the
    whole item as JSON.

    A few of its datasets (boxnet, graph_color, rubiks_cube, ...) accept many answers and name none:
    there answer and completion are empty, so they can be scored and used for RL but not for
    supervised training.
    """
    try:
        import reasoning_gym  # an extra, and slow to import
        from reasoning_gym.factory import DATASETS
        from reasoning_gym.utils import extract_answer
    except ImportError as error:
        raise ImportError(
            f"task='{GYM}{name}' needs reasoning-gym: pip install softar[rewards]"
        ) from error
    if name not in DATASETS:
        close = close_names(name, DATASETS, most=5, cutoff=0.3) or sorted(DATASETS)[:5]
        raise ValueError(f"task='{GYM}{name}' is unknown to reasoning-gym; close names: {close}")
    size = GYM_SIZE if size is None else size

    def generate(part: str, count: int):
        # Item i is generated from seed + i: neighbouring seeds would overlap, so each part hashes
        # its own.
        start = random.Random(f"{part}/{seed}").randrange(2**31)
        try:
            items = reasoning_gym.create_dataset(name, seed=start, size=count)
        except (AssertionError, TypeError, ValueError) as error:
            raise ValueError(
                f"task='{GYM}{name}' cannot be generated from its name alone: {error}"
            ) from error
        return items, [_gym_row(items[i]) for i in range(count)]

    items, train = generate("train", size)
    seen = {row["prompt"] for row in train}
    test = [row for row in generate("test", max(50, size // 10))[1] if row["prompt"] not in seen]
    if not test:
        raise ValueError(
            f"task='{GYM}{name}', size={size}: no question is left to hold out; take a smaller size"
        )

    def extract(text: str) -> str:
        """What stands in <answer> tags, without tags the whole text."""
        tagged = extract_answer(text)
        return text.strip() if tagged is None else tagged

    def score(answer: str, row: dict) -> float:
        """The dataset's own score of what `extract` reads."""
        entry = thaw(json.loads(row["entry"]))
        answer = extract(answer)
        try:
            return float(items.score_answer(answer, entry))
        except (
            Exception
        ):  # several scorers parse the model's text without a guard: unreadable is wrong
            return 0.0

    rows = Dataset.from_list(train), Dataset.from_list(test)
    return Task(GYM + name, *rows, score, think_steps=None, extract=extract)


def _gym_row(item: dict) -> dict:
    answer = "" if item["answer"] is None else str(item["answer"])
    entry = json.dumps(freeze(item))
    return {
        "prompt": item["question"] + "\n",
        "completion": answer,
        "answer": answer,
        "entry": entry,
    }


def freeze(x):
    """Tuples and keys that are not strings, tagged: JSON has neither, and scorers (arc_agi, rearc,
    ...) need them."""
    if isinstance(x, tuple):
        return {"__tuple__": [freeze(v) for v in x]}
    if isinstance(x, list):
        return [freeze(v) for v in x]
    if isinstance(x, dict):
        if all(isinstance(k, str) for k in x):
            return {k: freeze(v) for k, v in x.items()}
        return {"__dict__": [[freeze(k), freeze(v)] for k, v in x.items()]}
    return x


def thaw(x):
    """Undo `freeze`."""
    if isinstance(x, list):
        return [thaw(v) for v in x]
    if isinstance(x, dict):
        if "__tuple__" in x:
            return tuple(thaw(v) for v in x["__tuple__"])
        if "__dict__" in x:
            return {thaw(k): thaw(v) for k, v in x["__dict__"]}
        return {k: thaw(v) for k, v in x.items()}
    return x
