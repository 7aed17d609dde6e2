"""A grid of tasks x decoders x settings x seeds, shared by several processes, resumed after an
interruption.

The grid is data. Each of its runs writes `runs/NAME/results.json` when it is whole; what is there
is not run again. At the end `summary.json` (as results.json, all rows) and `summary.csv`;
`plot_sweep` draws accuracy against cost.
"""

import dataclasses
import functools
import hashlib
import itertools
import json
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

from ..checks import check_least, check_writable
from ..decoders.registry import ALONE, make_decoder, parse_spec
from ..models import MODELS as EMBEDDED
from ..models import stamp_of
from ..results import as_name, write_results, write_whole
from ..specs import format_options
from ..tasks import load_task
from .chats import asked_as_chats
from .sweep_summary import GRID_FILE, read_rows, write_summary

ROLES = ("soft", "baseline")


@dataclass(frozen=True)
class Grid:
    """What is run: every decoder with every combination of `vary`, on every task, with every
    seed."""

    tasks: tuple[str, ...]  # names for softar.load_task
    # decoders, "[MODEL=]NAME[:key=value,key=value]" (softar.decoders.registry.parse_spec)
    soft: tuple[str, ...]
    baseline: tuple[str, ...] = ()  # decoders that these are compared with
    # option -> values, for the decoders of both roles
    vary: dict[str, tuple] = field(default_factory=dict)
    # task -> model of the decoders that name none
    models: dict[str, str] = field(default_factory=dict)
    seeds: tuple[int, ...] = (0,)  # of what a decoder draws; the held-out rows are always the same
    limit: int | None = None  # held-out rows of each task, the first ones; None is all
    # None: what the task says, as the embedded ones and lm-eval's do, else each model's default
    max_new_tokens: int | None = None
    # prompts in the chat template of a decoder's model; None is where it has one
    chat: bool | None = None
    batch_size: int = 64
    repeats: int = 1  # passes over the rows in each run
    dtype: str = "auto"
    device: str | None = None

    def __post_init__(self):
        for name in ("tasks", "soft", "baseline", "seeds"):
            object.__setattr__(self, name, _tuple(name, getattr(self, name)))
        if not isinstance(self.vary, dict) or not isinstance(self.models, dict):
            raise ValueError(
                f"vary={self.vary!r}, models={self.models!r}: give mappings, option -> list of values"
            )
        object.__setattr__(self, "vary", {k: _tuple(f"vary {k}", v) for k, v in self.vary.items()})
        for name, values in [("tasks", self.tasks), ("seeds", self.seeds), *self.vary.items()]:
            if not values:
                raise ValueError(f"{name}: the grid needs at least one value")
        if not self.soft + self.baseline:
            raise ValueError("soft and baseline are empty: the grid needs at least one decoder")
        for name in ("limit", "max_new_tokens", "batch_size", "repeats"):
            if not isinstance(getattr(self, name), int | None):
                raise ValueError(f"{name}={getattr(self, name)!r} must be a whole number")
        if not isinstance(self.chat, bool | None):
            raise ValueError(f"chat={self.chat!r} must be true, false or null")
        check_least(self, limit=1, max_new_tokens=0, batch_size=1, repeats=1)
        if unknown := sorted(set(self.models) - set(self.tasks)):
            raise ValueError(
                f"models names {unknown}, which are not among the tasks {list(self.tasks)}"
            )

    def runs(self) -> list["Run"]:
        """In the order in which processes take them; what the grid holds twice is one run."""
        settings = [
            tuple(zip(self.vary, values)) for values in itertools.product(*self.vary.values())
        ]
        decoders = [(role, decoder) for role in ROLES for decoder in getattr(self, role)]
        runs = {}
        for task, (role, decoder), setting, seed in itertools.product(
            self.tasks, decoders, settings, self.seeds
        ):
            run = Run(task, role, decoder, setting, seed)
            other = runs.setdefault(run.name, run)
            if other != run:
                raise ValueError(
                    f"{other.spec!r} and {run.spec!r} would share the folder {run.name!r}: leave one out"
                )
        return list(runs.values())


@dataclass(frozen=True)
class Run:
    task: str
    role: str
    decoder: str  # as the grid names it
    setting: tuple[tuple[str, Any], ...]  # what is varied: (option, value)
    seed: int

    @property
    def spec(self) -> str:
        """The decoder with its setting, for softar.decoders.registry.make_decoder."""
        if not self.setting:
            return self.decoder
        joint = "," if parse_spec(self.decoder).options else ":"
        return self.decoder + joint + format_options(dict(self.setting))

    @property
    def name(self) -> str:
        """Of its folder."""
        return as_name(f"{self.task}-{self.role}-{self.spec}", f"-seed{self.seed}")


def read_grid(values: dict) -> Grid:
    """A Grid of what a YAML or JSON file holds; ValueError names what is no field of it, or
    missing."""
    names = {f.name for f in dataclasses.fields(Grid)}
    if unknown := sorted(set(values) - names):
        raise ValueError(f"the grid does not have {unknown}; known: {sorted(names)}")
    if missing := [name for name in ("tasks", "soft") if name not in values]:
        raise ValueError(
            f"the grid lacks {missing}: give for example tasks: [latin], soft: [soft-mask]"
        )
    return Grid(**values)


