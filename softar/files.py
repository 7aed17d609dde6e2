"""Rows out of files of your own: .jsonl, .json, .csv, .parquet, or a folder of them.

What cannot be read is named by its line, before anything is opened or computed.
"""

import csv
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from .checks import shorten

if TYPE_CHECKING:
    from datasets import Dataset

Rows = list[tuple[int, dict]]  # (line of the file, column -> value)


def is_file(name: str) -> bool:
    """Is it a file of rows by its ending, whether or not it is there?"""
    return Path(name).suffix.lower() in READERS


def read_rows(path: str | Path) -> Rows:
    """The rows of a file, each with the line where it begins (of .json and .parquet: its number,
    from 1).

    Raises:
        ValueError: naming the file, the line, and what would do.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{str(path)!r}: there is no such file (looked in {Path.cwd()})")
    if path.suffix.lower() not in READERS:
        raise ValueError(f"{str(path)!r}: its ending is none of {', '.join(READERS)}")
    try:
        rows = [*READERS[path.suffix.lower()](path)]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 ({error}): save it as such") from None
    if not rows:
        raise ValueError(f"{path} holds no row")
    return rows


def read_dataset(path: str | Path) -> "Dataset":
    """The rows of a file as a datasets.Dataset, for training."""
    return dataset_of(path, [row for _, row in read_rows(path)])


def dataset_of(path: str | Path, rows: list[dict]) -> "Dataset":
    """The rows that were read from `path`, with all columns that any of them has; None where a row
    lacks one. (`Dataset.from_list` keeps the columns of the first row alone.)

    Raises:
        ValueError: for a column with values of different kinds.
    """
    import datasets

    names = dict.fromkeys(name for row in rows for name in row)
    try:
        return datasets.Dataset.from_dict({name: [row.get(name) for row in rows] for name in names})
    except Exception as error:  # of pyarrow, in many classes
        raise ValueError(
            f"{path}: a column holds values of different kinds ({shorten(str(error))}): give each "
            "column one"
        ) from error


def column(path, row: dict, line: int, name: str, option: str):
    """A row's value in a column. Raises ValueError with the columns there are; option: what says
    another name for it."""
    if name not in row or row[name] is None:
        raise ValueError(
            f"{path}, line {line}: no {name!r}, it has {sorted(row)}: add it, or say which column it "
            f"is with {option}=COLUMN"
        )
    return row[name]


def _json_lines(path: Path) -> Iterator[tuple[int, dict]]:
    with open(path, encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield number, _object(path, f"line {number}", _parse(path, line, number))


def _json(path: Path) -> Iterator[tuple[int, dict]]:
    values = _parse(path, path.read_text(encoding="utf-8-sig"), None)
    if isinstance(values, dict) and all(isinstance(v, list) for v in values.values()):
        lengths = {len(v) for v in values.values()}
        if len(lengths) != 1:
            raise ValueError(
                f"{path}: its columns have {sorted(lengths)} values: give each as many"
            )
        values = [dict(zip(values, row)) for row in zip(*values.values())]
    if not isinstance(values, list):
        raise ValueError(f"{path} is no list of objects: give [{{...}}, ...], or write .jsonl")
    for number, value in enumerate(values, 1):
        yield number, _object(path, f"row {number}", value)


def _parse(path: Path, text: str, line: int | None):
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        at = line or (error.lineno if isinstance(error, json.JSONDecodeError) else 1)
        hint = "one object a line, as json.dumps writes it" if line else "a list of objects"
        raise ValueError(
            f"{path}, line {at}: no JSON ({shorten(str(error), 120)}): give {hint}"
        ) from None


def _object(path: Path, where: str, value) -> dict:
    if not isinstance(value, dict):
        shown = shorten(json.dumps(value), 40)
        raise ValueError(
            f'{path}, {where}: {shown} is no object: give {{"prompt": ..., "answer": ...}}'
        )
    return value


def _csv(path: Path) -> Iterator[tuple[int, dict]]:
    with open(path, encoding="utf-8-sig", newline="") as lines:
        reader = csv.DictReader(lines, strict=True)
        try:
            header = reader.fieldnames or []
            if not all(header) or len({*header}) < len(header):
                raise ValueError(
                    f"{path}, line 1: {header} are no names of columns: name each once"
                )
            begin = 2
            for row in reader:
                if None in row or None in row.values():
                    how = "more" if None in row else "fewer"
                    raise ValueError(
                        f"{path}, line {begin}: {how} fields than the header's {len(header)}, {header}: "
                        "put text with commas or line ends in quotes"
                    )
                yield begin, row
                begin = reader.line_num + 1
        except csv.Error as error:
            raise ValueError(f"{path}, line {reader.line_num}: no CSV ({error})") from None


def _parquet(path: Path) -> Iterator[tuple[int, dict]]:
    import pyarrow
    from pyarrow import parquet

    try:
        table = parquet.read_table(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path} is no parquet file ({shorten(str(error), 120)})") from None
    yield from enumerate(table.to_pylist(), 1)


READERS: dict[str, Callable[[Path], Iterator[tuple[int, dict]]]] = {
    ".jsonl": _json_lines,
    ".json": _json,
    ".csv": _csv,
    ".parquet": _parquet,
}
