"""Which YAML file a recipe reads: the one named, or that of its demo."""

from pathlib import Path

from .checks import did_you_mean


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
