"""The frame of the training recipes: one command line, one order of checks, one way to train rows
and to report them. A recipe says what differs, as a Recipe, and calls `run`."""

import contextlib
import os
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .checks import check_choice, check_least, check_writable, one_line_errors
from .launch import Program, default_accelerate_config, is_launched, launch, split_processes
from .progress import duration
from .recipe_config import check_model_options, check_taken, with_config
from .recipe_data import SFT_FORMATS, check_held_out, evaluates, made_with, open_task
from .recipe_model import adapter_of, check_named_model, check_stays, named_model
from .resume import MADE_WITH, checkpoint_of
from .rows import (
    APART,
    CUSTOM,
    Row,
    check_resume,
    folders_of,
    jobs_of,
    keeps_something,
    parse_rows,
    train_rows,
)

if TYPE_CHECKING:
    from .tasks import Task


@dataclass
class RecipeArguments:
    """What every training recipe can be asked beside TRL's ScriptArguments, its other base."""

    task: str | None = field(
        default=None,
        metadata={
            "help": "A task instead of a dataset: mnns, reasoning_gym:NAME, a folder with train.jsonl and test.jsonl "
            "(FOLDER:score=number), or module:function of your own."
        },
    )
    task_size: int | None = field(
        default=None,
        metadata={"help": "Number of training rows taken from the task. Default: all."},
    )
    eval_rows: int | None = field(
        default=None,
        metadata={"help": "Number of held-out rows that the table is measured on. Default: all."},
    )
    rows: str | None = None  # each recipe names its own in the help
    num_seeds: int = field(
        default=1, metadata={"help": "Train every row with this many seeds, from --seed on."}
    )
    jobs: int = field(
        default=0,
        metadata={
            "help": "Number of rows trained at the same time. Default 0: for tiny models one on each CPU core, else 1."
        },
    )


@dataclass(frozen=True)
class Inputs:
    """What a recipe was asked for, read and checked."""

    program: Program
    argv: list[str]
    names: list[str]  # of the rows to train
    script: Any  # the recipe's RecipeArguments
    training: Any  # its training arguments, as they are without what makes a row
    model_args: Any  # TRL's ModelConfig
    task: "Task"
    model: str  # what to open, by name
    model_options: dict  # for the function that opens it


@dataclass(frozen=True)
class Recipe:
    """What makes a training recipe: its options, its rows, and the functions that differ.

    A row of the table is the training arguments with the fields in `rows` of that name; everything
    else (data, steps, size) is common to all rows.
    """

    file: Path  # that the recipe lies in
    about: str  # what it is for, with commands: above the options in its help
    arguments: type  # a dataclass of RecipeArguments and TRL's ScriptArguments
    config: type  # a dataclass of training arguments, with a default output_dir
    demo: Path  # the YAML file that is read where no task, data, model or configuration is named
    rows: dict[str, dict]
    groups: dict[str, list[str]]  # names for several rows
    model_kind: str  # which of a task's own models to train: a key of Task.models
    # (inputs, name, args) -> the lines of results.json; None off the main process
    train_row: Callable[[Inputs, str, Any], list[dict] | None]
    # (inputs, lines, folder of each row, console) -> the file of the plot, or None without one
    report: Callable[[Inputs, list[dict], dict[Row, Path], Any], Path | None]
    # (inputs, training arguments of each row) -> None; raises ValueError for what the frame cannot
    # know to be wrong
    check: Callable[[Inputs, dict[str, Any]], None] = lambda inputs, configs: None
    # (name, training, task) -> the row's fields that depend on the others
    fields: Callable[[str, Any, "Task"], dict] = lambda name, training, task: {}
    prepare: Callable[[Any, "Task"], "Task"] = lambda script, task: task  # script, task -> the same
    # what the rows may look like: one of these sets of columns
    formats: tuple[tuple[str, ...], ...] = SFT_FORMATS
    # tasks named without anything else -> their YAML file
    task_demos: dict[str, Path] = field(default_factory=dict)
    # `config` for the options before a row completes them, where it is less strict
    base: type | None = None

    @property
    def program(self) -> Program:
        """Its file, where no command runs it."""
        return Program(self.file.name, [str(self.file)])


def run(recipe: Recipe, program: Program | None = None) -> None:
    """The command line of a recipe, from its options to the table and the plot.

    program: what runs it as one of its commands; by default its file is the program.
    """
    argv, is_command = sys.argv[1:], program is not None
    program = program or recipe.program
    with interruptible() as folders:
        if {"-h", "--help", "--help_all"} & {*argv}:
            show_help(recipe, program, everything="--help_all" in argv)
            return
        with one_line_errors(program.name):
            processes, argv = split_processes(argv)
            if is_command and not is_launched() and processes.accelerate_config is None:
                processes = processes._replace(accelerate_config=default_accelerate_config())
        if processes.launches and not is_launched():
            sys.exit(launch(program, processes, argv))
        with one_line_errors(program.name):
            inputs = read(recipe, argv, program)
        rows = folders_of(inputs.names, inputs.training, inputs.script.num_seeds)
        folders.extend(rows.values())
        with one_line_errors(program.name, FloatingPointError, code=1):
            train(recipe, inputs)


