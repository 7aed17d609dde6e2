# /// script
# dependencies = ["softar"]
# ///
"""
Masked-diffusion SFT, hard or with soft masks: LLaDA, Dream, BERT-like models, and the embedded tiny ones.

# The demo: a tiny model on Latin squares, training x decoding at several numbers of forwards
accelerate launch recipes/sft_diffusion.py
accelerate launch recipes/sft_diffusion.py --task mnns
accelerate launch recipes/sft_diffusion.py --rows all --num_seeds 5 --schedules uniform,pyramid,threshold

# Dream-7B or LLaDA-8B with DoRA and a soft-mask head, as published
accelerate launch recipes/sft_diffusion.py --config recipes/configs/dream7b_softmask_dora.yaml

# Any causal Llama or Qwen2, made a diffusion LM first, as Dream was
accelerate launch recipes/sft_diffusion.py --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct --from_causal true \
    --dataset_name your/chats --output_dir runs/qwen-diffusion

# Go on where an interrupted run stopped; without this a run starts anew and moves old checkpoints into _earlier
accelerate launch recipes/sft_diffusion.py --resume_from_checkpoint true
"""

import copy
import dataclasses
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, TrlParser

from softar.diffusion.models import MODELS
from softar.diffusion.sft import DiffusionSFTConfig
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

PROGRAM = "sft_diffusion.py"
HERE = Path(__file__).parent
TWICE = 0.8  # share of the steps that read a row twice (arXiv:2510.17206 finds 80 % best)
# Fields that make a row of the table what it is; everything else (data, steps, size) is common to
# all.
ROWS = {
    "hard": dict(objective="masked", softmasking_prob=0.0),
    # As many forwards as soft-mask: 1 + TWICE times the steps
    "hard-long": dict(objective="masked", softmasking_prob=0.0),
    "soft-mask": dict(objective="masked", softmasking_prob=TWICE),
    # Every token of the answer is predicted, none is a mask: the mean is over all of them.
    "duo": dict(objective="uniform", softmasking_prob=0.0, normalise="tokens"),
}
GROUPS = {"demo": ["hard", "soft-mask"], "all": list(ROWS)}
CONFIGS = {
    "latin": HERE / "configs" / "latin.yaml",
    "mnns": HERE / "configs" / "mnns_diffusion.yaml",
}
SCHEDULES = {  # name -> how a budget of it is said to DenoiseConfig
    "uniform": lambda budget: dict(steps=budget),
    "pyramid": lambda budget: dict(schedule="pyramid", dilation=budget),
    "threshold": lambda budget: dict(threshold=budget),
}
BUDGETS = {"uniform": (4, 8, 12), "pyramid": (1, 2, 4), "threshold": (0.5, 0.7, 0.9, 0.98)}


