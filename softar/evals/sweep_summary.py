"""The summary of a sweep: files, aggregation over seeds, table and plot."""

import json
import statistics
from pathlib import Path

from ..results import write_csv, write_results
from ..show.plots import plot
from .chart import PANELS, log_ticks
from .costs import read_harness
from .parallelism import AR_TPF, add_aup

# how often a run failed that is whole, for instance in a later pass: column -> head in the table
FAILED = {"failures": "failed", "scorer_failures": "scorer failed"}
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
    write_results(Path(folder, SUMMARY_FILE), rows)
    write_csv(Path(folder, "summary.csv"), rows)


def aggregate(rows: list[dict]) -> list[dict]:
    """One point for each task, decoder and setting, over its seeds: task, role, spec, model, varied
    (text), n_seeds, accuracy, accuracy_sd (0 for one seed), nfe, seconds_per_row, tokens_per_s, tpf
    (tokens per forward), aup (of the decoder over its settings, softar.evals.parallelism),
    peak_memory (most over the seeds, of a GPU), n (least rows with a score), failures and
    scorer_failures (of all seeds). In the order of the rows."""
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        setting = row["run"].rsplit("-seed", 1)[0]
        groups.setdefault((row["task"], row["role"], setting), []).append(row)
    points = [_point(seeds) for seeds in groups.values()]
    add_aup(points, ("task", "role", "spec"), among=("task",))
    return points


def _point(seeds: list[dict]) -> dict:
    names = ("accuracy", "nfe", "seconds_per_row", "tokens_per_s", "tpf")
    # what older files do not hold, and what a server does not tell, is not known
    values = {name: [row.get(name) for row in seeds] for name in (*names, "peak_memory")}
    means = {
        name: None if None in values[name] else statistics.mean(values[name]) for name in names
    }
    peaks = [peak for peak in values["peak_memory"] if peak is not None]
    means["peak_memory"] = max(peaks, default=None)
    means["n"] = min((row["n"] for row in seeds if "n" in row), default=None)
    means |= {name: sum(row.get(name, 0) for row in seeds) for name in FAILED}
    spread = statistics.stdev(row["accuracy"] for row in seeds) if len(seeds) > 1 else 0.0
    common = {name: seeds[0][name] for name in ("task", "role", "spec", "model", "varied")}
    return common | means | dict(accuracy_sd=spread, n_seeds=len(seeds))


def read_sweep(folder: str | Path) -> list[dict]:
    """The rows of a sweep's summary, or while it is not finished those of the runs that are; of a
    folder of `softar-eval`'s results, the rows of these."""
    folder = Path(folder)
    if (folder / SUMMARY_FILE).is_file():
        return read_rows(folder / SUMMARY_FILE)
    rows = [row for file in sorted(folder.glob("runs/*/results.json")) for row in read_rows(file)]
    rows = rows or read_harness(folder)
    if not rows:
        raise ValueError(
            f"{folder} holds no sweep: neither {SUMMARY_FILE} nor runs/*/results.json, nor results_*.json "
            "of softar-eval with generated answers"
        )
    return rows


def plot_sweep(folder: str | Path, file: str | Path | None = None) -> Path:
    """Accuracy against forwards and against seconds, a row of panels for each task -> the file,
    FOLDER/sweep.png.

    A line joins the settings of a decoder by increasing forwards: means over the seeds, bars of one
    standard deviation. Soft decoders are drawn in full, baselines dashed.
    """
    points = aggregate(read_sweep(folder))
    tasks = list(dict.fromkeys(point["task"] for point in points))
    lines = list(dict.fromkeys(map(_line, points)))
    option = _only_option(points)
    file = Path(folder, PLOT_FILE) if file is None else Path(file)
    size = (9, 3.2 * len(tasks) + 0.6)
    with plot(file, len(tasks), len(PANELS), figsize=size) as (figure, panels):
        for task, row in zip(tasks, panels, strict=True):
            in_task = [point for point in points if point["task"] == task]
            for axes, (cost, label) in zip(row, PANELS.items(), strict=True):
                for i, line in enumerate(lines):
                    settings = [point for point in in_task if _line(point) == line and point[cost]]
                    if settings:
                        settings.sort(key=lambda point: point["nfe"] or 0)
                        _draw(axes, settings, cost, f"C{i}")
                        if cost == "nfe":
                            _annotate(axes, settings, option, f"C{i}")
                axes.set(xscale="log", xlabel=label, title=task, ylim=(-0.05, 1.08))
                if drawn := [point[cost] for point in in_task if point[cost]]:
                    log_ticks(axes, drawn)
            row[0].set_ylabel("held-out accuracy")
        handles = {}
        for axes in panels.flat:
            handles |= {text: h for h, text in zip(*axes.get_legend_handles_labels())}
        figure.legend(
            handles.values(),
            handles,
            title=f"labels: {option}" if option else None,
            frameon=False,
            loc="outside lower center",
            ncols=3,
        )
    return file


