"""What the recipes grpo_soft.py and ppo_soft.py share: the policy to start from, its reward, RL,
before and after.

A row of the table is a policy: `soft` reads the mean of its draws in the thought, `hard` is the
same with one draw. Both make as many forwards an answer, see as many completions and take as many
steps.
"""

import copy
import dataclasses
import json
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
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
    resumes,
    train_rows,
    with_default_config,
)
from softar.training import opt

from .config import check_resume as check_same_policy
from .rewards import REWARDS, as_chats, check_columns, rewards_of, score_of

# Fields that make a row of the table what it is; soft_k stays as given for `soft`.
ROWS = {"soft": dict(soft_mixer="k-samples"), "hard": dict(soft_mixer="hard")}
GROUPS = {"demo": ["soft", "hard"], "all": ["soft", "hard"]}
# How the policy to start from is trained on sampled traces where the task brings its own, untrained
# model.
SFT = dict(
    targets="traces",
    alpha_schedule="constant",
    soft_mode="sequential",
    learning_rate=3e-3,
    weight_decay=0.01,
    lr_scheduler_type="cosine",
    warmup_steps=0.05,
    save_strategy="no",
    report_to="none",
)
SFT_BATCH = 128  # over all processes


@dataclass
class RLScriptArguments(ScriptArguments):
    task: str | None = opt(
        None, "A task by name: mnns, or reasoning_gym:NAME. Instead of a dataset."
    )
    task_size: int | None = opt(None, "Training rows of the task. Default: all.")
    reward_funcs: list[str] | None = opt(
        None,
        f"Rewards of a dataset: {', '.join(REWARDS)}, or the dotted path of a function of yours. The table shows the "
        "first. Default: the task's own score.",
    )
    system_prompt: str | None = opt(
        None, "Put before the prompts, which become chats; for instruct models."
    )
    rows: str | None = opt(
        None,
        "What to train: demo (= all), or names with commas out of soft (soft_k draws a think step) and hard (one draw: "
        "ordinary sampling). Default: one run as the options say.",
    )
    num_seeds: int = opt(1, "Train every row with this many seeds, from --seed on.")
    jobs: int = opt(
        0, "Rows trained at the same time. Default 0: for tiny models one on each CPU core, else 1."
    )
    sft_steps: int = opt(
        1200, "Steps of SFT on sampled traces before RL, where the task brings its own model."
    )
    eval_rows: int | None = opt(None, "Held-out rows of the table. Default: all.")
    eval_draws: int = opt(1, "Thoughts drawn for each held-out row; the accuracy is their mean.")


def run(program: str, config: type, make_trainer: Callable, default_config: Path) -> None:
    """The command line of a recipe: `config` is its dataclass of training options, for the trainer
    it makes."""
    with interruptible():
        with one_line_errors(program):
            argv = with_default_config(sys.argv[1:], default_config)
            parser = TrlParser((RLScriptArguments, config, ModelConfig, DatasetMixtureConfig))
            script, training, model_args, mixture = parser.parse_args_and_config(argv)
            names, task = check_input(script, training, model_args, mixture)
        main(program, make_trainer, names, task, script, training, model_args)


def main(program, make_trainer, names, task, script, training, model_args):
    from rich.console import Console

    from softar.show.figures import gain_table, plot_rewards

    console, folder = Console(), Path(training.output_dir)
    is_tiny = (model_args.model_name_or_path or task.model) == task.model
    if is_tiny:
        import torch

        torch.set_num_threads(1)  # threads only get in each other's way
    results, _ = train_rows(
        names,
        training,
        num_seeds=script.num_seeds,
        jobs=jobs_of(script.jobs, is_tiny),
        configure=lambda name, seed, place: row_config(training, name, seed, place, task),
        train=lambda name, args: train_row(program, make_trainer, args, task, script, model_args),
        console=console,
        program=program,
    )
    if not results:
        return
    plot = plot_rewards(
        results, folder / "rewards.png", title=f"{task.name}, {results[0]['algorithm']}"
    )
    if "accuracy" in results[0]:
        done = f"{results[0]['algorithm']}, {results[0]['train_steps']} steps"
        console.print(
            gain_table(results, title=f"{task.name}, {done}: accuracy, n = {results[0]['n']}")
        )
        console.print(
            "thoughts drawn as in training, with the same fixed seeds before and after; answers greedy"
        )
    console.print(f"results: {folder / 'results.json'}   plot: {plot}")


