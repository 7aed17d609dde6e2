"""What a soft step feeds back: each mixer turns a filtered distribution into the next input.

All share one signature, `mixer(dist, *, rng=None, **knobs) -> Mixed`, any leading shape, and are
differentiable in the weights where the method is. `rng` is one generator for all rows, or one per
row (leading dim): then a row draws the same numbers alone as in a batch. What decoders have to know
of a method stands in MIXERS beside its function: a new mixer is a function here and an entry there.
One of your own is named "module:function" or "module:MIXER", a Mixer that states its facts; what it
must keep to is said by `check_mixed`.

Shapes: ... any leading dims, K tokens kept.
"""

import functools
import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .checks import check_choice, shorten
from .names import lookup
from .soft import Soft
from .soft import hard as one_token

Rng = torch.Generator | Sequence[torch.Generator] | None
TINY = torch.finfo(torch.float32).tiny
TOLERANCE = 1e-3  # of the sum of a mixture's weights
GROUP = "softar.mixers"  # of entry points
LEAST, MOST = 1e-30, 1e30  # a knob beyond these is its limit in float32, and would only overflow


class Mixed(NamedTuple):
    """What one step decided."""

    soft: Soft  # [..., K'] what the model reads next
    token: Tensor  # [...] int64, the discrete token that stands for it
    # [...] log-probability of what was drawn under `dist`; None where nothing was drawn or it has
    # none
    logp: Tensor | None
    vector: Tensor | None = None  # [..., D] of a mixer that is `latent`: what the model reads next


class Mixer(NamedTuple):
    """A method, and what decoders have to know of it. Called as its function is."""

    fn: Callable[..., Mixed]
    single: bool = False  # gives one token, so that no embedding is ever mixed
    # its knobs -> does it draw random numbers?
    draws: Callable[[dict[str, Any]], bool] = lambda knobs: True
    # its knobs, tokens that the filters keep -> tokens in its mixture
    width: Callable[[dict[str, Any], float], float] = lambda knobs, filtered: filtered
    # do its knobs shape the mixture alone, and not the token that stands for it?
    only_mixes: bool = False
    hidden: bool = False  # also gets hidden=, [..., D] the last hidden state of the step
    latent: bool = False  # what it feeds back is a vector, and no token stands for the step
    gated: bool = False  # its knob `gate` may name the file of a softar.feedback.Gate

    def __call__(self, dist: Soft, *, rng: Rng = None, **knobs) -> Mixed:
        return self.fn(dist, rng=rng, **knobs)

    @property
    def __wrapped__(self) -> Callable[..., Mixed]:
        """Where `inspect.signature` looks."""
        return self.fn

    @property
    def knobs(self) -> dict[str, Any]:
        """Name -> value, or the function's default."""
        parameters = inspect.signature(self.fn).parameters.values()
        knobs = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
        return {name: value for name, value in knobs.items() if name not in ("rng", "hidden")}


def hard(dist: Soft, *, rng: Rng = None, sample: bool = False) -> Mixed:
    """One token: the most likely, or with `sample` a draw. logp is that token's."""
    slot = _draw(dist.weights, rng)[..., 0] if sample else dist.weights.argmax(-1)
    token = _pick(dist.ids, slot)
    return Mixed(one_token(token), token, _log(_pick(dist.weights, slot)))


def soft(dist: Soft, *, rng: Rng = None) -> Mixed:
    """The belief itself, nothing drawn (Soft Thinking, arXiv:2505.15778, eq. 2). The top token
    stands for it."""
    return Mixed(dist, _pick(dist.ids, dist.weights.argmax(-1)), None)


def gumbel(dist: Soft, *, rng: Rng = None, tau: float = 0.5) -> Mixed:
    """softmax((log p + g) / tau) with standard Gumbel g (arXiv:2508.03440; arXiv:1611.01144, eq.
    2).

    The largest weight is an exact draw from `dist` (Gumbel-max), so the recorded text is a sample
    and logp its categorical log-probability. tau -> 0 is sampling, tau -> inf uniform.
    Differentiable in the weights.
    """
    if not tau > 0:
        raise ValueError(
            f"tau={tau} must be > 0; use the mixer 'hard' with sample=True for the limit 0"
        )
    noise = -exponential(dist.weights, rng).log()
    perturbed = _log(dist.weights) + noise
    slot = perturbed.argmax(-1)
    weights = (perturbed / min(max(tau, LEAST), MOST)).softmax(-1)
    return Mixed(Soft(dist.ids, weights), _pick(dist.ids, slot), _log(_pick(dist.weights, slot)))


