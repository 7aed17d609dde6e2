# /// script
# dependencies = ["softar[rewards]"]
# ///
"""
Guided soft SFT: teach a causal LM to think in its own mixtures of tokens.

# The demo: a tiny model on MNNS, a table of no-CoT, discrete CoT and soft thought
accelerate launch recipes/sft_soft.py
accelerate launch recipes/sft_soft.py --rows all --num_seeds 5

# Any causal LM on a task by name, here SmolLM2-135M with LoRA
accelerate launch recipes/sft_soft.py --config recipes/configs/smollm2_chain_sum.yaml --max_steps 5

# Any dataset in TRL's prompt-completion format; the thought stands in tags
accelerate launch recipes/sft_soft.py \
    --model_name_or_path Qwen/Qwen3-0.6B --dataset_name my/cot-data \
    --think_start '<think>' --think_end '</think>' --soft_passes 2 --soft_top_k 10 \
    --use_peft --learning_rate 1e-4 --output_dir runs/qwen3-soft

# Go on where an interrupted run stopped; without this a run starts anew and moves old checkpoints into _earlier
accelerate launch recipes/sft_soft.py --resume_from_checkpoint true
"""

import contextlib
import copy
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, TrlParser

from softar.sft import SoftSFTConfig

HERE = Path(__file__).parent
# Fields that make a row of the table what it is; everything else (data, steps, size) is common to all.
ROWS = {
    "no-cot": dict(alpha_schedule="constant", alpha_start=1.0),
    "discrete": dict(alpha_schedule="constant", alpha_start=1.0),
    "discrete-traces": dict(alpha_schedule="constant", alpha_start=1.0, targets="traces"),
    "scheduled-sampling": dict(soft_mixer="hard", guidance="coin", thought_loss="alpha"),
    "guided-soft": dict(thought_loss="alpha"),
    "trace-soft": dict(alpha_schedule="constant", alpha_start=0.0, targets="traces"),
    "oracle-soft": dict(targets="oracle"),
}
GROUPS = {"demo": ["no-cot", "discrete", "trace-soft"], "all": list(ROWS)}
CUSTOM = "custom"  # one run, exactly as the options say
APART = "SOFTAR_TRAIN_APART"  # set for a process that trains one row and leaves table and plot to its parent


@dataclass
class SoftScriptArguments(ScriptArguments):
    task: str | None = field(
        default=None, metadata={"help": "A task by name: mnns, or reasoning_gym:NAME. Instead of a dataset."}
    )
    task_size: int | None = field(default=None, metadata={"help": "Training rows of the task. Default: all."})
    rows: str | None = field(
        default=None,
        metadata={
            "help": f"What to train: demo, all, or names with commas out of {', '.join(ROWS)}; each sets its own alpha "
            "schedule, targets and loss weights. Default: one run as the options say."
        },
    )
    num_seeds: int = field(default=1, metadata={"help": "Train every row with this many seeds, from --seed on."})
    jobs: int = field(
        default=0,
        metadata={"help": "Rows trained at the same time. Default 0: for tiny models one on each CPU core, else 1."},
    )


@dataclass
class RecipeConfig(SoftSFTConfig):
    output_dir: str | None = field(default="runs/sft_soft", metadata={"help": "Checkpoints, results.json, plot."})


def main(script, training, model_args, mixture):
    import torch
    from accelerate import PartialState
    from rich.console import Console

    from softar.report import plot_accuracy, results_table, write_results

    console = Console()
    folder = Path(training.output_dir)
    with one_line_errors():
        names, task = check_input(script, training, mixture)
        model, tokenizer = open_model(model_args, task, training.seed)
    tiny = sum(p.numel() for p in model.parameters()) < 1e6
    if tiny:
        torch.set_num_threads(1)  # threads only get in each other's way

    todo = [(name, seed) for seed in range(training.seed, training.seed + script.num_seeds) for name in names]
    is_child = APART in os.environ
    places = {row: folder / f"{row[0]}-seed{row[1]}" for row in todo}
    if todo == [(CUSTOM, training.seed)] and not is_child:
        places = {todo[0]: folder}
    if not resumes(training) and not is_child and PartialState().is_main_process:
        for place in places.values():
            set_apart(place)
    finished = {row: saved_row(places[row], training) for row in todo}
    left = [row for row in todo if finished[row] is None]
    jobs = script.jobs or (os.cpu_count() if tiny and PartialState().num_processes == 1 else 1)
    if jobs > 1 and len(left) > 1 and not is_child:
        train_apart(left, places, jobs, console)
        finished |= {row: json.loads((places[row] / "row.json").read_text()) for row in left}
    results, opened = [], {training.seed: (model, tokenizer)}
    for name, seed in todo:
        where = places[name, seed]
        if finished[name, seed] is not None:
            results += finished[name, seed]
        else:
            done = where / "row.json"
            done.unlink(missing_ok=True)
            args = row_config(training, name, seed, where, task)
            model, tokenizer = opened.pop(seed, None) or open_model(model_args, task, seed)
            rows = train_row(name, args, task, model, tokenizer, model_args)
            if rows is not None:  # the main process
                results += rows
                done.write_text(json.dumps(rows))
        if not is_child and results:
            write_results(folder / "results.json", results)
    PartialState().destroy_process_group()  # not earlier: the next row's trainer joins the same one
    if is_child or not results or "accuracy" not in results[0] or int(os.environ.get("RANK", 0)):
        return
    soft = [row for row in todo if row[0] in ("oracle-soft", "guided-soft", "trace-soft")]
    if soft:
        console.print(thought_of(places[soft[-1]], task))
    plot = plot_accuracy(results, folder / "accuracy.png", title=f"{results[0]['task']}, {results[0]['model']}")
    console.print(results_table(results, title=f"{results[0]['task']}: held-out accuracy, n = {results[0]['n']}"))
    console.print(f"results: {folder / 'results.json'}   plot: {plot}")


