"""The curves of the evidence: accuracies over doses or forwards, gains, accuracies over seconds. Each
panel is drawn by itself for the page, in colours that follow its scheme, and all of a figure on one PNG."""

import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from softar.recipes.evidence_gains import Analysis, points, seeds_of, share
from softar.recipes.evidence_kinds import MARGIN, Grid
from softar.show.plots import plot

SIZE = (4.6, 4.0)  # inches of a panel
MARKERS = "osD^vP"
LETTERS = 13  # an inch, of two columns of a legend beside their marks
# what is drawn in -> the name that it has in the page's style
COLOURS = {"#1c1e24": "ink", "#5f6470": "muted", "#e3e3de": "line"}
SERIES = {"#4338ca": "s0", "#b45309": "s1", "#0f766e": "s2", "#be185d": "s3"}
SERIES |= {"#2563eb": "s4", "#6b7280": "s5"}
INK, MUTED, LINE = COLOURS
LOOK = {
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.titlesize": 10,
    "font.size": 9,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "text.color": INK,
    "xtick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.color": MUTED,
    "ytick.labelcolor": INK,
    "svg.fonttype": "none",
}
ON_PAGE = {"figure.facecolor": "none", "axes.facecolor": "none", "savefig.facecolor": "none"}


class Panel(NamedTuple):
    title: str
    draw: Callable  # (axes) -> None
    alt: str  # what is to be seen, in words and numbers


class Figure(NamedTuple):
    name: str  # of its file
    title: str
    panels: list[Panel]


def figures_of(analysis: Analysis) -> list[Figure]:
    """Those of an experiment, none while no seed is whole."""
    if not analysis.logs.whole:
        return []
    evidence, seeds = analysis.evidence, seeds_of(analysis.logs)
    made = [
        Figure(
            f"{analysis.name}-{grid.name}",
            f"Accuracy over {grid.x} ({seeds}; bands: lowest to highest seed)",
            [curve_panel(analysis, grid)],
        )
        for grid in evidence.grids
        if grid.x
    ]
    made.append(
        Figure(
            f"{analysis.name}-gains",
            f"Gains ({seeds}; bars: 95 % over seeds and rows)",
            [gap_panel(analysis)],
        )
    )
    panels = [seconds_panel(analysis, column) for column in evidence.seconds]
    title = f"Accuracy over seconds of training ({seeds}; bars: lowest to highest seed)"
    return [*made, Figure(f"{analysis.name}-seconds", title, panels)]


def look(i: int) -> dict:
    return dict(color=[*SERIES][i % len(SERIES)], marker=MARKERS[i % len(MARKERS)], markersize=5)


def curve_panel(analysis: Analysis, grid: Grid) -> Panel:
    names = grid.drawn or tuple(grid.lines)
    ticks = [re.sub(r"^top | forwards$", "", column) for column in grid.columns]
    xs = [float(t) for t in ticks] if all(t.isdigit() for t in ticks) else [*range(len(ticks))]
    joined = len(ticks) - grid.apart
    xs = [x + 0.4 * (i >= joined) for i, x in enumerate(xs)]

    def draw(axes) -> None:
        for i, name in enumerate(names):
            cells = [analysis.cell(read).by_seed for read in grid.lines[name]]
            mean, low, high = ([f(cell) for cell in cells] for f in (np.mean, np.min, np.max))
            axes.plot(xs[:joined], mean[:joined], **look(i), linewidth=1.5, label=name)
            axes.fill_between(
                xs[:joined], low[:joined], high[:joined], color=look(i)["color"], alpha=0.15
            )
            for x, m, a, b in [*zip(xs, mean, low, high)][joined:]:
                axes.errorbar(x, m, [[m - a], [b - m]], **look(i), capsize=3)
            if grid.floor:
                label = grid.floor if i == 0 else None
                floor = analysis.floor(grid, name)
                axes.plot(xs[-1] + 0.25, floor, "_", color=look(i)["color"], label=label)
        axes.set_xticks(xs, ticks)
        axes.set(xlabel=grid.x, ylabel="accuracy on test rows", ylim=(0, 1.03))

    said = [
        f"{name}: "
        + ", ".join(
            f"{share(analysis.cell(read).mean)} at {column}"
            for column, read in zip(grid.columns, grid.lines[name])
        )
        for name in names
    ]
    return Panel(grid.corner if grid.apart else analysis.evidence.title, draw, "; ".join(said))


