# /// script
# dependencies = ["softar[rewards]"]
# ///
r"""
Guided soft SFT: teach a causal LM to think in its own mixtures of tokens.

Examples:

# The demo: a tiny model on MNNS, a table of no-CoT, discrete CoT and soft thought
softar sft
softar sft --rows all --num_seeds 5

# Coconut: stage by stage a step of the thought gives way to a hidden state
softar sft --rows coconut

# Any causal LM on a task by name, here SmolLM2-135M with LoRA
softar sft --config smollm2_chain_sum.yaml --max_steps 5

# Any dataset in TRL's prompt-completion format; the thought stands in tags
softar sft \
    --model_name_or_path Qwen/Qwen3-0.6B --dataset_name my/cot-data \
    --think_start '<think>' --think_end '</think>' --soft_passes 2 --soft_top_k 10 \
    --use_peft --learning_rate 1e-4 --output_dir runs/qwen3-soft

# Go on where an interrupted run stopped; without this a run starts anew and moves old checkpoints into _earlier
softar sft --resume_from_checkpoint true

From a checkout `accelerate launch recipes/sft_soft.py` and `python recipes/sft_soft.py` do the same.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from trl import ScriptArguments

from softar.recipe import (
    Recipe,
    RecipeArguments,
    fit_supervised,
    measured,
    one_line_errors,
    run,
    supervised,
    thought_fields,
)
from softar.results import counts
from softar.rows import CUSTOM
from softar.sft.config import LEFT_OUT, SoftSFTConfig
from softar.training import opt

# Fields that make a row of the table what it is; everything else (data, steps, size) is common to
# all.
MOVE = dict(alpha_end=None, alpha_hold=None, alpha_span=None)  # left out: a constant does not move
# Of a row whose thoughts are gold tokens: options of mixtures are for the others
UNLEARNT = dict(
    learn_temperature=False,
    learn_step_temperature=False,
    learn_min_p=False,
    learn_top_k=False,
    temperature_learning_rate=None,
    filter_learning_rate=None,
    gate_gradient=None,
    gate_scale_start=None,
    gate_scale_end=None,
)
HARD = dict(
    soft_mode="parallel",
    soft_passes=None,
    soft_grad_passes=None,
    soft_window=None,
    guidance="mix",
    **UNLEARNT,
)
# Of a row whose thoughts hold no hidden states
TOKENS = dict(
    latent_stages=None,
    latents_per_step=None,
    latent_step_end=None,
    latent_stage_steps=None,
    latent_uniform_prob=0.0,
)
GOLD = dict(alpha_schedule="constant", alpha_start=1.0, **MOVE, **HARD, **TOKENS)
ROWS = {
    "no-cot": dict(think_steps=0, entropy_coef=0.0, **GOLD),
    "discrete": GOLD,
    "discrete-traces": dict(targets="traces", **GOLD),
    "scheduled-sampling": dict(
        soft_mixer="hard", guidance="coin", thought_loss="alpha", **UNLEARNT, **TOKENS
    ),
    "guided-soft": dict(thought_loss="alpha", **TOKENS),
    "trace-soft": dict(
        alpha_schedule="constant", alpha_start=0.0, targets="traces", **MOVE, **TOKENS
    ),
    "coconut": dict(
        soft_mode="sequential",
        **{name: HARD[name] for name in HARD if name != "soft_mode"},
        **dict(soft_mixer="soft", soft_temperature=1.0, thought_loss="constant"),
        **dict(soft_top_k=10, soft_top_p=None, soft_min_p=None, entropy_coef=0.0),
        **dict(alpha_schedule="linear", alpha_start=1.0, **MOVE),
    ),
    "oracle-soft": dict(
        targets="oracle",
        soft_mixer="soft",
        alpha_schedule="linear",
        alpha_start=1.0,
        **MOVE,
        **HARD,
        **TOKENS,
    ),
}
GROUPS = {"demo": ["no-cot", "discrete", "trace-soft"], "all": list(ROWS)}


@dataclass
class SoftScriptArguments(RecipeArguments, ScriptArguments):
    rows: str | None = opt(
        None,
        f"What to train: demo, all, or names with commas out of {', '.join(ROWS)}; each sets its own alpha schedule, "
        "targets, loss weights and latent stages. Default: one run as the options say.",
    )


@dataclass
class RecipeConfig(SoftSFTConfig):
    output_dir: str | None = opt("runs/sft_soft", "Folder for checkpoints, results.json and plot.")


@dataclass
class BaseConfig(RecipeConfig):
    """Of all rows, before each adds its own: what does nothing here may act in one of them."""

    idle: ClassVar = ()

    def check_best(self) -> None:
        """A row may hold alpha where it is."""


def fields(name, training, task) -> dict:
    if name == "no-cot":
        return {}  # it has no thought
    if name == "coconut" and training.latent_stages is None and task.think_steps is not None:
        return thought_fields(training, task) | dict(latent_stages=task.think_steps)
    return thought_fields(training, task)


def check(inputs, configs):
    """What a row would only find out when its turn comes, hours into the run."""
    columns = inputs.task.train.column_names
    if not {"coconut", CUSTOM} & {*configs}:
        for option, left_out in TOKENS.items():
            value = getattr(inputs.training, option)
            if value not in (left_out, LEFT_OUT.get(option)):
                raise ValueError(
                    f"{option}={value!r} does nothing with these rows: add 'coconut' to --rows, or leave it out"
                )
    for name, args in configs.items():
        if args.think_tokens and inputs.model_args.model_name_or_path is None:
            raise ValueError(
                f"think_tokens={args.think_tokens} would freeze {inputs.model!r}, which is not trained: "
                "name a trained model, e.g. --model_name_or_path mnns-discrete-tiny"
            )
        rows_adapter(args, inputs.model_args)
        if name == "no-cot" and inputs.task.think_steps is None:
            raise ValueError(
                f"row 'no-cot' cuts thoughts out of completions, and {inputs.task.name!r} does not say how long they "
                "are: leave it out, or train without --rows on completions that are the answers alone"
            )
        if name == "coconut" and args.latent_stages is None:
            raise ValueError("row 'coconut': give --latent_stages, how many steps a thought has")
        if args.targets != "gold" and "traces" not in columns:
            raise ValueError(
                f"row {name!r} needs a column 'traces'; {inputs.task.name!r} has {columns}"
            )


def rows_adapter(args, model_args):
    """The adapter of think tokens, where one is asked for. Raises ValueError for options of LoRA."""
    from peft import TrainableTokensConfig

    if not (args.think_tokens and model_args.use_peft):
        return None
    plain = vars(type(model_args)())
    for name, value in vars(model_args).items():
        if ("lora" in name or name == "use_dora") and value != plain[name]:
            raise ValueError(
                f"{name}={value!r} does nothing with think_tokens={args.think_tokens}, which trains rows "
                "alone: leave one of them out"
            )
    return TrainableTokensConfig()


def open_model(inputs, seed):
    import softar

    return softar.load(inputs.model, seed=seed, **inputs.model_options)


def train_row(inputs, name, args):
    from softar.evaluate import evaluate
    from softar.sft.trainer import SoftSFTTrainer
    from softar.tasks import no_thought

    task = no_thought(inputs.task) if name == "no-cot" else inputs.task
    with one_line_errors(inputs.program.name):
        model, tokenizer = open_model(inputs, args.seed)
        adapter = rows_adapter(args, inputs.model_args)
        trainer = supervised(SoftSFTTrainer, model, tokenizer, inputs, task, args, adapter)

    def decode(model):
        """The held-out rows with the thought read softly and discretely."""
        for readout in ("soft", "discrete"):
            config = trainer.decoding(readout)
            yield {"readout": readout} | evaluate(
                model,
                tokenizer,
                task.test,
                task.score,
                config,
                batch_size=args.per_device_eval_batch_size,
                seed=args.seed,
            )

    common = fit_supervised(inputs, trainer, args, decoder=name)
    return measured(trainer, task, common, decode)


def report(inputs, lines, folders, console):
    from softar.show.figures import plot_accuracy, results_table

    if "accuracy" not in lines[0]:
        return None
    soft = [row for row in folders if row[0] in ("oracle-soft", "guided-soft", "trace-soft")]
    if soft:
        console.print(thought_of(folders[soft[-1]], inputs.task))
    name = inputs.task.name
    title = f"{name}: held-out accuracy, n = {counts(lines)}"
    console.print(results_table(lines, title=title))
    file = Path(inputs.training.output_dir, "accuracy.png")
    return plot_accuracy(lines, file, title=f"{name}, {inputs.model}")


def thought_of(folder, task):
    """How a trained model thinks about the first held-out row."""
    import softar
    from softar.config import SoftConfig
    from softar.evaluate import encode, prompt_of
    from softar.show.figures import thought_table

    model, tokenizer = softar.load(folder)
    config = SoftConfig.load(folder)
    row = task.test[0]
    inputs = encode(tokenizer, [prompt_of(row)], config.prompt_prefix)
    inputs = inputs.to(model.device)
    out = softar.generate(model, **inputs, config=config, tokenizer=tokenizer)
    return thought_table(out, tokenizer)


RECIPE = Recipe(
    file=Path(__file__),
    about=__doc__,
    arguments=SoftScriptArguments,
    config=RecipeConfig,
    base=BaseConfig,
    demo=Path(__file__).parent / "configs" / "mnns.yaml",
    rows=ROWS,
    groups=GROUPS,
    model_kind="untrained",
    fields=fields,
    check=check,
    train_row=train_row,
    report=report,
)

if __name__ == "__main__":
    run(RECIPE)
