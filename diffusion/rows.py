"""Rows that diffusion SFT trains on: text for tokenizers that close every text with an end token, as
BERT's do, and what all rows must keep to.

TRL tokenises prompt and completion as one text; there such a tokenizer would close the prompt alone
but not before its completion, and the end of both twice.
"""

import pyarrow.compute as pc
from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase

from .inputs import check_range


def close_rows(dataset, tokenizer: PreTrainedTokenizerBase, text_field: str = "text"):
    """Rows of text, with `prompt` and `completion` or `text_field`, tokenised as they are decoded:
    [CLS] prompt [SEP] completion [SEP]. Anything else comes back as it is: chats, tokens, streams of
    unknown columns, and rows for a tokenizer that closes nothing."""
    if isinstance(dataset, dict):  # DatasetDict among them
        return type(dataset)(
            {name: close_rows(rows, tokenizer, text_field) for name, rows in dataset.items()}
        )
    columns = dataset.column_names if isinstance(dataset, (Dataset, IterableDataset)) else None
    if not columns or "input_ids" in columns or not closes(tokenizer):
        return dataset
    fields = ["prompt", "completion"] if "prompt" in columns else [text_field]
    if not {*fields} <= {*columns} or not all(
        isinstance(value, str) for value in map(next(iter(dataset)).get, fields)
    ):
        return dataset
    end = tokenizer.eos_token

    def closed(row: dict) -> dict:
        first = tokenizer(row[fields[0]].removesuffix(end))["input_ids"]
        if len(fields) == 1:
            return {"input_ids": first}
        answer = row["completion"].removesuffix(end)
        ids = tokenizer(answer, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        return {"input_ids": first + ids, "completion_mask": [0] * len(first) + [1] * len(ids)}

    return dataset.map(closed)


def closes(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Does it end every text with its end token?"""
    ids = tokenizer(tokenizer.mask_token)["input_ids"]
    return tokenizer.eos_token_id is not None and ids[-1] == tokenizer.eos_token_id


def check_rows(rows, room: int | None, vocab_size: int) -> None:
    """Raise ValueError for tokenised rows of a Dataset that are longer than the model's positions,
    or hold ids that it does not know. Streams are looked at batch by batch, by `check_width`."""
    if not isinstance(rows, Dataset):
        return
    done = 0
    for table in rows.select_columns("input_ids").with_format("arrow").iter(batch_size=1000):
        lengths = pc.list_value_length(table["input_ids"])
        if room is not None and (longest := pc.max(lengths).as_py()) > room:
            raise ValueError(
                f"row {done + pc.index(lengths, longest).as_py()} of the data has {longest} tokens, and the model's "
                f"positions end at {room}: set max_length={room}"
            )
        ends = pc.min_max(pc.list_flatten(table["input_ids"])).as_py()
        if ends["min"] is not None:
            check_range("the data", ends["min"], ends["max"], vocab_size)
        done += len(lengths)
