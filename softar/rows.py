"""Rows and seeds of a recipe, each trained in a folder of its own, going on after an interruption.

A row is a (name, seed). Where rows are trained in processes of their own, the recipe starts itself
again for each, with `--rows NAME --seed SEED --num_seeds 1` behind its own options, so it must know
these three.
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from .checks import one_line_errors
from .launch import Program
from .resume import (
    ANY_WHOLE,
    EARLIER,
    LENGTH,
    STATE,
    arguments_of,
    changes,
    check_same,
    check_whole,
    checkpoint_of,
    is_of_optimiser,
    others,
    resumes,
)

CUSTOM = "custom"  # one run, exactly as the options say
# set for a process that trains one row and leaves table and plot to its parent
APART = "SOFTAR_TRAIN_APART"
LOG = "train.log"  # what such a process says, in the row's folder
TOLD = "row_arguments.json"  # what a finished row was trained with
# What a run leaves in a row's folder that decides how it is resumed, or how it is decoded
LEFT = (
    *("checkpoint-*", "row.json", TOLD, "README.md", "training_args.bin"),
    *("*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json"),
    *("adapter_config.json", "soft_config.json", "denoise_config.json"),
    *("transparency_config.json", "diffusion_process.json"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("*.model", "vocab.json", "vocab.txt", "merges.txt"),
    *("chat_template.jinja", "additional_chat_templates"),
)

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
    program: Program,
) -> tuple[list[dict], dict[Row, Path]]:
    """Train what is not finished -> the lines of results.json, and the folder of each row, inside
    training.output_dir.

    `configure(name, seed, folder)` gives a row's own training arguments. `train(name, args)` gives
    its lines, each with `train_steps`, and None off the main process. There are no lines to report
    in a child and off the main process.
    """
    from accelerate import PartialState

    from .results import write_results, write_whole

    output = Path(training.output_dir)
    is_child, is_main = APART in os.environ, PartialState().is_main_process
    if is_child:  # its parent ends it by SIGINT, which a shell may have told both to ignore
        signal.signal(signal.SIGINT, signal.default_int_handler)
    folders = folders_of(names, training, num_seeds)
    configs = {row: configure(*row, folder) for row, folder in folders.items()}
    lines_of = {row: saved_row(folder, configs[row]) for row, folder in folders.items()}
    left = [row for row, lines in lines_of.items() if lines is None]
    with one_line_errors(program.name):
        # before hours of training, not when the row's turn comes
        begin = {row: checkpoint_of(configs[row]) for row in left}
        how = {row: kept_with(folders[row], configs[row]) for row in {*folders} - {*left}}
    if is_main and not is_child:
        for (name, seed), lines in lines_of.items():
            if lines is not None:
                kept = f"{lines[0]['train_steps']} steps, and kept as it is{how[name, seed]}"
                print(f"{name}, seed {seed}: trained already, {kept}")
    begins = [folders[row] for row, path in begin.items() if is_from_start(path, folders[row])]
    results = []
    with anew(begins if is_main and not is_child else []):
        if jobs > 1 and len(left) > 1 and not is_child:
            for row, path in begin.items():  # the processes say it to their logs alone
                if path is not None and (line := changes(path, configs[row])):
                    print(line)
            train_apart({row: folders[row] for row in left}, jobs, console, program)
            lines_of |= {row: json.loads((folders[row] / "row.json").read_text()) for row in left}
        for row, lines in lines_of.items():
            if lines is None:
                file = folders[row] / "row.json"
                file.unlink(missing_ok=True)
                told = arguments_of(configs[row])  # trainers may write into theirs
                lines = train(row[0], configs[row])
                end_run()
                if lines is not None:  # the main process
                    write_whole(folders[row] / TOLD, json.dumps(told))
                    write_whole(file, json.dumps(lines))
            results += lines or []
            if is_main and not is_child and results:
                write_results(output / "results.json", results)
    PartialState().destroy_process_group()  # not earlier: the next row's trainer joins the same one
    return (results if is_main and not is_child else []), folders


def folders_of(names: list[str], training, num_seeds: int) -> dict[Row, Path]:
    """The folder of each row. A single run as the options say has the output folder itself."""
    output, seeds = Path(training.output_dir), range(training.seed, training.seed + num_seeds)
    folders = {(name, seed): output / f"{name}-seed{seed}" for seed in seeds for name in names}
    if [*folders] == [(CUSTOM, training.seed)] and APART not in os.environ:
        return {(CUSTOM, training.seed): output}
    return folders


def is_from_start(checkpoint: str | None, folder: Path) -> bool:
    """Is what lies in a row's folder an earlier run's, where it goes on from this checkpoint?"""
    return checkpoint is None or Path(checkpoint).resolve().parent != folder.resolve()


def end_run() -> None:
    """wandb goes on with the run that is open: the next row would be drawn into this one's."""
    wandb = sys.modules.get("wandb")
    if wandb is not None and wandb.run is not None:
        wandb.finish()


def jobs_of(jobs: int, is_tiny: bool) -> int:
    """How many rows to train at the same time; where `jobs` is 0, for tiny models one on each CPU
    core, else 1."""
    from accelerate import PartialState

    return jobs or (os.cpu_count() if is_tiny and PartialState().num_processes == 1 else 1)