def k_samples(dist: Soft, *, rng: Rng = None, k: int = 3, weighting: str = "uniform") -> Mixed:
    """The mean of k independent draws with replacement (Multiplex Thinking, arXiv:2601.08808;
    CoT2-MTS, 2505.23648).

    weighting "uniform" gives each draw 1 / k, "probability" weighs the draws by their probability,
    renormalised. The first draw stands for the mixture; logp is the joint log-probability of all k.
    k = 1 is sampling.
    """
    if k < 1:
        raise ValueError(f"k={k} must be at least 1; 1 is ordinary sampling")
    check_choice("weighting", weighting, ("uniform", "probability"))
    slots = _draw(dist.weights, rng, k)
    ids, probs = dist.ids.gather(-1, slots), dist.weights.gather(-1, slots)
    weights = (
        torch.full_like(probs, 1 / k)
        if weighting == "uniform"
        else probs / probs.sum(-1, keepdim=True)
    )
    return Mixed(Soft(ids, weights), ids[..., 0], _log(probs).sum(-1))


def mixture_of_inputs(dist: Soft, *, rng: Rng = None, beta: float = 1.0) -> Mixed:
    """Posterior mean after one draw y: w = (H p + (beta + 1 - H) 1_y) / (beta + 1), H the entropy
    of p over log K (arXiv:2505.14827, eq. 5). beta -> inf is sampling. The text, its logp and its
    stop logic are those of sampling.
    """
    if not beta >= 0:
        raise ValueError(f"beta={beta} must be >= 0; large values approach plain sampling")
    p = dist.weights
    slot = _draw(p, rng)[..., 0]
    h = -(p * p.clamp_min(TINY).log()).sum(-1, keepdim=True) / max(math.log(p.shape[-1]), TINY)
    drawn = torch.zeros_like(p).scatter(-1, slot[..., None], 1.0)
    # Split as 1 - share and share so that an infinite beta, the sampling limit, is exact too.
    share = h / (beta + 1)
    return Mixed(
        Soft(dist.ids, share * p + (1 - share) * drawn), _pick(dist.ids, slot), _log(_pick(p, slot))
    )


def hybrid(
    dist: Soft, *, rng: Rng = None, share: float | None = None, gate: str | None = None
) -> Mixed:
    """A sampled token beside the belief: `share` (default 0.5) of its embedding, the rest of
    s = sum_i p_i E_i / ||p||_2, or what a trained gate makes of both (HRPO, arXiv:2505.18454, eq. 3
    and 4). The text, its logp and its stop logic are those of sampling.

    gate: a file of softar.feedback.Gate. Beside it the weights are the belief's; otherwise they are
    all that is read, and sum to more than 1.
    """
    if share is not None and gate is not None:
        raise ValueError(f"share={share} does nothing beside gate={gate!r}: leave one out")
    share = 0.5 if share is None else share
    if not 0 <= share <= 1:
        raise ValueError(f"share={share} must lie in [0, 1]: 1 is the token alone, 0 the belief")
    drawn = hard(dist, rng=rng, sample=True)
    if gate is not None:
        return drawn._replace(soft=dist)
    normalised = Soft(dist.ids, dist.weights / dist.weights.norm(dim=-1, keepdim=True))
    return drawn._replace(soft=guide(normalised, drawn.token, share))


def last_hidden(dist: Soft, *, rng: Rng = None, hidden: Tensor | None = None) -> Mixed:
    """The last hidden state, after the final norm (Coconut, arXiv:2412.06769). Of the belief
    nothing is read: its id has weight 0."""
    ids, weights = (column[..., :1] for column in dist)
    return Mixed(Soft(ids, torch.zeros_like(weights)), ids[..., 0], None, hidden)


def dirichlet(dist: Soft, *, rng: Rng = None, gamma: float = 1.0) -> Mixed:
    """Weights drawn from Dirichlet(gamma p) (arXiv:2508.03440). Large gamma gives p, small gamma
    nearly one token.

    Drawn in log space, G(a) = G(a + 1) U^(1/a), so that a tiny concentration cannot underflow to 0
    / 0. The largest weight stands for the mixture; it has no closed-form probability.
    """
    if not gamma > 0:
        raise ValueError(f"gamma={gamma} must be > 0")
    a = min(max(gamma, LEAST), MOST) * dist.weights
    log_u = -exponential(a, rng)
    log_gamma = _standard_gamma(a + 1, rng).log() + log_u / a.clamp_min(TINY)
    weights = log_gamma.masked_fill(a == 0, -torch.inf).softmax(-1)
    return Mixed(Soft(dist.ids, weights), _pick(dist.ids, weights.argmax(-1)), None)