def train_row(program, make_trainer, args, task, script, model_args):
    """Train and evaluate one row -> its lines of results.json; None off the main process."""
    from trl import get_peft_config

    is_own, started = is_own_model(task, script, model_args), time.perf_counter()
    start = sft_policy(args, task, script) if is_own else None
    sft_seconds = time.perf_counter() - started
    with one_line_errors(program):
        if checkpoint := checkpoint_of(args):
            check_same_policy(checkpoint, args)
        model, tokenizer = open_model(start, model_args, task, args.seed)
        rewards = rewards_of(script.reward_funcs, task)
        trainer = make_trainer(
            model,
            rewards,
            args,
            train_dataset=task.train,
            eval_dataset=task.test if args.eval_strategy != "no" else None,
            processing_class=tokenizer,
            peft_config=get_peft_config(model_args),
        )
    score = score_of(rewards[0], task)

    def measure() -> dict:
        """On the main process; nothing where there are no held-out rows."""
        if task.test is None or not trainer.accelerator.is_main_process:
            return {}
        plain = trainer.accelerator.unwrap_model(trainer.model)
        return evaluate(plain, tokenizer, task.test, score, args, script.eval_draws)

    name, before = decoder_of(args), measure()
    trainer.accelerator.print(f"{name}: {before.get('accuracy', float('nan')):.3f} before")
    trainer.accelerator.wait_for_everyone()
    started = time.perf_counter()
    trainer.train(resume_from_checkpoint=checkpoint)
    seconds = time.perf_counter() - started
    trainer.save_model(args.output_dir)
    trainer.close()
    after = measure()
    trainer.accelerator.wait_for_everyone()
    common = dict(
        task=task.name,
        model=model_args.model_name_or_path or task.model,
        algorithm=type(trainer).__name__.removeprefix("Soft").removesuffix("Trainer"),
        decoder=name,
        draws=1 if name == "discrete" else args.soft_k,
        seed=args.seed,
        sft_steps=script.sft_steps if is_own else 0,
        sft_seconds=sft_seconds if is_own else 0.0,
        train_steps=trainer.state.global_step,
        train_seconds=seconds,
    )
    curve = [
        [entry["step"], entry["reward"]] for entry in trainer.state.log_history if "reward" in entry
    ]
    lines = [
        common | {"stage": "before"} | before,
        common | {"stage": "after"} | after | {"rewards": curve},
    ]
    return lines if trainer.accelerator.is_main_process else None


def decoder_of(args) -> str:
    """The registry's name of the policy: with one draw a think step it is an ordinary, sampled
    chain of thought."""
    return "discrete" if args.soft_mixer == "hard" or args.soft_k == 1 else args.soft_mixer


def evaluate(model, tokenizer, rows, score, args, draws: int) -> dict:
    """Accuracy and cost of the policy as it acts, but with greedy answers: what the reward would
    see is scored.

    The thoughts are drawn from generators seeded 0, 1, ..., draws - 1, whatever the training's seed
    is.
    """
    import torch

    from softar.decode import generate
    from softar.evaluate import encode, tally
    from softar.thought import Kind

    from .discretise import discretise

    config = dataclasses.replace(args.decoding(), answer_temperature=0.0)

    def answering(rng):
        def answer(batch):
            inputs = encode(tokenizer, [row["prompt"] for row in batch]).to(model.device)
            out = generate(model, **inputs, config=config, rng=rng, tokenizer=tokenizer)
            ids = discretise(out.record, out.answer_start, args.reward_sees)
            texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
            return texts, out, int((out.record.kind != Kind.PAD).sum())

        return answer

    each = [answering(torch.Generator().manual_seed(i)) for i in range(draws)]
    found = [tally(model, rows, score, answer, args.per_device_eval_batch_size) for answer in each]
    mean = {key: sum(f[key] for f in found) / draws for key in found[0]}
    return mean | {"n": len(rows), "eval_draws": draws}