def sweep(grid: Grid, folder: str | Path, *, console=None) -> list[dict]:
    """Run what is not finished -> all rows, in the order of the grid; [] where this is not the main
    process.

    Args:
        folder: of one grid. What an earlier call finished there is kept; a run that was cut short
            is done again.
        console: rich's, for progress; None is one on stderr.

    Raises:
        ValueError: before anything is decoded, for a folder of another grid, or of other rows or
            weights, an unknown task, or a decoder that does not exist or does not take its options;
            at the end if runs failed (they are named, and are tried again by the next call; all
            others are done), or if a model's files were written meanwhile.
        KeyboardInterrupt: after a remark on how to resume.
    """
    import torch
    from accelerate import PartialState
    from rich.console import Console

    console = Console(stderr=True) if console is None else console
    folder, runs = Path(folder), grid.runs()
    _task.cache_clear()  # rows of a file may have changed since the last sweep
    _check(grid, runs)
    sources = _sources(grid, runs)
    _claim(grid, sources, folder)
    # Only the end is waited for, however long the others take
    # unasked, processes on CPUs stay strangers
    on_cpu = grid.device == "cpu" or not torch.accelerator.is_available()
    state = PartialState(cpu=on_cpu, timeout=timedelta(weeks=52))
    if state.num_processes > 1:  # bars of several processes would overwrite each other
        console = Console(file=console.file, force_terminal=False)
    share = runs[state.process_index :: state.num_processes]
    share = [run for run in share if _finished(folder, run) is None]
    try:
        # a wrong option is found before anything is decoded; models stay open, so no time is lost
        for run in share:
            _decoder(grid, run)
        for run in share:
            _perform(grid, run, folder, console, f"[{runs.index(run) + 1}/{len(runs)}]")
        state.wait_for_everyone()
        _check_sources(folder, _sources(grid, runs), sources)
    except KeyboardInterrupt:
        done = sum(_finished(folder, run) is not None for run in runs)
        remark = f"interrupted; {done} of {len(runs)} runs are whole in {folder}: the same command resumes"
        if state.is_main_process:
            console.print(remark, markup=False, soft_wrap=True)
        raise
    return _gather(runs, folder) if state.is_main_process else []


def _gather(runs: list[Run], folder: Path) -> list[dict]:
    """Write the summary -> all rows. Raises ValueError where runs failed."""
    results = [_finished(folder, run) for run in runs]
    rows = [row for result in results for row in result or []]
    if rows:
        write_summary(rows, folder)
    if failed := [run.name for run, result in zip(runs, results) if result is None]:
        raise ValueError(
            f"{len(failed)} of {len(runs)} runs failed, {failed[:3]}; the same command tries them again"
        )
    return rows


def _check(grid: Grid, runs: list[Run]) -> None:
    """Raise ValueError for what is wrong with a grid, as far as it shows before a model is opened."""
    for task in grid.tasks:
        _task(task)
    for run in runs:
        if twice := sorted(set(parse_spec(run.decoder).options) & {*grid.vary, "seed"}):
            raise ValueError(
                f"decoder {run.decoder!r} sets {twice}, which the grid varies: leave it out of one of them"
            )
        _model_of(grid, run)


def _model_of(grid: Grid, run: Run) -> str | None:
    """The model of a run: the decoder's own, the grid's for the task, or the embedded one of a
    diffusion decoder."""
    asked = parse_spec(run.spec)
    default = _task(run.task).models.get("diffusion") if asked.family == "diffusion" else None
    model = asked.model or grid.models.get(run.task) or default
    if model is None and asked.family not in ALONE:
        raise ValueError(
            f"decoder {run.decoder!r} on task {run.task!r} has no model: say MODEL={run.decoder}"
        )
    return model


def _sources(grid: Grid, runs: list[Run]) -> dict[str, dict[str, str]]:
    """What the grid names and does not hold: by task a digest of the rows, by model in a folder or
    a file of its files' sizes and times."""
    rows = {run.task: _held_out(grid, run)[1] for run in runs}
    models = {_model_of(grid, run) for run in runs} - {None, *EMBEDDED}
    stamps = {model: stamp for model in sorted(models) if (stamp := stamp_of(model))}
    return {
        "rows": {task: _digest(held.to_list()) for task, held in rows.items()},
        "weights": {model: _digest(stamp) for model, stamp in stamps.items()},
    }


def _digest(value) -> str:
    # images and the like count by their type: their text holds addresses
    text = json.dumps(value, sort_keys=True, default=lambda other: type(other).__name__)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _check_sources(folder: Path, ours: dict, theirs: dict) -> None:
    """Raise ValueError for rows or weights that are not those of the runs in the folder."""
    for kind, what in (("rows", "the rows of task={!r}"), ("weights", "the files of model={!r}")):
        known = theirs.get(kind, {})  # of an older grid nothing is
        if other := [name for name in known if ours[kind].get(name) != known[name]]:
            raise ValueError(
                f"{what.format(other[0])} have changed since {folder} was begun: take another folder, "
                "or delete this one"
            )


