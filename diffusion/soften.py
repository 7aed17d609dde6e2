"""What a masked slot shows in the next forward: the bare mask, or a mixture that carries the
model's belief.

A softener is `fn(slots, **knobs) -> Soft`, ids and weights [n, K] of n positions. It is sparse: at
most k + 1 tokens a position, never a [B, L, V] mixture. How far a method reaches stands in
SOFTENERS beside its function.

Shapes: n positions (flat, row by row), V vocabulary, K tokens of a mixture, D width.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from softar.names import lookup
from softar.soft import NEVER, Soft, tempered

from .knobs import check_knobs
from .select import Belief, shape_of

GROUP = "softar.softeners"  # of entry points
SCALE_SCHEDULES = ("none", "linear", "stepwise")


class Slots(NamedTuple):
    """What a softener is told about n positions after a step's tokens were committed."""

    belief: Belief  # of this step, about each position
    ids: Tensor  # [n] what stands there now
    masked: Tensor  # [n] bool, ids == mask_id
    share: Tensor  # [n] masks left in the row, as a share of those at the start
    mask_id: int
    embedding: nn.Module


class Softener(NamedTuple):
    """A method, and how far it reaches."""

    fn: Callable[..., Soft] | None  # None: slots show the bare mask
    everywhere: bool = False  # softens all masks of the canvas, else those of the current block
    decoded: bool = False  # softens what the block has decoded, too
    carries: bool = False  # the state outlives its block
    revises: bool = False  # a decoded token of the block gives way to a more probable one
    wants_entropy: bool = False  # reads the belief's entropy
    is_own: bool = False  # of the user's, so that what it gives is looked at

    def __call__(self, slots: Slots) -> Soft:
        soft = self.fn(slots)
        if self.is_own:
            check_softened(soft, slots, f"{self.fn!r:.80}")
        return soft


def check_softened(soft: Soft, slots: Slots, name: str) -> None:
    """Raise ValueError for mixtures that cannot be shown: ids [n, K] int64 inside the vocabulary and
    weights [n, K] float. name: of the softener. A synchronisation."""
    n, V = slots.belief.logits.shape
    if not isinstance(soft, Soft):
        raise ValueError(
            f"soften={name} gave {shape_of(soft)}: give softar.Soft(ids, weights), each [n, K]"
        )
    ids, weights = soft
    if not (torch.is_tensor(ids) and torch.is_tensor(weights) and ids.shape == weights.shape):
        shapes = f"ids: {shape_of(ids)}; weights: {shape_of(weights)}"
        raise ValueError(f"soften={name} gave {shapes}: they are [n, K] of the n={n} slots")
    is_right = ids.dim() == 2 and len(ids) == n and ids.dtype == torch.int64
    if not is_right or not weights.is_floating_point():
        raise ValueError(
            f"soften={name} gave ids of shape {tuple(ids.shape)}, {ids.dtype}, and weights in {weights.dtype}: of "
            f"n={n} slots they are [n, K], int64 and float32"
        )
    if wrong := ids[(ids < 0) | (ids >= V)][:1].tolist():
        raise ValueError(f"soften={name} gave the id {wrong[0]}, outside the vocabulary of {V}")


def soft_token(slots: Slots, *, k: int = 5, bias: float = 0.5, renormalise: bool = True) -> Soft:
    """The k most likely tokens at their probabilities, and the mask at 1 - p_max + bias; divided by
    their sum (github.com/Les1a/SoftTokenForMaskedDLM). The mask keeps at least bias / (k-mass +
    bias) of the weight."""
    _check_k(slots, k)
    values, ids = slots.belief.top(k)
    probs = slots.belief.weigh(values)
    anchor = 1 - probs[:, :1] + bias
    weights = torch.cat([probs, anchor], -1).clamp_min(0.0)
    if renormalise:
        weights = weights / weights.sum(-1, keepdim=True).clamp_min(1e-12)
    return Soft(torch.cat([ids, torch.full_like(ids[:, :1], slots.mask_id)], -1), weights)


