"""What a task is: rows to train on, rows to hold out, and how to score an answer."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field

from datasets import Dataset


@dataclass(frozen=True)
class Task:
    """Data and scorer of one task. Prompt and completion are plain strings, to be tokenised as
    their concatenation; the completion does not hold the end-of-sequence token (TRL's SFTTrainer
    appends the tokenizer's)."""

    name: str
    # columns prompt, completion, answer (str); maybe traces (list[str], alternatives to the
    # completion), and group (str): rows of one group succeed and fail together, so that intervals
    # count groups
    train: Dataset | None  # None: there is nothing to train on
    test: Dataset  # the same columns, held out
    # (text generated after the thought, row) -> [0, 1]; special tokens stripped
    score: Callable[[str, dict], float]
    # the thought is the first n tokens of the completion; None: there is no thought
    think_steps: int | None = None
    # the embedded models made for it, by what they are: see MODELS
    models: dict[str, str] = field(default_factory=dict)
    # what of a generated text the scorer looks at, best one text for all that it takes as the same
    extract: Callable[[str], str] = str.strip

    # tokens that an answer takes, thought and end included; None: not known
    max_new_tokens: int | None = None
    stop: tuple[str, ...] = ()  # an answer ends before any of these

    @property
    def model(self) -> str | None:
        """The embedded model that training starts from, for softar.load, or None."""
        return self.models.get("untrained")


def no_thought(task: Task) -> Task:
    """The same task answered at once: the completion is the answer alone. A task without a thought
    comes back as is."""
    if task.think_steps is None:
        return task

    def strip(rows: Dataset) -> Dataset:
        rows = rows.remove_columns([c for c in ("completion", "traces") if c in rows.column_names])
        return rows.add_column("completion", [" " + answer for answer in rows["answer"]])

    return dataclasses.replace(
        task, train=strip(task.train), test=strip(task.test), think_steps=None
    )
