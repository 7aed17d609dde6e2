"""
Part of the benches: runs timed in turn, and how their results are shown and written.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from softar.results import device, versions, write_results

console = Console()


def synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def timed(run, clock=time.perf_counter) -> float:
    """Seconds of one call."""
    synchronise()
    started = clock()
    run()
    synchronise()
    return clock() - started


def clock_of(args) -> Callable[[], float]:
    return time.process_time if args.cpu_time else time.perf_counter


def interleaved(
    runs: dict, repeats: int, *, warm_up: bool = True, clock=time.perf_counter
) -> dict[str, list[float]]:
    """Seconds of each run, taken in turn (forwards, then backwards) so that a drift of the machine
    hits all alike."""
    for run in runs.values() if warm_up else ():
        run()
    seconds = {name: [] for name in runs}
    for repeat in range(repeats):
        for name in list(runs)[:: 1 if repeat % 2 == 0 else -1]:
            seconds[name].append(timed(runs[name], clock))
    return seconds


def spread(values) -> tuple[float, float, float]:
    """-> median, least, greatest."""
    values = list(values)
    return statistics.median(values), min(values), max(values)


def parser_of(description: str, repeats: int | None = None) -> argparse.ArgumentParser:
    """A parser that prints the description as it stands, with the option that `run_bench` reads.
    repeats: the default of a bench that times in this process, which has the options for it."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--output", default="runs/bench", help="folder that the results are written to"
    )
    if repeats is not None:
        parser.add_argument("--repeats", type=int, default=repeats, help="how often each is timed")
        parser.add_argument("--threads", type=int, help="number of torch's threads")
        parser.add_argument(
            "--cpu_time",
            action="store_true",
            help="measure processor time, for a busy machine; with --threads 1",
        )
    return parser


def run_bench(name: str, measure: Callable, args) -> None:
    """Print the conditions, measure, and write the rows to NAME.json in the folder
    `args.output`."""
    conditions = f"{device()}, {torch.get_num_threads()} threads, {versions()}"
    console.print(f"{name} on {conditions}", soft_wrap=True)
    folder = Path(args.output)
    folder.mkdir(parents=True, exist_ok=True)
    console.print(f"written: {write_results(folder / f'{name}.json', measure(args))}")


def largest(run) -> int:
    """Peak bytes allocated beyond what was there before, from the profiler's allocation events."""
    from torch.profiler import ProfilerActivity, profile

    with (
        torch.no_grad(),
        profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler,
    ):
        run()
    now = peak = 0
    for event in sorted(profiler.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak


def show(title: str, rows: list[dict], columns: tuple[str, ...], on: str | None = None) -> None:
    """Print a table. on: what it was measured on; by default this machine's `device`."""
    table = Table(title=title, caption=f"{on or device()}, torch {torch.__version__}")
    for column in columns:
        table.add_column(column.replace("_", " "), justify="right")
    for row in rows:
        cells = [row[c] for c in columns]
        table.add_row(
            *[f"{c:.4g}" if isinstance(c, float) else str("-" if c is None else c) for c in cells]
        )
    console.print(table)
