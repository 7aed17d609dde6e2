"""A schedule of the user's own: what it gives is looked at before the loop uses it."""

from collections.abc import Callable

import torch
from torch import Tensor

from .rules import Block, Outlasting, Rule, Step
from .select import Draws, shape_of


class CheckedRule:
    """A rule, which raises ValueError for commitments that are none."""

    def __init__(self, rule: Rule, name: str):
        if not isinstance(rule, Rule):
            raise ValueError(
                f"schedule={name} gave {shape_of(rule)}: give a rule that is called with a Step and has "
                f"more(index, left), as softar.diffusion.schedules.Rule describes it"
            )
        self.rule, self.name = rule, name

    def more(self, index: int, left: bool) -> bool:
        return self.rule.more(index, left)

    @property
    def busy(self) -> Tensor:
        if not isinstance(self.rule, Outlasting):
            raise ValueError(
                f"the rule of schedule={self.name} has no busy, which rows want another forward: give it [B] bool, "
                f"or leave outlasts out"
            )
        return self.rule.busy

    def __call__(self, step: Step) -> tuple[Tensor, Tensor | None]:
        gave = self.rule(step)
        if not isinstance(gave, tuple) or len(gave) != 2:
            raise ValueError(
                f"the rule of schedule={self.name} gave {shape_of(gave)}: give (commit, drop), each [B, L] bool, "
                f"drop None for nothing"
            )
        for name, value in zip(("commit", "drop"), gave, strict=True):
            is_none = value is None and name == "drop"
            is_mask = torch.is_tensor(value) and value.dtype == torch.bool
            if not is_none and not (is_mask and value.shape == step.open.shape):
                raise ValueError(
                    f"the rule of schedule={self.name} gave as {name} {shape_of(value)}: it is "
                    f"{list(step.open.shape)} bool"
                )
        return gave


def checked(fn: Callable[..., Rule], name: str) -> Callable[..., Rule]:
    """The schedule, whose rules are checked."""

    def schedule(block: Block, config, draws: Draws, **knobs) -> Rule:
        return CheckedRule(fn(block, config, draws, **knobs), name)

    return schedule
