"""The summary of a sweep: files, aggregation over seeds, table and plot."""

import csv
import itertools
import json
import os
import statistics
from pathlib import Path

from .chart import log_ticks

GRID_FILE, SUMMARY_FILE, PLOT_FILE = "grid.json", "summary.json", "sweep.png"


def read_rows(file: Path) -> list[dict]:
    """The rows of a run or a summary. Raises ValueError for what no sweep wrote, or not to its
    end."""
    try:
        rows = json.loads(file.read_text())["rows"]
        if not aggregate(rows):
            raise ValueError("no rows")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{file} is no results file of a sweep ({error!r}): delete it and run the sweep again, or name the folder "
            "of another sweep"
        ) from None
    return rows


def write_summary(rows: list[dict], folder: str | Path) -> None:
    """summary.json and summary.csv."""
    from ..results import write_results

    write_results(Path(folder, SUMMARY_FILE), rows)
    columns = list(dict.fromkeys(key for row in rows for key in row))
    draft = Path(folder, f"summary.csv.{os.getpid()}")
    with open(draft, "w", newline="") as out:
        writer = csv.DictWriter(out, columns)
        writer.writeheader()
        writer.writerows(rows)
    draft.replace(Path(folder, "summary.csv"))


def aggregate(rows: list[dict]) -> list[dict]:
    """One point for each task, decoder and setting, over its seeds: task, role, spec, model, varied
    (text), n_seeds, accuracy, accuracy_sd (0 for one seed), nfe, seconds_per_row, tokens_per_s. In
    the order of the rows."""
    groups = {}
    for row in rows:
        groups.setdefault((row["task"], row["role"], row["run"].rsplit("-seed", 1)[0]), []).append(
            row
        )
    return [_point(mine) for mine in groups.values()]


def _point(mine: list[dict]) -> dict:
    means = {
        name: statistics.mean(row[name] for row in mine)
        for name in ("accuracy", "nfe", "seconds_per_row", "tokens_per_s")
    }
    spread = statistics.stdev(row["accuracy"] for row in mine) if len(mine) > 1 else 0.0
    common = {name: mine[0][name] for name in ("task", "role", "spec", "model", "varied")}
    return common | means | dict(accuracy_sd=spread, n_seeds=len(mine))


def read_sweep(folder: str | Path) -> list[dict]:
    """The rows of a sweep's summary, or while it is not finished those of the runs that are."""
    folder = Path(folder)
    if (folder / SUMMARY_FILE).is_file():
        return read_rows(folder / SUMMARY_FILE)
    rows = [row for file in sorted(folder.glob("runs/*/results.json")) for row in read_rows(file)]
    if not rows:
        raise ValueError(f"{folder} holds no sweep: neither {SUMMARY_FILE} nor runs/*/results.json")
    return rows


def plot_sweep(folder: str | Path, file: str | Path | None = None) -> Path:
    """Accuracy against forwards and against seconds, a row of panels for each task -> the file,
    FOLDER/sweep.png.

    A line joins the settings of a decoder by increasing forwards: means over the seeds, bars of one
    standard deviation. Soft decoders are drawn in full, baselines dashed.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    points = aggregate(read_sweep(folder))
    tasks, lines = (list(dict.fromkeys(map(key, points))) for key in (lambda p: p["task"], _line))
    varied = {p["varied"].partition("=")[0] for p in points}
    only = (
        varied.pop()
        if len(varied) == 1 and all(p["varied"].count("=") == 1 for p in points)
        else ""
    )
    costs = {"nfe": "forward passes per answer", "seconds_per_row": "seconds per answer"}
    figure, axes = plt.subplots(
        len(tasks), 2, figsize=(9, 3.2 * len(tasks) + 0.6), squeeze=False, layout="constrained"
    )
    for (task, (cost, label)), axis in zip(itertools.product(tasks, costs.items()), axes.flat):
        for i, line in enumerate(lines):
            mine = sorted(
                (p for p in points if (p["task"], _line(p)) == (task, line)), key=lambda p: p["nfe"]
            )
            if not mine:
                continue
            is_soft = line[0] == "soft"
            axis.errorbar(
                [p[cost] for p in mine],
                [p["accuracy"] for p in mine],
                [p["accuracy_sd"] for p in mine],
                color=f"C{i}",
                marker="o" if is_soft else "s",
                markersize=4,
                capsize=2,
                linestyle="-" if is_soft else "--",
                label=f"{line[1]} ({line[0]})",
            )
            for p in mine if cost == "nfe" else []:
                value = p["varied"].partition("=")[2] if only else p["varied"]
                axis.annotate(
                    value,
                    (p[cost], p["accuracy"]),
                    xytext=(4, -9 if is_soft else 4),
                    textcoords="offset points",
                    fontsize=6,
                    color=f"C{i}",
                )
        axis.set(
            xscale="log",
            xlabel=label,
            ylabel="held-out accuracy" if cost == "nfe" else "",
            title=task,
            ylim=(-0.05, 1.08),
        )
        log_ticks(axis, [p[cost] for p in points if p["task"] == task])
        axis.spines[["top", "right"]].set_visible(False)
    handles = {text: h for axis in axes.flat for h, text in zip(*axis.get_legend_handles_labels())}
    note = f"labels: {only}" if only else None
    figure.legend(
        handles.values(), handles, title=note, frameon=False, loc="outside lower center", ncols=3
    )
    file = Path(folder, PLOT_FILE) if file is None else Path(file)
    figure.savefig(file, dpi=150)
    plt.close(figure)
    return file


def sweep_table(points: list[dict]):
    """rich.table.Table, a line for each point of `aggregate`; decoder and setting fold where they
    must."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for name in ("task", "role", "decoder", "setting", "accuracy", "NFE", "s/row", "tokens/s"):
        is_long = name in ("decoder", "setting")
        table.add_column(name, no_wrap=not is_long, overflow="fold" if is_long else "ellipsis")
    for p in points:
        accuracy = f"{p['accuracy']:.3f}" + (
            f" ± {p['accuracy_sd']:.3f}" if p["n_seeds"] > 1 else ""
        )
        costs = f"{p['nfe']:.1f}", f"{p['seconds_per_row']:.4f}", f"{p['tokens_per_s']:.0f}"
        table.add_row(p["task"], p["role"], Text(p["spec"]), Text(p["varied"]), accuracy, *costs)
    return table


def _line(point: dict) -> tuple[str, str]:
    return point["role"], point["spec"]
