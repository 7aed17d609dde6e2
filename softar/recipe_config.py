"""Which YAML file a recipe reads: the one named, or that of its demo; and options of the command
line that no row takes, or nothing at all."""

import os
import re
from pathlib import Path
from typing import Any

from .checks import did_you_mean
from .rows import APART

QUANTISED = ("load_in_", "bnb_", "use_bnb_")  # how the names of such options begin
OF_LORA = ("lora_", "use_rslora", "use_dora")


def check_model_options(model_args, script) -> None:
    """Raise ValueError for options of TRL's ModelConfig and ScriptArguments that no recipe reads, and
    for LoRA's without an adapter."""
    left_out = vars(type(model_args)())
    for name, value in vars(model_args).items():
        if value == left_out[name]:
            continue
        if name.startswith(QUANTISED):
            raise ValueError(
                f"{name}={value!r}: softar trains no quantised weights, leave it out; give --dtype bfloat16 and "
                "--use_peft"
            )
        if name.startswith(OF_LORA) and not model_args.use_peft:
            raise ValueError(
                f"{name}={value!r} does nothing without an adapter: give --use_peft true"
            )
    if script.ignore_bias_buffers:
        raise ValueError("ignore_bias_buffers=True does nothing here: leave it out")


def with_config(argv: list[str], demo: Path, task_demos: dict[str, Path]) -> list[str]:
    """The options with the path of the YAML file that is read, where one is, and with underscores in
    their names, where TRL's parser takes hyphens, too.

    Raises:
        ValueError: where there is no such file.
    """
    argv = [re.sub("^--[^=]+", lambda n: "--" + n[0][2:].replace("-", "_"), w) for w in argv]
    return with_default_config(with_found_config(argv, demo.parent), demo, task_demos)


def with_found_config(argv: list[str], folder: Path) -> list[str]:
    """The path behind --config, which may name a file of `folder` alone, or as in a checkout.

    Raises:
        ValueError: where there is no such file.
    """
    argv = [part for arg in argv for part in (arg.split("=", 1) if "--config=" in arg else [arg])]
    if "--config" not in argv[:-1]:
        return argv
    at = argv.index("--config") + 1
    file, ours = argv[at], folder / Path(argv[at]).name
    if not Path(file).is_file():
        if not ours.is_file() or file not in (ours.name, f"recipes/configs/{ours.name}"):
            names = sorted(path.name for path in folder.glob("*.yaml"))
            raise ValueError(
                f"config={file!r}: there is no such file{did_you_mean(file, names)}; the package has {', '.join(names)}"
            )
        file = str(ours)
    return [*argv[:at], file, *argv[at + 1 :]]


def with_default_config(
    argv: list[str], demo: str | Path, task_demos: dict[str, Path]
) -> list[str]:
    """The demo's configuration where no task, data, model or configuration is named; that of a task
    in `task_demos` where this is all that is named."""
    options = {arg.split("=")[0] for arg in argv}
    if options & {"--config", "--dataset_name", "--model_name_or_path"}:
        return argv
    if "--task" not in options:
        return ["--config", str(demo), *argv]
    task = argv[argv.index("--task") + 1] if "--task" in argv[:-1] else None
    return ["--config", str(task_demos[task]), *argv] if task in task_demos else argv


def check_taken(argv: list[str], training, rows: dict[str, dict], configs: dict[str, Any]) -> None:
    """Raise ValueError for an option of the command line in whose place every row that is named has a
    value of its own. In a process of one row it may be another's.

    training: the options as they were given. rows: the fields that make each row. configs: of each
    row that is named.
    """
    if APART in os.environ:
        return
    for option in (word[2:].partition("=")[0] for word in argv if word.startswith("--")):
        if all(
            option in rows.get(name, ()) and getattr(args, option) != getattr(training, option)
            for name, args in configs.items()
        ):
            raise ValueError(
                f"{option}={getattr(training, option)!r} does nothing with the rows {', '.join(configs)}, which have "
                f"their own: leave it out, or name a row that takes it"
            )
