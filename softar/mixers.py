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
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .checks import check_choice, shorten
from .names import lookup
from .noise import TINY, Rng, draw, exponential, standard_gamma
from .soft import Soft, likeliest
from .soft import hard as one_token

TOLERANCE = 1e-3  # of the sum of a mixture's weights
GROUP = "softar.mixers"  # of entry points
SHARE = 0.5  # of the token in `hybrid`, where neither it nor a gate is given
LEAST, MOST = 1e-30, 1e30  # a knob beyond these is its limit in float32, and would only overflow


class Mixed(NamedTuple):
    """What one step decided."""

    soft: Soft  # [..., K'] what the model reads next
    token: Tensor  # [...] int64, the discrete token that stands for it
    # [...] log-probability of what was drawn under `dist`; None where nothing was drawn or it has
    # none
    logp: Tensor | None
    vector: Tensor | None = None  # [..., D] of a mixer that is `latent`: what the model reads next
    # [..., K'] of soft.ids, the largest first, log p and Gumbel noise; of `gumbel` with candidates
    perturbed: Tensor | None = None


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
    slot = draw(dist.weights, rng)[..., 0] if sample else dist.weights.argmax(-1)
    token = _pick(dist.ids, slot)
    return Mixed(one_token(token), token, _log(_pick(dist.weights, slot)))


def soft(dist: Soft, *, rng: Rng = None) -> Mixed:
    """The belief itself, nothing drawn (Soft Thinking, arXiv:2505.15778, eq. 2). The top token
    stands for it."""
    return Mixed(dist, _pick(dist.ids, dist.weights.argmax(-1)), None)


def gumbel(
    dist: Soft, *, rng: Rng = None, tau: float = 0.5, candidates: int | None = None
) -> Mixed:
    """softmax((log p + g) / tau) with standard Gumbel g (arXiv:2508.03440; arXiv:1611.01144, eq.
    2).

    The largest weight is an exact draw from `dist` (Gumbel-max), so the recorded text is a sample
    and logp its categorical log-probability. tau -> 0 is sampling, tau -> inf uniform.
    Differentiable in the weights.

    candidates: so many of the largest log p + g are read: draws without replacement
        (arXiv:1903.06059), one of which is sampling. None reads all.
    """
    _check_candidates(candidates)
    if not tau > 0:
        raise ValueError(
            f"tau={tau} must be > 0; use the mixer 'hard' with sample=True for the limit 0"
        )
    noise = -exponential(dist.weights, rng).log()
    perturbed, ids = _log(dist.weights) + noise, dist.ids
    slot = perturbed.argmax(-1)
    if candidates is not None:
        perturbed, order = perturbed.topk(min(candidates, ids.shape[-1]), -1)
        ids, slot = ids.gather(-1, order), order[..., 0]
    weights = (perturbed / min(max(tau, LEAST), MOST)).softmax(-1)
    mixed = Mixed(Soft(ids, weights), _pick(dist.ids, slot), _log(_pick(dist.weights, slot)))
    return mixed if candidates is None else mixed._replace(perturbed=perturbed.detach())


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
    slots = draw(dist.weights, rng, k)
    ids, probs = dist.ids.gather(-1, slots), dist.weights.gather(-1, slots)
    weights = (
        torch.full_like(probs, 1 / k)
        if weighting == "uniform"
        else probs / probs.sum(-1, keepdim=True)
    )
    return Mixed(Soft(ids, weights), ids[..., 0], _log(probs).sum(-1))


def mixture_of_inputs(
    dist: Soft, *, rng: Rng = None, beta: float = 1.0, candidates: int | None = None
) -> Mixed:
    """Posterior mean after one draw y: w = (H p + (beta + 1 - H) 1_y) / (beta + 1), H the entropy
    of p over log K (arXiv:2505.14827, eq. 5). beta -> inf is sampling. The text, its logp and its
    stop logic are those of sampling.

    candidates: p and H are of so many of the likeliest tokens (the paper's n, 20), and y is drawn
        from all of `dist`, in a slot of its own. None: of all.
    """
    if not beta >= 0:
        raise ValueError(f"beta={beta} must be >= 0; large values approach plain sampling")
    _check_candidates(candidates)
    slot = draw(dist.weights, rng)[..., 0]
    token, logp = _pick(dist.ids, slot), _log(_pick(dist.weights, slot))
    ids, p = likeliest(dist, candidates)
    h = -(p * p.clamp_min(TINY).log()).sum(-1, keepdim=True) / max(math.log(p.shape[-1]), TINY)
    # Split as 1 - share and share so that an infinite beta, the sampling limit, is exact too.
    share = h / (beta + 1)
    if candidates is not None:
        return Mixed(_blend(Soft(ids, p), token, 1 - share, "mix", None), token, logp)
    drawn = torch.zeros_like(p).scatter(-1, slot[..., None], 1.0)
    return Mixed(Soft(ids, share * p + (1 - share) * drawn), token, logp)


