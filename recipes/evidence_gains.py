"""From the logs of an experiment to its gains and verdicts.

Shapes: S seeds, n rows.
"""

import math
from typing import NamedTuple

import numpy as np

from softar.evals.intervals import number_groups
from softar.evals.seeds import Gain, bootstrap_gains, summary
from softar.recipes.evidence_kinds import (
    EQUAL_FORWARDS,
    EQUAL_SECONDS,
    EQUIVALENT,
    MARGIN,
    Best,
    Claim,
    Evidence,
    Grid,
    Part,
)
from softar.recipes.evidence_logs import DEV, Logs, Read, Rows

THERE = "there is one"  # to a question
RANK = (
    "refuted",
    "open",
    "supported",
    THERE,
)  # several claims together are as sure as the least sure


class Result(NamedTuple):
    claim: Claim
    gain: Gain
    beside: Gain | None  # on the rows that `Rows.beside` marks, where there are such
    ours: float | None  # mean accuracies, of a claim with one part
    theirs: float | None
    seconds: tuple[float, float] | None = None  # of training, of ours and theirs
    forwards: tuple[float, float] | None = None  # an answer, of ours and theirs
    least_seeds: int = 2

    @property
    def longer(self) -> float | None:
        """By which share ours were trained longer than theirs."""
        if self.seconds is None:
            return None
        ours, theirs = self.seconds
        return (ours - theirs) / theirs

    @property
    def verdict(self) -> str | None:
        return verdict_on(self.claim, self.gain, self.least_seeds)

    @property
    def by_t(self) -> str | None:
        """The verdict that t over the seeds gives."""
        of_t = self.gain._replace(low=self.gain.t_low, high=self.gain.t_high)
        return verdict_on(self.claim, of_t, self.least_seeds)

    @property
    def is_equivalent(self) -> bool:
        return self.gain.is_equivalent(EQUIVALENT)


def verdict_on(claim: Claim, gain: Gain, least_seeds: int) -> str | None:
    if not claim.has_verdict:
        return None
    if gain.seeds < least_seeds:
        return "open"
    if not claim.is_question:
        return gain.verdict(claim.margin)
    return "open" if gain.low <= 0 <= gain.high else THERE


def of_both(verdict: str | None, by_t: str | None) -> str:
    """What bootstrap and t say together: "supported", "open (bootstrap: supported)"."""
    if not verdict or verdict == by_t:
        return verdict or ""
    return f"open (t: {by_t})" if verdict == "open" else f"open (bootstrap: {verdict})"


class Cell(NamedTuple):
    """Accuracy of a read-out."""

    by_seed: np.ndarray  # [S]

    @property
    def mean(self) -> float:
        return float(self.by_seed.mean())

    @property
    def sd(self) -> float | None:
        return float(self.by_seed.std(ddof=1)) if len(self.by_seed) > 1 else None


class Analysis(NamedTuple):
    """All that is known of an experiment; no results where no seed is whole."""

    name: str
    evidence: Evidence
    logs: Logs
    results: dict[str, Result]  # by what the claim says
    cells: dict[Read, Cell]
    choices: dict[Best, Read]

    def verdict(self, about: str, by_t: bool = False) -> str:
        """On all claims of that name: the least of theirs."""
        of = [each for each in self.results.values() if each.claim.about == about]
        return min((each.by_t if by_t else each.verdict for each in of), key=RANK.index)

    def read(self, read: Read | Best) -> Read:
        """What was chosen, where there was a choice."""
        return self.choices[read] if isinstance(read, Best) else read

    def cell(self, read: Read | Best) -> Cell:
        return self.cells[self.read(read)]

    def floor(self, grid: Grid, line: str) -> float | None:
        return self.logs.rows[self.read(grid.lines[line][0]).rows].floor


