"""What a recipe trains on: a task by name, or rows in TRL's formats."""

import dataclasses
from typing import TYPE_CHECKING

from .files import is_file, read_dataset

if TYPE_CHECKING:
    from .tasks import Task

# TRL's, for supervised training
SFT_FORMATS = (("prompt", "completion"), ("messages",), ("conversations",), ("text",))


def open_task(script, mixture, formats: tuple[tuple[str, ...], ...] = SFT_FORMATS) -> "Task":
    """A task by name, or a dataset in TRL's formats as a task without a scorer; of its held-out
    rows `eval_rows`."""
    from .tasks import load_task

    if sum(map(bool, (script.task, script.dataset_name, mixture.datasets))) != 1:
        raise ValueError("give exactly one of --task, --dataset_name and (in a YAML file) datasets")
    try:
        if script.task:
            task = load_task(script.task, size=script.task_size)
        else:
            task = open_dataset(script, mixture)
    except (OSError, ImportError) as error:
        raise ValueError(f"the data cannot be loaded: {error}") from error
    check_formats(task, formats)
    if script.eval_rows is None or task.test is None:
        return task
    rows = range(min(script.eval_rows, len(task.test)))
    return dataclasses.replace(task, test=task.test.select(rows))


def check_formats(task: "Task", formats: tuple[tuple[str, ...], ...]) -> None:
    """Raise ValueError where there is nothing to train on, or the rows have the columns of none of
    the formats."""
    if task.train is None:
        raise ValueError(
            f"task={task.name!r} has no rows to train on: --dataset_name FILE trains on a file, "
            "--task FOLDER on train.jsonl of a folder that holds test.jsonl, too"
        )
    columns = task.train.column_names  # None of a stream that does not know them
    if columns is not None and not any({*names} <= {*columns} for names in formats):
        needed = ", or ".join(" and ".join(names) for names in formats)
        raise ValueError(
            f"{task.name!r} has columns {columns}, and rows need {needed}: rename yours"
        )


def open_dataset(script, mixture) -> "Task":
    """A hub id, a folder, a file of rows (softar.files), or the mixture of a YAML file."""
    from datasets import load_dataset
    from trl import get_dataset

    from .tasks import Task

    train, name = script.dataset_train_split, script.dataset_name
    if name and is_file(name):
        data = {train: read_dataset(name)}
    elif name:
        data = load_dataset(name, script.dataset_config)
    else:
        name, data = ",".join(d.path for d in mixture.datasets), get_dataset(mixture)
    if train not in data:
        raise ValueError(f"dataset_train_split={train!r} is not among {sorted(data)}")
    test = data[script.dataset_test_split] if script.dataset_test_split in data else None
    return Task(name, data[train], test, score=None, think_steps=None)
