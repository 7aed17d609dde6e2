"""Two ways to train, compared over seeds: the gain of one over the other, its interval, and what
was claimed of it beforehand.

The same rows are answered with every seed, so that seeds and rows are crossed: both are drawn with
replacement (Owen's pigeonhole bootstrap, 2007). Of few seeds such percentiles are too narrow: with 3
they hold the seeds' share of the gain less than 80 % of the time in place of 95. So Student's t over the
means of the seeds stands beside them, which takes the rows as they are.

Shapes: S seeds, n rows, G groups.
"""

import math
from typing import NamedTuple

import numpy as np

from ..checks import check_least
from .intervals import draw_counts

DRAWS = 10_000


class Gain(NamedTuple):
    """A difference of two mean scores, with its intervals."""

    mean: float
    low: float  # 95 %
    high: float
    low90: float
    high90: float
    t_low: float  # 95 %, a paired t over the seeds; infinite of one seed
    t_high: float
    seeds: int
    groups: int

    def verdict(self, margin: float) -> str:
        """Supported: at least the margin, its 95 % interval above 0. Refuted: the interval lies below
        the margin. Open: neither; and of one seed, of which nothing tells how far seeds differ."""
        if self.seeds < 2:
            return "open"
        if self.low > 0 and self.mean >= margin:
            return "supported"
        return "refuted" if self.high < margin else "open"

    def is_equivalent(self, within: float) -> bool:
        """Lies the 90 % interval nearer to 0 than this, as two one-sided tests at 5 % ask? Never of
        one seed."""
        return self.seeds > 1 and -within < self.low90 and self.high90 < within


def gain_of(
    scores: np.ndarray,
    others: np.ndarray,
    groups: np.ndarray | None = None,
    *,
    draws: int = DRAWS,
    seed: int = 0,
) -> Gain:
    """The gain of `scores` over `others`, paired by seed and row.

    Args:
        scores, others: [S, n], a line for each seed, the same seeds and rows in the same order.
        groups: [n] the number of each row's group; None: each row is one.
        draws: of the bootstrap, by `seed`.

    Raises:
        ValueError: for shapes that do not fit, or scores that are missing.
    """
    check_least({"draws": draws}, draws=1)
    gains = np.asarray(scores, float) - _like(others, scores)
    count = _number(groups, gains.shape[1])
    drawn = bootstrap_gains(gains, groups, draws=draws, seed=seed)
    return summary(gains.mean(1), drawn, count)


def bootstrap_gains(
    gains: np.ndarray,
    groups: np.ndarray | None = None,
    *,
    draws: int = DRAWS,
    seed: int = 0,
    rows: int = 0,
) -> np.ndarray:
    """Means of gains [..., S, n] whose seeds and groups are drawn with replacement, the same draws
    for all of them -> [..., draws]. The seeds that a draw takes depend on `seed` and S alone, so that
    two sets of rows answered with the same seeds are drawn together; `rows`, a number of its own for
    each such set, keeps the rows that are drawn apart."""
    gains = np.asarray(gains, float)
    S, n = gains.shape[-2:]
    groups = np.arange(n) if groups is None else groups
    sizes = np.bincount(groups).astype(float)
    sums = np.stack([np.bincount(groups, line) for line in gains.reshape(-1, n)])  # [... * S, G]
    of_seeds, of_groups = np.random.default_rng(seed), np.random.default_rng([seed, n, rows])
    seeds = np.concatenate([*draw_counts(S, draws, of_seeds)])  # [draws, S]
    by_seed = np.concatenate(
        [
            counts @ sums.T / (counts @ sizes)[:, None]
            for counts in draw_counts(len(sizes), draws, of_groups)
        ]
    )
    means = np.einsum("dks,ds->kd", by_seed.reshape(draws, -1, S), seeds) / S
    return means.reshape(*gains.shape[:-2], draws)


def summary(by_seed: np.ndarray, drawn: np.ndarray, groups: int) -> Gain:
    """By percentiles of a bootstrap, and by t over the seeds. by_seed: [S] the gain of each, drawn:
    [draws] of their mean."""
    low, low90, high90, high = map(float, np.quantile(drawn, [0.025, 0.05, 0.95, 0.975]))
    t = t_interval(by_seed)
    return Gain(float(by_seed.mean()), low, high, low90, high90, *t, len(by_seed), groups)


def t_interval(values: np.ndarray, level: float = 0.95) -> tuple[float, float]:
    """Of the mean of [S] values, by Student's t with S - 1 degrees of freedom."""
    mean, S = float(np.mean(values)), len(values)
    if S == 1:
        return -math.inf, math.inf
    half = t_quantile((1 + level) / 2, S - 1) * float(np.std(values, ddof=1)) / math.sqrt(S)
    return mean - half, mean + half


def t_quantile(p: float, freedom: int) -> float:
    """Of Student's t with so many degrees of freedom, a whole number; p: in (0.5, 1)."""
    low, high = 0.0, 1.0
    while _within(high, freedom) < 2 * p - 1:
        high *= 2
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if _within(middle, freedom) < 2 * p - 1 else (low, middle)
    return high


def _within(t: float, freedom: int) -> float:
    """P(-t < T < t), the finite series of Abramowitz and Stegun, 26.7.3 and 26.7.4."""
    angle, odd = math.atan(t / math.sqrt(freedom)), freedom % 2
    term, total = (math.cos(angle) if odd else 1.0), 0.0
    for i in range(freedom // 2):
        total += term
        term *= (2 * i + 1 + odd) / (2 * i + 2 + odd) * math.cos(angle) ** 2
    inner = math.sin(angle) * total
    return 2 / math.pi * (angle + inner) if odd else inner


def _like(others: np.ndarray, scores: np.ndarray) -> np.ndarray:
    scores, others = np.asarray(scores, float), np.asarray(others, float)
    if scores.ndim != 2 or scores.shape != others.shape or not scores.size:
        raise ValueError(
            f"scores of shape {scores.shape} and others of {others.shape}: give [seeds, rows] of both, the same"
        )
    if not (np.isfinite(scores).all() and np.isfinite(others).all()):
        raise ValueError(
            "a score is missing: count what failed as 0, or leave its seed out of both"
        )
    return others


def _number(groups: np.ndarray | None, rows: int) -> int:
    if groups is None:
        return rows
    if len(groups) != rows:
        raise ValueError(
            f"groups of {len(groups)} rows, scores of {rows}: give a group to each row"
        )
    return len(np.unique(groups))