def analyse(name: str, evidence: Evidence, logs: Logs, draws: int = 10_000) -> Analysis:
    if not logs.whole:
        return Analysis(name, evidence, logs, {}, {}, {})
    choices = choices_of(evidence, logs)
    claims = [with_choices(claim, choices) for claim in evidence.claims]
    parts = {part._replace(weight=1.0): None for claim in claims for part in claim.parts}
    scores = {read: logs.scores(read) for read in reads_of(evidence)}
    gains = {part: mean(scores, part.ours) - mean(scores, part.theirs) for part in parts}
    rows_of = {part: logs.rows[part.ours[0].rows] for part in parts}
    every = drawn(gains, rows_of, draws)
    some = {part: rows.beside for part, rows in rows_of.items() if rows.beside is not None}
    few = {part: gains[part][:, mask] for part, mask in some.items()}
    few_rows = {part: subset(rows_of[part], mask) for part, mask in some.items()}
    beside = drawn(few, few_rows, draws)
    results = {}
    for claim in claims:
        ours = theirs = seconds = forwards = None
        if len(claim.parts) == 1:
            (part,) = claim.parts
            ours, theirs = (Cell(mean(scores, reads).mean(1)).mean for reads in part[:2])
            seconds = seconds_of(logs, part) if claim.has_seconds else None
            forwards = forwards_of(logs, part)
        on_some = all(part._replace(weight=1.0) in few for part in claim.parts)
        results[claim.says] = Result(
            claim,
            combined(claim, gains, every, rows_of),
            combined(claim, few, beside, few_rows) if on_some else None,
            ours,
            theirs,
            seconds,
            forwards,
            evidence.least_seeds,
        )
    cells = {read: Cell(each.mean(1)) for read, each in scores.items()}
    return Analysis(name, evidence, logs, results, cells, choices)


def reads_of(evidence: Evidence) -> dict[Read, None]:
    """All that the tables name, each once."""
    return dict.fromkeys(
        read
        for each in named_in(evidence)
        for read in (each.of if isinstance(each, Best) else [each])
    )


def named_in(evidence: Evidence) -> list[Read | Best]:
    """Ours and theirs, of every claim, and the lines of every grid."""
    parts = [part for claim in evidence.claims for part in claim.parts]
    sides = [read for part in parts for reads in (part.ours, part.theirs) for read in reads]
    return sides + [read for g in evidence.grids for reads in g.lines.values() for read in reads]


def choices_of(evidence: Evidence, logs: Logs) -> dict[Best, Read]:
    """What each `Best` is: all seeds have as many rows, so that the sum decides as the mean does."""

    def right(read: Read) -> int:
        return int(logs.scores(read, DEV).sum())

    every = dict.fromkeys(each for each in named_in(evidence) if isinstance(each, Best))
    return {each: max(each.of, key=right) for each in every}


def with_choices(claim: Claim, choices: dict[Best, Read]) -> Claim:
    """The claim, with what was chosen in place of each `Best`."""

    def made(reads: tuple) -> tuple[Read, ...]:
        return tuple(choices[read] if isinstance(read, Best) else read for read in reads)

    parts = (part._replace(ours=made(part.ours), theirs=made(part.theirs)) for part in claim.parts)
    return claim._replace(parts=tuple(parts))


def mean(scores: dict[Read, np.ndarray], reads: tuple[Read, ...]) -> np.ndarray:
    """[S, n] float, of several read-outs."""
    return sum(scores[read].astype(float) for read in reads) / len(reads)


def seconds_of(logs: Logs, part: Part) -> tuple[float, float] | None:
    """Mean processor seconds of the training of ours and of theirs, over the whole seeds of which
    none failed; None where the weights are the same, or no seconds are there."""
    ours, theirs = ([*dict.fromkeys(read.setting for read in reads)] for reads in part[:2])
    if ours == theirs:
        return None
    both = np.stack([sum(map(logs.seconds, some)) / len(some) for some in (ours, theirs)])
    both = both[:, np.isfinite(both).all(0)]
    if not both.size or not both.mean(1).all():
        return None
    return tuple(both.mean(1).tolist())


