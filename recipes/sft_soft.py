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

import copy
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, TrlParser

from softar.recipe import (
    CUSTOM,
    check_resume,
    checkpoint_of,
    interruptible,
    jobs_of,
    named_model,
    one_line_errors,
    open_task,
    parse_rows,
    train_rows,
    with_default_config,
)
from softar.sft.trainer import SoftSFTConfig

HERE, PROGRAM = Path(__file__).parent, Path(__file__).name
# Fields that make a row of the table what it is; everything else (data, steps, size) is common to
# all.
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


@dataclass
class SoftScriptArguments(ScriptArguments):
    task: str | None = field(
        default=None,
        metadata={"help": "A task by name: mnns, or reasoning_gym:NAME. Instead of a dataset."},
    )
    task_size: int | None = field(
        default=None, metadata={"help": "Training rows of the task. Default: all."}
    )
    eval_rows: int | None = field(
        default=None, metadata={"help": "Held-out rows of the table. Default: all."}
    )
    rows: str | None = field(
        default=None,
        metadata={
            "help": f"What to train: demo, all, or names with commas out of {', '.join(ROWS)}; each sets its own alpha "
            "schedule, targets and loss weights. Default: one run as the options say."
        },
    )
    num_seeds: int = field(
        default=1, metadata={"help": "Train every row with this many seeds, from --seed on."}
    )
    jobs: int = field(
        default=0,
        metadata={
            "help": "Rows trained at the same time. Default 0: for tiny models one on each CPU core, else 1."
        },
    )


@dataclass
class RecipeConfig(SoftSFTConfig):
    output_dir: str | None = field(
        default="runs/sft_soft", metadata={"help": "Checkpoints, results.json, plot."}
    )


def main(script, training, model_args, mixture):
    import torch
    from rich.console import Console

    from softar.show.figures import plot_accuracy, results_table

    console, folder = Console(), Path(training.output_dir)
    with one_line_errors(PROGRAM):
        names, task = check_input(script, training, mixture)
        opened = {training.seed: open_model(model_args, task, training.seed)}
    is_tiny = sum(p.numel() for p in opened[training.seed][0].parameters()) < 1e6
    if is_tiny:
        torch.set_num_threads(1)  # threads only get in each other's way

    def configure(name, seed, place):
        return row_config(training, name, seed, place, task)

    def train(name, args):
        model, tokenizer = opened.pop(args.seed, None) or open_model(model_args, task, args.seed)
        return train_row(name, args, task, model, tokenizer, model_args)

    results, places = train_rows(
        names,
        training,
        num_seeds=script.num_seeds,
        jobs=jobs_of(script.jobs, is_tiny),
        configure=configure,
        train=train,
        console=console,
        program=PROGRAM,
    )
    if not results or "accuracy" not in results[0]:
        return
    soft = [row for row in places if row[0] in ("oracle-soft", "guided-soft", "trace-soft")]
    if soft:
        console.print(thought_of(places[soft[-1]], task))
    plot = plot_accuracy(
        results, folder / "accuracy.png", title=f"{results[0]['task']}, {results[0]['model']}"
    )
    console.print(
        results_table(
            results, title=f"{results[0]['task']}: held-out accuracy, n = {results[0]['n']}"
        )
    )
    console.print(f"results: {folder / 'results.json'}   plot: {plot}")


def train_row(name, args, task, model, tokenizer, model_args):
    """Train and evaluate one row -> its lines of results.json; None off the main process."""
    from trl import get_peft_config

    from softar.evaluate import evaluate
    from softar.sft.trainer import SoftSFTTrainer
    from softar.tasks import no_thought

    if name == "no-cot":
        task = no_thought(task)
    evaluates = args.eval_strategy != "no"
    with one_line_errors(PROGRAM):
        trainer = SoftSFTTrainer(
            model,
            args,
            train_dataset=task.train,
            eval_dataset=task.test if evaluates or task.score is None else None,
            processing_class=tokenizer,
            score=task.score,
            peft_config=get_peft_config(model_args),
        )
    trainer.accelerator.print(
        f"{name}: {args.max_steps if args.max_steps > 0 else args.num_train_epochs} steps"
    )
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
            found = evaluate(
                plain, tokenizer, task.test, task.score, args.decoding(readout), seed=args.seed
            )
            rows.append(common | {"readout": readout} | found)
    trainer.accelerator.wait_for_everyone()
    return rows if trainer.accelerator.is_main_process else None


def thought_of(place, task):
    """How a trained model thinks about the first held-out row."""
    import softar
    from softar.config import SoftConfig
    from softar.evaluate import encode
    from softar.show.figures import thought_table

    model, tokenizer = softar.load(place)
    inputs = encode(tokenizer, task.test["prompt"][:1]).to(model.device)
    return thought_table(
        softar.generate(model, **inputs, config=SoftConfig.load(place), tokenizer=tokenizer),
        tokenizer,
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
    from softar.training import check_writable

    names = parse_rows(script.rows, ROWS, GROUPS)
    if script.num_seeds < 1:
        raise ValueError(f"num_seeds={script.num_seeds} must be at least 1")
    task = open_task(script, mixture)
    check_writable(training.output_dir)
    for name in names:
        check_row(name, row_config(training, name, training.seed, training.output_dir, task), task)
    check_resume(training, is_single=names == [CUSTOM] and script.num_seeds == 1)
    return names, task


def check_row(name, args, task):
    """What a row would only find out when its turn comes, hours into the run."""
    from softar.mixers import mk_mixer

    mk_mixer(args.soft_mixer, **(args.soft_mixer_args or {}))
    if args.targets != "gold" and "traces" not in task.train.column_names:
        raise ValueError(
            f"row {name!r} needs a column 'traces'; {task.name!r} has {task.train.column_names}"
        )


def open_model(model_args, task, seed):
    import softar

    name, options = named_model(model_args, task, task.model)
    return softar.load(name, dtype=model_args.dtype, seed=seed, **options)


def make_parser():
    return TrlParser((SoftScriptArguments, RecipeConfig, ModelConfig, DatasetMixtureConfig))


if __name__ == "__main__":
    with interruptible():
        with one_line_errors(PROGRAM):
            argv = with_default_config(sys.argv[1:], HERE / "configs" / "mnns.yaml")
            given = make_parser().parse_args_and_config(argv)
        main(*given)
