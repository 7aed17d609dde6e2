"""Uniform-state diffusion: tokens decay to uniformly random ones, so that a later step can still
repair any of them.

Duo (arXiv:2506.10892) adds the Gaussian underneath: the argmax of a noised one-hot vector is such a
process, and a tempered softmax of the same vector is a soft token that a model can train on before
the tokens turn hard.

Shapes: B rows, T positions, V vocabulary, K tokens kept; n positions, flat. x clean token, z noisy
token; alpha the chance that a token is still its own, from 1 at t = 0 to about 0 at t = 1.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor, nn

from softar.soft import Soft, mk_proba_dist


def gaussian_alpha(gamma: Tensor) -> tuple[Tensor, Tensor]:
    """Signal and noise of the Gaussian at log noise-to-signal ratio gamma [...]: alpha~, sigma~
    [...], whose squares sum to 1."""
    return (-gamma).sigmoid().sqrt(), gamma.sigmoid().sqrt()


def discrete_alpha(gamma: Tensor, vocab_size: int) -> tuple[Tensor, Tensor]:
    """The diffusion transformation T (arXiv:2506.10892) by quadrature, and its derivative by gamma.

    With a = alpha~ / sigma~ = exp(-gamma / 2), argmax w is x with chance P = int phi(u) Phi(u +
    a)^(V-1) du and any other token with an equal share of the rest, so that alpha = (V P - 1) / (V
    - 1).

    gamma: [G] finite -> alpha, d alpha / d gamma [G] float64. Takes G x 2401 numbers of memory.
    """
    _check_vocab(vocab_size)
    V, step = vocab_size, 0.01
    # Smooth and gone at both ends: there a plain sum over a grid is exact to rounding.
    u = torch.arange(-1200, 1201, dtype=torch.float64, device=gamma.device) * step
    log_phi = -0.5 * u.square() - 0.5 * math.log(2 * math.pi)
    a = (-gamma.double() / 2).exp()
    shifted = u + a[:, None]
    log_cdf = torch.special.log_ndtr(shifted)
    chance = (log_phi + (V - 1) * log_cdf).exp().sum(1) * step
    # dP/da / (V - 1), the density of a tie: a product of positive terms, where int u phi(u)
    # Phi^(V-1) would cancel.
    tie = (
        log_phi + (V - 2) * log_cdf - 0.5 * shifted.square() - 0.5 * math.log(2 * math.pi)
    ).exp().sum(1) * step
    return (V * chance - 1) / (V - 1), -0.5 * a * V * tie


@dataclass(frozen=True)
class GaussianToDiscrete:
    """The schedule of the tokens argmax w where gamma runs from gamma_min at t = 0 to gamma_max at
    t = 1.

    Computed once per vocabulary and range; in between, cubics that meet value and slope at `points`
    places. Alpha ends inside (0, 1) at both ends, so a bound on the likelihood needs `prior_kl` and
    the loss of reading x off z_0.
    """

    vocab_size: int
    gamma_min: float = -3.5
    gamma_max: float = -1.75
    points: int = 257

    def __post_init__(self):
        _check_vocab(self.vocab_size)
        if not -math.inf < self.gamma_min < self.gamma_max < math.inf:
            raise ValueError(
                f"gamma_min={self.gamma_min} must be below gamma_max={self.gamma_max}, both finite"
            )
        if self.points < 2:
            raise ValueError(f"points={self.points} must be at least 2")

    def gamma(self, t: Tensor) -> Tensor:
        """t: [...] in [0, 1] -> gamma_t [...]."""
        _check_time(t)
        return self.gamma_min + t * (self.gamma_max - self.gamma_min)

    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """t: [...] in [0, 1] -> alpha, d alpha / dt [...], float32 or t's wider type."""
        _check_time(t)
        alphas, slopes = (column.to(t.device) for column in _table(self))
        place = t.double() * (self.points - 1)
        left = place.long().clamp_max(self.points - 2)
        f = place - left
        y0, y1, m0, m1 = alphas[left], alphas[left + 1], slopes[left], slopes[left + 1]
        square, cube = 3 * (y1 - y0) - 2 * m0 - m1, m0 + m1 - 2 * (y1 - y0)
        alpha = y0 + f * (m0 + f * (square + f * cube))
        dalpha = (m0 + f * (2 * square + f * 3 * cube)) * (self.points - 1)
        dtype = torch.promote_types(t.dtype, torch.float32)
        return alpha.to(dtype), dalpha.to(dtype)