def _claim(grid: Grid, sources: dict, folder: Path) -> None:
    """Keep the grid and its sources in its folder, or raise ValueError where others are: the results
    would be mixed up."""
    file, ours = folder / GRID_FILE, json.loads(json.dumps(dataclasses.asdict(grid)))
    # before the file: another process may write both meanwhile
    has_runs = any(folder.glob("runs/*/results.json"))
    # a grid of which nothing was finished, with a typo say, makes way
    if not has_runs or not file.exists():
        if has_runs:
            raise ValueError(
                f"{folder} holds runs without a {GRID_FILE}, of an unknown grid: take another folder"
            )
        check_writable(folder, "folder")
        write_whole(file, json.dumps(ours | sources, indent=1) + "\n")
        return
    try:
        theirs = json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{file} cannot be read ({error}): take another folder, or delete this one"
        ) from None
    for name in dict.fromkeys([*ours, *(name for name in theirs if name not in sources)]):
        if ours.get(name) != theirs.get(name):
            raise ValueError(
                f"{folder} is of another grid, with {name}={theirs.get(name)!r} and not {ours.get(name)!r}: "
                "take another folder, or delete this one"
            )
    _check_sources(folder, sources, theirs)


def _perform(grid: Grid, run: Run, folder: Path, console, count: str) -> None:
    """Decode and write results.json. Of a run that fails the console says so, and no file is left;
    the others go on."""
    try:
        row = measure(grid, run, console)
    except (ValueError, RuntimeError, FloatingPointError, OSError) as error:
        console.print(
            f"{count} {run.name}: failed: {' '.join(str(error).split())}",
            markup=False,
            soft_wrap=True,
        )
        return
    file = _file(folder, run)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_results(file, [row])
    forwards = "" if row["nfe"] is None else f"{row['nfe']:.1f} forwards, "
    result = f"accuracy {row['accuracy']:.3f}, {forwards}{row['seconds']:.2f} s"
    console.print(f"{count} {run.name}: {result}", markup=False, soft_wrap=True)


def measure(grid: Grid, run: Run, console=None) -> dict:
    """Decode one run -> its row of results.json, with columns for the run, its role, how often it and
    the scorer failed, and each option that varies."""
    from .compare import NoAnswers, compare

    task, rows = _held_out(grid, run)
    decoder, failed = _decoder(grid, run), "its decoder failed, as said above"  # by compare
    if parse_spec(run.spec).family == "vllm":
        decoder.start()  # until then it has no tokenizer
    try:
        comparison = compare(
            [decoder],
            rows,
            task.score,
            batch_size=grid.batch_size,
            repeats=grid.repeats,
            seed=run.seed,
            task=run.task,  # two functions may call theirs the same
            extract=task.extract,
            chats=asked_as_chats(rows, [decoder], grid.chat),
            console=console,
        )
    except NoAnswers:
        raise ValueError(failed) from None
    if comparison.interrupted:
        raise KeyboardInterrupt
    if not comparison.rows[0]["complete"]:
        raise ValueError(failed)
    columns = dict(
        run=run.name,
        role=run.role,
        spec=run.decoder,
        varied=format_options(dict(run.setting), " "),
        seed=run.seed,
        failures=len(comparison.failures),
        scorer_failures=len(comparison.scorer_failures),
    )
    return comparison.rows[0] | columns | dict(run.setting)


def _decoder(grid: Grid, run: Run):
    task = _task(run.task)
    return make_decoder(
        run.spec,
        model=_model_of(grid, run),
        max_new_tokens=_length(grid, run),
        seed=run.seed,
        dtype=grid.dtype,
        device=grid.device,
        stop=task.stop,
        extract=task.extract,
    )


@functools.cache
def _task(name: str):
    return load_task(name)  # takes seconds


def _held_out(grid: Grid, run: Run):
    task = _task(run.task)
    n = len(task.test) if grid.limit is None else min(grid.limit, len(task.test))
    return task, task.test.select(range(n))


def _length(grid: Grid, run: Run) -> int | None:
    """How many tokens to generate: none where a diffusion model fills a template; None where
    neither grid nor task says: the model's default."""
    _, rows = _held_out(grid, run)
    if "template" in rows.column_names and parse_spec(run.spec).family == "diffusion":
        return 0
    if grid.max_new_tokens is not None:
        return grid.max_new_tokens
    return _task(run.task).max_new_tokens


def _file(folder: Path, run: Run) -> Path:
    return folder / "runs" / run.name / "results.json"


def _finished(folder: Path, run: Run) -> list[dict] | None:
    """The rows of a run that is whole, else None."""
    try:
        return read_rows(_file(folder, run))
    except (FileNotFoundError, ValueError):
        return None


def _tuple(name: str, values) -> tuple:
    if isinstance(values, str) or not isinstance(values, (list, tuple)):
        raise ValueError(f"{name}={values!r} must be a list")
    return tuple(values)
