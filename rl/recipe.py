"""What the RL recipes (recipes/grpo_soft.py, ppo_soft.py, rloo_soft.py) share: the policy to start
from, its reward, RL, before and after.

A row of the table is a policy: `soft` reads the mean of its draws in the thought, `hard` is the
same with one draw, the others are named after their mixer. All make as many forwards an answer, see
as many completions and take as many steps.
"""

import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from trl import ScriptArguments

from softar.checks import check_least
from softar.model_card import example_of
from softar.recipe import Recipe, RecipeArguments, fit, one_line_errors, thought_fields
from softar.recipe_data import evaluates
from softar.recipe_model import adapter_of
from softar.results import counts
from softar.resume import checkpoint_of, resumes
from softar.rows import APART
from softar.split import on_main
from softar.training import opt, tell_progress

from .guards import check_candidates, check_same_policy, policy_of
from .neutral import OF_POLICY
from .policies import DRAWS, KNOBS, LEFT_OUT, draws_of
from .rewards import REWARDS, as_chats, check_columns, rewards_of, score_of


def row_of(mixer: str, **fields) -> dict:
    """Fields that make a row of the table what it is, without the options of other mixers."""
    others = {option: None for option in LEFT_OUT if option not in KNOBS[mixer]}
    one = {} if mixer in DRAWS else {"soft_ratio": "per_draw"}
    return {"soft_mixer": mixer} | others | one | fields


ROWS = {"soft": row_of("k-samples"), "hard": row_of("hard", embedding_grad=True)}
ROWS |= {name: row_of(name) for name in KNOBS if name not in ("k-samples", "hard")}
GROUPS = {"demo": ["soft", "hard"], "all": [*ROWS]}
# How the policy to start from is trained on sampled traces where the task brings its own, untrained
# model.
SFT = dict(
    targets="traces",
    alpha_schedule="constant",
    soft_top_k=0,  # the whole vocabulary
    learning_rate=3e-3,
    weight_decay=0.01,
    lr_scheduler_type="cosine",
    warmup_steps=0.05,
    save_strategy="no",
    report_to="none",
)
SFT_BATCH = 128  # over all processes


@dataclass
class RewardArguments(RecipeArguments):
    """What recipes of RL ask of a dataset, whatever the model."""

    reward_funcs: list[str] | None = opt(
        None,
        f"Rewards of a dataset: {', '.join(REWARDS)}, or module:name, a function of yours. The table shows the first. "
        "Default: the task's own score.",
    )
    system_prompt: str | None = opt(
        None, "Text put before the prompts, which then become chats; for instruct models."
    )


@dataclass
class RLScriptArguments(RewardArguments, ScriptArguments):
    rows: str | None = opt(
        None,
        "What to train: demo (soft and hard), all, or names with commas out of soft (soft_k draws a think step), hard "
        "(one draw: ordinary sampling), gumbel, mixture-of-inputs and hybrid. Default: one run as the options say.",
    )
    sft_steps: int = opt(
        1200, "Steps of SFT on sampled traces before RL, where the task brings its own model."
    )
    eval_draws: int = opt(
        1, "Number of thoughts drawn for each held-out row; the accuracy is their mean."
    )


def rl_recipe(
    file: str, about: str, config: type, trainer: Callable[[], type], demo: str
) -> Recipe:
    """The recipe that lies in `file`.

    about: its help. config: its dataclass of training options. trainer: gives the class of its
        trainer, which is slow to import: not before the input has been checked. demo: the name of
        the demo's YAML.
    """
    return Recipe(
        file=Path(file),
        about=about,
        arguments=RLScriptArguments,
        config=config,
        base=base_of(config),
        demo=Path(file).parent / "configs" / demo,
        rows=ROWS,
        groups=GROUPS,
        model_kind="untrained",
        prepare=lambda script, task: as_chats(task, script.system_prompt),
        fields=lambda name, training, task: thought_fields(training, task),
        check=check,
        formats=(("prompt",),),
        train_row=partial(train_row, trainer),
        report=report,
    )


def base_of(config: type) -> type:
    """The same configuration before a row has said which policy it is, on which it depends what the
    options of policies do."""
    rules = tuple(rule for rule in config._idle if rule not in OF_POLICY)
    return type(config.__name__, (config,), {"_idle": rules, "__module__": config.__module__})


def starts_anew(inputs) -> bool:
    """Is the policy to start from made first, of the task's own model?"""
    return inputs.script.sft_steps > 0 and inputs.model_args.model_name_or_path is None


def check(inputs, configs) -> None:
    import softar

    script = inputs.script
    check_least(script, sft_steps=0, eval_draws=1)
    if "soft" in configs and configs["soft"].soft_k < 2:
        raise ValueError(
            f"soft_k={configs['soft'].soft_k}: the row 'soft' needs at least 2 draws; 1 is the row 'hard'"
        )
    check_columns(script.reward_funcs, inputs.task)
    named = inputs.model_args.model_name_or_path
    if named is not None and script.sft_steps not in (0, RLScriptArguments.sft_steps):
        raise ValueError(
            f"sft_steps={script.sft_steps} does nothing to a model that is named, {named!r}: leave it out, or train "
            "that by softar sft before"
        )
    if inputs.task.test is None and script.eval_draws != RLScriptArguments.eval_draws:
        raise ValueError(
            f"eval_draws={script.eval_draws} does nothing without held-out rows: leave it out, or give some"
        )
    if starts_anew(inputs):
        model, _ = softar.load(inputs.model)  # untrained, and tiny
        for args in configs.values():
            check_candidates(model, args)


