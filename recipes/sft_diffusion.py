# /// script
# dependencies = ["softar"]
# ///
r"""
Masked-diffusion SFT, hard or with soft masks: LLaDA, Dream, BERT-like models, and the embedded tiny ones.

Examples:

# The demo: a tiny model on Latin squares, training x decoding at several numbers of forwards
softar diffusion-sft
softar diffusion-sft --task mnns
softar diffusion-sft --rows all --num_seeds 5 --schedules uniform,pyramid,threshold

# Dream-7B or LLaDA-8B with DoRA and a soft-mask head, as published
softar diffusion-sft --config dream7b_softmask_dora.yaml

# A causal LM (Llama, Qwen, ...), made a diffusion LM first, as Dream was; --block_length 4 makes it block-causal
softar diffusion-sft --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct --from_causal true \
    --dataset_name your/chats --output_dir runs/qwen-diffusion

# A checkpoint of dllm whose folder says neither its blocks nor that its logits are about the next token
softar diffusion-sft --model_name_or_path path/to/bd3lm --block_length 32 --shift 1 --dataset_name your/chats

# Go on where an interrupted run stopped; without this a run starts anew and moves old checkpoints into _earlier
softar diffusion-sft --resume_from_checkpoint true

From a checkout `accelerate launch recipes/sft_diffusion.py` and `python recipes/sft_diffusion.py` do the same.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from trl import ScriptArguments

from softar.checks import check_choice, check_least
from softar.diffusion.models import MODELS
from softar.diffusion.recipe import FOLDER, FolderArguments, check_folder_options
from softar.diffusion.sft import DiffusionSFTConfig
from softar.recipe import (
    Recipe,
    RecipeArguments,
    fit_supervised,
    measured,
    one_line_errors,
    run,
    supervised,
)
from softar.results import counts
from softar.training import opt

CONFIGS = Path(__file__).parent / "configs"
TWICE = 0.8  # share of the steps that read a row twice (arXiv:2510.17206 finds 80 % best)
# Fields that make a row of the table what it is; everything else (data, steps, size) is common to
# all.
# Without a head its options are at their defaults, or left out: they would change nothing.
HEADLESS = dict(softmasking_prob=0.0) | {
    field.name: field.default
    for field in dataclasses.fields(DiffusionSFTConfig)
    if field.name.startswith("head_")
}
ROWS = {
    "hard": dict(objective="masked", **HEADLESS),
    # As many forwards as soft-mask: 1 + TWICE times the steps
    "hard-long": dict(objective="masked", **HEADLESS),
    "soft-mask": dict(objective="masked", softmasking_prob=TWICE),
    # Every token of the answer is predicted, none is a mask: the mean is over all of them.
    "duo": dict(objective="uniform", normalise="tokens", **HEADLESS),
}
GROUPS = {"demo": ["hard", "soft-mask"], "all": list(ROWS)}
SCHEDULES = {  # name -> how a budget of it is said to DenoiseConfig
    "uniform": lambda budget: dict(steps=budget),
    "pyramid": lambda budget: dict(schedule="pyramid", schedule_args={"dilation": budget}),
    "threshold": lambda budget: dict(threshold=budget),
}
BUDGETS = {"uniform": (4, 8, 12), "pyramid": (1, 2, 4), "threshold": (0.5, 0.7, 0.9, 0.98)}


@dataclass
class DiffusionScriptArguments(RecipeArguments, FolderArguments, ScriptArguments):
    task: str | None = opt(
        None, "A task by name, instead of a dataset: latin, mnns, or reasoning_gym:NAME."
    )
    rows: str | None = opt(
        None,
        f"What to train: demo, all, or names with commas out of {', '.join(ROWS)}; each sets its own objective and "
        "softmasking_prob. Default: one run as the options say.",
    )
    from_causal: bool = opt(
        False, "The model is a causal LM (Llama, Qwen, ...): make a diffusion LM of it first."
    )
    block_length: int | None = opt(
        None,
        "With from_causal: the model reads blocks of so many tokens one after the other. Default: the whole canvas. "
        "Else, where the model's folder does not say it: of the blocks that it was trained on.",
    )
    shift: int | None = opt(
        None,
        "With from_causal: 1 (default) leaves logits about the next token, 0 has them be about their own. Else, where "
        "the folder does not say it: what they are about.",
    )
    schedules: str = opt(
        "uniform", f"Schedules to decode with, with commas out of {', '.join(SCHEDULES)}."
    )
    likelihood_samples: int = opt(
        0,
        "Also bound the negative log-likelihood of the held-out completions, by this many draws of masks for each: the "
        "column nll_bound, nats per token. Default 0: not computed.",
    )


@dataclass
class RecipeConfig(DiffusionSFTConfig):
    output_dir: str | None = opt(
        "runs/sft_diffusion", "Folder for checkpoints, results.json and plot."
    )


def fields(name, training, task) -> dict:
    if name != "hard-long":
        return {}
    if training.max_steps > 0:
        return dict(max_steps=round((1 + TWICE) * training.max_steps))
    return dict(num_train_epochs=(1 + TWICE) * training.num_train_epochs)


def prepare(script, task):
    return dataclasses.replace(task, train=last_answers(task.train), test=last_answers(task.test))


def last_answers(rows):
    """A conversation's last message is what is learnt, as published; otherwise the user's turns
    would be, too."""
    if rows is None or "messages" not in rows.column_names:
        return rows
    features = rows.features and rows.features.copy()
    if features:  # which `map` would take from the first rows alone
        features["prompt"] = features["completion"] = features.pop("messages")
    return rows.map(
        lambda row: {"prompt": row["messages"][:-1], "completion": row["messages"][-1:]},
        remove_columns="messages",
        features=features,
    )


def check(inputs, configs):
    from softar.diffusion.evaluate import has_texts, says_slots

    script, task = inputs.script, inputs.task
    check_least(script, likelihood_samples=0, block_length=1)
    if script.shift is not None:
        check_choice("shift", script.shift, (0, 1))
    check_stated(script, inputs.model)
    schedules = script.schedules.split(",")
    for schedule in schedules:
        check_choice("schedules", schedule, SCHEDULES)
    if script.schedules != DiffusionScriptArguments.schedules and task.score is None:
        raise ValueError(
            f"schedules={script.schedules!r}: nothing is decoded, as {task.name!r} has no scorer: leave it out, or "
            "give a --task, such as a folder with train and test files"
        )
    if script.likelihood_samples and not (task.test is not None and has_texts(task.test)):
        raise ValueError(
            f"likelihood_samples needs held-out rows with prompt and completion as text; {task.name} has none"
        )
    rows = [] if task.score is None or task.test is None else [task.test, task.train]
    if rows and not any(says_slots(each.column_names) for each in rows):
        raise ValueError(
            f"{task.name!r} has held-out rows of {task.test.column_names} and training rows of "
            f"{task.train.column_names}: no completion says how many tokens an answer has; give held-out rows one"
        )
    objectives = [a.objective for a in configs.values()]
    redraws = [name for name in objectives if name != "masked"]
    if "uniform" not in schedules and redraws:
        raise ValueError(
            f"schedules={script.schedules!r}: a model of objective={redraws[0]!r} decodes with 'uniform' only"
        )
    if script.likelihood_samples and ("canvas" in redraws or "masked" not in objectives):
        raise ValueError(
            f"likelihood_samples={script.likelihood_samples} bounds a likelihood by masks, and a model of "
            f"objective={redraws[0]!r} has none: leave it out"
        )


def stated(script) -> dict:
    """What is said of the model, and where it comes from a causal one, of what it is made."""
    values = {name: getattr(script, name) for name in (*FOLDER, "block_length")}
    return {name: value for name, value in values.items() if value is not None}


def check_stated(script, model: str) -> None:
    """Raise ValueError for what is said of a model that takes it not."""
    if not script.from_causal:
        remedy = "leave it out, or name a causal model and give --from_causal true"
        return check_folder_options(stated(script), model, remedy)
    for name, value in stated(script).items():
        if name not in ("block_length", "shift"):
            raise ValueError(
                f"{name}={value} is about diffusion models, and --from_causal makes one of its own: leave it out"
            )


def open_model(inputs, seed):
    import softar
    from softar.diffusion import load
    from softar.diffusion.convert import convert

    options, said = inputs.model_options, stated(inputs.script)
    if inputs.script.from_causal:
        return convert(*softar.load(inputs.model, seed=seed, **options), **said)
    return load(
        inputs.model, **options, **said, **(dict(seed=seed) if inputs.model in MODELS else {})
    )


def train_row(inputs, name, args):
    from softar.diffusion.evaluate import nll_bound
    from softar.diffusion.sft import DiffusionSFTTrainer
    from softar.split import on_main

    script, task = inputs.script, inputs.task
    with one_line_errors(inputs.program.name):
        model, tokenizer = open_model(inputs, args.seed)
        trainer = supervised(DiffusionSFTTrainer, model, tokenizer, inputs, task, args)
    common = fit_supervised(inputs, trainer, args, training=name)
    samples = script.likelihood_samples

    def bound(model):
        how = dict(samples=samples, seed=args.seed)
        common["nll_bound"] = nll_bound(model, trainer.processing_class, task.test, **how)

    if samples and trainer.uniform is None:
        on_main(trainer, bound)
    schedules = script.schedules.split(",")
    return measured(trainer, task, common, lambda model: decode_all(trainer, task, schedules))


def decode_all(trainer, task, schedules):
    """The held-out rows under every decoding: hard, and softly as the model was trained, or else
    without training. A uniform-state model shows no masks, and steps more than its slots are of use
    to it; DiffusionGemma reads its own belief, or none."""
    from softar.diffusion.config import DenoiseConfig
    from softar.diffusion.evaluate import evaluate

    args = trainer.args
    plain, tokenizer = trainer.accelerator.unwrap_model(trainer.model), trainer.processing_class
    learnt = {} if trainer.head is None else trainer.head.settings()
    decoders = {"hard": dict(soften="hard")}
    if trainer.args.objective == "canvas":
        decoders["self-conditioned"] = {}
    elif trainer.uniform is None:
        name = "soft-token" if trainer.head is None else "soft-mask"
        decoders[name] = dict(soften=name, soften_args=learnt)
    length = slots_of(task, tokenizer)
    for schedule in schedules if trainer.args.objective == "masked" else ["uniform"]:
        budgets = budgets_of(schedule, trainer.args.objective, plain, tokenizer, task, length)
        for decoder, settings in decoders.items():
            for budget in budgets:
                config = DenoiseConfig(**settings, **SCHEDULES[schedule](budget))
                yield dict(decoder=decoder, schedule=schedule, budget=budget) | evaluate(
                    plain,
                    tokenizer,
                    task.test,
                    task.score,
                    config,
                    gen_length=length,
                    batch_size=args.per_device_eval_batch_size,
                    seed=args.seed,
                )


def slots_of(task, tokenizer) -> int | None:
    """Tokens to fill of each held-out row, where these don't say it: as many as the longest completion
    of the training rows has."""
    from softar.diffusion.evaluate import most_slots, says_slots

    if says_slots(task.test.column_names):
        return None
    return most_slots(task.train.select_columns(["prompt", "completion"]), tokenizer)


def budgets_of(schedule, objective, model, tokenizer, task, length=None) -> list:
    """Numbers of steps, or what else the schedule is asked by. Each block of a block-causal model
    gets one step at least, each canvas as many as another. length: tokens to fill, where the rows
    don't say it."""
    from softar.diffusion.evaluate import most_blocks, most_slots
    from softar.diffusion.net import facts

    budgets, known = BUDGETS[schedule], facts(model)
    if schedule != "uniform":
        return budgets
    slots = most_slots(task.test, tokenizer) if length is None else length
    if objective == "canvas":
        return [b * -(-slots // known.block_length) for b in budgets]
    if objective == "uniform":
        return sorted({*budgets, slots})
    budgets = [b for b in budgets if b < slots] + [slots]
    if known.block_length is None:
        return budgets
    own = "template" in task.test.column_names  # each row has its masks
    each = None if own else slots
    most = max(most_blocks(row, tokenizer, known.block_length, each) for row in task.test)
    if few := [b for b in budgets if b < most]:
        print(f"steps {few} are left out: a row may have {most} blocks, and each takes a step")
    return [b for b in budgets if b >= most] or [most]


def report(inputs, lines, folders, console):
    from softar.show.figures import nfe_table, plot_nfe

    if "accuracy" not in lines[0]:
        return None
    name = inputs.task.name
    title = f"{name}: held-out accuracy by forwards, n = {counts(lines)}"
    console.print(nfe_table(lines, title=title))
    file = Path(inputs.training.output_dir, "accuracy.png")
    return plot_nfe(lines, file, title=f"{name}, {inputs.model}")


RECIPE = Recipe(
    file=Path(__file__),
    about=__doc__,
    arguments=DiffusionScriptArguments,
    config=RecipeConfig,
    demo=CONFIGS / "latin.yaml",
    task_demos={
        "latin": CONFIGS / "latin.yaml",
        "latin-prompt": CONFIGS / "latin_prompt.yaml",
        "mnns": CONFIGS / "mnns_diffusion.yaml",
    },
    rows=ROWS,
    groups=GROUPS,
    model_kind="diffusion",
    prepare=prepare,
    fields=fields,
    check=check,
    train_row=train_row,
    report=report,
)

if __name__ == "__main__":
    run(RECIPE)
