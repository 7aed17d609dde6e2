"""What a recipe trains on: a task by name, or rows in TRL's formats."""

import dataclasses
import hashlib
import json
import os
import sys
from typing import TYPE_CHECKING

from .files import is_file, read_dataset
from .recipe_config import OF_LORA

if TYPE_CHECKING:
    from .tasks import Task

# TRL's, for supervised training
SFT_FORMATS = (("prompt", "completion"), ("messages",), ("conversations",), ("text",))
HELD_OUT = "test"  # TRL's dataset_test_split where nobody gives one
TASK, FILE, DATASET, MIXTURE = "a task", "a file", "a dataset", "datasets of a YAML file"
# Of each option of the rows: what it is where it is left out, the sources that read it, and what to
# do with another
OPTIONS = {
    "task_size": (None, (TASK,), "give the rows to train on in a file of their own"),
    "dataset_config": (None, (DATASET,), "leave it out"),
    "dataset_train_split": ("train", (DATASET, MIXTURE), "leave it out"),
    "dataset_test_split": (
        HELD_OUT,
        (DATASET, MIXTURE),
        "leave it out; a folder with train and test files has held-out rows",
    ),
    "dataset_streaming": (False, (), "leave it out; all rows are read before a training"),
}


def open_task(script, mixture, formats: tuple[tuple[str, ...], ...] = SFT_FORMATS) -> "Task":
    """A task by name, or a dataset in TRL's formats as a task without a scorer; of its held-out
    rows `eval_rows`."""
    from .tasks import load_task

    if sum(map(bool, (script.task, script.dataset_name, mixture.datasets))) != 1:
        raise ValueError("give exactly one of --task, --dataset_name and (in a YAML file) datasets")
    check_source(script)
    try:
        if script.task:
            task = load_task(script.task, size=script.task_size)
        else:
            task = open_dataset(script, mixture)
    except (OSError, ImportError) as error:
        raise ValueError(f"the data cannot be loaded: {error}") from error
    check_formats(task, formats)
    if script.eval_rows is None:
        return task
    if task.test is None:
        raise ValueError(
            f"eval_rows={script.eval_rows}: {task.name!r} has no held-out rows: leave it out, or give a folder with "
            "train and test files"
        )
    rows = range(min(script.eval_rows, len(task.test)))
    return dataclasses.replace(task, test=task.test.select(rows))


def told_rows(task: "Task") -> str:
    """A task's rows to train on in a few words, others for other rows: its name, their number, and a
    hash of up to 2000 of them. Of a stream the name alone."""
    rows = task.train
    if not hasattr(rows, "__len__"):
        return task.name
    picked = range(0, len(rows), max(1, len(rows) // 1000))
    seen = [json.dumps(rows[i], default=lambda value: type(value).__name__) for i in picked]
    mark = hashlib.sha256("\n".join(seen).encode()).hexdigest()[:8]
    return f"{task.name}, {len(rows)} rows ({mark})"


def made_with(program: str, inputs) -> dict:
    """What a resume has to know of a recipe's Inputs beside the training arguments: the program, the
    model, the rows, and the options that say more of them. How rows are chosen, `data` tells by what
    they are."""
    script, model_args = vars(inputs.script), vars(inputs.model_args)
    chosen = ("task", "rows", "num_seeds", "jobs", "dataset_")
    how = ("dtype", "attn_implementation", "model_revision", "use_peft", *OF_LORA)
    made = {k: v for k, v in script.items() if not k.startswith(chosen)}
    made |= {k: v for k, v in model_args.items() if k.startswith(how)}
    return made | dict(program=program, model=inputs.model, data=told_rows(inputs.task))


def evaluates(training) -> bool:
    """Do training arguments ask for evaluations, and so for held-out rows?"""
    return training.eval_strategy != "no" or training.eval_on_start


def check_held_out(script, training, task: "Task") -> None:
    """Raise ValueError for evaluations without rows, which transformers would name when the model is
    open."""
    if task.test is not None or not evaluates(training):
        return
    asked = f"eval_strategy={training.eval_strategy.value!r}"
    if training.eval_strategy == "no":
        asked = f"eval_on_start={training.eval_on_start}"
    remedy = "give a folder with train and test files"
    if script.task:
        remedy = "give the task some"
    elif not (script.dataset_name and is_file(script.dataset_name)):
        remedy = "name a split of the data, --dataset_test_split"
    raise ValueError(
        f"{asked} needs held-out rows, and {task.name!r} has none: leave it out, or {remedy}"
    )


def check_source(script) -> None:
    """Raise ValueError for an option that the source of the rows does not read."""
    if script.task or not script.dataset_name:
        source = TASK if script.task else MIXTURE
    else:
        source = FILE if is_file(script.dataset_name) else DATASET
    for option, (left_out, sources, remedy) in OPTIONS.items():
        value = getattr(script, option)
        if value != left_out and source not in sources:
            raise ValueError(f"{option}={value!r} says nothing to {source}: {remedy}")


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
    return Task(name, data[train], held_out(data, script), score=None, think_steps=None)


def held_out(data: dict, script):
    """The split to evaluate on; None where nobody named one and there is no HELD_OUT. Of what the
    data has instead ("validation", which a file dev.jsonl becomes) it is said how to name it."""
    test, others = script.dataset_test_split, sorted({*data} - {script.dataset_train_split})
    if test in data:
        return data[test]
    if test != HELD_OUT:
        raise ValueError(f"dataset_test_split={test!r} is not among {sorted(data)}")
    if others and os.environ.get("RANK", "0") == "0":
        print(
            f"no held-out rows: the data has no split {test!r}, but {others}: "
            f"--dataset_test_split {others[-1]} evaluates on that",
            file=sys.stderr,
        )
    return None
