"""Checks of what a model is given, before its first forward: token ids, and room for them."""

import torch
from torch import Tensor

from softar.guard import check_range


def check_ids(name: str, ids: Tensor, dims: int, vocab_size: int) -> None:
    """Raise ValueError unless `ids` is a tensor of so many dimensions that holds token ids."""
    shape = "[B, P]" if dims == 2 else "[T]"
    if not torch.is_tensor(ids):
        raise ValueError(
            f"{name} is of type {type(ids).__name__}: give a tensor {shape} of int64, as tokenizer(..., "
            f"return_tensors='pt') makes one"
        )
    if ids.dim() != dims or ids.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"{name} of shape {tuple(ids.shape)}, {ids.dtype}: need {shape} of int64")
    if ids.numel():
        check_range(name, *(int(end) for end in ids.aminmax()), vocab_size)


def check_width(ids: Tensor, room: int | None) -> None:
    """Raise ValueError for a batch [B, T] wider than the model's positions."""
    if room is not None and ids.shape[1] > room:
        raise ValueError(
            f"a row of {ids.shape[1]} tokens does not fit into the model's {room} positions: cut it"
        )
