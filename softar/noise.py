"""Random numbers of mixers: exponential and uniform noise, draws from weights.

`rng` is one generator for all rows, or one per row (leading dim): then a row draws the same numbers
alone as in a batch. None is torch's global one. A tensor is the numbers themselves, drawn ahead.

Shapes: ... any leading dims, K tokens kept.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Rng = torch.Generator | Sequence[torch.Generator] | Tensor | None
TINY = torch.finfo(torch.float32).tiny


def exponential(like: Tensor, rng: Rng) -> Tensor:
    """Standard exponential noise of like's shape, never 0. A CPU generator draws the same numbers
    for every device."""
    if isinstance(rng, Tensor):
        return rng
    noise = _drawn(Tensor.exponential_, like.shape, like.dtype, rng, like.device)
    return noise.clamp_min_(TINY)


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
    if isinstance(rng, Tensor):
        return rng
    return _drawn(Tensor.uniform_, shape, torch.float64, rng, device)


def _drawn(draw: Callable, shape, dtype: torch.dtype, rng: Rng, device: torch.device) -> Tensor:
    """Drawn in place, by one generator or each row by its own, and moved together: one tensor and
    one copy to an accelerator, not one a row."""
    is_shared = rng is None or isinstance(rng, torch.Generator)
    home = device if rng is None else rng.device if is_shared else rng[0].device
    noise = torch.empty(shape, dtype=dtype, device=home)
    pairs = [(noise, rng)] if is_shared else zip(noise.unbind(), rng, strict=True)
    for part, generator in pairs:
        draw(part, generator=generator)
    return noise.to(device, non_blocking=True)