def show_help(recipe: Recipe, program: Program, everything: bool) -> None:
    from .arguments import RecipeParser

    options = RecipeParser(recipe.arguments, recipe.config).help(everything)
    print(f"usage: {program.name} [--option value ...]\n{recipe.about.rstrip()}\n{options}")


def read(recipe: Recipe, argv: list[str], program: Program | None = None) -> Inputs:
    """The options, and all that can be found to be wrong with them before a model is opened.

    Raises:
        ValueError: with one line that names the option and its value.
    """
    argv = with_config(argv, recipe.demo, recipe.task_demos)
    script, training, model_args, mixture = parse(recipe, argv, recipe.base)
    check_model_options(model_args, script)
    quiet(bars=sys.stderr.isatty())
    names = parse_rows(script.rows, recipe.rows, recipe.groups)
    check_least(script, num_seeds=1, eval_rows=1)
    task = recipe.prepare(script, open_task(script, mixture, recipe.formats))
    check_held_out(script, training, task)
    model, options = named_model(model_args, task, task.models.get(recipe.model_kind))
    if model != task.models.get(recipe.model_kind):
        check_named_model(model, recipe.model_kind, script, options)
        check_stays(model, training, folders_of(names, training, script.num_seeds))
    program = program or recipe.program
    inputs = Inputs(program, argv, names, script, training, model_args, task, model, options)
    output = training.output_dir
    configs = {name: row_config(recipe, inputs, name, training.seed, output) for name in names}
    recipe.check(inputs, configs)
    check_taken(argv, training, recipe.rows, configs)
    check_loggers(training.report_to)
    check_writable(output)
    check_resume(training, is_single=names == [CUSTOM] and script.num_seeds == 1)
    return inputs


def parse(recipe: Recipe, argv: list[str], config: type | None = None) -> tuple:
    """-> the recipe's arguments, its training arguments, TRL's ModelConfig and
    DatasetMixtureConfig. config: the class of the second, by default the recipe's."""
    from .arguments import RecipeParser

    parser = RecipeParser(recipe.arguments, config or recipe.config)
    parser.check_names(argv)
    return parser.parse_args_and_config(argv)


def row_config(recipe: Recipe, inputs: Inputs, name: str, seed: int, folder: str | Path):
    """A row's own training arguments: read again with the row's fields behind the other options, so
    that they are checked as if they had been given there."""
    fields = recipe.rows.get(name, {}) | recipe.fields(name, inputs.training, inputs.task)
    fields |= dict(seed=seed, output_dir=folder)
    if Path(folder) != Path(inputs.training.output_dir):  # else loggers would have to make one up
        fields["run_name"] = "-".join(
            filter(None, [inputs.training.run_name, f"{name}-seed{seed}"])
        )
    argv = [*inputs.argv, *(f"--{key}={value}" for key, value in fields.items())]
    try:
        return parse(recipe, argv)[1]
    except ValueError as error:
        if name == CUSTOM:
            raise
        raise ValueError(f"row {name!r}: {error}") from error


def train(recipe: Recipe, inputs: Inputs) -> None:
    """Train the rows, then print the table and say where results and plot are."""
    from rich.console import Console

    console, training = Console(), inputs.training
    is_tiny = inputs.model in inputs.task.models.values()
    if is_tiny:
        import torch

        torch.set_num_threads(1)  # threads only get in each other's way
    made = made_with(recipe.file.stem, inputs)

    def configure(*row):
        args = row_config(recipe, inputs, *row)
        setattr(args, MADE_WITH, made)
        return args

    results, folders = train_rows(
        inputs.names,
        training,
        num_seeds=inputs.script.num_seeds,
        jobs=jobs_of(inputs.script.jobs, is_tiny),
        configure=configure,
        train=lambda name, args: recipe.train_row(inputs, name, args),
        console=console,
        program=inputs.program,
    )
    plot = recipe.report(inputs, results, folders, console) if results else None
    if plot is not None:
        console.print(f"results: {Path(training.output_dir, 'results.json')}   plot: {plot}")
    if results:
        say_where(results, folders)


def say_where(results: list[dict], folders: dict[Row, Path]) -> None:
    """Where the trained models lie, what an evaluation found, and how one is decoded."""
    from .model_card import command_of

    (name, seed), folder = [*folders.items()][-1]
    if "eval_loss" in results[-1]:
        print(f"{name}, seed {seed}: held-out loss {results[-1]['eval_loss']:.4g}")
    print(
        f"saved to {folder}"
        if len(folders) == 1
        else f"saved in the folders {folder.parent}/*-seed*"
    )
    if command := command_of(folder):
        print(f"decode {'it' if len(folders) == 1 else 'the last'} with: {command}")