def forwards_of(logs: Logs, part: Part) -> tuple[float, float] | None:
    """Mean forwards an answer of ours and of theirs, over the whole seeds of which none failed; None
    where the logs have none."""
    both = np.stack([sum(map(logs.forwards, reads)) / len(reads) for reads in part[:2]])
    both = both[:, np.isfinite(both).all(0)]
    return tuple(both.mean(1).tolist()) if both.size else None


def subset(rows: Rows, mask: np.ndarray) -> Rows:
    groups = None if rows.groups is None else number_groups([*rows.groups[mask]])
    return rows._replace(n=int(mask.sum()), groups=groups)


def drawn(gains: dict[Part, np.ndarray], rows: dict[Part, Rows], draws: int) -> dict:
    """Part -> [draws] of its mean gain; those over the same rows are drawn together."""
    found, by_rows = {}, {}
    for part in gains:
        by_rows.setdefault(rows[part].number, []).append(part)
    for number, parts in by_rows.items():
        stack = np.stack([gains[part] for part in parts])
        groups = rows[parts[0]].groups
        found |= zip(parts, bootstrap_gains(stack, groups, draws=draws, rows=number))
    return found


def combined(claim: Claim, gains: dict, every: dict, rows: dict[Part, Rows]) -> Gain:
    """The sum of a claim's parts, each with its weight."""
    parts = {part._replace(weight=1.0): part.weight for part in claim.parts}
    by_seed = sum(weight * gains[part].mean(1) for part, weight in parts.items())
    means = sum(weight * every[part] for part, weight in parts.items())
    return summary(by_seed, means, min(groups_of(rows[part]) for part in parts))


def groups_of(rows: Rows) -> int:
    return rows.n if rows.groups is None else int(rows.groups.max()) + 1


# What the tables and the page say


def points(value: float, sign: str = "+") -> str:
    """In points of accuracy, with a sign."""
    return f"{round(100 * value, 1) + 0.0:{sign}.1f}"


def span(low: float, high: float) -> str:
    return "" if math.isinf(low) else f"{points(low, '')} to {points(high, '')}"


def share(value: float) -> str:
    """An accuracy: .913"""
    return f"{value:.3f}".removeprefix("0") if value < 1 else "1.000"


def seeds_of(logs: Logs) -> str:
    """Which seeds count: "all 8 seeds", "interim, 4 of 8 seeds: 0 to 2, 4"."""
    if len(logs.whole) == len(logs.planned):
        return f"all {len(logs.planned)} seeds"
    some = f": {ranges(logs.whole)}" if logs.whole else ""
    return f"interim, {len(logs.whole)} of {len(logs.planned)} seeds{some}"


def ranges(numbers: list[int]) -> str:
    """Rising whole numbers: "0 to 2, 4"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{r[0]} to {r[-1]}" if len(r) > 1 else f"{r[0]}" for r in runs)


def verdicts_of(result: Result) -> str:
    """ "supported, equivalent; ours took 21 % longer; forwards 7, 56" """
    words = [of_both(result.verdict, result.by_t)]
    if result.verdict is not None and result.is_equivalent:
        words.append("equivalent")
    if result.verdict is not None and result.claim.margin != MARGIN:
        words.append(f"margin {100 * result.claim.margin:.0f}")
    said = [", ".join(filter(None, words))]
    if result.longer is not None:
        both = {"ours": result.longer}
        if result.verdict == result.by_t == "refuted":  # to which theirs are in favour
            both["theirs"] = 1 / (1 + result.longer) - 1
        said += [
            f"{whose} took {100 * more:.0f} % longer"
            for whose, more in both.items()
            if more > EQUAL_SECONDS
        ]
    if result.forwards is not None:
        ours, theirs = result.forwards
        if abs(theirs - ours) > EQUAL_FORWARDS * ours:
            said.append(f"forwards {ours:.3g}, {theirs:.3g}")
    return "; ".join(filter(None, said))
