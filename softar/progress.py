"""How far something is: in lines where no terminal draws bars (a log, a pipe, a notebook), in bars,
or not at all."""

import contextlib
import re
import time
from dataclasses import dataclass

LINE = re.compile(r"step (\d+)/(\d+)(.*)")


@dataclass
class Pace:
    """Says when to speak again: after so many seconds, or such a share of the whole, but not before
    `gap` seconds."""

    seconds: float = 30.0
    share: float = 0.05
    gap: float = 2.0
    spoke_at: float = -1e9
    spoke_of: float = -1.0

    def is_due(self, part: float) -> bool:
        """part: of the whole, in [0, 1]. Speaking is taken for granted where it says yes."""
        now = time.monotonic()
        since = now - self.spoke_at
        due = since >= self.seconds or (part - self.spoke_of >= self.share and since >= self.gap)
        if due:
            self.spoke_at, self.spoke_of = now, part
        return due


def step_line(step: int, steps: int, values: dict[str, float], seconds: float) -> str:
    """values: what was logged last, loss or reward. seconds: how long is left."""
    numbers = "".join(f", {name} {value:.4g}" for name, value in values.items())
    return f"step {step}/{steps}{numbers}, {duration(seconds)} left"


def last_step(log: str) -> tuple[int, int, str] | None:
    """Step, number of steps and the rest of the last such line in a log."""
    lines = LINE.findall(log)
    return (int(lines[-1][0]), int(lines[-1][1]), lines[-1][2]) if lines else None


def duration(seconds: float) -> str:
    """ "40 s", "12 min", "3.5 h" """
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


@contextlib.contextmanager
def without_bars():
    """transformers draws none meanwhile: over in a second, they would only tear the output."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


class Lines:
    """Rows trained apart, told of in lines."""

    def __init__(self, console):
        self.console, self.paces, self.told = console, {}, {}

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def say(self, row, text: str) -> None:
        line = f"{row[0]}, seed {row[1]}: {text}"
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def start(self, row, log) -> None:
        self.paces[row] = Pace()
        self.say(row, f"starts, its log is {log}")

    def update(self, row, log: str) -> None:
        at = last_step(log)
        if at is not None and self.paces[row].is_due(at[0] / max(1, at[1])):
            step, steps, rest = at  # between steps it saves, or decodes held-out rows
            is_told, self.told[row] = self.told.get(row) == at, at
            self.say(
                row,
                f"{'still after ' if is_told else ''}step {step}/{steps}{'' if is_told else rest}",
            )

    def end(self, row) -> None:
        self.say(row, "done")


class Bars:
    """The same on a terminal."""

    def __init__(self, console):
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn

        columns = "{task.description}", BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
        self.progress, self.bars = Progress(*columns, console=console), {}

    def __enter__(self):
        self.progress.start()
        return self

    def __exit__(self, *error):
        self.progress.stop()

    def start(self, row, log) -> None:
        self.bars[row] = self.progress.add_task(f"{row[0]}, seed {row[1]}", total=None)

    def update(self, row, log: str) -> None:
        if (at := last_step(log)) is not None:
            self.progress.update(self.bars[row], completed=at[0], total=at[1])

    def end(self, row) -> None:
        pass
