"""A check of what a model is given, before its first forward: that there is room for it."""

from torch import Tensor


def check_width(ids: Tensor, room: int | None) -> None:
    """Raise ValueError for a batch [B, T] wider than the model's positions."""
    if room is not None and ids.shape[1] > room:
        raise ValueError(
            f"a row of {ids.shape[1]} tokens does not fit into the model's {room} positions: cut it"
        )