def train_row(name, args, task, model, tokenizer, model_args):
    """Train and evaluate one row -> its lines of results.json; None off the main process."""
    from trl import get_peft_config

    from softar.evaluate import evaluate
    from softar.sft import SoftSFTTrainer
    from softar.tasks import no_thought

    if name == "no-cot":
        task = no_thought(task)
    evaluates = args.eval_strategy != "no"
    with one_line_errors():
        trainer = SoftSFTTrainer(
            model,
            args,
            train_dataset=task.train,
            eval_dataset=task.test if evaluates or task.score is None else None,
            processing_class=tokenizer,
            score=task.score,
            peft_config=get_peft_config(model_args),
        )
    trainer.accelerator.print(f"{name}: {args.max_steps if args.max_steps > 0 else args.num_train_epochs} steps")
    started = time.perf_counter()
    trainer.train(resume_from_checkpoint=checkpoint_of(args))
    train_seconds = time.perf_counter() - started
    trainer.save_model(args.output_dir)
    common = dict(
        task=task.name,
        model=model_args.model_name_or_path or task.model,
        decoder=name,
        stage=None,
        seed=args.seed,
        train_steps=trainer.state.global_step,
        train_seconds=train_seconds,
        train_loss=trainer.state.log_history[-1].get("train_loss"),
    )
    rows = []
    if task.score is None:
        metrics = trainer.evaluate() if task.test is not None else {}
        rows = [common | metrics]
    elif trainer.accelerator.is_main_process:
        plain = trainer.accelerator.unwrap_model(trainer.model)
        for readout in ("soft", "discrete"):
            found = evaluate(plain, tokenizer, task.test, task.score, args.decoding(readout), seed=args.seed)
            rows.append(common | {"readout": readout} | found)
    trainer.accelerator.wait_for_everyone()
    return rows if trainer.accelerator.is_main_process else None


def train_apart(rows, places, jobs, console):
    """Train rows in processes of their own, `jobs` at a time; each writes row.json, its output goes to train.log."""
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
                    steps = [(int(n), int(of)) for n, of in re.findall(r"(\d+)/(\d+) \[", text[-2000:]) if of != "1"]
                    if steps:
                        progress.update(bar, completed=steps[-1][0], total=steps[-1][1])
                    if code is not None:
                        del running[row]
                        if code != 0:
                            failed = f"row {row[0]!r}, seed {row[1]}, failed:\n{text[-3000:]}"
                            print(f"sft_soft.py: error: {failed}", file=sys.stderr)
                            sys.exit(code)
        finally:  # after Ctrl-C or a failure let the others save what they write
            for child, _ in running.values():
                child.send_signal(signal.SIGINT)
            for child, _ in running.values():
                child.wait()


def start_apart(row, place):
    (place / "row.json").unlink(missing_ok=True)
    place.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, *sys.argv, "--rows", row[0], "--seed", str(row[1]), "--num_seeds", "1"]
    with open(place / "train.log", "w") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | {APART: "1"})


def set_apart(place):
    """A run from the start leaves nothing of an earlier one where a later resume would take it for its own: the
    checkpoints move into a folder `_earlier` (push_to_hub skips that name), in place of what was there."""
    (place / "row.json").unlink(missing_ok=True)
    if old := list(place.glob("checkpoint-*")):
        earlier = place / "_earlier"
        shutil.rmtree(earlier, ignore_errors=True)
        earlier.mkdir()
        for checkpoint in old:
            checkpoint.rename(earlier / checkpoint.name)
        print(f"starts anew; the checkpoints of an earlier run are now in {earlier}")


def saved_row(place, training):
    """The lines of a row that an earlier run has finished, if this one goes on from it; else None."""
    done = place / "row.json"
    if not resumes(training) or not done.exists():
        return None
    rows = json.loads(done.read_text())
    return rows if training.max_steps in (-1, rows[0]["train_steps"]) else None


def thought_of(place, task):
    """How a trained model thinks about the first held-out row."""
    import softar
    from softar.config import SoftConfig
    from softar.evaluate import encode
    from softar.report import thought_table

    model, tokenizer = softar.load(place)
    inputs = encode(tokenizer, task.test["prompt"][:1]).to(model.device)
    return thought_table(
        softar.generate(model, **inputs, config=SoftConfig.load(place), tokenizer=tokenizer), tokenizer
    )


