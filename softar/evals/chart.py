"""How a comparison looks: its table and its plot, from the rows of results.json alone."""

import math
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

PANELS = {"nfe": "forward passes per answer (NFE)", "seconds_per_row": "seconds per answer"}
MARKERS = "os^Dv<>PX"


def comparison_table(rows: list[dict], notes: str = "") -> Table:
    """One line per decoder, its model below its name where there are several, 95 % intervals below
    accuracy and gain. 100 columns wide at the most; from 84 on only the names wrap."""
    with_model = len({row["model"] for row in rows}) > 1
    sizes = {row["n"] for row in rows}
    title = ", ".join(
        filter(
            None, [rows[0]["task"] if rows else "", f"{max(sizes)} rows" if len(sizes) == 1 else ""]
        )
    )
    table = Table(
        title=Text(title),
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

    def beaten(p: dict) -> bool:
        return any(
            q[cost] <= p[cost]
            and q["accuracy"] >= p["accuracy"]
            and (q[cost], q["accuracy"]) != (p[cost], p["accuracy"])
            for q in points
        )

    return sorted((p for p in points if not beaten(p)), key=lambda p: p[cost])


def plot_frontier(rows: list[dict], file: str | Path, title: str = "") -> Path:
    """Accuracy with its 95 % interval against NFE and against seconds per answer, both on log axes.

    A colour and marker per decoder (and model and training, where there are several), a line
    through its settings. Frontier points are ringed and joined by a step line. What was cut short
    is hollow. Points of equal cost are drawn side by side.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    keys = [
        key
        for key in ("decoder", "model", "training")
        if key == "decoder" or len({r.get(key) for r in rows}) > 1
    ]
    series: dict[tuple, list[dict]] = {}
    for row in rows:
        series.setdefault(tuple(row.get(key) for key in keys), []).append(row)
    if not any(_drawable(row, cost) for row in rows for cost in PANELS):
        raise ValueError("there is nothing to plot: no decoder has an accuracy and a cost above 0")
    figure, panels = plt.subplots(
        1,
        2,
        figsize=(9.6, 3.6 + 0.2 * math.ceil(len(series) / 2)),
        sharey=True,
        layout="constrained",
    )
    labels = {
        group: legend_label(group, sorted(mine, key=lambda row: row["nfe"]))
        for group, mine in series.items()
    }
    handles, rings = {}, None
    places = {
        cost: side_by_side([row for row in rows if _drawable(row, cost)], cost) for cost in PANELS
    }
    for axes, (cost, label) in zip(panels, PANELS.items()):
        axes.set(xscale="log", xlabel=label)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="0.92")
        axes.set_axisbelow(True)
        at = places[cost]
        for i, (group, mine) in enumerate(series.items()):
            mine = sorted((row for row in mine if _drawable(row, cost)), key=lambda row: row[cost])
            if mine:
                handles[labels[group]] = _draw(
                    axes, mine, at, f"C{i % 10}", MARKERS[i % len(MARKERS)]
                )
        if best := frontier(rows, cost):
            x, y = [at[id(row)] for row in best], [row["accuracy"] for row in best]
            axes.step(x, y, where="post", color="0.6", linewidth=1, linestyle=":", zorder=1)
            (rings,) = axes.plot(
                x, y, "o", markersize=12, markerfacecolor="none", markeredgecolor="0.35"
            )
        if at:
            log_ticks(axes, list(at.values()))
    panels[0].set_ylabel("accuracy (95 % interval)")
    if rings is not None:
        handles["frontier: nothing as cheap is more accurate"] = rings
    note = (
        "points of equal cost are drawn side by side"
        if any(at[id(r)] != r[c] for c, at in places.items() for r in rows if id(r) in at)
        else None
    )
    figure.suptitle(title)
    figure.legend(
        handles.values(),
        handles,
        title=note,
        title_fontsize=8,
        fontsize=8,
        frameon=False,
        loc="outside lower center",
        ncols=2,
    )
    figure.savefig(file, dpi=150)
    plt.close(figure)
    return Path(file)


def _drawable(row: dict, cost: str) -> bool:
    return row["accuracy"] is not None and row[cost] is not None and row[cost] > 0


def _draw(axes, rows: list[dict], at: dict[int, float], color: str, marker: str):
    """The settings of one decoder -> what stands for it in the legend."""
    x, y = [at[id(row)] for row in rows], [row["accuracy"] for row in rows]
    below = [row["accuracy"] - row["accuracy_low"] for row in rows]
    above = [row["accuracy_high"] - row["accuracy"] for row in rows]
    axes.errorbar(
        x, y, [below, above], color=color, linestyle="none", elinewidth=0.9, capsize=2, alpha=0.6
    )
    (line,) = axes.plot(x, y, color=color, marker=marker, markersize=5, linewidth=1.2)
    cut = [row for row in rows if not row["complete"]]
    axes.plot(
        [at[id(row)] for row in cut],
        [row["accuracy"] for row in cut],
        color=color,
        marker=marker,
        markersize=5,
        markerfacecolor="white",
        linestyle="none",
    )
    return line


def side_by_side(rows: list[dict], cost: str) -> dict[int, float]:
    """Where each row (by id) is drawn: at its cost, or a little beside it if another costs the
    same, within 1 %."""
    rows, at = sorted(rows, key=lambda row: row[cost]), {}
    span = math.log(rows[-1][cost] / rows[0][cost]) if rows else 0.0
    step = max(span, 0.5) * 0.018
    while rows:
        same = [row for row in rows if row[cost] <= rows[0][cost] * 1.01]
        for i, row in enumerate(same):
            at[id(row)] = row[cost] * math.exp(step * (i - (len(same) - 1) / 2))
        rows = rows[len(same) :]
    return at


def log_ticks(axes, values: list[float]) -> None:
    """Plain numbers, enough of them also where the costs span less than a decade."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    low, high = min(values) / 1.2, max(values) * 1.2
    axes.set_xlim(low, high)
    axes.xaxis.set_major_locator(
        LogLocator(subs=(1, 2, 5) if high / low > 6 else (1, 1.5, 2, 3, 4, 5, 7))
    )
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def legend_label(group: tuple, rows: list[dict]) -> str:
    """Decoder and what tells it from others, its settings from cheap to dear, what they share last:
    "sampled: votes=2, 4, 8, temperature=1.0"."""
    name = ", ".join(str(part) for part in group if part is not None)
    settings = [row["setting"].split() for row in rows if row["setting"]]
    shared = (
        [word for word in settings[0] if all(word in words for words in settings)]
        if len(settings) > 1
        else []
    )
    own = [" ".join(word for word in words if word not in shared) for words in settings]
    key = own[0].split("=")[0] + "=" if own else ""
    if all(words.startswith(key) for words in own):
        own = [words.removeprefix(key) if i else words for i, words in enumerate(own)]
    own = own if len(own) < 7 else [*own[:3], "…", *own[-2:]]
    text = f"{name}: {', '.join([*own, *shared])}" if own else name
    return text if all(row["complete"] for row in rows) else f"{text} (hollow: cut short)"