def train_row(trainer_class: Callable[[], type], inputs, name, args) -> list[dict] | None:
    """Make the policy to start from where the task brings its own model, then measure, train and
    measure again."""
    import softar

    script, task = inputs.script, inputs.task
    is_new, started = starts_anew(inputs), time.perf_counter()
    model = sft_policy(args, task, script) if is_new else inputs.model
    sft_seconds = time.perf_counter() - started if is_new else 0.0
    with one_line_errors(inputs.program.name):
        model, tokenizer = softar.load(model, seed=args.seed, **inputs.model_options)
        if checkpoint := checkpoint_of(args):
            check_same_policy(checkpoint, policy_of(model, args))
        rewards = rewards_of(script.reward_funcs, task)
        trainer = trainer_class()(
            model,
            rewards,
            args,
            train_dataset=task.train,
            eval_dataset=task.test if evaluates(args) else None,
            processing_class=tokenizer,
            peft_config=adapter_of(model, inputs.model_args),
        )
    trainer.origin = example_of(task, tokenizer)
    accelerator, score = trainer.accelerator, score_of(task, trainer)

    def measure(stage: str) -> dict:
        """On the main process; nothing where there are no held-out rows."""
        if task.test is None:
            return {}
        how = (tokenizer, task.test, score, args, trainer.policy, script.eval_draws)
        if found := on_main(trainer, lambda model: evaluate(model, *how)):
            print(f"{name}, seed {args.seed}: accuracy {found['accuracy']:.3f} {stage}", flush=True)
        return found or {}

    decoder, before = decoder_of(args), measure("before")
    accelerator.wait_for_everyone()
    seconds = fit(trainer, args, name)
    trainer.close()
    after = measure("after")
    accelerator.wait_for_everyone()
    common = dict(
        task=task.name,
        model=inputs.model,
        algorithm=type(trainer).__name__.removeprefix("Soft").removesuffix("Trainer"),
        decoder=decoder,
        draws=draws_of(args),
        seed=args.seed,
        sft_steps=script.sft_steps if is_new else 0,
        sft_seconds=sft_seconds,
        train_steps=trainer.state.global_step,
        train_seconds=seconds,
    )
    curve = [[e["step"], e["reward"]] for e in trainer.state.log_history if "reward" in e]
    lines = [
        common | {"stage": "before"} | before,
        common | {"stage": "after"} | after | {"rewards": curve},
    ]
    return lines if accelerator.is_main_process else None


def decoder_of(args) -> str:
    """The registry's name of the policy: with one draw a think step it is an ordinary, sampled
    chain of thought."""
    return "discrete" if args.decoding().width == 1 else args.soft_mixer


def evaluate(model, tokenizer, rows, score, args, policy, draws: int) -> dict:
    """Accuracy and cost of the policy as it acts, but with greedy answers: what the reward would
    see is scored, by score(text, row, ids).

    The thoughts are drawn from generators seeded 0, 1, ..., draws - 1, whatever the training's seed
    is.
    """
    import torch

    from softar.decode import generate
    from softar.evaluate import Chat, encode, tally

    from .discretise import seen

    def answering(rng):
        def answer(batch):
            prompts = [asked(row["prompt"]) for row in batch]
            inputs = encode(tokenizer, prompts, config.prompt_prefix).to(model.device)
            out = generate(model, **inputs, config=config, rng=rng, tokenizer=tokenizer)
            ids, texts = seen(out, tokenizer, args.reward_sees)
            answers = [*zip(texts, ids, strict=True)]
            return answers, out, int(out.num_tokens.sum())

        return answer

    def asked(prompt):  # as the rollouts': of columns of the rows TRL's RL hears none
        is_text = isinstance(prompt, str)
        return prompt if is_text else Chat(prompt, args.chat_template_kwargs or {})

    def judge(answer, row):
        return score(answer[0], row, answer[1])

    config = policy.changed(answer_temperature=0.0)
    each = [answering(torch.Generator().manual_seed(i)) for i in range(draws)]
    tallies = [
        tally(model, rows, judge, answer, args.per_device_eval_batch_size) for answer in each
    ]
    mean = {key: sum(one[key] for one in tallies) / draws for key in tallies[0]}
    return mean | {"n": len(rows), "eval_draws": draws}


def report(inputs, lines, folders, console) -> Path:
    from softar.show.figures import gain_table, plot_rewards

    task, algorithm = inputs.task.name, lines[0]["algorithm"]
    file = Path(inputs.training.output_dir, "rewards.png")
    plot = plot_rewards(lines, file, title=f"{task}, {algorithm}")
    if "accuracy" in lines[0]:
        done = f"{algorithm}, {lines[0]['train_steps']} steps"
        title = f"{task}, {done}: accuracy, n = {counts(lines)}"
        console.print(gain_table(lines, title=title))
        console.print(
            "thoughts drawn as in training, with the same fixed seeds before and after; answers greedy"
        )
    return plot


# -- the policy to start from


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
    is_found = resumes(args) and note.is_file()
    # a checkpoint has come from the one that is there
    if not is_found or not (checkpoint_of(args) or json.loads(note.read_text()) == made_with):
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
    tell_progress(trainer, f"SFT before RL, seed {args.seed}", to_log=APART in os.environ)
    trainer.train()
    trainer.save_model()
    if trainer.accelerator.is_main_process:
        (draft / "made_with.json").write_text(json.dumps(made_with))
        shutil.rmtree(start, ignore_errors=True)
        draft.rename(start)  # whole or not at all
    trainer.accelerator.wait_for_everyone()