def guide(soft: Soft, target: Tensor, alpha: float, how: str = "mix", *, rng: Rng = None) -> Soft:
    """Blend the target token into a mixture.

    "mix": alpha 1_y + (1 - alpha) p. "clamp": the target has at least alpha; if p_y >= alpha
    nothing changes, else q_y = alpha and the rest is scaled by (1 - alpha) / (1 - p_y). "coin": the
    target itself with probability alpha, else the mixture (scheduled sampling, arXiv:1506.03099).

    Args:
        soft: [..., K], rows summing to 1.
        target: [...] int64; need not be among soft.ids.
        alpha: in [0, 1]. 0 returns `soft` untouched and 1 the target alone (K = 1), so that neither
            can leak a NaN.

    Returns:
        [..., K + 1], the target in the last slot; what it had before is moved there.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(
            f"alpha={alpha} must lie in [0, 1]: 1 is the target token alone, 0 the mixture alone"
        )
    check_choice("guidance", how, sorted(GUIDES))
    if alpha == 0:
        return soft
    if alpha == 1:
        return one_token(target)
    is_target = soft.ids == target[..., None]
    rest = soft.weights.masked_fill(is_target, 0.0)
    had = (soft.weights * is_target).sum(-1, keepdim=True)
    keep, share = GUIDES[how](had, alpha, rng)
    return Soft(torch.cat([soft.ids, target[..., None]], -1), torch.cat([keep * rest, share], -1))


def _mix(had: Tensor, alpha: float, rng: Rng):
    return 1 - alpha, alpha + (1 - alpha) * had


def _clamp(had: Tensor, alpha: float, rng: Rng):
    low = had < alpha
    scale = torch.where(low, (1 - alpha) / (1 - had).clamp_min(1 - alpha), 1.0)
    return scale, torch.where(low, torch.full_like(had, alpha), had)


def _coin(had: Tensor, alpha: float, rng: Rng):
    gold = exponential(had.detach(), rng) > -math.log(alpha)  # P(Exp(1) > -log a) = a
    return (~gold).float(), torch.where(gold, torch.ones_like(had), had)


def mk_mixer(name: str | Callable, **knobs) -> Mixer:
    """The mixer of that name (of MIXERS, of an entry point in the group softar.mixers, or
    "module:function"), or a function as one that draws and does not narrow the mixture; with its
    knobs bound. Unknown names and knobs are errors."""
    is_named = not callable(name)
    if is_named:
        method = lookup("mixer", name, MIXERS, GROUP, hint=" or pass a function")
        if not callable(method):
            raise ValueError(f"mixer={name!r} is a {type(method).__name__}, and no function")
    else:
        method = name
        try:
            inspect.signature(method)
        except ValueError as error:
            raise ValueError(
                f"mixer={name!r} is no function of Python's ({error}): give one of (dist, *, rng=None)"
            ) from None
    mixer = method if isinstance(method, Mixer) else Mixer(method)
    if not knobs:
        return mixer
    if is_named and mixer.hidden:  # its width is not known here
        check_choice(f"knob of mixer {name!r}", next(iter(knobs)), mixer.knobs)
    elif is_named:
        try:
            is_plain = all(isinstance(value, (int, float, str)) for value in knobs.values())
            (_try if is_plain else _try.__wrapped__)(mixer, **knobs)
        except TypeError as error:
            raise ValueError(f"mixer={name!r} does not take {knobs}: {error}") from None
    return mixer._replace(fn=functools.partial(mixer.fn, **knobs))


@functools.lru_cache(maxsize=64, typed=True)
def _try(mixer: Mixer, **knobs) -> None:
    """One step on two made-up tokens: a misspelt or impossible knob fails here, not in the middle of
    a decode. Once for each, as configurations are made of one another all the time."""
    trial = Soft(torch.tensor([[0, 1]]), torch.tensor([[0.5, 0.5]]))
    mixer(trial, rng=torch.Generator(), **knobs)


def name_of(mixer: str | Callable) -> str:
    """What errors and tables call it."""
    while isinstance(mixer, (Mixer, functools.partial)):
        mixer = mixer.fn if isinstance(mixer, Mixer) else mixer.func
    if isinstance(mixer, str):
        return mixer
    return mixer.__name__ if inspect.isfunction(mixer) else type(mixer).__name__


def check_mixed(mixed: Mixed, rows: int, vocab: int, name: str) -> None:
    """Raise ValueError where a mixer's Mixed is none that can be fed back: weights
    [rows, K] float that sum to 1, none negative; ids [rows, K] int64 and a token [rows] int64 inside
    the vocabulary; logp [rows], or None where nothing was drawn.

    NaN is left to the loop, which names step and rows. A synchronisation.
    """
    if not (isinstance(mixed, Mixed) and isinstance(mixed.soft, Soft)):
        raise ValueError(
            f"mixer {name!r} gave a {type(mixed).__name__}: give softar.Mixed(softar.Soft(ids, weights), "
            "token, logp)"
        )
    (ids, weights), token, logp, vector = mixed
    shapes = [tuple(t.shape) for t in (ids, weights, token)]
    is_shaped = ids.dim() == 2 and shapes == [(rows, ids.shape[1])] * 2 + [(rows,)]
    if not is_shaped or (logp is not None and tuple(logp.shape) != (rows,)):
        shapes.append(logp if logp is None else tuple(logp.shape))
        raise ValueError(
            f"mixer {name!r} gave ids, weights, token and logp of shapes {shapes}: of {rows} rows they "
            "are [rows, K], [rows, K], [rows] and [rows] or None"
        )
    if ids.dtype != torch.int64 or token.dtype != torch.int64 or not weights.is_floating_point():
        raise ValueError(
            f"mixer {name!r} gave ids, weights and token of {ids.dtype}, {weights.dtype}, {token.dtype}: "
            "they are int64, float32 and int64"
        )
    off = (weights.sum(-1) - 1).abs() > TOLERANCE
    for is_wrong, shown, what in (
        (weights < 0, weights, "negative weights"),
        (off & (vector is None), weights, "weights that do not sum to 1"),
        ((ids < 0) | (ids >= vocab), ids, f"ids outside the vocabulary of {vocab}"),
        ((token < 0) | (token >= vocab), token, f"a token outside the vocabulary of {vocab}"),
    ):
        if wrong := is_wrong.reshape(rows, -1).any(1).nonzero()[:, 0].tolist():
            value = shorten(str(shown[wrong[0]].tolist()), 80)
            raise ValueError(f"mixer {name!r} gave {what} in rows {wrong}, first {value}")


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


def _standard_gamma(a: Tensor, rng: Rng) -> Tensor:
    if rng is None or isinstance(rng, torch.Generator):
        return torch._standard_gamma(a if rng is None else a.to(rng.device), generator=rng).to(
            a.device, non_blocking=True
        )
    # from an accelerator: the one place where a mixer waits for it, once a step
    home = a.to(rng[0].device)
    rows = [torch._standard_gamma(row, generator=r) for row, r in zip(home, rng, strict=True)]
    return torch.stack(rows).to(a.device, non_blocking=True)


def _draw(weights: Tensor, rng: Rng, n: int = 1) -> Tensor:
    """Sample n slots with replacement, in proportion to the weights: [..., K] -> [..., n]. By
    inverting the cumulative distribution in float64: one uniform number a draw, any shape, and no
    synchronisation as torch.multinomial has."""
    cumulative = weights.detach().double().cumsum(-1)
    uniform = _uniform((*weights.shape[:-1], n), rng, weights.device) * cumulative[..., -1:]
    return torch.searchsorted(cumulative, uniform, right=True).clamp_max(weights.shape[-1] - 1)


def _uniform(shape: tuple[int, ...], rng: Rng, device: torch.device) -> Tensor:
    """Float64 in [0, 1)."""
    if rng is None or isinstance(rng, torch.Generator):
        source = device if rng is None else rng.device
        return torch.rand(shape, generator=rng, device=source, dtype=torch.float64).to(
            device, non_blocking=True
        )
    rows = [torch.rand(shape[1:], generator=r, device=r.device, dtype=torch.float64) for r in rng]
    return torch.stack(rows).to(device, non_blocking=True)


def _pick(values: Tensor, slot: Tensor) -> Tensor:
    return values.gather(-1, slot[..., None])[..., 0]


def _log(weights: Tensor) -> Tensor:
    """log w with -inf at 0, and there a gradient of 0 instead of NaN."""
    return weights.clamp_min(TINY).log().masked_fill(weights == 0, -torch.inf)


MIXERS: dict[str, Mixer | Callable[..., Mixed]] = {
    "hard": Mixer(
        hard, single=True, draws=lambda knobs: knobs["sample"], width=lambda knobs, filtered: 1
    ),
    "soft": Mixer(soft, draws=lambda knobs: False),
    "gumbel": Mixer(gumbel, only_mixes=True),
    "k-samples": Mixer(k_samples, width=lambda knobs, filtered: knobs["k"], only_mixes=True),
    "mixture-of-inputs": Mixer(mixture_of_inputs, only_mixes=True),
    "dirichlet": Mixer(dirichlet),
    "hybrid": Mixer(
        hybrid, width=lambda knobs, filtered: filtered + 1, only_mixes=True, gated=True
    ),
    "hidden": Mixer(
        last_hidden, draws=lambda knobs: False, width=lambda *_: 1, hidden=True, latent=True
    ),
}
GUIDES = {"mix": _mix, "clamp": _clamp, "coin": _coin}
BUILT_IN = frozenset(MIXERS)  # whose mixtures need no check