def quiet(bars: bool) -> None:
    """No bars for the reading and writing of weights, and none for data where nobody sees them."""
    from datasets import disable_progress_bars
    from transformers.utils import logging

    logging.disable_progress_bar()
    # of adapters over a model that softar brings, and of a run without network
    for remark in ("Could not find a config file in", "Unable to fetch remote file"):
        warnings.filterwarnings("ignore", remark)
    if not bars:
        disable_progress_bars()


# -- what a row's training is made of


def thought_fields(training, task: "Task") -> dict:
    """The length of the task's thoughts, where the options do not say how a thought ends."""
    ends = training.think_end is not None or training.think_steps is not None
    return {} if ends or task.think_steps is None else dict(think_steps=task.think_steps)


def supervised(trainer: type, model, tokenizer, inputs: Inputs, task: "Task", args, adapter=None):
    """An SFT trainer on the task's rows. It has held-out rows where its options say so, and where
    nothing else could measure it. adapter: of PEFT, in the place of the one that the options say."""
    from .model_card import example_of

    wanted = evaluates(args) or task.score is None
    made = trainer(
        model,
        args,
        train_dataset=task.train,
        eval_dataset=task.test if wanted else None,
        processing_class=tokenizer,
        score=task.score,
        peft_config=adapter or adapter_of(model, inputs.model_args),
    )
    made.origin = example_of(task, tokenizer)
    return made


def fit(trainer, args, name: str) -> float | None:
    """Train, from the checkpoint that `args` names, and save -> seconds of the training, those before
    the checkpoint too; None where it does not know them. name: of the row, for what is said
    meanwhile."""
    from .training import tell_progress

    checkpoint = checkpoint_of(args)
    title = f"{name}, seed {args.seed}"
    tell_progress(trainer, title, to_log=APART in os.environ)
    started = time.perf_counter()
    trainer.train(resume_from_checkpoint=checkpoint)
    seconds = time.perf_counter() - started
    before, more = trainer.seconds_before, ""
    if before is None:
        more = ", and for a time that the checkpoint does not know"
    elif before:
        more = f", after {duration(before)} before the checkpoint"
    trainer.accelerator.print(f"{title}: trained in {duration(seconds)}{more}")
    trainer.save_model(args.output_dir)
    return None if before is None else before + seconds


def fit_supervised(inputs: Inputs, trainer, args, **name: str) -> dict:
    """`fit` for SFT -> the columns that all lines of the row share. name: the column that names the
    row."""
    seconds = fit(trainer, args, *name.values())
    return dict(
        task=inputs.task.name,
        model=inputs.model,
        **name,
        stage=None,
        seed=args.seed,
        train_steps=trainer.state.global_step,
        train_seconds=seconds,
        train_loss=trainer.state.log_history[-1].get("train_loss"),
    )


def measured(trainer, task: "Task", common: dict, decode: Callable) -> list[dict] | None:
    """The lines of a trained row: `common` with each of `decode(model)`, or with the trainer's own
    evaluation where the task has no scorer. None off the main process."""
    accelerator, lines = trainer.accelerator, []
    if task.test is not None:
        title = f"{common.get('decoder', common.get('training'))}, seed {common['seed']}"
        does = "evaluates" if task.score is None else "decodes"
        accelerator.print(f"{title}: {does} {len(task.test)} held-out rows")
    if task.score is None:
        lines = [common | (trainer.evaluate() if task.test is not None else {})]
    else:
        from .split import on_main

        lines = on_main(trainer, lambda model: [common | line for line in decode(model)])
    accelerator.wait_for_everyone()
    return lines if accelerator.is_main_process else None


# -- input


def check_loggers(names: list[str]) -> None:
    """Raise ValueError for a logger of --report_to that is not there or not installed."""
    from transformers.integrations import integration_utils as loggers

    for name in names:
        check_choice("report_to", name, [*sorted(loggers.INTEGRATION_TO_CALLBACK), "none"])
        if name not in ("none", *loggers.get_available_reporting_integrations()):
            raise ValueError(f"report_to={name!r} is not installed: pip install {name}")


@contextlib.contextmanager
def interruptible():
    """Ctrl-C ends a run with how to go on, not with a traceback. Gives a list, for the folders of its
    rows once they are known: where nothing is kept in them, that is said."""
    folders: list[Path] = []
    try:
        yield folders
    except KeyboardInterrupt:
        if any(map(keeps_something, folders)):
            said = "the last checkpoint is whole: go on with --resume_from_checkpoint true"
        else:
            said = "nothing was kept, it was before the first checkpoint (--save_steps)"
        print(f"\ninterrupted; {said}", file=sys.stderr)
        sys.exit(130)
