"""Filters whose thresholds can be learnt: min-p and top-k as gates.

A gate is sigmoid(distance to the threshold / scale): a token well inside of it keeps its probability,
one well outside loses it, and the threshold gets a gradient from those between. At scale 0 it is
the filter of `mk_proba_dist`.

Shapes: ... any leading dims, V vocabulary, K tokens looked at.
"""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from .checks import check_choice
from .soft import Soft, mk_proba_dist

GRADIENTS = ("straight", "soft")
TINY = torch.finfo(torch.float32).tiny


def relaxed_dist(
    logits: Tensor,
    *,
    min_p: float | Tensor | None = None,
    top_k: int | Tensor | None = None,
    most: int | None = None,
    scale: float = 0.1,
    gradient: str = "straight",
    **filters,
) -> Soft:
    """The mixture of `mk_proba_dist`, with a min-p or a top-k that gets a gradient.

    w_i ~ p_i sigmoid((log p_i - log p_max - log min_p) / scale) sigmoid((top_k + 1/2 - rank_i) / scale),
    rank 1 the likeliest.

    Args:
        logits: [..., V].
        min_p: in (0, 1], as a tensor that broadcasts to [..., 1] a gate.
        top_k: a number of tokens, as a tensor a gate: real, at least 1, filters as floor(top_k + 1/2).
        most: tokens that a learnt top_k may keep, K. None is the vocabulary.
        scale: > 0, of the gates: nats for min_p, ranks for top_k.
        gradient: "straight" filters as the numbers say and passes the gradient of the gates
            (straight-through); "soft" mixes by the gates themselves.
        filters: as for mk_proba_dist.

    Returns:
        Soft with K = most, or as mk_proba_dist; what does not pass has weight 0, with "soft" next to
        0.

    Raises:
        ValueError: a value out of its range, a learnt top_k together with top_p, which is taken of
            what top_k leaves, or a learnt min_p together with temperature_last.
    """
    check_choice("gradient", gradient, GRADIENTS)
    if not scale > 0:
        raise ValueError(f"scale={scale} must be > 0; near 0 the gates are the filters")
    check_gates(min_p, top_k)
    if not torch.is_tensor(min_p):
        filters, min_p = filters | {"min_p": min_p}, None
    if not torch.is_tensor(top_k):
        filters, top_k = filters | {"top_k": top_k}, None
    elif filters.get("top_p") is not None:
        raise ValueError(
            f"top_p={filters['top_p']} is taken of what a learnt top_k leaves: give one of them"
        )
    elif most is not None:
        filters = filters | {"top_k": min(most, logits.shape[-1])}
    if min_p is not None and filters.get("temperature_last"):
        raise ValueError(
            "temperature_last=True takes min_p at temperature 1, and a learnt min_p is taken at the temperature: "
            "give one of them"
        )
    ids, weights = mk_proba_dist(logits, **filters)
    there = weights > 0
    logp, gates = weights.clamp_min(TINY).log(), torch.zeros_like(weights)
    passes = there
    if min_p is not None:
        over = (logp - logp.amax(-1, keepdim=True) - min_p.log()) / scale
        gates = gates + logsigmoid(over)
        passes = passes & (weights >= min_p * weights.amax(-1, keepdim=True))
    if top_k is not None:
        over = (top_k + 0.5 - _ranks(weights)) / scale
        gates, passes = gates + logsigmoid(over), passes & (over >= 0)
    soft = (logp + gates).masked_fill(~there, -torch.inf).softmax(-1)
    if gradient == "soft":
        return Soft(ids, soft)
    hard = (weights * passes).detach()
    return Soft(ids, hard / hard.sum(-1, keepdim=True) + (soft - soft.detach()))


def check_gates(min_p, top_k) -> None:
    """Raise ValueError for a threshold, given as a tensor, out of its range. Like `check_dist` it
    looks into tensors of the CPU alone."""
    min_p, top_k = (x if torch.is_tensor(x) and x.is_cpu else None for x in (min_p, top_k))
    if min_p is not None and not ((min_p > 0) & (min_p <= 1)).all():
        raise ValueError(f"min_p={min_p.tolist()} must lie in (0, 1]; None switches the filter off")
    if top_k is not None and not ((top_k >= 1) & (top_k < torch.inf)).all():
        raise ValueError(f"top_k={top_k.tolist()} must be at least 1 and finite")


def _ranks(weights: Tensor) -> Tensor:
    """1 for the largest; of equal ones the first leads, as for argmax."""
    order = weights.argsort(dim=-1, descending=True, stable=True)
    ranks = torch.arange(1, weights.shape[-1] + 1, device=weights.device).expand_as(order)
    return torch.empty_like(order).scatter(-1, order, ranks)
