"""Two ways to train, compared over seeds: the gain of one over the other, its interval, and what
was claimed of it beforehand.

The same rows are answered with every seed, so that seeds and rows are crossed: both are drawn with
replacement (Owen's pigeonhole bootstrap, 2007, which errs on the wide side).

Shapes: S seeds, n rows, G groups.
"""

from typing import NamedTuple

import numpy as np

from ..checks import check_least

DRAWS = 10_000


class Gain(NamedTuple):
    """A difference of two mean scores, with its intervals."""

    mean: float
    low: float  # 95 %
    high: float
    low90: float
    high90: float
    seeds: int
    groups: int

    def verdict(self, margin: float) -> str:
        """Supported: at least the margin, its 95 % interval above 0. Refuted: the interval lies below
        the margin. Open: neither."""
        if self.low > 0 and self.mean >= margin:
            return "supported"
        return "refuted" if self.high < margin else "open"

    def is_equivalent(self, within: float) -> bool:
        """Lies the 90 % interval nearer to 0 than this, as two one-sided tests at 5 % ask?"""
        return -within < self.low90 and self.high90 < within


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
    return summary(gains.mean(), drawn, len(gains), count)


def bootstrap_gains(
    gains: np.ndarray, groups: np.ndarray | None = None, *, draws: int = DRAWS, seed: int = 0
) -> np.ndarray:
    """Means of gains [S, n] whose seeds and groups are drawn with replacement -> [draws]. The seeds
    that a draw takes depend on `seed` and S alone, so that two sets of rows answered with the same
    seeds are drawn together."""
    (S, n), groups = gains.shape, np.arange(gains.shape[1]) if groups is None else groups
    sizes = np.bincount(groups).astype(float)
    sums = np.stack([np.bincount(groups, line) for line in gains])  # [S, G]
    of_seeds, of_groups = np.random.default_rng(seed), np.random.default_rng([seed, n])
    means = np.empty(draws)
    for i in range(draws):
        some = of_seeds.integers(S, size=S)
        counts = np.bincount(of_groups.integers(len(sizes), size=len(sizes)), minlength=len(sizes))
        means[i] = (sums[some] @ counts).mean() / (sizes @ counts)
    return means


def summary(mean: float, drawn: np.ndarray, seeds: int, groups: int) -> Gain:
    """By percentiles of a bootstrap."""
    low, low90, high90, high = np.quantile(drawn, [0.025, 0.05, 0.95, 0.975])
    return Gain(float(mean), *map(float, (low, high, low90, high90)), seeds, groups)


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
