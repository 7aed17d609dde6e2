"""Models that stay open, for as long as their files stay the same."""

import functools
import os
from collections.abc import Callable
from pathlib import Path

from .adapter import base_of
from .embedded import MODELS, folder_of

# of what a model is made, in its folder; not what decoding leaves there
ENDINGS = (".safetensors", ".json", ".gguf", ".jinja", ".model", ".txt")
RESULTS = ("grid.json", "summary.json", "results.json")

Stamp = tuple[tuple[str, int, int], ...]  # (file, nanoseconds of its last change, bytes)


def stamp_of(name: str | os.PathLike) -> Stamp:
    """Of the files of a model in a folder, those of an adapter's base included, or of a .gguf file;
    () of other names. It differs when one was written anew."""
    path, base = Path(name), ()
    files, folder = [path] if path.is_file() else [], folder_of(name)
    if folder is not None:
        files = [file for file in folder.iterdir() if file.suffix in ENDINGS]
        if (folder / "adapter_config.json").is_file():
            base = _stamp_of_base(folder)
    seen = [(file, file.stat()) for file in sorted(files) if file.name not in RESULTS]
    return (*((file.name, stat.st_mtime_ns, stat.st_size) for file, stat in seen), *base)


def _stamp_of_base(folder: Path) -> Stamp:
    try:
        base = base_of(folder).name
    except Exception:  # of a damaged file PEFT raises many: they are for `load` to say
        return ()
    return () if base in MODELS else stamp_of(base)


def kept(load: Callable[..., tuple]) -> Callable[..., tuple]:
    """`load`, which opens a model once for the same name and keywords, and anew where its files have
    been written since."""
    opened: dict[tuple, tuple[Stamp, tuple]] = {}

    @functools.wraps(load)
    def open_once(name: str, **how) -> tuple:
        key, stamp = (name, *sorted(how.items())), stamp_of(name)
        if key not in opened or opened[key][0] != stamp:
            opened.pop(key, None)  # makes room
            opened[key] = stamp, load(name, **how)
        return opened[key][1]

    return open_once
