# /// script
# dependencies = ["softar[rewards]"]
# ///
r"""
GRPO on a model that fills masks, hard or soft: few forwards, and tokens that fit together learn from their reward.

Examples:

# The demo: Latin squares from the shipped soft-mask model at 8 forwards; before and after, hard and soft, at 4 to 20
softar diffusion-grpo
softar diffusion-grpo --rows soft-mask --num_seeds 3

# LLaDA-8B with LoRA on a GPU of 80 GB; the smallest public chat model of this kind on a smaller one
softar diffusion-grpo --config grpo_llada8b.yaml
softar diffusion-grpo --config grpo_modernbert_chat.yaml

# Any model that softar.diffusion.load opens on any dataset with a column 'prompt' (or 'template', which holds masks),
# rewarded by one of TRL's functions or one of yours
softar diffusion-grpo \
    --model_name_or_path GSAI-ML/LLaDA-8B-Instruct --dataset_name your/prompts --reward_funcs my_rewards.is_short \
    --gen_length 128 --steps 32 --use_peft --learning_rate 1e-5 --output_dir runs/llada-short

# Go on where an interrupted run stopped; without this a run starts anew and moves old checkpoints into _earlier
softar diffusion-grpo --resume_from_checkpoint true

From a checkout `accelerate launch recipes/grpo_diffusion.py` and `python recipes/grpo_diffusion.py` do the same.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from trl import ScriptArguments

from softar.checks import check_least
from softar.diffusion.recipe import FOLDER, FolderArguments, check_folder_options
from softar.recipe import Recipe, fit, one_line_errors, run
from softar.recipe_data import evaluates
from softar.results import counts
from softar.resume import checkpoint_of
from softar.rl.config import RolloutConfig
from softar.rl.diffusion_config import DiffusionGRPOConfig
from softar.rl.recipe import RewardArguments
from softar.rl.rewards import as_chats, check_columns, rewards_of, score_of
from softar.training import opt

CONFIGS = Path(__file__).parent / "configs"
ROWS = {
    "soft-mask": dict(soften="soft-mask"),
    "hard": dict(soften="hard", soften_args=None, rescale=None, embedding_grad=True),
}
GROUPS = {"demo": [*ROWS], "all": [*ROWS]}
GREEDY = dict(temperature=0.0, alg_temp=0.0)  # tokens, and slots


@dataclass
class DiffusionRLArguments(RewardArguments, FolderArguments, ScriptArguments):
    from_causal = False  # no option: RL starts from a model that fills masks

    rows: str | None = opt(
        None,
        f"What to train: demo (= all), or names with commas out of {', '.join(ROWS)}: what a mask shows in the "
        "rollouts. Default: one run as the options say.",
    )
    eval_forwards: str | None = opt(
        None,
        "Numbers of forwards, with commas, to decode the held-out rows with, before and after. Default: as the "
        "rollouts.",
    )
    model_block_length: int | None = opt(
        None, "Where the model's folder does not say it: of the blocks that it was trained on."
    )


@dataclass
class RecipeConfig(DiffusionGRPOConfig):
    output_dir: str | None = opt(
        "runs/grpo_diffusion", "Folder for checkpoints, results.json and plots."
    )


@dataclass
class BaseConfig(RecipeConfig):
    """Before the task has said how long its answers are, on which the other checks depend."""

    def __post_init__(self):
        RolloutConfig.__post_init__(self)


def has_templates(rows) -> bool:
    """A row without one, among others with, has None there."""
    return "template" in rows.column_names and None not in rows["template"]


def prepare(script, task):
    """Rows with a template are asked by it."""
    parts = {"train": task.train, "test": task.test}
    parts = {name: rows for name, rows in parts.items() if rows is not None}
    which = {*map(has_templates, parts.values())}
    if len(which) > 1:
        raise ValueError(
            f"{task.name!r} has templates in training or in held-out rows only: give all a column 'template', or none"
        )
    if which != {True}:
        return as_chats(task, script.system_prompt)
    if script.system_prompt is not None:
        raise ValueError(
            f"system_prompt={script.system_prompt!r:.80} makes chats of prompts, and {task.name!r} has templates: "
            f"leave it out"
        )
    return dataclasses.replace(task, **{name: asked(rows) for name, rows in parts.items()})


def asked(rows):
    """The rows with their templates for prompts."""
    others = [name for name in rows.column_names if name != "prompt"]
    return rows.select_columns(others).add_column("prompt", rows["template"])


def fields(name, training, task) -> dict:
    """The length of answers, where the options do not say it."""
    if training.gen_length is not None:
        return {}
    if has_templates(task.train):
        return dict(gen_length=0)
    if training.max_completion_length is not None or task.max_new_tokens is None:
        return {}
    return dict(gen_length=task.max_new_tokens)


def check(inputs, configs):
    script, task = inputs.script, inputs.task
    check_least(script, model_block_length=1)
    if inputs.training.gen_length and has_templates(task.train):
        raise ValueError(
            f"gen_length={inputs.training.gen_length} puts masks behind prompts, and {task.name!r} has templates, "
            f"whose own masks are filled: leave it out"
        )
    if script.eval_forwards is not None and task.test is None:
        raise ValueError(
            f"eval_forwards={script.eval_forwards!r} does nothing without held-out rows: leave it out, or give some"
        )
    check_columns(script.reward_funcs, task)
    said = {name: value for name, value in stated(script).items() if name != "block_length"}
    if script.model_block_length is not None:
        said["model_block_length"] = script.model_block_length
    check_folder_options(said, inputs.model)
    for args in configs.values():
        for forwards in budgets(script, args):
            try:
                dataclasses.replace(args.decoding(), steps=forwards)
            except ValueError as error:
                raise ValueError(f"eval_forwards={script.eval_forwards!r}: {error}") from error


def budgets(script, args) -> list[int | None]:
    """The numbers of forwards to evaluate with."""
    if script.eval_forwards is None:
        return [args.steps]
    try:
        numbers = [int(number) for number in script.eval_forwards.split(",")]
    except ValueError as error:
        raise ValueError(
            f"eval_forwards={script.eval_forwards!r}: give whole numbers with commas, 4,8,12"
        ) from error
    if twice := [number for number in numbers if numbers.count(number) > 1]:
        raise ValueError(f"eval_forwards={script.eval_forwards!r} names {twice[0]} twice")
    return numbers


def stated(script) -> dict:
    """What is said of the model, as `softar.diffusion.load` calls it."""
    values = {name: getattr(script, name) for name in FOLDER}
    values["block_length"] = script.model_block_length
    return {name: value for name, value in values.items() if value is not None}


def train_row(inputs, name, args):
    """Measure, train and measure again."""
    from softar.diffusion import load
    from softar.diffusion.evaluate import check_masks, check_steps
    from softar.diffusion.net import facts
    from softar.model_card import example_of
    from softar.recipe_model import adapter_of
    from softar.rl import DiffusionGRPOTrainer
    from softar.rl.diffusion_grpo import check_same_policy

    script, task = inputs.script, inputs.task
    with one_line_errors(inputs.program.name):
        if checkpoint := checkpoint_of(args):
            check_same_policy(checkpoint, args.decoding())
        model, tokenizer = load(inputs.model, **inputs.model_options, **stated(script))
        rewards = rewards_of(script.reward_funcs, task)
        trainer = DiffusionGRPOTrainer(
            model,
            rewards,
            args,
            train_dataset=task.train,
            eval_dataset=task.test if evaluates(args) else None,
            processing_class=tokenizer,
            peft_config=adapter_of(model, inputs.model_args),
        )
        if task.test is not None and not args.gen_length:
            check_masks(tokenizer, task.test["prompt"], facts(model).mask_id)
        for steps in (args.steps, *budgets(script, args)):
            config = dataclasses.replace(trainer.decoding, steps=steps)
            for rows in filter(None, (task.train, task.test)):
                check_steps(model, tokenizer, rows["prompt"], config, args.chat_template_kwargs)
    trainer.origin = example_of(task, tokenizer)
    how = score_of(task, trainer), args, budgets(script, args)
    common = dict(
        task=task.name,
        model=inputs.model,
        algorithm="GRPO",
        training=name,
        schedule=trainer.decoding.schedule_name,
        seed=args.seed,
    )
    before = measure(trainer, task, common | {"stage": "before"}, *how)
    seconds = fit(trainer, args, name)
    common |= dict(train_steps=trainer.state.global_step, train_seconds=seconds)
    after = measure(trainer, task, common | {"stage": "after"}, *how)
    curve = [[e["step"], e["reward"]] for e in trainer.state.log_history if "reward" in e]
    after[0]["rewards"] = curve
    order = {line.get("decoder"): number for number, line in enumerate(after)}
    lines = sorted([*before, *after], key=lambda line: order[line.get("decoder")])
    lines = [common | line for line in lines]
    return lines if trainer.accelerator.is_main_process else None


def measure(trainer, task, common: dict, score, args, forwards: list) -> list[dict]:
    """Accuracy and cost of greedy decoding, hard and as the rollouts are soft, on the main process;
    without held-out rows what they have in common alone."""
    from softar.diffusion.evaluate import evaluate
    from softar.diffusion.net import facts

    accelerator, policy, lines = trainer.accelerator, trainer.decoding, []
    if task.test is None or not accelerator.is_main_process:
        accelerator.wait_for_everyone()
        return [common]
    net, tokenizer = accelerator.unwrap_model(trainer.model), trainer.processing_class
    for decoder, settings in softeners(policy, facts(net).soft_mask).items():
        for steps in forwards:
            config = dataclasses.replace(policy, **GREEDY, steps=steps, **settings)
            found = evaluate(
                net,
                tokenizer,
                task.test,
                score,
                config,
                gen_length=args.gen_length,
                batch_size=args.per_device_eval_batch_size,
                template=args.chat_template_kwargs or {},
                with_ids=True,
            )
            own = steps or args.threshold or args.factor or args.entropy_bound
            lines.append(common | dict(decoder=decoder, budget=own or round(found["nfe"])) | found)
    shown = ", ".join(f"{e['decoder']} {e['budget']:g}: {e['accuracy']:.3f}" for e in lines)
    title = f"{common['training']}, seed {common['seed']}"
    print(f"{title}: accuracy {common['stage']}, by forwards: {shown}", flush=True)
    accelerator.wait_for_everyone()
    return lines


def softeners(policy, soft_mask: dict | None) -> dict[str, dict]:
    """The ways to decode that are compared: hard, and softly as the rollouts are, or as the model
    was trained."""
    ways = {"hard": dict(soften="hard", soften_args={}, rescale=None)}
    if policy.soften != "hard":
        name = policy.soften if isinstance(policy.soften, str) else "soft"
        ways[name] = {}
    elif soft_mask is not None:
        ways["soft-mask"] = dict(soften="soft-mask", soften_args=soft_mask)
    return ways


def report(inputs, lines, folders, console):
    from softar.show.figures import nfe_table, plot_nfe, plot_rewards

    folder, task = Path(inputs.training.output_dir), inputs.task.name
    curves = [line | {"decoder": line["training"]} for line in lines if "rewards" in line]
    plot = plot_rewards(curves, folder / "rewards.png", title=f"{task}, GRPO")
    if "accuracy" not in lines[0]:
        return plot
    title = (
        f"{task}, GRPO, {lines[-1]['train_steps']} steps: accuracy by forwards, n = {counts(lines)}"
    )
    console.print(nfe_table(lines, title=title))
    console.print("decoded greedily, before and after")
    return plot_nfe(lines, folder / "accuracy.png", title=f"{task}, {inputs.model}")


RECIPE = Recipe(
    file=Path(__file__),
    about=__doc__,
    arguments=DiffusionRLArguments,
    config=RecipeConfig,
    base=BaseConfig,
    demo=CONFIGS / "latin_grpo.yaml",
    rows=ROWS,
    groups=GROUPS,
    model_kind="diffusion",
    prepare=prepare,
    fields=fields,
    check=check,
    formats=(("prompt",), ("template",)),
    train_row=train_row,
    report=report,
)

if __name__ == "__main__":
    run(RECIPE)