def hybrid(
    dist: Soft,
    *,
    rng: Rng = None,
    share: float | None = None,
    gate: str | None = None,
    candidates: int | None = None,
) -> Mixed:
    """A sampled token beside the belief: `share` (default SHARE) of its embedding, the rest of
    s = sum_i p_i E_i / ||p||_2, or what a trained gate makes of both (HRPO, arXiv:2505.18454, eq. 3
    and 4). The text, its logp and its stop logic are those of sampling.

    gate: a file of softar.feedback.Gate. Beside it the weights are the belief's; otherwise they are
        all that is read, and sum to more than 1.
    candidates: the belief is of so many of the likeliest tokens, and the token drawn from all of
        `dist`. None: of all.
    """
    _check_candidates(candidates)
    if share is not None and gate is not None:
        raise ValueError(f"share={share} does nothing beside gate={gate!r}: leave one out")
    share = SHARE if share is None else share
    if not 0 <= share <= 1:
        raise ValueError(f"share={share} must lie in [0, 1]: 1 is the token alone, 0 the belief")
    drawn, belief = hard(dist, rng=rng, sample=True), likeliest(dist, candidates)
    if gate is not None:
        return drawn._replace(soft=belief)
    normalised = Soft(belief.ids, belief.weights / belief.weights.norm(dim=-1, keepdim=True))
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
    log_gamma = standard_gamma(a + 1, rng).log() + log_u / a.clamp_min(TINY)
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
    return _blend(soft, target, alpha, how, rng)


def _blend(soft: Soft, target: Tensor, alpha: float | Tensor, how: str, rng: Rng) -> Soft:
    """`guide` at an alpha of each row, [..., 1], or of all."""
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
    (ids, weights), token, logp, vector, _ = mixed
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


def _check_candidates(candidates: int | None) -> None:
    if candidates is not None and not (isinstance(candidates, int) and candidates >= 1):
        raise ValueError(
            f"candidates={candidates} must be a whole number from 1 on; None reads all"
        )


def _pick(values: Tensor, slot: Tensor) -> Tensor:
    return values.gather(-1, slot[..., None])[..., 0]


def _log(weights: Tensor) -> Tensor:
    """log w with -inf at 0, and there a gradient of 0 instead of NaN."""
    return weights.clamp_min(TINY).log().masked_fill(weights == 0, -torch.inf)


def _candidates(knobs: dict[str, Any], filtered: float) -> float:
    return min(knobs["candidates"] or filtered, filtered)


MIXERS: dict[str, Mixer | Callable[..., Mixed]] = {
    "hard": Mixer(
        hard, single=True, draws=lambda knobs: knobs["sample"], width=lambda knobs, filtered: 1
    ),
    "soft": Mixer(soft, draws=lambda knobs: False),
    "gumbel": Mixer(gumbel, width=_candidates, only_mixes=True),
    "k-samples": Mixer(k_samples, width=lambda knobs, filtered: knobs["k"], only_mixes=True),
    "mixture-of-inputs": Mixer(
        mixture_of_inputs,
        width=lambda knobs, n: _candidates(knobs, n) + (knobs["candidates"] is not None),
        only_mixes=True,
    ),
    "dirichlet": Mixer(dirichlet),
    "hybrid": Mixer(
        hybrid, width=lambda knobs, n: _candidates(knobs, n) + 1, only_mixes=True, gated=True
    ),
    "hidden": Mixer(
        last_hidden, draws=lambda knobs: False, width=lambda *_: 1, hidden=True, latent=True
    ),
}
GUIDES = {"mix": _mix, "clamp": _clamp, "coin": _coin}
BUILT_IN = frozenset(MIXERS)  # whose mixtures need no check
