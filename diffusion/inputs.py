"""Checks of what a model is given, before its first forward: that there is room for it, and that its
padding is none of the text."""

import torch
from torch import Tensor, nn

from .net import READS_PADDING, Facts, plain


def check_width(ids: Tensor, room: int | None) -> None:
    """Raise ValueError for a batch [B, T] wider than the model's positions."""
    if room is not None and ids.shape[1] > room:
        raise ValueError(
            f"a row of {ids.shape[1]} tokens does not fit into the model's {room} positions: cut it"
        )


def check_reads_none(model: nn.Module, real: Tensor) -> None:
    """Raise ValueError for padding, which `real` [B, T] bool is not, in rows of a model whose other
    tokens would read it."""
    inner = plain(model)
    if inner.config.model_type in READS_PADDING and not real.all():
        raise ValueError(
            f"{type(inner).__name__} reads padding as if it were text: give rows of one length"
        )


def real_of(
    model: nn.Module, facts: Facts, input_ids: Tensor, attention_mask: Tensor | None
) -> Tensor:
    """[B, T] bool, what is not padding. Raises ValueError for a mask of another shape, and padding
    that would be read as text or filled."""
    if attention_mask is None:
        return torch.ones_like(input_ids, dtype=torch.bool)
    if not torch.is_tensor(attention_mask) or attention_mask.shape != input_ids.shape:
        what = tuple(attention_mask.shape) if torch.is_tensor(attention_mask) else "none"
        raise ValueError(
            f"attention_mask of shape {what} does not fit input_ids of {tuple(input_ids.shape)}: give a tensor like it"
        )
    real = attention_mask.bool()
    if facts.mask_id is not None and (input_ids == facts.mask_id).logical_and(~real).any():
        raise ValueError(
            f"padding holds the mask token (id {facts.mask_id}): pad with another token"
        )
    check_reads_none(model, real)
    return real
