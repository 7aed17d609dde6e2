"""From answers and scores to the rows of a comparison: means, what they cost, and bootstrap
intervals."""

import math
import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from ..decoders.answer import Decoded


@dataclass
class Pass:
    """One decoder once over the rows; it was cut short where not all of them are `done`."""

    answers: list["Decoded | None"]  # by row
    scores: np.ndarray  # [n] float, nan where there is none
    done: np.ndarray  # [n] bool: the scorer has seen it
    read: list[str | None]  # by row: the answer in the text, for the agreement of two decoders


def bootstrap_means(values: np.ndarray, draws: int, seed: int = 0) -> np.ndarray:
    """Means over rows drawn with replacement, the same draws for all columns.

    values: [n, k], nan left out -> [draws, k], nan where a draw holds nothing else.
    """
    n, rng = len(values), np.random.default_rng(seed)
    finite = np.isfinite(values)
    filled, counted = np.where(finite, values, 0.0), finite.astype(float)
    means, size = [], max(1, 2**22 // n)  # draws at a time: at most 32 MB
    for begin in range(0, draws, size):
        m = min(size, draws - begin)
        drawn = rng.integers(n, size=(m, n)) + n * np.arange(m)[:, None]
        # how often each row is in
        counts = np.bincount(drawn.ravel(), minlength=m * n).reshape(m, n).astype(float)
        with np.errstate(invalid="ignore"):
            means.append(counts @ filled / (counts @ counted))
    return np.concatenate(means)


def interval(means: np.ndarray) -> tuple[float | None, float | None]:
    """95 %, by percentiles."""
    means = means[np.isfinite(means)]
    return tuple(map(float, np.quantile(means, [0.025, 0.975]))) if len(means) else (None, None)


def summarise(
    passes: dict[str, list[Pass]],
    labels: dict[str, dict],
    baseline: str | None,
    draws: int,
    seed: int,
) -> list[dict]:
    """The rows of results.json."""
    if not passes:
        return []
    used = {
        name: [p for p in taken if p.done.all()] or [p for p in taken if p.done.any()]
        for name, taken in passes.items()
    }
    # [n, decoders]
    scores = np.stack([_mean([p.scores for p in taken], 0) for taken in used.values()], 1)
    base = scores[:, list(used).index(baseline)] if baseline else np.full(len(scores), np.nan)
    gains = scores - base[:, None]
    means = bootstrap_means(np.concatenate([scores, gains], 1), draws, seed)
    rows = []
    for i, (name, taken) in enumerate(used.items()):
        row = labels[name] | dict(
            name=name, n=int(np.isfinite(scores[:, i]).sum()), repeats=len(taken)
        )
        row["accuracy"] = number(_mean(scores[:, i]))
        row["accuracy_low"], row["accuracy_high"] = interval(means[:, i])
        row["accuracy_sd"] = _spread([number(_mean(p.scores)) for p in taken])
        is_other = baseline not in (None, name)
        row["gain"] = number(_mean(gains[:, i])) if is_other else None
        row["gain_low"], row["gain_high"] = (
            interval(means[:, len(used) + i]) if is_other else (None, None)
        )
        row |= _costs(taken)
        row["agreement"] = _agreement(taken, used[baseline]) if baseline else None
        row["complete"] = bool(taken[0].done.all())
        rows.append(row)
    return rows


def _costs(passes: list[Pass]) -> dict:
    by_pass = [[answer for answer in p.answers if answer is not None] for p in passes]
    answers = [answer for answers in by_pass for answer in answers]
    seconds = [float(sum(answer.seconds for answer in answers)) for answers in by_pass]
    whole, tokens = sum(seconds), sum(len(answer.tokens) for answer in answers)
    entropies = [
        float(answer.entropy)
        for answer in answers
        if answer.entropy is not None and math.isfinite(answer.entropy)
    ]
    return dict(
        nfe=statistics.fmean(answer.num_forwards for answer in answers),
        token_forwards=statistics.fmean(answer.token_forwards for answer in answers),
        tokens_per_s=tokens / whole if whole > 0 else None,
        seconds=statistics.fmean(seconds),
        seconds_per_row=whole / len(answers),
        seconds_sd=_spread(seconds),
        entropy=statistics.fmean(entropies) if entropies else None,
    )


def _agreement(passes: list[Pass], others: list[Pass]) -> float | None:
    same = [
        a == b
        for p, q in zip(passes, others)
        for a, b in zip(p.read, q.read)
        if a is not None and b is not None
    ]
    return sum(same) / len(same) if same else None


def _mean(values, axis: int | None = None):
    """Of the finite values; nan where there are none."""
    values = np.asarray(values)
    with np.errstate(invalid="ignore"):
        return np.nansum(values, axis) / np.isfinite(values).sum(axis)


def _spread(values: list[float | None]) -> float | None:
    numbers = [value for value in values if value is not None]
    return statistics.stdev(numbers) if len(numbers) > 1 else None


def number(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
