"""95 % intervals of a mean score and of a gain, over rows that may belong together.

Rows of a group (the permutations of one problem, say) succeed and fail together, so that a group is
what is drawn, and a hundred rows of ten groups tell little more than ten. Scores of 0 and 1 have
formulas, which hold where all rows are right, too; other scores are resampled.

Shapes: n rows, G groups, k columns.
"""

import math
from collections.abc import Iterator
from statistics import NormalDist

import numpy as np

Z = NormalDist().inv_cdf(0.975)
Interval = tuple[float | None, float | None]


def number_groups(names: list) -> np.ndarray:
    """[n] the number of each row's group, from 0. A row whose group is None is one of its own."""
    numbers: dict = {}
    keys = [("alone", i) if name is None else ("group", name) for i, name in enumerate(names)]
    return np.array([numbers.setdefault(key, len(numbers)) for key in keys], dtype=int)


def share_interval(scores: np.ndarray, groups: np.ndarray, verdicts: int) -> Interval:
    """Of a share of rows that are right: Wilson's score interval (1927), of groups at the effective
    number of rows, n over the design effect (Kish 1965), with Student's quantile.

    The design effect is taken with two groups more, one all right and one all wrong, of the size in
    which a row finds itself: without an error in sight the rows of a group count as one, and what
    is seen outweighs that by and by. Without groups it is 1, and nothing is added.

    scores: [n], each the mean of a row's verdicts of 0 and 1, nan left out. verdicts: of all rows
    together.
    """
    sums, sizes = _by_group(scores, groups)
    n = sizes.sum()
    if n == 0:
        return None, None
    size = (sizes**2).sum() / n
    p, middle = sums.sum() / n, (sums.sum() + size) / (n + 2 * size)
    between = ((sums - middle * sizes) ** 2).sum() + size**2 * (middle**2 + (1 - middle) ** 2)
    effect = between / ((n + 2 * size) * middle * (1 - middle))
    return _wilson(p, min(verdicts, n / effect), _quantile(sizes))


def gain_interval(gains: np.ndarray, groups: np.ndarray) -> Interval:
    """Of a difference of two such shares over the same rows: Bonett and Price's (2012), which counts
    one pair more won and one lost; of groups one group more each, at the variance between groups,
    with Student's quantile.

    gains: [n], nan left out.
    """
    sums, sizes = _by_group(gains, groups)
    n = sizes.sum()
    if n == 0:
        return None, None
    size = (sizes**2).sum() / n
    middle = sums.sum() / (n + 2 * size)
    between = ((sums - middle * sizes) ** 2).sum() + size**2 * (
        (1 - middle) ** 2 + (1 + middle) ** 2
    )
    reach = _quantile(sizes) * math.sqrt(between) / (n + 2 * size)
    return max(-1.0, float(middle - reach)), min(1.0, float(middle + reach))


def bootstrap_means(
    values: np.ndarray, draws: int, seed: int = 0, groups: np.ndarray | None = None
) -> np.ndarray:
    """Means over groups of rows drawn with replacement, the same draws for all columns.

    values: [n, k], nan left out. groups: [n] int, the number of each row's group; None: each row is
    one -> [draws, k], nan where a draw holds nothing else.
    """
    groups = np.arange(len(values)) if groups is None else groups
    columns = [_sums(column, groups) for column in values.T]
    sums, sizes = (np.stack(part, 1) for part in zip(*columns, strict=True))  # [G, k]
    with np.errstate(invalid="ignore"):
        means = [
            counts @ sums / (counts @ sizes)
            for counts in draw_counts(len(sums), draws, np.random.default_rng(seed))
        ]
    return np.concatenate(means)


def draw_counts(n: int, draws: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """How often each of n is in, when n of them are drawn with replacement -> [m, n] float, some
    draws at a time: at most 32 MB."""
    step = max(1, 2**22 // n)
    for begin in range(0, draws, step):
        m = min(step, draws - begin)
        drawn = rng.integers(n, size=(m, n)) + n * np.arange(m)[:, None]
        yield np.bincount(drawn.ravel(), minlength=m * n).reshape(m, n).astype(float)


def interval(means: np.ndarray, mean: float | None) -> Interval:
    """By percentiles. mean: of all rows, which the interval holds: where all scores are alike, the
    resampled means differ from it by rounding."""
    means = means[np.isfinite(means)]
    if mean is None or len(means) == 0:
        return None, None
    low, high = map(float, np.quantile(means, [0.025, 0.975]))
    return min(low, mean), max(high, mean)


def _sums(values: np.ndarray, groups: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of each group the sum of the finite values, and how many they are: [G], [G] float."""
    finite = np.isfinite(values)
    sums = np.bincount(groups, np.where(finite, values, 0.0))
    return sums, np.bincount(groups, finite.astype(float))


def _by_group(values: np.ndarray, groups: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The same of the groups that have any."""
    sums, sizes = _sums(values, groups)
    return sums[sizes > 0], sizes[sizes > 0]


def _wilson(p: float, n: float, z: float) -> tuple[float, float]:
    middle, scale = p + z**2 / (2 * n), 1 + z**2 / n
    reach = z * math.sqrt(p * (1 - p) / n + (z / (2 * n)) ** 2)
    low, high = (middle - reach) / scale, (middle + reach) / scale
    # rounding would miss the ends
    return (0.0 if p == 0 else float(low)), (1.0 if p == 1 else float(high))


def _quantile(sizes: np.ndarray) -> float:
    """Of the normal distribution for rows by themselves, else Student's with a degree of freedom
    less than groups (Abramowitz and Stegun 26.7.5; from two degrees on within 3 %)."""
    if (sizes == 1).all():
        return Z
    nu = max(len(sizes) - 1, 1)
    terms = (
        (Z**3 + Z) / 4,
        (5 * Z**5 + 16 * Z**3 + 3 * Z) / 96,
        (3 * Z**7 + 19 * Z**5 + 17 * Z**3 - 15 * Z) / 384,
    )
    return Z + sum(term / nu**power for power, term in enumerate(terms, 1))
