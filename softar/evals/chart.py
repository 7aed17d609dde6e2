"""How a comparison looks: its table and its plot, from the rows of results.json alone."""

import math
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from ..show.plots import plot

PANELS = {"nfe": "forward passes per answer (NFE)", "seconds_per_row": "seconds per answer"}
MARKERS = "os^Dv<>PX"
SAME = 0.01  # costs that differ by no more than this share are drawn side by side
APART = 0.018  # how far from each other, as a share of the axis, which is a logarithm ...
LEAST_SPAN = 0.5  # ... and taken to span this at least, from cheapest to dearest
MARGIN = 1.2  # by this factor an axis goes beyond its points
MANY_SETTINGS = 7  # from so many on a legend leaves out those in the middle


def comparison_table(rows: list[dict], notes: str = "") -> Table:
    """One line per decoder, its model below its name where there are several, 95 % intervals below
    accuracy and gain. 100 columns wide at the most; from 84 on only the names wrap."""
    with_model = len({row["model"] for row in rows}) > 1
    sizes = {row["n"] for row in rows}
    parts = [rows[0]["task"] if rows else "", _counted(rows) if len(sizes) == 1 else ""]
    table = Table(
        title=Text(", ".join(filter(None, parts))),
        caption=Text(notes),
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    table.add_column("decoder", overflow="fold", max_width=30)
    columns = {
        "n": (len(sizes) > 1, lambda row: str(row["n"])),
        "accuracy": (True, lambda row: _with_interval(row, "accuracy", "")),
        "gain": (True, lambda row: _with_interval(row, "gain", "+")),
        "NFE": (True, lambda row: _short(row["nfe"])),
        "token-\nfwds": (True, lambda row: _short(row["token_forwards"])),
        "tokens\n/s": (True, lambda row: _short(row["tokens_per_s"])),
        "ms\n/row": (True, lambda row: _short(row["seconds_per_row"] * 1000)),
        "nats": (
            any(row["entropy"] is not None for row in rows),
            lambda row: _fixed(row["entropy"]),
        ),
        "agree": (True, lambda row: _fixed(row["agreement"])),
    }
    columns = {head: cell for head, (is_shown, cell) in columns.items() if is_shown}
    for head in columns:
        table.add_column(head, justify="right", no_wrap=True)
    for row in rows:
        name = row["name"] + ("" if row["complete"] else " (cut short)")
        lines = [name, row["model"]] if with_model and row["model"] else [name]
        table.add_row(Text("\n".join(lines)), *(cell(row) for cell in columns.values()))
    return table


def _counted(rows: list[dict]) -> str:
    """How many rows, and in how many groups, where they belong together."""
    n, groups = rows[0]["n"], {row.get("groups", row["n"]) for row in rows}
    return f"{n} rows" + (f" in {max(groups)} groups" if groups != {n} else "")


def _with_interval(row: dict, key: str, sign: str) -> str:
    if row[key] is None:
        return ""
    return f"{row[key]:{sign}.3f}\n{row[f'{key}_low']:{sign}.3f}…{row[f'{key}_high']:{sign}.3f}"


def _short(value: float | None) -> str:
    """Three significant digits, or all before the point."""
    if value is None:
        return ""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _fixed(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def frontier(rows: list[dict], cost: str) -> list[dict]:
    """The whole rows that no other is both as cheap and as accurate as, by cost. Equals stay
    together."""
    points = [row for row in rows if row["complete"] and _drawable(row, cost)]

    def is_beaten(p: dict) -> bool:
        return any(
            q[cost] <= p[cost]
            and q["accuracy"] >= p["accuracy"]
            and (q[cost], q["accuracy"]) != (p[cost], p["accuracy"])
            for q in points
        )

    return sorted((p for p in points if not is_beaten(p)), key=lambda p: p[cost])


def plot_frontier(rows: list[dict], file: str | Path, title: str = "") -> Path:
    """Accuracy with its 95 % interval against NFE and against seconds per answer, both on log axes.

    A colour and marker per decoder (and model and training, where there are several), a line
    through its settings. Frontier points are ringed and joined by a step line. What was cut short
    is hollow. Points of equal cost are drawn side by side.
    """
    if not any(_drawable(row, cost) for row in rows for cost in PANELS):
        raise ValueError("there is nothing to plot: no decoder has an accuracy and a cost above 0")
    series = _series(rows)
    handles, rings, is_moved = {}, None, False
    size = (9.6, 3.6 + 0.2 * math.ceil(len(series) / 2))  # two series on each line of the legend
    with plot(file, 1, len(PANELS), figsize=size, sharey=True) as (figure, panels):
        for axes, (cost, label) in zip(panels[0], PANELS.items(), strict=True):
            axes.set(xscale="log", xlabel=label)
            axes.grid(axis="y", color="0.92")
            axes.set_axisbelow(True)
            at = side_by_side([row for row in rows if _drawable(row, cost)], cost)
            is_moved |= any(at[id(row)] != row[cost] for row in rows if id(row) in at)
            for i, (name, settings) in enumerate(series):
                settings = [row for row in settings if id(row) in at]
                if settings:
                    settings.sort(key=lambda row: row[cost])
                    look = dict(color=f"C{i % 10}", marker=MARKERS[i % len(MARKERS)])
                    handles[name] = _draw(axes, settings, at, look)
            if best := frontier(rows, cost):
                rings = _draw_frontier(axes, best, at)
            if at:
                log_ticks(axes, list(at.values()))
        if rings is not None:
            handles["frontier: nothing as cheap is more accurate"] = rings
        panels[0, 0].set_ylabel("accuracy (95 % interval)")
        figure.suptitle(title)
        figure.legend(
            handles.values(),
            handles,
            title="points of equal cost are drawn side by side" if is_moved else None,
            title_fontsize=8,
            fontsize=8,
            frameon=False,
            loc="outside lower center",
            ncols=2,
        )
    return Path(file)


def _series(rows: list[dict]) -> list[tuple[str, list[dict]]]:
    """The settings of each decoder (and model and training, where there are several), under its
    label in the legend."""
    several = [key for key in ("model", "training") if len({row.get(key) for row in rows}) > 1]
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault(tuple(row.get(key) for key in ["decoder", *several]), []).append(row)
    return [
        (legend_label(group, sorted(settings, key=lambda row: row["nfe"])), settings)
        for group, settings in groups.items()
    ]


def _drawable(row: dict, cost: str) -> bool:
    return row["accuracy"] is not None and row[cost] is not None and row[cost] > 0


def _draw(axes, rows: list[dict], at: dict[int, float], look: dict):
    """The settings of one decoder -> what stands for it in the legend. look: colour and marker."""
    x, y = [at[id(row)] for row in rows], [row["accuracy"] for row in rows]
    below = [row["accuracy"] - row["accuracy_low"] for row in rows]
    above = [row["accuracy_high"] - row["accuracy"] for row in rows]
    axes.errorbar(
        x,
        y,
        [below, above],
        color=look["color"],
        linestyle="none",
        elinewidth=0.9,
        capsize=2,
        alpha=0.6,
    )
    (line,) = axes.plot(x, y, **look, markersize=5, linewidth=1.2)
    cut = [row for row in rows if not row["complete"]]
    axes.plot(
        [at[id(row)] for row in cut],
        [row["accuracy"] for row in cut],
        **look,
        markersize=5,
        markerfacecolor="white",
        linestyle="none",
    )
    return line


def _draw_frontier(axes, best: list[dict], at: dict[int, float]):
    """-> what stands for it in the legend."""
    x, y = [at[id(row)] for row in best], [row["accuracy"] for row in best]
    axes.step(x, y, where="post", color="0.6", linewidth=1, linestyle=":", zorder=1)
    (rings,) = axes.plot(x, y, "o", markersize=12, markerfacecolor="none", markeredgecolor="0.35")
    return rings


def side_by_side(rows: list[dict], cost: str) -> dict[int, float]:
    """Where each row (by id) is drawn: at its cost, or a little beside it if another costs the
    same."""
    rows, at = sorted(rows, key=lambda row: row[cost]), {}
    span = math.log(rows[-1][cost] / rows[0][cost]) if rows else 0.0
    step = APART * max(span, LEAST_SPAN)
    while rows:
        same = [row for row in rows if row[cost] <= rows[0][cost] * (1 + SAME)]
        for i, row in enumerate(same):
            at[id(row)] = row[cost] * math.exp(step * (i - (len(same) - 1) / 2))
        rows = rows[len(same) :]
    return at


def log_ticks(axes, values: list[float]) -> None:
    """Plain numbers, enough of them also where the costs span less than a decade."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    low, high = min(values) / MARGIN, max(values) * MARGIN
    axes.set_xlim(low, high)
    is_wide = high / low > 6
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if is_wide else (1, 1.5, 2, 3, 4, 5, 7)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def legend_label(group: tuple, rows: list[dict]) -> str:
    """Decoder and what tells it from others, its settings from cheap to dear, what they share last:
    "sampled: votes=2, 4, 8, temperature=1.0"."""
    name = ", ".join(str(part) for part in group if part is not None)
    settings = [row["setting"].split() for row in rows if row["setting"]]
    shared = []
    if len(settings) > 1:
        shared = [word for word in settings[0] if all(word in words for words in settings)]
    singles = [" ".join(word for word in words if word not in shared) for words in settings]
    key = singles[0].split("=")[0] + "=" if singles else ""
    if all(words.startswith(key) for words in singles):  # the key once
        singles[1:] = [words.removeprefix(key) for words in singles[1:]]
    if len(singles) >= MANY_SETTINGS:
        singles = [*singles[:3], "…", *singles[-2:]]
    text = f"{name}: {', '.join([*singles, *shared])}" if singles else name
    return text if all(row["complete"] for row in rows) else f"{text} (hollow: cut short)"
