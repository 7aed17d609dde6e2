"""Checks of what a model is given, before its first forward: that there is room for it, that its
padding is none of the text, and that texts end as those that it was trained on."""

import warnings

import torch
from torch import Tensor, nn

from softar.models.origin import origin_of

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


def warn_of_ends(model: nn.Module, facts: Facts, input_ids: Tensor, real: Tensor) -> None:
    """Warn of texts [B, T] with masks that lack the token behind each row that the model was trained on:
    it has seen none without it, and may fill these much worse. real: [B, T] bool, what is not
    padding."""
    if facts.rows_end is None:
        return
    column = torch.arange(input_ids.shape[1], device=input_ids.device)
    last = (column * real).amax(1, keepdim=True)
    ids = input_ids.gather(1, last)[:, 0]
    known = torch.tensor([facts.rows_end, facts.mask_id, *facts.end_ids], device=ids.device)
    has_masks = (input_ids == facts.mask_id).any(1)
    if rows := (has_masks & ~torch.isin(ids, known)).nonzero()[:, 0].tolist():
        tokenizer = origin_of(model).tokenizer
        names = [int(ids[rows[0]]), facts.rows_end]
        if tokenizer is not None:
            names = [repr(tokenizer.decode([i])) for i in names]
        warnings.warn(
            f"a text with masks ends in {names[0]} (row {rows[0]} of input_ids), and all that the model was trained on "
            f"end in {names[1]}: it may fill it much worse than with {names[1]} behind it",
            stacklevel=4,  # of whoever called its caller, behind torch.no_grad
        )
