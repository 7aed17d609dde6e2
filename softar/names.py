"""What a name stands for: a method of softar's, one that an installed package registered, or one of
your own.

Every table of methods is asked through `lookup`. A package registers a mixer by the entry point
group "softar.mixers"; the others are softar.softeners, softar.schedules, softar.tasks and
softar.decoders. Code of your own is "module:name", importable from Python's path or from the folder
in which the program runs.
"""

import functools
import importlib
import importlib.util
import os
import re
import sys
from collections.abc import Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from .checks import check_choice, shorten

# Beside a model's weights: how it is decoded (softar.SoftConfig), and what that names
CONFIG_FILE = "soft_config.json"
STEP_TEMPERATURE_FILE = "step_temperature.safetensors"
CODE = re.compile(r"([A-Za-z_]\w*(?:\.\w+)*):([A-Za-z_]\w*(?:\.\w+)*)")
HINT = " or 'module:name' of your own"
# What has been asked for by "module:name" in this process: what a checkpoint may name, too
NAMED: set[str] = set()


def lookup(option: str, name: str, table: Mapping[str, Any], group: str, *, hint: str = "") -> Any:
    """An entry of the table, else what a package registered under that name in the group, else what
    "module:name" imports.

    Raises:
        ValueError: naming the option and its value; the message lists what there is. hint: what
            else would do.
    """
    if name in table:
        return table[name]
    if name in (points := registered(group)):
        try:
            return points[name].load()
        except Exception as error:  # of somebody else's package
            raise ValueError(
                f"{option}={name!r}, registered as {points[name].value}, cannot be loaded: "
                f"{type(error).__name__}: {shorten(str(error))}"
            ) from error
    if isinstance(name, str) and is_code(name):
        return load_code(option, name)
    check_choice(option, name, sorted({*table, *points}), hint=f"{hint}{HINT}")


def is_code(name: str) -> bool:
    """Is it of the form "module:name"?"""
    return CODE.fullmatch(name) is not None


def load_code(option: str, name: str) -> Any:
    """What "module:name" names. Raises ValueError where it cannot be imported."""
    module_name, path = CODE.fullmatch(name).groups()
    _see_working_folder(module_name.partition(".")[0])
    try:
        value = importlib.import_module(module_name)
    except Exception as error:  # of somebody else's module
        where = f"Python's path and {os.getcwd()} were searched"
        raise ValueError(
            f"{option}={name!r}: module {module_name!r} cannot be imported "
            f"({type(error).__name__}: {shorten(str(error))}); {where}"
        ) from error
    for part in path.split("."):
        try:
            value = getattr(value, part)  # a module may make what it holds, a class inherits
        except AttributeError as error:
            names = ", ".join(n for n in dir(value) if not n.startswith("_"))
            raise ValueError(
                f"{option}={name!r}: there is no {part!r} in it, but {shorten(names, 200)}"
            ) from error
        except Exception as error:  # of a module that imports what it is asked for
            raise ValueError(
                f"{option}={name!r}: {part!r} cannot be imported "
                f"({type(error).__name__}: {shorten(str(error))})"
            ) from error
    NAMED.add(name)
    return value


def note_named(option: str, value) -> None:
    """What the user asks for as "module:name" a file may name from now on. Raises ValueError where
    it cannot be imported."""
    if isinstance(value, str) and is_code(value):
        load_code(option, value)


def is_unasked_code(name) -> bool:
    """Is it a "module:name" that nobody has asked for in this process?"""
    return isinstance(name, str) and is_code(name) and name not in NAMED


def check_not_code(option: str, name, where: str) -> None:
    """Raise ValueError for a "module:name" that a file brings and that nobody has asked for in this
    process: a checkpoint is data, and must not say what is run."""
    if is_unasked_code(name):
        raise ValueError(
            f"{where} names code, {option}={name!r}, and a file does not say what is run: name it yourself "
            f"({option}={name!r} in Python, -d soft:{option}={name} in a spec), or register it as an entry point"
        )


@functools.cache
def registered(group: str) -> dict[str, EntryPoint]:
    """What installed packages have in an entry point group, by name."""
    return {point.name: point for point in entry_points(group=group)}


def _see_working_folder(module: str) -> None:
    """A console script does not see the folder that it runs in, where one's own modules are."""
    folder = os.getcwd()
    if module in sys.modules or folder in sys.path:
        return
    if importlib.util.find_spec(module) is None:
        sys.path.append(folder)
        importlib.invalidate_caches()
