"""The loss of a replayed decode, piece by piece: each piece's backward comes right after its forward,
so that memory is that of one piece, whatever the number of steps.

Shapes: B rows, L columns of the canvas; n slots of a piece, flat; V vocabulary.
"""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from softar.diffusion.record import Trajectory
from softar.diffusion.replay import Piece
from softar.soft import entropy

from .actions import token_kl
from .losses import surrogate

RATIOS = ("token", "trajectory")


def summed(losses: Callable[[], Iterable[Tensor]], parameters: list[Tensor]) -> Tensor:
    """The sum of losses that are made one after the other, differentiable with respect to the
    parameters: their gradients are taken at once, and added up."""
    if torch.is_grad_enabled():
        return _Summed.apply(losses, *parameters)
    return torch.stack([*losses()]).sum()


class _Summed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, losses, *parameters):
        total, ctx.grads = torch.zeros((), device=parameters[0].device), [None] * len(parameters)
        with torch.enable_grad():
            for loss in losses():
                total = total + loss.detach()
                new = torch.autograd.grad(loss, parameters, allow_unused=True)
                for i, grad in enumerate(new):
                    if grad is not None:
                        # which may be a view of one number
                        ctx.grads[i] = (
                            grad.clone() if ctx.grads[i] is None else ctx.grads[i].add_(grad)
                        )
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        grads, ctx.grads = ctx.grads, None
        return None, *(g if g is None else g.mul_(grad) for g in grads)


class Clip(NamedTuple):
    """How the policy may move away from the one that rolled out."""

    low: float
    high: float
    delta: float | None = None
    ratio: str = "token"  # of each committed token, or of all of a row together


class Losses:
    """Makes the loss of each piece, and notes what is logged of it."""

    def __init__(
        self,
        steps: Trajectory,
        weights: Tensor,
        advantages: Tensor,
        clip: Clip,
        *,
        old: Tensor | None = None,
        now: Tensor | None = None,
        beta: float = 0.0,
        entropy_weight: float = 0.0,
    ):
        """weights: [B, L], of each slot in the loss; advantages: [B]; old: [B, L] log-probabilities of
        the policy that rolled out, None where it is this one; now: of this one, for the ratio of a
        trajectory to an older policy's; entropy_weight: of a slot's entropy in the loss."""
        self.steps, self.weights, self.advantages, self.clip = steps, weights, advantages, clip
        self.old, self.beta, self.entropy_weight = old, beta, entropy_weight
        self.new, self.kl, self.entropy = (torch.zeros_like(weights) for _ in range(3))
        # [B, L] 1 where the token is the likeliest of its belief
        self.is_top = torch.zeros_like(weights)
        self.row = None
        if clip.ratio == "trajectory":
            moved = torch.zeros_like(advantages) if now is None else (now - old).sum(1)
            self.row = self._linear(moved)

    def _surrogate(self, new: Tensor, old: Tensor, advantages: Tensor) -> Tensor:
        """[n] of each -> [n]."""
        clip = self.clip
        terms = surrogate(
            new[:, None, None],
            old[:, None, None],
            advantages,
            clip.low,
            clip.high,
            delta=clip.delta,
        )
        return terms[:, 0]

    def _linear(self, moved: Tensor) -> tuple[Tensor, Tensor]:
        """The surrogate of whole rows [B] at the logarithms of their ratios, shared out among their
        slots, and its slopes there."""
        with torch.enable_grad():
            moved = moved.detach().requires_grad_()
            value = self._surrogate(moved, torch.zeros_like(moved), self.advantages)
            (slope,) = torch.autograd.grad(value.sum(), moved)
        slots = (self.steps.committed_at >= 0).sum(1).clamp(min=1)
        return value.detach() / slots, slope

    def __call__(self, piece: Piece, reference: Piece | None) -> Tensor:
        where = rows, _ = piece.rows, piece.cols
        token = self.steps.after[where]
        new = piece.log_probs(token)
        self.new[where] = new.detach()
        self.is_top[where] = (piece.logits.argmax(-1) == token).to(self.is_top.dtype)
        if self.row is None:
            old = new.detach() if self.old is None else self.old[where]
            per_slot = self._surrogate(new, old, self.advantages[rows])
        else:  # of a sum over the row's slots, each of which is at work in one piece
            value, slope = (part[rows] for part in self.row)
            per_slot = value + slope * (new - new.detach())
        if reference is not None:
            kl = token_kl(piece.logits, reference.logits)
            if piece.choices is not None:
                kl = kl + token_kl(piece.choices, reference.choices)
            self.kl[where] = kl.detach()
            per_slot = per_slot + self.beta * kl
        loss = (self.weights[where] * per_slot).sum()
        with torch.set_grad_enabled(bool(self.entropy_weight) and torch.is_grad_enabled()):
            nats = entropy(piece.logits)
            if piece.choices is not None:
                nats = nats + entropy(piece.choices)
        self.entropy[where] = nats.detach()
        return loss - self.entropy_weight * nats.sum() if self.entropy_weight else loss