@lru_cache(maxsize=8)
def _table(schedule: GaussianToDiscrete) -> tuple[Tensor, Tensor]:
    """alpha and its slope per grid interval, [points] float64."""
    low, high = schedule.gamma_min, schedule.gamma_max
    gamma = torch.linspace(low, high, schedule.points, dtype=torch.float64)
    alpha, slope = discrete_alpha(gamma, schedule.vocab_size)
    return alpha, slope * (high - low) / (schedule.points - 1)


def log_linear(t: Tensor, eps: float = 1e-3) -> tuple[Tensor, Tensor]:
    """The schedule without a Gaussian: t [...] in [0, 1] -> alpha = 1 - (1 - eps) t and d alpha /
    dt [...]."""
    _check_time(t)
    if not 0 <= eps < 1:
        raise ValueError(f"eps={eps} must be in [0, 1)")
    return 1 - (1 - eps) * t, torch.full_like(t, eps - 1)


def corrupt(
    ids: Tensor,
    alpha: Tensor,
    maskable: Tensor,
    uniform: Tensor,
    replacement: Tensor,
    vocab_size: int,
) -> Tensor:
    """Draw z ~ q_t(z | x): a token stays with its row's alpha, else it becomes a uniform one,
    possibly itself.

    Args:
        ids: [B, T]; alpha: [B] in [0, 1]; maskable: [B, T] bool, never the prompt.
        uniform, replacement: [B, T] in [0, 1), independent: whether to replace, and by which token.
        vocab_size: tokens come from 0 .. vocab_size - 1. Below the model's V it leaves out a mask
            token or padding rows at the end; every V of the posterior and the loss must then be
            this one.

    Returns:
        [B, T] int64.
    """
    _check_vocab(vocab_size)
    shapes = {tuple(x.shape) for x in (ids, maskable, uniform, replacement)}
    if len(shapes) > 1 or alpha.shape != ids.shape[:1]:
        raise ValueError(
            f"shapes {sorted(shapes)} of [B, T] must be one, and alpha of shape {tuple(alpha.shape)} [B]"
        )
    tokens = (replacement * vocab_size).long()
    return tokens.where(maskable & (uniform >= alpha[:, None]), ids)


def gaussian_corrupt(
    ids: Tensor, gamma: Tensor, noise: Tensor, tau: float, k: int | None = None
) -> tuple[Tensor, Soft]:
    """The noisy token and the soft one, off the same Gaussian (arXiv:2506.10892): w = alpha~
    onehot(x) + sigma~ noise, z = argmax w, softmax(w / tau).

    Args:
        ids: [B, ...]; gamma: [B]; noise: [B, ..., V] standard normal, never written to.
        tau: >= 0; 0 is the hard token z (K = 1).
        k: keep the k largest weights and renormalise, z first; None keeps the vocabulary.

    Returns:
        z [B, ...] int64; Soft of ids and weights [B, ..., K].
    """
    if noise.shape[:-1] != ids.shape or gamma.shape != ids.shape[:1]:
        raise ValueError(
            f"noise {tuple(noise.shape)} and gamma {tuple(gamma.shape)} do not fit ids {tuple(ids.shape)}: "
            f"[B, ..., V] and [B] are wanted"
        )
    alpha, sigma = (x.reshape(-1, *[1] * ids.dim()).to(noise.dtype) for x in gaussian_alpha(gamma))
    w = (sigma * noise).scatter_add(-1, ids[..., None], alpha.expand(*ids.shape, 1))
    return w.argmax(-1), mk_proba_dist(w, temperature=tau, top_k=k)


def tau_at(
    progress: float, tau_start: float = 1e-1, tau_end: float = 1e-2, span: float = 0.5
) -> float:
    """The temperature at a share `progress` in [0, 1] of training: from tau_start to tau_end,
    evenly in its logarithm, over the first `span`; then 0, the hard token."""
    if not 0 <= progress <= 1 or not 0 <= span <= 1:
        raise ValueError(f"progress={progress} and span={span} must be in [0, 1]")
    if not 0 < tau_start < math.inf or not 0 < tau_end < math.inf:
        raise ValueError(f"tau_start={tau_start} and tau_end={tau_end} must be above 0")
    return tau_start * (tau_end / tau_start) ** (progress / span) if progress < span else 0.0


