"""Rows that diffusion SFT trains on: text for tokenizers that close every text with an end token, as
BERT's do.

TRL tokenises prompt and completion as one text; there such a tokenizer would close the prompt alone
but not before its completion, and the end of both twice.
"""

from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase


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