@dataclass
class DiffusionScriptArguments(ScriptArguments):
    task: str | None = field(
        default=None,
        metadata={
            "help": "A task by name: latin, mnns, or reasoning_gym:NAME. Instead of a dataset."
        },
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
            "help": f"What to train: demo, all, or names with commas out of {', '.join(ROWS)}; each sets its own "
            "objective and softmasking_prob. Default: one run as the options say."
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
    from_causal: bool = field(
        default=False,
        metadata={
            "help": "The model is a causal LM (Llama, Qwen2): make a diffusion LM of it first."
        },
    )
    schedules: str = field(
        default="uniform",
        metadata={"help": f"Schedules to decode with, with commas out of {', '.join(SCHEDULES)}."},
    )
    likelihood_samples: int = field(
        default=0,
        metadata={
            "help": "Also bound the negative log-likelihood of the held-out completions, by so many draws of masks for "
            "each: the column nll_bound, nats per token. Default 0: not computed."
        },
    )


@dataclass
class RecipeConfig(DiffusionSFTConfig):
    output_dir: str | None = field(
        default="runs/sft_diffusion", metadata={"help": "Checkpoints, results.json, plot."}
    )


def main(script, training, model_args, mixture):
    from rich.console import Console

    from softar.show.figures import nfe_table, plot_nfe

    console = Console()
    with one_line_errors(PROGRAM):
        names, schedules, task = check_input(script, training, mixture)
        is_tiny = model_args.model_name_or_path is None or model_args.model_name_or_path in MODELS
        if is_tiny:
            import torch

            torch.set_num_threads(1)  # threads only get in each other's way

    results, _ = train_rows(
        names,
        training,
        num_seeds=script.num_seeds,
        jobs=jobs_of(script.jobs, is_tiny),
        configure=lambda name, seed, place: row_config(training, name, seed, place),
        train=lambda name, args: train_row(name, args, task, schedules, model_args, script),
        console=console,
        program=PROGRAM,
    )
    if not results or "accuracy" not in results[0]:
        return
    folder = Path(training.output_dir)
    title = f"{task.name}: held-out accuracy by forwards, n = {results[0]['n']}"
    console.print(nfe_table(results, title=title))
    plot = plot_nfe(results, folder / "accuracy.png", title=f"{task.name}, {results[0]['model']}")
    console.print(f"results: {folder / 'results.json'}   plot: {plot}")


def train_row(name, args, task, schedules, model_args, script):
    """Train and evaluate one row -> its lines of results.json; None off the main process."""
    from trl import get_peft_config

    from softar.diffusion.sft import DiffusionSFTTrainer

    with one_line_errors(PROGRAM):
        model, tokenizer = open_model(model_args, task, args.seed, script.from_causal)
        trainer = DiffusionSFTTrainer(
            model,
            args,
            train_dataset=task.train,
            eval_dataset=task.test if args.eval_strategy != "no" or task.score is None else None,
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
        model=model_args.model_name_or_path or task.models.get("diffusion"),
        training=name,
        stage=None,
        seed=args.seed,
        train_steps=trainer.state.global_step,
        train_seconds=train_seconds,
        train_loss=trainer.state.log_history[-1].get("train_loss"),
    )
    if (
        script.likelihood_samples
        and trainer.process is None
        and trainer.accelerator.is_main_process
    ):
        from softar.diffusion.evaluate import nll_bound

        plain = trainer.accelerator.unwrap_model(trainer.model)
        bound = nll_bound(
            plain,
            trainer.processing_class,
            task.test,
            samples=script.likelihood_samples,
            seed=args.seed,
        )
        common["nll_bound"] = bound
    rows = []
    if task.score is None:
        rows = [common | (trainer.evaluate() if task.test is not None else {})]
    elif trainer.accelerator.is_main_process:
        rows = [common | line for line in decode_all(trainer, task, schedules, args.seed)]
    trainer.accelerator.wait_for_everyone()
    return rows if trainer.accelerator.is_main_process else None


def decode_all(trainer, task, schedules, seed):
    """The held-out rows under every decoding: hard, and softly as the model was trained, or else
    without training. A uniform-state model shows no masks, and steps more than its slots are of use
    to it."""
    from softar.diffusion.config import DenoiseConfig
    from softar.diffusion.evaluate import evaluate

    plain, tokenizer = trainer.accelerator.unwrap_model(trainer.model), trainer.processing_class
    learnt = {} if trainer.head is None else trainer.head.settings()
    decoders = {"hard": {}, "soft-token" if trainer.head is None else "soft-mask": learnt}
    slots = slots_of(task, tokenizer)
    if trainer.process is not None:
        decoders, schedules = {"hard": {}}, ["uniform"]
    for schedule in schedules:
        budgets = BUDGETS[schedule]
        if trainer.process is not None:
            budgets = sorted({*budgets, slots})
        elif schedule == "uniform":
            budgets = [b for b in budgets if b < slots] + [slots]
        for decoder, settings in decoders.items():
            for budget in budgets:
                config = DenoiseConfig(
                    soften=decoder, soften_args=settings, **SCHEDULES[schedule](budget)
                )
                found = evaluate(plain, tokenizer, task.test, task.score, config, seed=seed)
                yield dict(decoder=decoder, schedule=schedule, budget=budget) | found


def slots_of(task, tokenizer) -> int:
    """Masks of the first held-out row."""
    row = task.test[0]
    if "template" in row:
        return row["template"].split().count(tokenizer.mask_token)
    return len(tokenizer(row["completion"], add_special_tokens=False)["input_ids"]) + 1


def row_config(training, name, seed, place):
    args = copy.deepcopy(training)
    args.output_dir, args.seed = str(place), seed
    for key, value in ROWS.get(name, {}).items():
        setattr(args, key, value)
    if name == "hard-long":
        if args.max_steps > 0:
            args.max_steps = round((1 + TWICE) * args.max_steps)
        else:
            args.num_train_epochs *= 1 + TWICE
    return args


def check_input(script, training, mixture):
    """All that can be told to be wrong before a model is opened -> names of the rows, schedules,
    task."""
    from softar.diffusion.evaluate import has_texts
    from softar.training import check_writable

    names = parse_rows(script.rows, ROWS, GROUPS)
    if script.num_seeds < 1:
        raise ValueError(f"num_seeds={script.num_seeds} must be at least 1")
    if script.likelihood_samples < 0:
        raise ValueError(
            f"likelihood_samples={script.likelihood_samples} must be at least 0, which computes none"
        )
    schedules = script.schedules.split(",")
    if unknown := [s for s in schedules if s not in SCHEDULES]:
        raise ValueError(
            f"schedules={script.schedules!r}: {unknown[0]!r} is unknown; choose out of {list(SCHEDULES)}"
        )
    task = open_task(script, mixture)
    task = dataclasses.replace(task, train=last_answers(task.train), test=last_answers(task.test))
    if script.likelihood_samples and not (task.test is not None and has_texts(task.test)):
        raise ValueError(
            f"likelihood_samples needs held-out rows with prompt and completion as text; {task.name} has none"
        )
    check_writable(training.output_dir)
    for name in names:
        args = row_config(training, name, training.seed, training.output_dir)
        args.__post_init__()
        if args.objective == "uniform" and "uniform" not in schedules:
            raise ValueError(
                f"schedules={script.schedules!r}: a model of objective='uniform' decodes with 'uniform' only"
            )
    check_resume(training, is_single=names == [CUSTOM] and script.num_seeds == 1)
    return names, schedules, task


def last_answers(rows):
    """A conversation's last message is what is learnt, as published; otherwise the user's turns
    would be, too."""
    if rows is None or "messages" not in rows.column_names:
        return rows
    return rows.map(
        lambda row: {"prompt": row["messages"][:-1], "completion": row["messages"][-1:]},
        remove_columns="messages",
    )


def open_model(model_args, task, seed, from_causal):
    import softar
    from softar.diffusion import load
    from softar.diffusion.convert import convert

    name, options = named_model(model_args, task, task.models.get("diffusion"))
    if name in MODELS:
        options["seed"] = seed
    if from_causal:
        return convert(*softar.load(name, dtype=model_args.dtype, seed=seed, **options))
    return load(name, dtype=model_args.dtype, **options)


def with_demo_config(argv: list[str]) -> list[str]:
    """The demo's configuration where nothing is named, or an embedded task and nothing else."""
    task = argv[argv.index("--task") + 1] if "--task" in argv[:-1] else None
    others = ("--config", "--dataset_name", "--model_name_or_path")
    if task in CONFIGS and not any(arg.split("=")[0] in others for arg in argv):
        return ["--config", str(CONFIGS[task]), *argv]
    return with_default_config(argv, CONFIGS["latin"])


if __name__ == "__main__":
    with interruptible():
        with one_line_errors(PROGRAM):
            parser = TrlParser(
                (DiffusionScriptArguments, RecipeConfig, ModelConfig, DatasetMixtureConfig)
            )
            given = parser.parse_args_and_config(with_demo_config(sys.argv[1:]))
        main(*given)
