"""From answers and scores to the rows of a comparison: means, their intervals, and what they
cost."""

import math
import statistics
from dataclasses import dataclass

import numpy as np

from ..decoders.answer import Decoded, known_sum
from .intervals import bootstrap_means, gain_interval, interval, share_interval
from .parallelism import add_aup


@dataclass
class Pass:
    """One decoder once over the rows; it was cut short where not all of them are `done`."""

    answers: list[Decoded | None]  # by row
    scores: np.ndarray  # [n] float, nan where there is none
    done: np.ndarray  # [n] bool: the scorer has seen it
    read: list[str | None]  # by row: the answer in the text, for the agreement of two decoders


def summarise(
    passes: dict[str, list[Pass]],
    labels: dict[str, dict],
    baseline: str | None,
    draws: int,
    seed: int,
    groups: np.ndarray,
) -> list[dict]:
    """The rows of results.json. groups: [n] the number of each row's group."""
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
    intervals, gain_intervals = _intervals(used, baseline, scores, gains, (draws, seed, groups))
    rows = []
    for i, (name, taken) in enumerate(used.items()):
        scored = np.isfinite(scores[:, i])
        row = labels[name] | dict(name=name, n=int(scored.sum()))
        row |= dict(groups=len(np.unique(groups[scored])), repeats=len(taken))
        row["accuracy"] = number(_mean(scores[:, i]))
        row["accuracy_low"], row["accuracy_high"] = intervals[i]
        row["accuracy_sd"] = _spread([number(_mean(p.scores)) for p in taken])
        is_other = baseline not in (None, name)
        row["gain"] = number(_mean(gains[:, i])) if is_other else None
        row["gain_low"], row["gain_high"] = gain_intervals[i] if is_other else (None, None)
        row |= _costs(taken)
        row["agreement"] = _agreement(taken, used[baseline]) if baseline else None
        row["complete"] = bool(taken[0].done.all())
        rows.append(row)
    add_aup(rows, ("model", "decoder", "training"))
    return rows


def _intervals(
    used: dict[str, list[Pass]], baseline: str | None, scores, gains, how: tuple
) -> tuple[list, list]:
    """Of each decoder's accuracy and of its gain: by formula where all its verdicts (and the
    baseline's) are 0 or 1, else by resampling. scores, gains: [n, decoders]."""
    draws, seed, groups = how
    verdicts = {name: np.concatenate([p.scores for p in taken]) for name, taken in used.items()}
    verdicts = {name: values[np.isfinite(values)] for name, values in verdicts.items()}
    binary = [bool(np.isin(values, (0, 1)).all()) for values in verdicts.values()]
    both = [each and binary[list(used).index(baseline or name)] for each, name in zip(binary, used)]
    accuracies, differences = [None] * len(used), [None] * len(used)
    if not all(both):
        means = bootstrap_means(np.concatenate([scores, gains], 1), draws, seed, groups)
        held = [number(_mean(column)) for column in np.concatenate([scores, gains], 1).T]
        found = [interval(*pair) for pair in zip(means.T, held, strict=True)]
        accuracies, differences = found[: len(used)], found[len(used) :]
    for i, values in enumerate(verdicts.values()):
        if binary[i]:
            accuracies[i] = share_interval(scores[:, i], groups, len(values))
        if both[i]:
            differences[i] = gain_interval(gains[:, i], groups)
    return accuracies, differences


def _costs(passes: list[Pass]) -> dict:
    by_pass = [[answer for answer in p.answers if answer is not None] for p in passes]
    answers = [answer for answers in by_pass for answer in answers]
    seconds = [float(sum(answer.seconds for answer in answers)) for answers in by_pass]
    whole, n = sum(seconds), len(answers)
    tokens = known_sum(answer.num_tokens for answer in answers)
    forwards = known_sum(answer.num_forwards for answer in answers)
    positions = known_sum(answer.token_forwards for answer in answers)
    entropies = [
        float(answer.entropy)
        for answer in answers
        if answer.entropy is not None and math.isfinite(answer.entropy)
    ]
    return dict(
        nfe=None if forwards is None else forwards / n,
        tpf=None if tokens is None or not forwards else tokens / forwards,
        token_forwards=None if positions is None else positions / n,
        tokens_per_s=None if tokens is None or not whole else tokens / whole,
        seconds=statistics.fmean(seconds),
        seconds_per_row=whole / n,
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
