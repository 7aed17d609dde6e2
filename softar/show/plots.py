"""The frame of every plot."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def plot(file: str | Path, lines: int = 1, columns: int = 1, **options) -> Iterator[tuple]:
    """A matplotlib figure and its axes [lines, columns]; after the block it is saved in the file,
    whether or not there is a screen.

    options: of `pyplot.subplots`.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(lines, columns, squeeze=False, layout="constrained", **options)
    try:
        for axes in panels.flat:
            axes.spines[["top", "right"]].set_visible(False)
        yield figure, panels
        figure.savefig(file, dpi=150)
    finally:
        plt.close(figure)
