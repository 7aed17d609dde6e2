"""The tables of the evidence in Markdown, and the regions of README.md and RESULTS.md that hold them."""

import math
import re
import textwrap
from pathlib import Path

from softar.recipes.evidence_gains import (
    Analysis,
    Result,
    of_both,
    points,
    seeds_of,
    share,
    span,
    verdicts_of,
)
from softar.recipes.evidence_kinds import Grid
from softar.results import write_whole

WIDTH = 100
COSTS = ("forwards an answer", "steps", "seconds of training")
BEGIN, END = "<!-- evidence: {} -->", "<!-- /evidence: {} -->"


def table(head: list[str], lines: list[list[str]]) -> str:
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def wrapped(text: str, width: int = WIDTH) -> str:
    return "\n".join(textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False))


def head_of(analysis: Analysis) -> str:
    """Which seeds count, and the verdicts."""
    words = []
    for about in analysis.evidence.verdicts:
        verdict = of_both(analysis.verdict(about), analysis.verdict(about, by_t=True))
        colon = ":" if " " in verdict and not verdict.startswith("open") else ""
        words.append(f"{about}{colon} {verdict}")
    seeds = seeds_of(analysis.logs)
    failed = [name for name in analysis.logs.failed if is_counted(name, analysis)]
    wrong = f" Failed, and so wrong in every row: {', '.join(failed)}." if failed else ""
    said = "; ".join(words)
    return f"**{seeds[0].upper()}{seeds[1:]}. {said[0].upper()}{said[1:]}.**{wrong}"


def is_counted(name: str, analysis: Analysis) -> bool:
    return int(name.rpartition("seed")[2]) in analysis.logs.whole


def claims_table(analysis: Analysis) -> str:
    has_beside = any(result.beside for result in analysis.results.values())
    head = ["", "gain", "accuracy", "95 %", "t, 95 %", "seconds, both", "verdict"]
    head[5:5] = ["gain on other rows"] if has_beside else []
    return table(head, [claim_line(each, has_beside) for each in analysis.results.values()])


def claim_line(result: Result, has_beside: bool) -> list[str]:
    gain, claim = result.gain, result.claim
    says = f"*{claim.about}*, {claim.says}"
    both = "" if result.ours is None else f"{share(result.ours)}, {share(result.theirs)}"
    spans = span(gain.low, gain.high), span(gain.t_low, gain.t_high)
    seconds = ", ".join(f"{each:.0f}" for each in result.seconds or ())
    line = [says, points(gain.mean), both, *spans, seconds, verdicts_of(result)]
    if has_beside:
        some = result.beside
        said = some and f"{points(some.mean)} ({span(some.low, some.high)})"
        line.insert(5, said or "")
    return line


def grid_table(analysis: Analysis, grid: Grid) -> str:
    lines = []
    for name, reads in grid.lines.items():
        cells = [analysis.cell(read) for read in reads]
        spread = ["" if cell.sd is None else f" ± {share(cell.sd)}" for cell in cells]
        line = [name, *(share(cell.mean) + sd for cell, sd in zip(cells, spread))]
        if grid.floor:
            line.append(share(analysis.floor(grid, name)))
        lines.append(line + (costs_of(analysis, reads) if grid.costs else []))
    head = [grid.corner, *grid.columns, *filter(None, [grid.floor])]
    return table(head + ([*COSTS] if grid.costs else []), lines)


def costs_of(analysis: Analysis, reads) -> list[str]:
    """Of a line's columns, COSTS."""
    logs, every = analysis.logs, [analysis.read(read) for read in reads]
    numbers = (
        [logs.forwards(read).mean() for read in every],
        [logs.steps(read.setting).mean() for read in every],
        [logs.seconds(read.setting).mean() for read in every],
    )
    return [", ".join("?" if math.isnan(n) else f"{n:.0f}" for n in some) for some in numbers]


def about_of(analysis: Analysis) -> str:
    """How the table of claims is read."""
    about = (
        "Gains in points of accuracy. 95 %: bootstrap over seeds and groups of rows; t: over seeds."
    )
    about += " Accuracy: of both. Seconds: mean processor seconds of training, of both, where these are two nets."
    if any("forwards" in verdicts_of(each) for each in analysis.results.values()):
        about += " Forwards: an answer, of both, where they are not as many."
    about += " Without a verdict: beside the claims and for the curves."
    beside = analysis.evidence.beside
    return f"{about} Other rows: {beside}." if beside else about


def choices_of(analysis: Analysis) -> str:
    """What was chosen on development rows; nothing where nothing was."""
    said = [
        f"{best.name}: {read.setting}, {read.readout}" for best, read in analysis.choices.items()
    ]
    return f"Best on development rows, mean over seeds: {'; '.join(said)}." if said else ""


def region_of(analysis: Analysis) -> str:
    """What stands in RESULTS.md of an experiment."""
    evidence = analysis.evidence
    if not analysis.logs.whole:
        return f"No seed is whole yet, of {len(analysis.logs.planned)}."
    tables = [grid_table(analysis, grid) for grid in evidence.grids]
    notes = "\n".join(wrapped(f"* {note}").replace("\n", "\n  ") for note in evidence.notes)
    parts = [
        wrapped(head_of(analysis)),
        wrapped(about_of(analysis)),
        claims_table(analysis),
        wrapped(choices_of(analysis)),
        *tables,
        notes,
    ]
    return "\n\n".join(filter(None, parts))


# Regions


def rewritten(text: str, name: str, body: str, page: str) -> str:
    """The page with what stands between the marks of a region replaced.

    Raises:
        ValueError: unless the page has these marks, once.
    """
    begin, end = BEGIN.format(name), END.format(name)
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(
            f"{page} has no region {name!r}: put the lines {begin} and {end} where it shall stand"
        )
    before, after = text.split(begin)[0], text.split(end)[1]
    return f"{before}{begin}\n{body}\n{end}{after}"


def has_region(text: str, name: str) -> bool:
    return BEGIN.format(name) in text


def without_regions(text: str) -> str:
    return re.sub(r"<!-- evidence: (.*?) -->.*?<!-- /evidence: \1 -->", "", text, flags=re.DOTALL)


def update(file: Path, regions: dict[str, str], write: bool) -> bool:
    """Are these regions of a page what they should be? With `write` they are, afterwards."""
    old = new = file.read_text(encoding="utf-8")
    for name, body in regions.items():
        new = rewritten(new, name, body, file.name)
    if write and new != old:
        write_whole(file, new)
    return new == old