def posterior(probs: Tensor, z: Tensor, alpha_s: Tensor, alpha_t: Tensor) -> Tensor:
    """q(z_s | z_t = z, x ~ probs) by Bayes' rule, s < t (arXiv:2506.10892).

    Proportional to q(z | z_s) q(z_s | probs); written out it is the paper's sum of four terms, but
    every factor here is >= 0 as computed.

    Args:
        probs: [n, V]; z: [n]; alpha_s, alpha_t: [n] or [], 0 <= alpha_t <= alpha_s <= 1 and alpha_t
            < 1.

    Returns:
        [n, V], float32 or probs' wider type; rows sum to 1.
    """
    probs, alpha_s, alpha_t = _columns(probs, z, alpha_s, alpha_t)
    if not ((alpha_t >= 0) & (alpha_t <= alpha_s) & (alpha_s <= 1) & (alpha_t < 1)).all():
        raise ValueError(
            f"alpha_s={alpha_s.flatten().tolist()[:8]} and alpha_t={alpha_t.flatten().tolist()[:8]} must have "
            f"0 <= alpha_t <= alpha_s <= 1 and alpha_t < 1"
        )
    V = probs.shape[-1]
    kept = alpha_t / alpha_s.clamp_min(torch.finfo(probs.dtype).tiny)  # alpha_{t|s}
    step = ((1 - kept) / V).expand_as(probs).scatter_add(-1, z[:, None], kept.expand(len(z), 1))
    weights = step * (alpha_s * probs + (1 - alpha_s) / V)
    return weights / weights.sum(-1, keepdim=True)


def nelbo(log_probs: Tensor, x: Tensor, z: Tensor, alpha: Tensor, dalpha: Tensor) -> Tensor:
    """The integrand over t of the negative ELBO, nats per token (arXiv:2506.10892; UDLM,
    arXiv:2412.10193).

    Equal to the paper's expression, sorted into two parts that are >= 0. With q = q_t(. | x), p =
    q_t(. | probs) and l = log p(z) / q(z):  (-dalpha / alpha) / (V q(z)) [exp(-l) - 1 + l + KL(q ||
    p)].

    The best probs are the belief about x given the other positions' tokens: what z itself says
    about x enters through the posterior, so a model of p(x | every z), as cross-entropy trains it,
    counts z twice.

    Args:
        log_probs: [n, V] log-softmax over V tokens, -inf allowed; x, z: [n].
        alpha, dalpha: [n] or [], the schedule's value in [0, 1] and slope < 0 at z's time.

    Returns:
        [n], float32 or log_probs' wider type. Its mean over t ~ U(0, 1) and z ~ q_t, plus
            `prior_kl`, bounds -log p(x)
        where alpha(0) = 1.
    """
    if x.shape != z.shape:
        raise ValueError(f"x of shape {tuple(x.shape)} must have one token per z, {tuple(z.shape)}")
    log_probs, alpha, dalpha = _columns(log_probs, z, alpha, dalpha)
    V, tiny = log_probs.shape[-1], torch.finfo(log_probs.dtype).tiny
    alpha, rest = (y.expand(len(z), 1).clamp_min(tiny) for y in (alpha, 1 - alpha))
    # Logs are taken against the (1 - alpha) / V that every token has, so that nothing under- or
    # overflows.
    most = math.log(V) + alpha.log() - rest.log()
    above = _softplus(most + log_probs)  # log p V / (1 - alpha)
    x, z = x[:, None], z[:, None]
    above_x = above.gather(-1, x)
    ratio_x = above_x - _softplus(most)  # log p(x) / q(x), <= 0
    kl = -(alpha + rest / V) * ratio_x - rest / V * (above.sum(-1, keepdim=True) - above_x)
    ratio_z = ratio_x.where(x == z, above.gather(-1, z))
    at_z = rest + V * alpha * (x == z)  # V q(z)
    loss = -dalpha / alpha / at_z * (torch.expm1(-ratio_z) + ratio_z + kl)
    return loss.clamp_min(0).squeeze(-1)  # below 0 only by rounding