# -- the policy to start from


def is_own_model(task, script, model_args) -> bool:
    return script.sft_steps > 0 and task.model is not None and model_args.model_name_or_path is None


def open_model(start: Path | None, model_args, task, seed: int):
    """The policy to start from, or the model named."""
    import softar

    name, options = named_model(model_args, task, task.model)
    return softar.load(start or name, dtype=model_args.dtype, seed=seed, **options)


def sft_policy(args, task, script) -> Path:
    """The task's own model after a brief SFT as the policy it is going to be; a resumed run finds
    it again."""
    start = Path(args.output_dir, "start")
    made_with = dict(
        sft_steps=script.sft_steps,
        seed=args.seed,
        task_size=script.task_size,
        decoder=decoder_of(args),
    )
    note = start / "made_with.json"
    if not (resumes(args) and note.is_file() and json.loads(note.read_text()) == made_with):
        make_start(start, made_with, args, task)
    return start


def make_start(start: Path, made_with: dict, args, task) -> None:
    """Supervised training on sampled traces: teacher-forced for a discrete policy, self-fed for a
    soft one.

    Self-fed with whole mixtures, of which the draws are a sample: fed with three draws of its own
    the tiny model learnt the training prompts by heart (seed 42, 1000 steps of 256: held-out .37,
    training .84).
    """
    from accelerate import PartialState

    import softar
    from softar.sft.trainer import SoftSFTConfig, SoftSFTTrainer

    draft = start.with_suffix(".partial")
    settings = SoftSFTConfig(
        output_dir=str(draft),
        max_steps=made_with["sft_steps"],
        seed=args.seed,
        think_steps=args.think_steps,
        disable_tqdm=args.disable_tqdm,
        per_device_train_batch_size=max(1, SFT_BATCH // PartialState().num_processes),
        alpha_start=float(decoder_of(args) == "discrete"),
        **SFT,
    )
    model, tokenizer = softar.load(task.model, seed=args.seed)
    trainer = SoftSFTTrainer(model, settings, train_dataset=task.train, processing_class=tokenizer)
    trainer.accelerator.print(f"start: {made_with['sft_steps']} steps of SFT")
    trainer.train()
    trainer.save_model()
    if trainer.accelerator.is_main_process:
        (draft / "made_with.json").write_text(json.dumps(made_with))
        shutil.rmtree(start, ignore_errors=True)
        draft.rename(start)  # whole or not at all
    trainer.accelerator.wait_for_everyone()


# -- input


def row_config(training, name, seed, place, task):
    args = copy.deepcopy(training)
    args.output_dir, args.seed = str(place), seed
    if task.think_steps is not None and args.think_end is None and args.think_steps is None:
        args.think_steps = task.think_steps
    for key, value in ROWS.get(name, {}).items():
        setattr(args, key, value)
    return args


def check_input(script, training, model_args, mixture):
    """All that can be told to be wrong before a model is opened -> names of the rows, task."""
    from softar.training import check_writable

    names = parse_rows(script.rows, ROWS, GROUPS)
    for name, least in (("num_seeds", 1), ("sft_steps", 0), ("eval_draws", 1)):
        value = getattr(script, name)
        if value is not None and value < least:
            raise ValueError(f"{name}={value} must be at least {least}")
    if "soft" in names and training.soft_k < 2:
        raise ValueError(
            f"soft_k={training.soft_k}: the row 'soft' needs at least 2 draws; 1 is the row 'hard'"
        )
    if model_args.load_in_4bit or model_args.load_in_8bit:
        raise ValueError(
            "load_in_4bit and load_in_8bit are not there for soft policies: use LoRA on bfloat16 weights"
        )
    task = as_chats(open_task(script, mixture), script.system_prompt)
    check_columns(script.reward_funcs, task)
    named_model(model_args, task, task.model)
    for name in names:
        row_config(training, name, training.seed, training.output_dir, task).decoding()
    check_writable(training.output_dir)
    check_resume(training, is_single=names == [CUSTOM] and script.num_seeds == 1)
    return names, task
