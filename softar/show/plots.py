"""The frame of every plot."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..checks import check_writable

# Without the hour, and with names that follow from what is drawn: the same plot is the same file
METADATA = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}
NAMES = {"svg.hashsalt": "softar"}


@contextmanager
def plot(file: str | Path, lines: int = 1, columns: int = 1, **options) -> Iterator[tuple]:
    """A matplotlib figure and its axes [lines, columns]; after the block it is saved in the file,
    whether or not there is a screen.

    options: of `pyplot.subplots`. Raises ValueError for a file of a kind that is not written, or in
    a folder that cannot be made.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.backend_bases import FigureCanvasBase

    kinds = FigureCanvasBase.get_supported_filetypes()
    if Path(file).suffix.lower()[1:] not in kinds:
        raise ValueError(
            f"file={str(file)!r}: plots are written as .png, .pdf or .svg: give such a name"
        )
    check_writable(Path(file).parent, "the folder of file")
    figure, panels = plt.subplots(lines, columns, squeeze=False, layout="constrained", **options)
    try:
        for axes in panels.flat:
            axes.spines[["top", "right"]].set_visible(False)
        yield figure, panels
        with matplotlib.rc_context(NAMES):
            figure.savefig(file, dpi=150, metadata=METADATA.get(Path(file).suffix.lower()))
    finally:
        plt.close(figure)
