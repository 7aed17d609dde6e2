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

TOLD = ("tools", "chat_template_kwargs")  # columns that a chat template hears
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
    lacks one. (`Dataset.from_list` keeps the columns of the first row alone.) A dict inside has the
    keys that it has in its row, whatever those of other rows have.

    Raises:
        ValueError: for a column with values of different kinds.
    """
    import datasets

    names = dict.fromkeys(name for row in rows for name in row)
    try:
        return datasets.Dataset.from_dict(
            {name: _kept([row.get(name) for row in rows]) for name in names}
        )
    except Exception as error:  # of pyarrow, in many classes
        raise ValueError(
            f"{path}: a column holds values of different kinds ({shorten(str(error))}): give each "
            "column one"
        ) from error


def _kept(values: list):
    """A column as Arrow can keep it. Its structs have all keys that any row has, in one order, None
    where a row lacks one, and one kind of value for each: dicts that differ in these are kept as JSON,
    which a datasets.Dataset reads as what it was."""
    depth, inner = 0, [value for value in values if value is not None]
    while inner and all(isinstance(value, list) for value in inner):
        nested = [x for value in inner for x in value if isinstance(x, (dict, list))]
        depth, inner = depth + 1, nested
    if not (inner and all(isinstance(value, dict) for value in inner)) or _is_alike(inner):
        return values
    import pyarrow
    from datasets import Json

    def frozen(value):
        if value is None or isinstance(value, list):
            return value and [frozen(x) for x in value]
        text = json.dumps(value, allow_nan=False)
        Json().decode_example(text)  # raises for numbers beyond 64 bits
        return text

    kind = pyarrow.json_()
    for _ in range(depth):
        kind = pyarrow.list_(kind)
    return pyarrow.array([frozen(value) for value in values]).cast(kind)


def _is_alike(values: list) -> bool:
    """Are these of one kind, and do dicts at the same place inside have the same keys, in one order?
    None is of each kind."""
    values = [value for value in values if value is not None]
    kinds = {type(value) for value in values}
    if kinds == {dict}:
        return all([*value] == [*values[0]] for value in values) and all(
            _is_alike([value[key] for value in values]) for key in values[0]
        )
    if kinds == {list}:
        return _is_alike([x for value in values for x in value])
    return len(kinds) < 2


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
    kinds = {field.name: field.type for field in table.schema}
    for number, row in enumerate(table.to_pylist(), 1):
        yield number, {k: _thawed(value, kinds[k], k in TOLD) for k, value in row.items()}


def _thawed(value, kind, drops: bool):
    """With JSON read, which datasets.Json is kept as. drops: without the keys of structs that are null,
    most of which other rows alone have; a null that was meant cannot be told apart."""
    import pyarrow

    if value is None:
        return None
    if isinstance(kind, pyarrow.JsonType):
        return json.loads(value)
    if isinstance(kind, pyarrow.ListType):
        return [_thawed(x, kind.value_type, drops) for x in value]
    if isinstance(kind, pyarrow.StructType):
        read = {k: _thawed(x, kind.field(k).type, drops) for k, x in value.items()}
        return {k: x for k, x in read.items() if not (drops and x is None)}
    return value


READERS: dict[str, Callable[[Path], Iterator[tuple[int, dict]]]] = {
    ".jsonl": _json_lines,
    ".json": _json,
    ".csv": _csv,
    ".parquet": _parquet,
}
