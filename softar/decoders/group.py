"""Rows of a batch that are decoded in step, several positions at a time.

Shapes: n rows, m of them, P prompt length, t tokens so far, V vocabulary.
"""

import copy
from typing import NamedTuple

import torch
from torch import Tensor

from ..models.reading import CACHES
from ..thought import Progress


class Group(NamedTuple):
    """Rows that are in step."""

    rows: Tensor  # [n] int64, which of the batch
    tokens: Tensor  # [n, P + t] int64, the prompts and the tokens that stand for the steps
    logits: Tensor  # [n, V] float32, of the next step, processed
    h: Tensor  # [n] its entropy
    inputs: dict  # arguments of the model's next forward, the cache among them
    progress: Progress  # of n rows

    def select(self, index: Tensor) -> "Group":
        """These rows [m], with a cache of their own."""
        n = len(self.rows)
        inputs = {
            k: v[index] if isinstance(v, Tensor) and len(v) == n else v
            for k, v in self.inputs.items()
        }
        for name in CACHES:
            if inputs.get(name) is not None:
                inputs[name] = copy.deepcopy(inputs[name])
                inputs[name].reorder_cache(index)
        columns = (self.rows, self.tokens, self.logits, self.h)
        return Group(*(c[index] for c in columns), inputs, self.progress.select(index))

    def split(self, key: Tensor) -> list[tuple[int, Tensor, "Group"]]:
        """By a number [n] of each row: number, rows [m] of this group, and they as a group."""
        numbers = sorted({*key.tolist()})
        if len(numbers) == 1:
            return [(numbers[0], torch.arange(len(key), device=key.device), self)]
        parts = [(number, (key == number).nonzero()[:, 0]) for number in numbers]
        return [(number, index, self.select(index)) for number, index in parts]

    def longer(self, more: int) -> dict:
        """`inputs` of a forward that reads so many columns more."""
        steps = {"attention_mask": 0, "position_ids": 1}
        known = {name: by for name, by in steps.items() if self.inputs.get(name) is not None}
        return self.inputs | {k: _longer(self.inputs[k], more, by) for k, by in known.items()}


def _longer(columns: Tensor, more: int, by: int) -> Tensor:
    """[..., t] -> [..., t + more], going on from the last column by steps of 0 or 1."""
    steps = by * torch.arange(1, more + 1, dtype=columns.dtype, device=columns.device)
    return torch.cat([columns, columns[..., -1:] + steps], -1)
