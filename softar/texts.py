"""Rows of text that the trainers take, and what of them is refused before any is tokenised."""

from collections.abc import Callable

import pyarrow.compute as pc
from accelerate import PartialState
from datasets import Dataset, IterableDataset, LargeList, List, Value

PAIR = ("prompt", "completion")
CHATS = (*PAIR, "messages", "conversations")  # columns that may hold chats
TEXT = "text"  # where dataset_text_field is left out


def check_data(args, tokenizer, train_dataset, eval_dataset) -> None:
    """Raise ValueError for rows that TRL's SFT would fail on without saying what they lack, or learn
    nothing from, and for options that say nothing to them; of some that teach no more than an end say
    how many."""
    if isinstance(train_dataset, Dataset):
        _check_read(train_dataset, "train_dataset", args.dataset_text_field)
        _check_said(args, train_dataset.column_names)
    check_rows(train_dataset, "train_dataset", args, tokenizer)
    check_rows(eval_dataset, "eval_dataset", args, tokenizer)


def _read(columns: list[str], field: str) -> list[str]:
    """The columns that TRL's SFT reads: it needs one, or the pair."""
    if {*PAIR} <= {*columns}:
        return [*PAIR]
    return [name for name in (*CHATS[2:], field, "input_ids") if name in columns][:1]


def _check_read(dataset: Dataset, name: str, field: str) -> list[str]:
    """The same of these rows. Raises ValueError where it reads none."""
    columns = dataset.column_names
    if not (used := _read(columns, field)):
        raise ValueError(
            f"{name} has the columns {columns}: name yours 'prompt' and 'completion', or 'messages', or {field!r}"
        )
    return used


def _check_said(args, columns: list[str]) -> None:
    """Raise ValueError for options about texts that these columns do not ask."""
    field, said = args.dataset_text_field, {}
    if "input_ids" in columns or _read(columns, field) != [field]:
        said["dataset_text_field"] = field if field != TEXT else None
    if "labels" in columns or not {"completion", "completion_mask"} & {*columns}:
        said["completion_only_loss"] = args.completion_only_loss or None
    for name, value in said.items():
        if value is not None:
            raise ValueError(
                f"{name}={value!r} says nothing to rows with the columns {columns}: leave it out"
            )


def check_no_list(dataset, name: str) -> None:
    """Raise ValueError for rows in a list, which no trainer takes. name: theirs."""
    if isinstance(dataset, (list, tuple)):
        raise ValueError(
            f"{name} is a {type(dataset).__name__}: give datasets.Dataset.from_list(rows)"
        )


def check_rows(dataset, name: str, args, tokenizer) -> None:
    """Raise ValueError for rows of a data set, or several by name, that TRL's SFT would fail on without
    saying what they lack, or learn nothing from. name: of the data set; args: what of it is read."""
    field = args.dataset_text_field
    check_no_list(dataset, name)
    if isinstance(dataset, dict):  # DatasetDict among them
        for key, rows in dataset.items():
            check_rows(rows, f"{name}[{key!r}]", args, tokenizer)
    elif isinstance(dataset, (Dataset, IterableDataset)):
        if (first := next(iter(dataset), None)) is None:
            raise ValueError(f"{name} is empty: give at least one row")
        read = _read([*first], field)
        has_end = args.eos_token is not None or tokenizer.eos_token is not None
        if read and isinstance(first[read[-1]], str) and not has_end:
            raise ValueError(
                f"{name} holds texts, and the tokenizer has no end token to close them with: set tokenizer.eos_token"
            )
        said = first["conversations"] if read == ["conversations"] else None
        if isinstance(said, list) and said and "role" in said[0]:
            raise ValueError(
                f"{name} holds messages of {[*said[0]]} in column 'conversations', which is for 'from' and 'value': "
                "name it 'messages'"
            )
    if isinstance(dataset, Dataset):
        columns, used = dataset.column_names, _check_read(dataset, name, field)
        check_cells(dataset, [*used, *({"traces"} & {*columns})], name)
        kinds = ["a chat" if is_list(dataset.features[each]) else "text" for each in used]
        if len({*kinds}) > 1:
            raise ValueError(
                f"{name} has {kinds[0]} as prompt and {kinds[1]} as completion: give both as texts, or both as "
                "lists of messages"
            )
        if used[-1] != "input_ids":
            _check_blank(dataset, used[-1], name)
    has_template = args.chat_template_path is not None or tokenizer.chat_template is not None
    if isinstance(dataset, (Dataset, IterableDataset)) and not has_template:
        if read and is_chat(first[read[-1]]):
            raise ValueError(
                f"{name} holds chats, and the tokenizer has no chat template: give chat_template_path, or texts"
            )


def _check_blank(dataset: Dataset, column: str, name: str) -> None:
    if blank := sum(map(is_blank, dataset[column])):
        said = f"{name} holds nothing but white space in column {column!r}"
        if blank == len(dataset):
            raise ValueError(f"{said}: give texts to learn")
        PartialState().print(f"{said} in {blank} of {len(dataset)} rows: they teach its end alone")


def is_blank(cell) -> bool:
    """Is a text nothing but white space; does no message of a chat say anything, not even by a tool?"""
    if isinstance(cell, str):
        return not cell.strip()
    said = (v for message in cell for key, v in message.items() if key not in ("role", "from"))
    return not any(value.strip() if isinstance(value, str) else value for value in said)


def is_chat(cell) -> bool:
    """Is it a list of messages?"""
    return isinstance(cell, list) and bool(cell) and isinstance(cell[0], dict)


def is_list(feature) -> bool:
    return isinstance(feature, (List, LargeList))


def mapped(dataset, function: Callable[[dict], dict], num_proc: int | None):
    """`map` in num_proc processes; a stream, which goes row by row, has one."""
    if isinstance(dataset, IterableDataset):
        return dataset.map(function)
    return dataset.map(function, num_proc=num_proc)


def check_cells(dataset: Dataset, columns: list[str], name: str) -> None:
    """Raise ValueError for cells of text that hold None, numbers, or lists of anything but messages.
    name: of the dataset."""
    for column in columns:
        feature = dataset.features[column]
        kind = feature.dtype if isinstance(feature, Value) else "text"
        if column in CHATS and is_list(feature) and isinstance(feature.feature, Value):
            kind = f"lists of {feature.feature.dtype}"  # of no messages
        if kind not in ("text", "string", "large_string", "null"):
            raise ValueError(
                f"{name} holds {kind} in column {column!r}: give text, or a chat as a list of messages"
            )
    first = 0
    for table in dataset.select_columns(columns).with_format("arrow").iter(batch_size=1000):
        for column in columns:
            if table[column].null_count:
                number = first + pc.index(pc.is_null(table[column]), True).as_py()
                raise ValueError(
                    f"row {number} of {name} holds None in column {column!r}: give text, or drop such rows"
                )
        first += len(table)
