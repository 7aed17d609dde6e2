"""What the training recipes share: rows and seeds, each trained in a folder of its own, going on
after an interruption.

A row is a (name, seed). The recipe that trains rows in processes of their own starts itself again
for each, with `--rows NAME --seed SEED --num_seeds 1` behind its own options, so it must know these
three.
"""

import contextlib
import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

CUSTOM = "custom"  # one run, exactly as the options say
# set for a process that trains one row and leaves table and plot to its parent
APART = "SOFTAR_TRAIN_APART"

Row = tuple[str, int]


def train_rows(
    names: list[str],
    training,
    *,
    num_seeds: int,
    jobs: int,
    configure: Callable,
    train: Callable,
    console,
    program: str,
) -> tuple[list[dict], dict[Row, Path]]:
    """Train what is not finished -> the lines of results.json, and where each row lies in
    training.output_dir.

    `configure(name, seed, place)` gives a row's own training arguments. `train(name, args)` gives
    its lines, each with `train_steps`, and None off the main process. There are no lines to report
    in a child and off the main process.
    """
    from accelerate import PartialState

    from .results import write_results

    folder = Path(training.output_dir)
    is_child, is_main = APART in os.environ, PartialState().is_main_process
    todo = [
        (name, seed) for seed in range(training.seed, training.seed + num_seeds) for name in names
    ]
    places = {row: folder / f"{row[0]}-seed{row[1]}" for row in todo}
    if todo == [(CUSTOM, training.seed)] and not is_child:
        places = {todo[0]: folder}
    if not resumes(training) and is_main and not is_child:
        for place in places.values():
            set_apart(place)
    configs = {row: configure(*row, places[row]) for row in todo}
    finished = {row: saved_row(places[row], configs[row]) for row in todo}
    left = [row for row in todo if finished[row] is None]
    if jobs > 1 and len(left) > 1 and not is_child:
        train_apart(left, places, jobs, console, program)
        finished |= {row: json.loads((places[row] / "row.json").read_text()) for row in left}
    results = []
    for row in todo:
        lines = finished[row]
        if lines is None:
            done = places[row] / "row.json"
            done.unlink(missing_ok=True)
            lines = train(row[0], configs[row])
            if lines is not None:  # the main process
                done.write_text(json.dumps(lines))
        results += lines or []
        if is_main and not is_child and results:
            write_results(folder / "results.json", results)
    PartialState().destroy_process_group()  # not earlier: the next row's trainer joins the same one
    return (results if is_main and not is_child else []), places


def jobs_of(given: int, is_tiny: bool) -> int:
    """How many rows to train at the same time; 0 given: for tiny models one on each CPU core, else
    1."""
    from accelerate import PartialState

    return given or (os.cpu_count() if is_tiny and PartialState().num_processes == 1 else 1)