def _only_option(points: list[dict]) -> str:
    """The one option that varies, "" where it is another number of them."""
    options = {point["varied"].partition("=")[0] for point in points}
    is_one = len(options) == 1 and all(point["varied"].count("=") == 1 for point in points)
    return options.pop() if is_one else ""


def _draw(axes, points: list[dict], cost: str, color: str) -> None:
    """The settings of one decoder."""
    role, spec = _line(points[0])
    axes.errorbar(
        [point[cost] for point in points],
        [point["accuracy"] for point in points],
        [point["accuracy_sd"] for point in points],
        color=color,
        marker="o" if role == "soft" else "s",
        markersize=4,
        capsize=2,
        linestyle="-" if role == "soft" else "--",
        label=f"{spec} ({role})",
    )


def _annotate(axes, points: list[dict], option: str, color: str) -> None:
    """Each setting's value beside its point, under a soft decoder's and over a baseline's; of
    settings at one place all values together."""
    places: dict[tuple, list[str]] = {}
    for point in points:
        text = point["varied"].partition("=")[2] if option else point["varied"]
        places.setdefault((point["nfe"], point["accuracy"]), []).append(text)
    for place, texts in places.items():
        axes.annotate(
            ", ".join(texts),
            place,
            xytext=(4, -9 if points[0]["role"] == "soft" else 4),
            textcoords="offset points",
            fontsize=6,
            color=color,
        )


def sweep_table(points: list[dict]):
    """rich.table.Table, a line for each point of `aggregate`; task, decoder and setting fold where
    they must. Rows (n) and failures where there are any, or the rows of a task are not as many
    everywhere."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    heads = ("task", "role", "decoder", "setting", "accuracy", "NFE", "s/row", "tokens/s")
    parallel = any((p.get("tpf") or 0) > AR_TPF for p in points)
    on_gpu = any(p.get("peak_memory") for p in points)
    failed = [name for name in FAILED if any(p.get(name) for p in points)]
    sizes = {(p["task"], p.get("n")) for p in points}
    counted = bool(failed) or len(sizes) > len({task for task, _ in sizes})
    heads += ("TPF", "AUP") * parallel + ("peak MB",) * on_gpu + ("n",) * counted
    for name in (*heads, *(FAILED[name] for name in failed)):
        is_long = name in ("task", "decoder", "setting")
        table.add_column(name, no_wrap=not is_long, overflow="fold" if is_long else "ellipsis")
    for p in points:
        accuracy = f"{p['accuracy']:.3f}" + (
            f" ± {p['accuracy_sd']:.3f}" if p["n_seeds"] > 1 else ""
        )
        shown = {"nfe": ".1f", "seconds_per_row": ".4f", "tokens_per_s": ".0f"}
        shown |= {"tpf": ".2f", "aup": ".2f"} if parallel else {}
        costs = ["-" if p[name] is None else f"{p[name]:{form}}" for name, form in shown.items()]
        if on_gpu:
            costs.append("-" if p["peak_memory"] is None else f"{p['peak_memory'] / 2**20:.0f}")
        if counted:
            costs.append("-" if p["n"] is None else str(p["n"]))
        costs += [str(p[name]) for name in failed]
        table.add_row(p["task"], p["role"], Text(p["spec"]), Text(p["varied"]), accuracy, *costs)
    return table


def _line(point: dict) -> tuple[str, str]:
    return point["role"], point["spec"]