def prior_kl(alpha: Tensor, vocab_size: int) -> Tensor:
    """KL(q_t(. | x) || uniform), nats: what the ELBO pays for the alpha that is left at t = 1.
    [...] -> [...]."""
    _check_vocab(vocab_size)
    own, other = alpha + (1 - alpha) / vocab_size, (1 - alpha) / vocab_size
    return torch.special.xlogy(own, vocab_size * own) + (vocab_size - 1) * torch.special.xlogy(
        other, vocab_size * other
    )


def view_scale(alpha: Tensor, vocab_size: int) -> Tensor:
    """(1 - alpha) / (V alpha + 1 - alpha): how likely a token that is right was drawn by chance,
    from 0 at alpha = 1 to 1 at alpha = 0. As a weight of rows it makes those count little that a
    model solves by copying. alpha: [...] -> [...]."""
    _check_vocab(vocab_size)
    return (1 - alpha) / (vocab_size * alpha + 1 - alpha)


def symmetric_kl(log_probs: Tensor, x: Tensor, smoothing: float = 1e-3) -> Tensor:
    """KL(y || p) + KL(p || y) against y = (1 - smoothing) onehot(x) + smoothing / V; without
    smoothing the second is infinite.

    log_probs: [n, V] finite; x: [n] -> [n] nats, float32 or log_probs' wider type. No bound on a
    likelihood. Its best probs are p(x | every z), what z itself says about x included, which
    `posterior` then counts twice: the sampler does not return the data's law (see `nelbo`).
    """
    if not 0 < smoothing < 1:
        raise ValueError(f"smoothing={smoothing} must be in (0, 1)")
    log_probs = log_probs.to(torch.promote_types(log_probs.dtype, torch.float32))
    share = smoothing / log_probs.shape[-1]
    y = torch.full_like(log_probs, share).scatter(-1, x[:, None], 1 - smoothing + share)
    # both sums in one, term by term >= 0
    return ((log_probs.exp() - y) * (log_probs - y.log())).sum(-1)


def ancestral_step(
    probs: Tensor, z: Tensor, alpha_s: Tensor, alpha_t: Tensor, uniform: Tensor
) -> Tensor:
    """Draw z_s from `posterior` by its inverse CDF: uniform [n] in [0, 1) -> [n] int64; other
    shapes as there.

    A step to alpha_s = 1 draws x itself; a greedy end takes probs.argmax(-1) instead.
    """
    if uniform.shape != z.shape:
        raise ValueError(
            f"uniform of shape {tuple(uniform.shape)} must have one number per token, {tuple(z.shape)}"
        )
    # float32 near 1 cannot tell rare tokens apart
    cdf = posterior(probs, z, alpha_s, alpha_t).double().cumsum(-1)
    drawn = torch.searchsorted(cdf, uniform.double()[:, None] * cdf[:, -1:], right=True)
    return drawn.squeeze(-1).clamp_max(probs.shape[-1] - 1)


def _softplus(x: Tensor) -> Tensor:
    # linear from 20 on would cost float64 its digits
    return nn.functional.softplus(x, threshold=40)


def _columns(rows: Tensor, z: Tensor, *alphas: Tensor) -> list[Tensor]:
    """rows [n, V] and each [n] or [] as [n, 1] or [1, 1], in float32 or rows' wider type."""
    if rows.dim() != 2 or z.shape != rows.shape[:1]:
        raise ValueError(
            f"z of shape {tuple(z.shape)} does not fit rows of shape {tuple(rows.shape)}: [n], [n, V]"
        )
    dtype = torch.promote_types(rows.dtype, torch.float32)
    columns = [
        torch.as_tensor(alpha, device=rows.device).to(dtype).reshape(-1, 1) for alpha in alphas
    ]
    if wrong := [len(column) for column in columns if len(column) not in (1, len(z))]:
        raise ValueError(
            f"alphas of {wrong} numbers do not fit {len(z)} tokens: give one or one each"
        )
    return [rows.to(dtype), *columns]


def _check_vocab(vocab_size: int) -> None:
    if vocab_size < 2:
        raise ValueError(f"vocab_size={vocab_size} must be at least 2")


def _check_time(t: Tensor) -> None:
    if not ((t >= 0) & (t <= 1)).all():
        raise ValueError(f"t={t.flatten().tolist()[:8]} must be in [0, 1]")
