"""Rows that diffusion SFT trains on: text for tokenizers that close every text with an end token, as
BERT's do, and documents packed into longer rows.

TRL tokenises prompt and completion as one text; there such a tokenizer would close the prompt alone
but not before its completion, and the end of both twice.
"""

from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from trl import pack_dataset

from softar.sft.data import SoftCollator
from softar.texts import mapped


def close_rows(
    dataset,
    tokenizer: PreTrainedTokenizerBase,
    text_field: str = "text",
    num_proc: int | None = None,
):
    """Rows of text, with `prompt` and `completion` or `text_field`, tokenised as they are decoded:
    [CLS] prompt [SEP] completion [SEP]. Anything else comes back as it is: chats, tokens, streams of
    unknown columns, and rows for a tokenizer that closes nothing."""
    if isinstance(dataset, dict):  # DatasetDict among them
        return type(dataset)(
            {
                name: close_rows(rows, tokenizer, text_field, num_proc)
                for name, rows in dataset.items()
            }
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

    return mapped(dataset, closed, num_proc)


LOOKED_AT = 64


def end_of(rows, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The end token where all of the first tokenised rows have it behind them, as supervised training
    puts it there; None where one was cut, and for streams."""
    if not isinstance(rows, Dataset):
        return None
    lasts = {ids[-1] for ids in rows[:LOOKED_AT]["input_ids"] if ids}
    return tokenizer.eos_token_id if lasts == {tokenizer.eos_token_id} else None


def closes(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Does it end every text with its end token? Those that do have a mask token."""
    if tokenizer.mask_token is None or tokenizer.eos_token_id is None:
        return False
    return tokenizer(tokenizer.mask_token)["input_ids"][-1] == tokenizer.eos_token_id


def filled(
    dataset, block_length: int, end_id: int, max_length: int | None, num_proc: int | None = None
):
    """Tokenised rows with end tokens up to the end of their last block, trained as part of the
    answer (dllm's BD3LM): decoding has slots there, too. Rows that end in what is not trained stay
    as they are, and those of `max_length` tokens, which may have been cut: they don't end there."""
    if isinstance(dataset, dict):
        return {
            name: filled(rows, block_length, end_id, max_length, num_proc)
            for name, rows in dataset.items()
        }
    if dataset is None or "seq_lengths" in (dataset.column_names or []):  # packed since
        return dataset

    def fill(row: dict) -> dict:
        length = len(row["input_ids"])
        room = -length % block_length
        if max_length is not None:
            room = min(room, max_length - length)
        ends = [] if row["labels"][-1] == -100 else [end_id] * room
        return {"input_ids": row["input_ids"] + ends, "labels": row["labels"] + ends}

    return mapped(dataset, fill, num_proc)


def packed(dataset, args):
    """Tokenised rows as documents of rows of up to `max_length` tokens, each the best fit for the next
    longest document; `seq_lengths` says where they end. The longest stand first, or, as in TRL, rows
    are shuffled where a DiffusionSFTConfig says so."""
    columns = dataset.select_columns(["input_ids", "labels"])
    rows = pack_dataset(columns, args.max_length, "bfd")
    return rows.shuffle(seed=args.seed) if args.shuffle_dataset else rows


@dataclass
class PackedCollator(SoftCollator):
    """Gives also `documents` [B, T], the number of each token's document, from 1 on, and 0 at padding,
    as `forward_masked` takes it. Rows without `seq_lengths` are a document each."""

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Tensor]:
        batch = super().torch_call(examples)
        documents = batch["attention_mask"].clone()
        for row, example in zip(documents, examples, strict=True):
            lengths = torch.tensor(example.get("seq_lengths", ()), dtype=torch.long)
            numbers = torch.arange(1, len(lengths) + 1)
            row[: lengths.sum()] = numbers.repeat_interleave(lengths)
        return batch | {"documents": documents}