def soft_mask(
    slots: Slots,
    *,
    k: int = 3,
    scale: float = 0.25,
    centre: float = -1.0,
    steepness: float = 5.0,
    algorithm: str = "top-k",
    temperature: float = 1.0,
    scheduling: str = "none",
) -> Soft:
    """(1 - lambda) mask + lambda belief, lambda = scale sigmoid(steepness (-H - centre))
    (arXiv:2510.17206, eq. 5).

    algorithm "top-k": the belief is the k most likely tokens, renormalised, H in nats that of the
    whole distribution. "temperature": both at this temperature, over the whole vocabulary (K = V).
    scheduling multiplies the scale: "linear" by the share of masks left, "stepwise" by 1 while more
    than half are left, then by 0.
    """
    _check_k(slots, k)
    left = {
        "none": torch.ones_like,
        "linear": lambda s: s,
        "stepwise": lambda s: (s > 0.5).to(s.dtype),
    }[scheduling]
    if algorithm == "top-k":
        values, ids = slots.belief.top(k)
        probs, negative_entropy = values.softmax(-1), slots.belief.negative_entropy
    else:
        logp = tempered(slots.belief.logits, temperature).log_softmax(-1).clamp_min(NEVER)
        probs = logp.exp()
        ids, negative_entropy = (
            torch.arange(probs.shape[-1], device=probs.device),
            (probs * logp).sum(-1),
        )
    strength = scale * left(slots.share) * torch.sigmoid(steepness * (negative_entropy - centre))
    strength = strength.where(slots.masked, torch.zeros_like(strength))[:, None]
    if algorithm == "top-k":
        return Soft(
            torch.cat([ids, slots.ids[:, None]], -1),
            torch.cat([strength * probs, 1 - strength], -1),
        )
    beyond = max(slots.mask_id + 1 - len(ids), 0)  # 1 where no token is the mask
    weights = torch.nn.functional.pad(strength * probs, (0, beyond))
    ids = torch.arange(len(ids) + beyond, device=ids.device).expand_as(weights)
    return Soft(ids, weights.scatter_add(-1, slots.ids[:, None], 1 - strength))


def evolving(slots: Slots, *, k: int = 3, alpha: float = 0.7) -> Soft:
    """A masked slot shows the mask with weight alpha and the k most likely tokens with the rest; a
    slot decoded in this block those tokens alone, until the block is done (EvoToken,
    arXiv:2601.07351, section 3)."""
    _check_k(slots, k)
    values, ids = slots.belief.top(k)
    probs = slots.belief.weigh(values)
    mask = torch.where(
        slots.masked, alpha / (1 - alpha) * probs.sum(-1), torch.zeros_like(probs[:, 0])
    )
    weights = torch.cat([probs, mask[:, None]], -1)
    return Soft(torch.cat([ids, slots.ids[:, None]], -1), weights / weights.sum(-1, keepdim=True))


def soft_decoded(slots: Slots, *, k: int = 1) -> Soft:
    """What the block has decoded shows the k most likely tokens at their probabilities, and the mask
    with the rest; masks are bare. With rescale="norm" DMax's hybrid embeddings (arXiv:2604.08302,
    section 3.3), which has k = 1."""
    _check_k(slots, k)
    values, ids = slots.belief.top(k)
    probs = slots.belief.weigh(values).masked_fill(slots.masked[:, None], 0.0)
    rest = (1 - probs.sum(-1, keepdim=True)).clamp_min(0.0)
    return Soft(
        torch.cat([ids, torch.full_like(ids[:, :1], slots.mask_id)], -1),
        torch.cat([probs, rest], -1),
    )