def row_config(training, name, seed, where, task):
    args = copy.deepcopy(training)
    args.output_dir, args.seed = str(where), seed
    if task.think_steps is not None and args.think_end is None and args.think_steps is None:
        args.think_steps = task.think_steps
    for key, value in ROWS.get(name, {}).items():
        setattr(args, key, value)
    if name == "no-cot":
        args.think_steps = 0
    return args


def check_input(script, training, mixture):
    """All that can be told to be wrong before a model is opened -> names of the rows, task."""
    from softar.sft import check_writable

    names = parse_rows(script.rows)
    if script.num_seeds < 1:
        raise ValueError(f"num_seeds={script.num_seeds} must be at least 1")
    task = open_task(script, mixture)
    check_writable(training.output_dir)
    for name in names:
        check_row(name, row_config(training, name, training.seed, training.output_dir, task), task)
    given = training.resume_from_checkpoint
    if resumes(training) and str(given).lower() != "true":
        if names != [CUSTOM] or script.num_seeds > 1:
            raise ValueError(f"resume_from_checkpoint={given!r}: with several rows or seeds give true, for the newest")
        if not Path(given, "trainer_state.json").is_file():
            raise ValueError(f"resume_from_checkpoint={given!r} holds no whole checkpoint")
    return names, task


def check_row(name, args, task):
    """What a row would only find out when its turn comes, hours into the run."""
    from softar.mixers import mk_mixer

    mk_mixer(args.soft_mixer, **(args.soft_mixer_args or {}))
    if args.targets != "gold" and "traces" not in task.train.column_names:
        raise ValueError(f"row {name!r} needs a column 'traces'; {task.name!r} has {task.train.column_names}")


def parse_rows(text: str | None) -> list[str]:
    if text is None:
        return [CUSTOM]
    names = [name for part in text.split(",") for name in GROUPS.get(part, [part])]
    for name in names:
        if name not in ROWS and name != CUSTOM:
            raise ValueError(f"rows={text!r}: {name!r} is unknown; choose demo, all, or out of {', '.join(ROWS)}")
    return names


def open_task(script, mixture):
    """A task by name, or a dataset in TRL's formats as a task without a scorer."""
    from datasets import load_dataset
    from trl import get_dataset

    from softar.tasks import Task, load_task

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
        raise ValueError(f"dataset_train_split={script.dataset_train_split!r} is not among {sorted(data)}")
    test = data[script.dataset_test_split] if script.dataset_test_split in data else None
    return Task(name, data[script.dataset_train_split], test, score=None, think_steps=None, model=None)


def open_model(model_args, task, seed):
    import softar

    name = model_args.model_name_or_path or task.model
    if name is None:
        raise ValueError(f"task {task.name!r} has no model of its own: give --model_name_or_path")
    options = {}
    if model_args.attn_implementation:
        options["attn_implementation"] = model_args.attn_implementation
    if model_args.model_revision not in (None, "main"):
        options["revision"] = model_args.model_revision
    return softar.load(name, dtype=model_args.dtype, seed=seed, **options)


def resumes(training) -> bool:
    return str(training.resume_from_checkpoint or "false").lower() != "false"


def checkpoint_of(args) -> str | None:
    """What to go on from: "true" is the newest whole checkpoint of the output folder, a path that checkpoint."""
    if not resumes(args):
        return None
    given = str(args.resume_from_checkpoint)
    return last_checkpoint(args.output_dir) if given.lower() == "true" else given


def last_checkpoint(folder: str) -> str | None:
    """The newest checkpoint that was written to its end (trainer_state.json comes last)."""
    whole = [p.parent for p in Path(folder).glob("checkpoint-*/trainer_state.json")]
    return str(max(whole, key=lambda p: int(p.name.split("-")[1]))) if whole else None


def make_parser():
    return TrlParser((SoftScriptArguments, RecipeConfig, ModelConfig, DatasetMixtureConfig))


def with_default_config(argv: list[str]) -> list[str]:
    """No task, data, model or configuration named: the demo's."""
    named = ("--config", "--task", "--dataset_name", "--model_name_or_path")
    if "--config" in argv[:-1] and not Path(file := argv[argv.index("--config") + 1]).is_file():
        raise ValueError(f"config={file!r}: there is no such file")
    if any(arg.split("=")[0] in named for arg in argv):
        return argv
    return ["--config", str(HERE / "configs" / "mnns.yaml"), *argv]


@contextlib.contextmanager
def one_line_errors():
    """For what checks the input. Elsewhere a ValueError is a bug, and needs its traceback."""
    try:
        yield
    except ValueError as error:
        print(f"sft_soft.py: error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    try:
        with one_line_errors():
            given = make_parser().parse_args_and_config(with_default_config(sys.argv[1:]))
        main(*given)
    except KeyboardInterrupt:
        print("\ninterrupted; the last checkpoint is whole: go on with --resume_from_checkpoint true", file=sys.stderr)
        sys.exit(130)
