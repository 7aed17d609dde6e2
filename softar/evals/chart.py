"""How a comparison looks: its table and its plot, from the rows of results.json alone."""

import math
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from ..show.plots import plot
from .parallelism import AR_TPF

PANELS = {"nfe": "forward passes per answer (NFE)", "seconds_per_row": "seconds per answer"}
MARKERS = "os^Dv<>PX"
SAME = 0.01  # costs that differ by no more than this share are equal to the frontier
LARGEST, SMALLEST = 8.0, 4.0  # markers, from the first decoder to the last: none hides another
MARGIN = 1.2  # by this factor an axis goes beyond its points
TABLE_WIDTH = 84  # in a narrower window the columns of a comparison would be cut
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
    is_parallel = any((row.get("tpf") or 0) > AR_TPF for row in rows)
    columns = {
        "n": (len(sizes) > 1, lambda row: str(row["n"])),
        "accuracy": (True, lambda row: _with_interval(row, "accuracy", "")),
        "gain": (True, lambda row: _with_interval(row, "gain", "+")),
        "NFE": (True, lambda row: _short(row["nfe"])),
        "tokens\n/fwd": (is_parallel, lambda row: _short(row["tpf"])),
        "AUP": (
            is_parallel and len({row["setting"] for row in rows}) > 1,
            lambda row: _short(row["aup"]),
        ),
        "token-\nfwds": (True, lambda row: _short(row["token_forwards"])),
        "tokens\n/s": (True, lambda row: _short(row["tokens_per_s"])),
        "ms\n/row": (True, lambda row: _short(row["seconds_per_row"] * 1000)),
        "peak\nMB": (
            any(row.get("peak_memory") for row in rows),
            lambda row: _short((row.get("peak_memory") or 0) / 2**20),
        ),
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
    """The whole rows than which no other is more accurate for as little, or as accurate for less,
    by cost. Costs within SAME of each other are equal: a decoder that ends a step earlier in one row
    of a hundred is no cheaper. Equals stay together."""
    points = [row for row in rows if row["complete"] and _drawable(row, cost)]

    def is_beaten(p: dict) -> bool:
        return any(
            (q[cost] <= p[cost] * (1 + SAME) and q["accuracy"] > p["accuracy"])
            or (q[cost] * (1 + SAME) < p[cost] and q["accuracy"] == p["accuracy"])
            for q in points
        )

    return sorted((p for p in points if not is_beaten(p)), key=lambda p: p[cost])


def plot_frontier(rows: list[dict], file: str | Path, title: str = "") -> Path:
    """Accuracy with its 95 % interval against NFE and against seconds per answer, both on log axes.

    A colour and marker per decoder (and model and training, where there are several), the later
    ones smaller, a line through its settings. Frontier points are ringed and joined by a step line.
    What was cut short is hollow. A point stands where its numbers say.
    """
    if not any(_drawable(row, cost) for row in rows for cost in PANELS):
        raise ValueError("there is nothing to plot: no decoder has an accuracy and a cost above 0")
    series = _series(rows)
    handles, rings = {}, None
    size = (9.6, 3.6 + 0.2 * math.ceil(len(series) / 2))  # two series on each line of the legend
    with plot(file, 1, len(PANELS), figsize=size, sharey=True) as (figure, panels):
        for axes, (cost, label) in zip(panels[0], PANELS.items(), strict=True):
            axes.set(xscale="log", xlabel=label)
            axes.grid(axis="y", color="0.92")
            axes.set_axisbelow(True)
            for i, (name, settings) in enumerate(series):
                settings = [row for row in settings if _drawable(row, cost)]
                if settings:
                    settings.sort(key=lambda row: row[cost])
                    handles[name] = _draw(axes, settings, cost, _look(i, len(series)))
            if best := frontier(rows, cost):
                rings = _draw_frontier(axes, best, cost)
            if drawn := [row[cost] for row in rows if _drawable(row, cost)]:
                log_ticks(axes, drawn)
        if rings is not None:
            handles["frontier: nothing as cheap is more accurate"] = rings
        panels[0, 0].set_ylabel("accuracy (95 % interval)")
        figure.suptitle(title)
        figure.legend(
            handles.values(),
            handles,
            fontsize=8,
            frameon=False,
            loc="outside lower center",
            ncols=2,
        )
    return Path(file)


def _series(rows: list[dict]) -> list[tuple[str, list[dict]]]:
    """The settings of each decoder (and model, and training where one model's differ), under its
    label in the legend."""
    groups: dict[tuple, list[dict]] = {}
    has_models = len({row.get("model") for row in rows}) > 1
    for row in rows:
        key = row["decoder"], row.get("model") if has_models else None, row.get("training")
        groups.setdefault(key, []).append(row)
    trainings: dict[tuple, set] = {}
    for decoder, model, training in groups:
        trainings.setdefault((decoder, model), set()).add(training)
    return [
        (
            legend_label(
                decoder,
                model,
                training if len(trainings[decoder, model]) > 1 else None,
                sorted(settings, key=lambda row: row["nfe"] or 0),
            ),
            settings,
        )
        for (decoder, model, training), settings in groups.items()
    ]


def _look(i: int, n: int) -> dict:
    """Colour, marker and its size of the i-th of n decoders."""
    size = LARGEST - (LARGEST - SMALLEST) * i / max(n - 1, 1)
    return dict(color=f"C{i % 10}", marker=MARKERS[i % len(MARKERS)], markersize=size)


def _drawable(row: dict, cost: str) -> bool:
    return row["accuracy"] is not None and row[cost] is not None and row[cost] > 0


def _draw(axes, rows: list[dict], cost: str, look: dict):
    """The settings of one decoder -> what stands for it in the legend."""
    x, y = [row[cost] for row in rows], [row["accuracy"] for row in rows]
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
    (line,) = axes.plot(x, y, **look, linewidth=1.2)
    cut = [row for row in rows if not row["complete"]]
    axes.plot(
        [row[cost] for row in cut],
        [row["accuracy"] for row in cut],
        **look,
        markerfacecolor="white",
        linestyle="none",
    )
    return line


def _draw_frontier(axes, best: list[dict], cost: str):
    """-> what stands for it in the legend."""
    x, y = [row[cost] for row in best], [row["accuracy"] for row in best]
    axes.step(x, y, where="post", color="0.6", linewidth=1, linestyle=":", zorder=1)
    (rings,) = axes.plot(x, y, "o", markersize=12, markerfacecolor="none", markeredgecolor="0.35")
    return rings


def log_ticks(axes, values: list[float]) -> None:
    """Plain numbers, enough of them also where the costs span less than a decade."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    low, high = min(values) / MARGIN, max(values) * MARGIN
    axes.set_xlim(low, high)
    is_wide = high / low > 6
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if is_wide else (1, 1.5, 2, 3, 4, 5, 7)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def legend_label(decoder: str, model: str | None, training: str | None, rows: list[dict]) -> str:
    """A decoder, its model and that one's training where they tell it from others, its settings from
    cheap to dear, what they share last: "m-tiny=sampled: votes=2, 4, 8, temperature=1.0"."""
    name = "=".join(filter(None, [model, decoder]))
    name += f" (model trained for {training})" if training else ""
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