def slerp(slots: Slots, *, k: int = 3, strength: float = 0.3) -> Soft:
    """The mask's embedding turned by `strength` of the angle towards the mean of the k most likely
    tokens, at its own length (arXiv:2609.37391). As weights of the k + 1 embeddings; they do not
    sum to 1."""
    _check_k(slots, k)
    values, ids = slots.belief.top(k)
    probs = values.softmax(-1)
    mean = (probs[..., None] * slots.embedding(ids).float()).sum(-2)  # [n, D]
    mask = slots.embedding(slots.ids.new_tensor([slots.mask_id])).float()  # [1, D]
    lengths = mean.norm(dim=-1).clamp_min(1e-12), mask.norm(dim=-1).clamp_min(1e-12)
    cosine = (mean * mask).sum(-1) / (lengths[0] * lengths[1])
    angle = cosine.clamp(-1 + 1e-6, 1 - 1e-6).acos()
    on_mask = ((1 - strength) * angle).sin() / angle.sin()
    on_mean = (strength * angle).sin() / angle.sin() * lengths[1] / lengths[0]
    return Soft(
        torch.cat([ids, torch.full_like(ids[:, :1], slots.mask_id)], -1),
        torch.cat([on_mean[:, None] * probs, on_mask[:, None]], -1),
    )


def mk_softener(name: str | Callable | Softener, **knobs) -> Softener:
    """The softener of that name (of SOFTENERS, of an entry point in the group softar.softeners, or
    "module:function"), or a function as one that softens the masks of the block; with its knobs
    bound."""
    method = name
    if isinstance(name, str):
        method = lookup("soften", name, SOFTENERS, GROUP, hint=" or pass a function")
    if not isinstance(method, Softener) and not callable(method):
        raise ValueError(f"soften={name!r} is a {type(method).__name__}, and no function")
    is_own = not (isinstance(name, str) and name in SOFTENERS)
    softener = method if isinstance(method, Softener) else Softener(method)
    softener = softener._replace(is_own=is_own and softener.fn is not None)
    if not knobs:
        return softener
    if softener.fn is None:
        raise ValueError(
            f"soften='hard' takes no options, not {knobs}: choose a soft one, or leave soften_args out"
        )
    if not is_own:  # what a user's takes is its own affair
        check_knobs("soften", name, knobs, softener.fn.__kwdefaults__, RANGES)
    return softener._replace(fn=functools.partial(softener.fn, **knobs))


def _check_k(slots: Slots, k: int) -> None:
    V = slots.belief.logits.shape[-1]
    if k > V:
        raise ValueError(f"soften_args k={k} must be at most {V}, the vocabulary")


def _finite(x) -> bool:
    return isinstance(x, (int, float)) and math.isfinite(x)


RANGES = {
    "k": (
        lambda k: isinstance(k, int) and k >= 1,
        "must be a whole number, at least 1 and at most the vocabulary",
    ),
    "bias": (lambda x: _finite(x) and x >= 0, "must be >= 0"),
    "renormalise": (lambda x: isinstance(x, bool), "must be True or False"),
    "scale": (lambda x: _finite(x) and 0 <= x <= 1, "must lie in [0, 1]; 0 is the bare mask"),
    "centre": (_finite, "must be a number, in nats of negative entropy"),
    "steepness": (lambda x: _finite(x) and x >= 0, "must be >= 0"),
    "temperature": (lambda x: _finite(x) and x > 0, "must be > 0"),
    "algorithm": (
        lambda x: x in ("top-k", "temperature"),
        "is unknown: choose 'top-k' or 'temperature'",
    ),
    "scheduling": (lambda x: x in SCALE_SCHEDULES, f"is unknown: choose one of {SCALE_SCHEDULES}"),
    "alpha": (lambda x: _finite(x) and 0 <= x < 1, "must lie in [0, 1): the mask's share"),
    "strength": (
        lambda x: _finite(x) and 0 <= x <= 1,
        "must lie in [0, 1]: 0 is the mask, 1 the tokens' mean",
    ),
}
SOFTENERS: dict[str, Softener] = {
    "hard": Softener(None),
    "soft-token": Softener(soft_token),
    "soft-mask": Softener(soft_mask, wants_entropy=True),
    "evolving": Softener(evolving, everywhere=True, decoded=True, carries=True, revises=True),
    "slerp": Softener(slerp),
    "soft-decoded": Softener(soft_decoded, decoded=True),
}