def train_apart(folders: dict[Row, Path], jobs: int, console, program: Program) -> None:
    """Train rows in processes of their own, `jobs` at a time; each writes row.json, its output goes
    to LOG."""
    from .progress import Bars, Lines

    waiting, running = list(folders), {}
    with (Bars if console.is_terminal else Lines)(console) as display:
        try:
            while waiting or running:
                while waiting and len(running) < jobs:
                    row = waiting.pop(0)
                    running[row] = start_apart(row, folders[row], program)
                    display.start(row, folders[row] / LOG)
                time.sleep(0.3)
                for row, child in list(running.items()):
                    code = child.poll()
                    log = (folders[row] / LOG).read_text(errors="replace")
                    display.update(row, log[-2000:])
                    if code is None:
                        continue
                    del running[row]
                    if code:
                        failed = f"row {row[0]!r}, seed {row[1]}, failed:\n{log[-3000:]}"
                        print(f"{program.name}: error: {failed}", file=sys.stderr)
                        sys.exit(code)
                    display.end(row)
        finally:  # after Ctrl-C or a failure let the others save what they write
            for child in running.values():
                child.send_signal(signal.SIGINT)
            for child in running.values():
                child.wait()


def start_apart(row: Row, folder: Path, program: Program) -> subprocess.Popen:
    (folder / "row.json").unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    options = f"--rows={row[0]}", f"--seed={row[1]}", "--num_seeds=1"
    command = [sys.executable, *program.start, *sys.argv[1:], *options]
    with open(folder / LOG, "w") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | {APART: "1"})


@contextlib.contextmanager
def anew(folders: list[Path]) -> Iterator[None]:
    """Rows from the start: nothing of an earlier run stays in their folders where a later resume, or
    who decodes them, would take it for theirs. An error of the input that only shows when a trainer
    is made, before anything has been trained, leaves the folders as they were."""
    undo = [set_apart(folder) for folder in folders]
    try:
        yield
    except SystemExit as end:
        if end.code == 2 and not any(map(keeps_something, folders)):
            for put_back in undo:
                put_back()
        raise
    finally:
        for folder in folders:
            shutil.rmtree(folder / EARLIER / EARLIER, ignore_errors=True)


def left_in(folder: Path) -> list[Path]:
    """What an earlier run left in a row's folder, as LEFT says."""
    return sorted({path for pattern in LEFT for path in folder.glob(pattern)})


def set_apart(folder: Path) -> Callable[[], None]:
    """Move what an earlier run left into a folder named EARLIER (push_to_hub skips that name), in
    place of what was there, which goes into a folder inside until the run is over -> what undoes
    it."""
    earlier, older, left = folder / EARLIER, folder / f"{EARLIER}{EARLIER}", left_in(folder)
    if left:
        if earlier.exists():
            earlier.rename(older)
        earlier.mkdir()
        if older.exists():
            older.rename(earlier / EARLIER)
        for path in left:
            path.rename(earlier / path.name)
        print(f"starts anew; model and checkpoints of an earlier run are now in {earlier}")

    def put_back() -> None:
        if left:
            for path in left:
                (earlier / path.name).rename(path)
            if (earlier / EARLIER).exists():
                (earlier / EARLIER).rename(older)
            shutil.rmtree(earlier)
            if older.exists():
                older.rename(earlier)
            print(f"nothing was trained; they are back in {folder}")

    return put_back


def keeps_something(folder: str | Path) -> bool:
    """Is there in a row's folder what a resume would go on from?"""
    return Path(folder, "row.json").exists() or any(Path(folder).glob("checkpoint-*"))


def saved_row(folder: Path, training) -> list[dict] | None:
    """The lines of a row that an earlier run has finished, if this one goes on from it; else
    None."""
    file = folder / "row.json"
    if not resumes(training) or not file.exists():
        return None
    lines = json.loads(file.read_text())
    goes_on = training.max_steps == -1 and {*LENGTH} & {*others(_told(folder), training)}
    return None if goes_on or training.max_steps not in (-1, lines[0]["train_steps"]) else lines


def kept_with(folder: Path, training) -> str:
    """With what a finished row was trained that these arguments say otherwise, as the end of a line.
    Raises ValueError for what a resume of an unfinished one would refuse, too."""
    before = _told(folder)
    other = {k: v for k, v in others(before, training).items() if k not in LENGTH}
    check_same(before, other, folder)
    for name in filter(is_of_optimiser, other):
        raise ValueError(
            f"{name}={other[name]!r} does nothing, as {str(folder)!r} is trained already, with {before[name]!r}: give "
            "the same, or start anew without resume_from_checkpoint"
        )
    said = ", ".join(f"{k}={before[k]!r}, not {v!r}" for k, v in other.items())
    return said and f", trained with {said}"


def _told(folder: Path) -> dict:
    """The arguments of a finished row, as far as they are known."""
    file = folder / TOLD
    return json.loads(file.read_text()) if file.exists() else {}


def check_resume(training, is_single: bool) -> None:
    """A checkpoint named by its path is whole, and that of a single run in the output folder
    itself."""
    wanted = training.resume_from_checkpoint
    if not resumes(training) or str(wanted).lower() in ("true", ANY_WHOLE):
        return
    if not is_single:
        raise ValueError(
            f"resume_from_checkpoint={wanted!r}: with several rows or seeds give true, for the newest, or "
            f"{ANY_WHOLE}, for the newest that is not damaged"
        )
    if not Path(wanted, STATE).is_file():
        raise ValueError(f"resume_from_checkpoint={wanted!r} holds no whole checkpoint")
    check_whole(wanted)


def parse_rows(text: str | None, rows: dict, groups: dict[str, list[str]]) -> list[str]:
    """Names with commas, groups opened, each once; None is the one run that the options
    describe."""
    if text is None:
        return [CUSTOM]
    names = [name for part in text.split(",") for name in groups.get(part, [part])]
    for name in names:
        if name not in rows and name != CUSTOM:
            choices = f"{', '.join(groups)}, or out of {', '.join(rows)}"
            raise ValueError(f"rows={text!r}: {name!r} is unknown; choose {choices}")
    return list(dict.fromkeys(names))
