"""Rows of your own as a task: `rows.jsonl`, or `rows.jsonl:score=number,prompt=question`.

A row has a prompt (text, or a list of chat messages), an answer, and maybe a group: rows of one
group succeed and fail together, and intervals count groups.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from datasets import Dataset

from ..checks import check_choice, did_you_mean
from ..files import READERS, Rows, column, dataset_of, is_file, read_rows
from ..names import is_code, load_code
from ..specs import parse_options, regular_expression
from .number import is_clear, last_number
from .task import Task

SPLITS = ("train", "test")


@dataclass(frozen=True)
class Options:
    """What may stand behind the colon."""

    score: str = "exact"  # name in SCORERS, or "module:function": (text, row) -> number
    pattern: str | None = None  # of score=regex: its last match in the text is the answer
    prompt: str = "prompt"  # columns
    answer: str = "answer"
    group: str = "group"


def is_own(spec: str) -> bool:
    """Does a task's spec name a file, or a folder with files that are called after a split?"""
    path = split_spec(spec)[0]
    return is_file(path) or Path(path).is_dir()


def split_spec(spec: str) -> tuple[str, str]:
    """The path and what stands behind its colon; a path may hold colons itself."""
    match = re.match(
        r"(.*?(?:\.jsonl?|\.csv|\.parquet))(?::(.*))?$", spec, re.IGNORECASE | re.DOTALL
    )
    if match:
        return match[1], match[2] or ""
    path, _, options = spec.partition(":")
    return path, options


def own_task(spec: str) -> Task:
    """A file's rows are held out and nothing is to train on; of a folder, test.* is held out and
    train.* to train on.

    Raises:
        ValueError: naming the file, the line and the remedy.
    """
    path, text = split_spec(spec)
    options = _options(spec, text)
    scorer, extract = _scorer(options)
    with_answer = not is_code(options.score)
    folder = Path(path)
    if folder.is_dir():
        files = {split: _file_of(folder, split) for split in SPLITS}
    else:
        files = {"test": folder}
    if files["test"] is None:
        raise ValueError(f"{path} holds no rows to answer: test.jsonl, or another of {[*READERS]}")
    read = {
        split: _rows(file, read_rows(file), options, with_answer)
        for split, file in files.items()
        if file is not None
    }
    return Task(
        name=spec,
        train=read.get("train"),
        test=read["test"],
        score=scorer,
        think_steps=None,
        extract=extract,
    )


def _options(spec: str, text: str) -> Options:
    options, names = parse_options(text), [f.name for f in fields(Options)]
    for name, value in options.items():
        if name not in names:
            raise ValueError(
                f"task={spec!r} takes no {name!r}{did_you_mean(name, names)}: it takes {names}"
            )
        if not isinstance(value, str):
            raise ValueError(f"task={spec!r}: {name}={value!r} must be text")
    return Options(**options)


def _scorer(options: Options) -> tuple[Callable[[str, dict], float], Callable[[str], str]]:
    """-> score(text, row) and extract(text)."""
    if is_code(options.score):
        scorer = load_code("score", options.score)
        if not callable(scorer):
            raise ValueError(f"score={options.score!r} is a {type(scorer).__name__}, no function")
        return scorer, str.strip
    check_choice("score", options.score, SCORERS, hint=" or 'module:function' of your own")
    if (options.pattern is not None) != (options.score == "regex"):
        raise ValueError(
            f"score={options.score}, pattern={options.pattern!r}: a pattern goes with score=regex, and "
            r"score=regex needs one, e.g. pattern=Answer: (\d+); one with commas stands in double quotes, "
            r'its backslashes doubled, e.g. pattern="(\\d+), sure"'
        )
    read = SCORERS[options.score](options)
    return (lambda text, row: float(read(text) == read_answer(row, read))), read


def read_answer(row: dict, read: Callable[[str], str]) -> str:
    """The gold answer as the scorer sees it: what `read` finds in it, or where that is nothing, the
    answer itself ("72" for a pattern that reads "Answer: 72")."""
    return read(row["answer"]) or row["answer"].strip()


def _exact(options: Options):
    return lambda text: " ".join(text.split())


def _number(options: Options):
    return last_number


def _regex(options: Options):
    pattern = regular_expression(options.pattern)

    def read(text: str) -> str:
        matches = [*pattern.finditer(text)]
        return " ".join((matches[-1][1 if pattern.groups else 0] or "").split()) if matches else ""

    return read


def _rows(path: Path, rows: Rows, options: Options, with_answer: bool) -> Dataset:
    """The columns prompt, answer and maybe group, and all that the file has beside them.
    with_answer: each row needs one, which becomes text, as softar's own scorers read it."""
    read = [_row(path, row, line, options, with_answer) for line, row in rows]
    kinds = [isinstance(row["prompt"], str) for row in read]
    if len({*kinds}) > 1:
        line = rows[kinds.index(not kinds[0])][0]
        raise ValueError(
            f"{path}, line {line}: texts and chats in one file: give prompts of one kind"
        )
    return dataset_of(path, read)


def _row(path: Path, row: dict, line: int, options: Options, with_answer: bool) -> dict:
    prompt = column(path, row, line, options.prompt, "prompt")
    if not (_is_chat(prompt) or (isinstance(prompt, str) and prompt.strip())):
        raise ValueError(
            f"{path}, line {line}: {options.prompt}={prompt!r:.60} must be a text that is not empty, "
            'or chat messages [{"role": "user", "content": ...}]'
        )
    out = dict(row) | {"prompt": prompt}
    if with_answer or options.answer in row:
        answer: Any = column(path, row, line, options.answer, "answer")
        if isinstance(answer, (dict, list, bool)) and with_answer:
            raise ValueError(
                f"{path}, line {line}: {options.answer}={answer!r:.60} must be a text or a number"
            )
        out["answer"] = answer
        if with_answer:
            out["answer"] = text = str(answer)
            if not text.strip():
                raise ValueError(
                    f"{path}, line {line}: {options.answer}={text!r} is empty: give an answer, or leave the row out"
                )
            if options.score == "number":
                _check_number(text, f"{path}, line {line}: {options.answer}={text!r:.60}")
    if options.group in row:
        group = row[options.group]
        out["group"] = None if group in (None, "") else str(group)  # as .csv has it
    elif options.group != "group":
        column(path, row, line, options.group, "group")
    return out


def _check_number(text: str, what: str) -> None:
    if not last_number(text):
        raise ValueError(
            f"{what} holds no number for score=number: give one, or choose another score"
        )
    if not is_clear(text):
        raise ValueError(
            f"{what} is no single number for score=number, of which the last would count: write the one "
            "meant behind '####', or choose another score, e.g. exact"
        )


def _is_chat(prompt) -> bool:
    return (
        isinstance(prompt, list)
        and bool(prompt)
        and all(isinstance(m, dict) and {"role", "content"} <= {*m} for m in prompt)
    )


def _file_of(folder: Path, split: str) -> Path | None:
    files = [folder / f"{split}{ending}" for ending in READERS]
    return next((file for file in files if file.is_file()), None)


# name -> function of the options -> what of a text is the answer, one text for all that are the same
SCORERS = {"exact": _exact, "number": _number, "regex": _regex}