def train_apart(rows: list[Row], places: dict[Row, Path], jobs: int, console, program: str) -> None:
    """Train rows in processes of their own, `jobs` at a time; each writes row.json, its output goes
    to train.log."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn

    columns = "{task.description}", BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    waiting, running = list(rows), {}
    with Progress(*columns, console=console) as progress:
        try:
            while waiting or running:
                while waiting and len(running) < jobs:
                    row = waiting.pop(0)
                    running[row] = (
                        start_apart(row, places[row]),
                        progress.add_task(f"{row[0]}, seed {row[1]}", total=None),
                    )
                time.sleep(0.3)
                for row, (child, bar) in list(running.items()):
                    code = child.poll()
                    text = (places[row] / "train.log").read_text(errors="replace")
                    # The trainer's own bar; "1/1" is that of a file being written.
                    steps = [
                        (int(n), int(of))
                        for n, of in re.findall(r"(\d+)/(\d+) \[", text[-2000:])
                        if of != "1"
                    ]
                    if steps:
                        progress.update(bar, completed=steps[-1][0], total=steps[-1][1])
                    if code is not None:
                        del running[row]
                        if code != 0:
                            failed = f"row {row[0]!r}, seed {row[1]}, failed:\n{text[-3000:]}"
                            print(f"{program}: error: {failed}", file=sys.stderr)
                            sys.exit(code)
        finally:  # after Ctrl-C or a failure let the others save what they write
            for child, _ in running.values():
                child.send_signal(signal.SIGINT)
            for child, _ in running.values():
                child.wait()


def start_apart(row: Row, place: Path) -> subprocess.Popen:
    (place / "row.json").unlink(missing_ok=True)
    place.mkdir(parents=True, exist_ok=True)
    command = [
        sys.executable,
        *sys.argv,
        "--rows",
        row[0],
        "--seed",
        str(row[1]),
        "--num_seeds",
        "1",
    ]
    with open(place / "train.log", "w") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | {APART: "1"})


def set_apart(place: Path) -> None:
    """A run from the start leaves nothing of an earlier one where a later resume would take it for
    its own: the checkpoints move into a folder `_earlier` (push_to_hub skips that name), in place
    of what was there."""
    (place / "row.json").unlink(missing_ok=True)
    if old := list(place.glob("checkpoint-*")):
        earlier = place / "_earlier"
        shutil.rmtree(earlier, ignore_errors=True)
        earlier.mkdir()
        for checkpoint in old:
            checkpoint.rename(earlier / checkpoint.name)
        print(f"starts anew; the checkpoints of an earlier run are now in {earlier}")


def saved_row(place: Path, training) -> list[dict] | None:
    """The lines of a row that an earlier run has finished, if this one goes on from it; else
    None."""
    done = place / "row.json"
    if not resumes(training) or not done.exists():
        return None
    rows = json.loads(done.read_text())
    return rows if training.max_steps in (-1, rows[0]["train_steps"]) else None


def resumes(training) -> bool:
    return str(training.resume_from_checkpoint or "false").lower() != "false"


def checkpoint_of(args) -> str | None:
    """What to go on from: "true" is the newest whole checkpoint of the output folder, a path that
    checkpoint."""
    if not resumes(args):
        return None
    given = str(args.resume_from_checkpoint)
    return last_checkpoint(args.output_dir) if given.lower() == "true" else given


def last_checkpoint(folder: str | Path) -> str | None:
    """The newest checkpoint that was written to its end (trainer_state.json comes last)."""
    whole = [p.parent for p in Path(folder).glob("checkpoint-*/trainer_state.json")]
    return str(max(whole, key=lambda p: int(p.name.split("-")[1]))) if whole else None


def check_resume(training, is_single: bool) -> None:
    """A checkpoint named by its path is whole, and that of a single run in the output folder
    itself."""
    given = training.resume_from_checkpoint
    if not resumes(training) or str(given).lower() == "true":
        return
    if not is_single:
        raise ValueError(
            f"resume_from_checkpoint={given!r}: with several rows or seeds give true, for the newest"
        )
    if not Path(given, "trainer_state.json").is_file():
        raise ValueError(f"resume_from_checkpoint={given!r} holds no whole checkpoint")


def parse_rows(text: str | None, rows: dict, groups: dict[str, list[str]]) -> list[str]:
    """Names with commas, groups opened, each once; nothing given is the one run that the options
    describe."""
    if text is None:
        return [CUSTOM]
    names = list(
        dict.fromkeys(name for part in text.split(",") for name in groups.get(part, [part]))
    )
    for name in names:
        if name not in rows and name != CUSTOM:
            choices = f"{', '.join(groups)}, or out of {', '.join(rows)}"
            raise ValueError(f"rows={text!r}: {name!r} is unknown; choose {choices}")
    return names


def open_task(script, mixture):
    """A task by name, or a dataset in TRL's formats as a task without a scorer; of its held-out
    rows `eval_rows`."""
    if script.eval_rows is not None and script.eval_rows < 1:
        raise ValueError(f"eval_rows={script.eval_rows} must be at least 1")
    task = _open_task(script, mixture)
    if script.eval_rows is None or task.test is None:
        return task
    return dataclasses.replace(
        task, test=task.test.select(range(min(script.eval_rows, len(task.test))))
    )


def _open_task(script, mixture):
    from datasets import load_dataset
    from trl import get_dataset

    from .tasks import Task, load_task

    given = [bool(script.task), bool(script.dataset_name), bool(mixture.datasets)]
    if sum(given) != 1:
        raise ValueError("give exactly one of --task, --dataset_name and (in a YAML file) datasets")
    try:
        if script.task:
            return load_task(script.task, size=script.task_size)
        name = script.dataset_name or ",".join(d.path for d in mixture.datasets)
        if script.dataset_name:
            data = load_dataset(script.dataset_name, name=script.dataset_config)
        else:
            data = get_dataset(mixture)
    except (OSError, ImportError) as error:
        raise ValueError(f"the data cannot be loaded: {error}") from error
    if script.dataset_train_split not in data:
        raise ValueError(
            f"dataset_train_split={script.dataset_train_split!r} is not among {sorted(data)}"
        )
    test = data[script.dataset_test_split] if script.dataset_test_split in data else None
    return Task(name, data[script.dataset_train_split], test, score=None, think_steps=None)


def named_model(model_args, task, default: str | None) -> tuple[str, dict]:
    """The model to open, `default` where none is named, and what its loading takes from TRL's
    ModelConfig."""
    name = model_args.model_name_or_path or default
    if name is None:
        raise ValueError(f"task {task.name!r} has no model of its own: give --model_name_or_path")
    options = {}
    if model_args.attn_implementation:
        options["attn_implementation"] = model_args.attn_implementation
    if model_args.model_revision not in (None, "main"):
        options["revision"] = model_args.model_revision
    return name, options


def with_default_config(argv: list[str], config: str | Path) -> list[str]:
    """No task, data, model or configuration named: the demo's."""
    named = ("--config", "--task", "--dataset_name", "--model_name_or_path")
    if "--config" in argv[:-1] and not Path(file := argv[argv.index("--config") + 1]).is_file():
        raise ValueError(f"config={file!r}: there is no such file")
    if any(arg.split("=")[0] in named for arg in argv):
        return argv
    return ["--config", str(config), *argv]


@contextlib.contextmanager
def one_line_errors(program: str):
    """For what checks the input. Elsewhere a ValueError is a bug, and needs its traceback."""
    try:
        yield
    except ValueError as error:
        print(f"{program}: error: {error}", file=sys.stderr)
        sys.exit(2)


@contextlib.contextmanager
def interruptible():
    """Ctrl-C ends a run with how to go on, not with a traceback."""
    try:
        yield
    except KeyboardInterrupt:
        print(
            "\ninterrupted; the last checkpoint is whole: go on with --resume_from_checkpoint true",
            file=sys.stderr,
        )
        sys.exit(130)