def gap_panel(analysis: Analysis) -> Panel:
    lines, claims = {}, []
    for legend, by_tick in analysis.evidence.gaps.items():
        results = [analysis.results[says] for says in by_tick.values()]
        lines[legend] = [result.gain for result in results]
        claims += [result.claim for result in results]
        if all(result.beside for result in results):
            lines["other rows"] = [result.beside for result in results]
    ticks = [*next(iter(analysis.evidence.gaps.values()))]

    def draw(axes) -> None:
        for i, (legend, gains) in enumerate(lines.items()):
            xs = np.arange(len(gains)) + 0.12 * (i - (len(lines) - 1) / 2)
            mean, low, high = (100 * np.array([gain[at] for gain in gains]) for at in range(3))
            ends = np.maximum([mean - low, high - mean], 0)
            axes.errorbar(xs, mean, ends, **look(i), linewidth=1.2, capsize=3, label=legend)
        axes.axhline(0, color=MUTED, linewidth=0.8)
        margins = {claim.margin for claim in claims if claim.has_verdict} or {MARGIN}
        for margin in margins:
            axes.axhline(
                100 * margin, color=MUTED, linewidth=0.8, linestyle=":", label="the margin"
            )
        axes.set_xticks(range(len(ticks)), ticks)
        axes.set(xlabel=analysis.evidence.gaps_x, ylabel="gain in points")

    said = [
        f"{legend}: " + ", ".join(f"{points(g.mean)} at {t}" for t, g in zip(ticks, gains))
        for legend, gains in lines.items()
    ]
    return Panel("gain", draw, "; ".join(said))


def seconds_panel(analysis: Analysis, column: str) -> Panel:
    grid = analysis.evidence.grids[0]
    at, names = grid.columns.index(column), analysis.evidence.seconds[column]
    reads = {name: analysis.read(grid.lines[name][at]) for name in names}
    seconds = {name: analysis.logs.seconds(read.setting) for name, read in reads.items()}
    seconds = {name: some[np.isfinite(some)] for name, some in seconds.items()}
    seconds = {name: some for name, some in seconds.items() if len(some)}  # not all failed

    def draw(axes) -> None:
        for i, name in enumerate(names):
            if name not in seconds:
                continue
            xs, ys = seconds[name], analysis.cells[reads[name]].by_seed
            ends = [[[z.mean() - z.min()], [z.max() - z.mean()]] for z in (xs, ys)]
            ends = np.maximum(ends, 0)
            axes.errorbar(
                xs.mean(),
                ys.mean(),
                ends[1],
                ends[0],
                **look(i),
                linewidth=1,
                label=name,
                linestyle="none",
            )
        most = max((some.max() for some in seconds.values()), default=1.0)
        axes.set(xlim=(0, 1.08 * most), ylim=(0, 1.03), ylabel="accuracy on test rows")
        axes.set_xlabel("seconds of training (processor)")

    said = [
        f"{name}: {share(analysis.cells[reads[name]].mean)} after {some.mean():.0f} seconds"
        for name, some in seconds.items()
    ]
    return Panel(column, draw, "; ".join(said))


def png(figure: Figure, folder: Path) -> Path:
    """All panels side by side."""
    import matplotlib

    file, wide = folder / f"{figure.name}.png", len(figure.panels)
    size = (SIZE[0] * wide, SIZE[1])
    with matplotlib.rc_context(LOOK), plot(file, 1, wide, figsize=size) as (drawing, axes):
        for panel, each in zip(figure.panels, axes[0], strict=True):
            panel.draw(each)
            each.set_title(panel.title)
        drawing.suptitle(figure.title, fontsize=9, wrap=True)
        legend(drawing, axes[0, 0])
    return file


def svg(panel: Panel, name: str) -> str:
    """For a page: colours by the page's scheme, an alternative text, ids of its own."""
    import matplotlib

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "panel.svg")
        with matplotlib.rc_context(LOOK | ON_PAGE), plot(file, figsize=SIZE) as (drawing, axes):
            panel.draw(axes[0, 0])
            axes[0, 0].set_title(panel.title)
            legend(drawing, axes[0, 0])
        text = file.read_text(encoding="utf-8")
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'( id="|url\(#|href="#)', rf"\1{name}-", text)
    for colour, variable in (COLOURS | SERIES).items():
        text = text.replace(colour, f"var(--{variable})")
    text = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", text)
    return re.sub(r"^<svg[^>]*?(viewBox=\"[^\"]*\")[^>]*>", r'<svg \1 aria-hidden="true">', text)


def legend(drawing, axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    wide = sum(sorted(map(len, labels))[-2:]) > LETTERS * drawing.get_size_inches()[0]
    drawing.legend(handles, labels, loc="outside lower center", ncols=1 if wide else 2)
