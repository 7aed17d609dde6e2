"""Random numbers of mixers: exponential and uniform noise, draws from weights.

`rng` is one generator for all rows, or one per row (leading dim): then a row draws the same numbers
alone as in a batch. None is torch's global one.

Shapes: ... any leading dims, K tokens kept.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

Rng = torch.Generator | Sequence[torch.Generator] | None
TINY = torch.finfo(torch.float32).tiny


def exponential(like: Tensor, rng: Rng) -> Tensor:
    """Standard exponential noise of like's shape, never 0. A CPU generator draws the same numbers
    for every device."""
    if rng is None or isinstance(rng, torch.Generator):
        noise = torch.empty(
            like.shape, dtype=like.dtype, device=like.device if rng is None else rng.device
        )
        return noise.exponential_(generator=rng).clamp_min(TINY).to(like.device, non_blocking=True)
    pairs = zip(like, rng, strict=True)
    rows = [
        torch.empty(row.shape, dtype=row.dtype, device=r.device).exponential_(generator=r)
        for row, r in pairs
    ]
    # Moved together: one copy to an accelerator, not one a row
    return torch.stack(rows).clamp_min(TINY).to(like.device, non_blocking=True)


def standard_gamma(a: Tensor, rng: Rng) -> Tensor:
    if rng is None or isinstance(rng, torch.Generator):
        return torch._standard_gamma(a if rng is None else a.to(rng.device), generator=rng).to(
            a.device, non_blocking=True
        )
    # from an accelerator: the one place where a mixer waits for it, once a step
    home = a.to(rng[0].device)
    rows = [torch._standard_gamma(row, generator=r) for row, r in zip(home, rng, strict=True)]
    return torch.stack(rows).to(a.device, non_blocking=True)


def draw(weights: Tensor, rng: Rng, n: int = 1) -> Tensor:
    """Sample n slots with replacement, in proportion to the weights: [..., K] -> [..., n]. By
    inverting the cumulative distribution in float64: one uniform number a draw, any shape, and no
    synchronisation as torch.multinomial has."""
    cumulative = weights.detach().double().cumsum(-1)
    at = uniform((*weights.shape[:-1], n), rng, weights.device) * cumulative[..., -1:]
    return torch.searchsorted(cumulative, at, right=True).clamp_max(weights.shape[-1] - 1)


def uniform(shape: tuple[int, ...], rng: Rng, device: torch.device) -> Tensor:
    """Float64 in [0, 1)."""
    if rng is None or isinstance(rng, torch.Generator):
        source = device if rng is None else rng.device
        return torch.rand(shape, generator=rng, device=source, dtype=torch.float64).to(
            device, non_blocking=True
        )
    rows = [torch.rand(shape[1:], generator=r, device=r.device, dtype=torch.float64) for r in rng]
    return torch.stack(rows).to(device, non_blocking=True)
