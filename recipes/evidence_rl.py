"""X4 of the evidence: RL on soft policies, 2 x 2 (RESULTS.md, "Evidence: rules")."""

import dataclasses
from pathlib import Path

from safetensors.torch import load_file

from softar.config import SoftConfig
from softar.decoders.soft import SelfConsistency, SoftDecoder
from softar.recipes.evidence_mnns import data, fields_of, fit, untrained
from softar.recipes.evidence_units import (
    Unit,
    hash_of,
    keep_weights,
    readouts,
    rows_hash,
    weights_file,
)

DIGITS = 5
# What the arms of a seed and a start begin with, trained once; a folder that git ignores
FOLDER = Path(__file__).resolve().parent.parent / "runs" / "evidence" / "starts"
STARTS = {  # the arm of X1 that each is, cut short
    "self-fed": dict(arm="trace-soft", steps=1500),
    "teacher-forced": dict(arm="discrete-traces", steps=1500),
}
OF_DRAWS = {"draws-1": dict(soft_k=1), "draws-3": dict(soft_k=3)}  # of a think step
CHAINS = 3  # thoughts of one draw a step, whose commonest answer counts
TEMPERATURE = 1.0  # of thoughts, in RL and read out, and of answers in RL
REPEATS = 4  # answers to each row, as thoughts are drawn
RL = dict(
    soft_mixer="k-samples",
    temperature=TEMPERATURE,
    per_device_train_batch_size=512,
    num_generations=16,
    learning_rate=3e-4,
    lr_scheduler_type="linear",
    warmup_steps=10,
    beta=0.0,
    loss_type="dr_grpo",
    scale_rewards="none",
    logging_steps=25,
)
STEPS = {  # that take equally long, as RESULTS.md says
    "self-fed": {"draws-1": 340, "draws-3": 340, "sft": 3050},
    "teacher-forced": {"draws-1": 340, "draws-3": 340, "sft": 5000},
}
SEEDS = range(6)
LATER = 10_000  # more than any seed
SETTINGS = {
    f"{start}-{how}": dict(start=start, how=how, steps=steps)
    for start, made in STARTS.items()
    for how, steps in {"start": made["steps"], **STEPS[start]}.items()
}


def measure(unit: Unit) -> list[dict]:
    """Make a start, or go on from it, and read it out in every way: the lines of its log."""
    task, rows = data(DIGITS)
    model, tokenizer = untrained(unit)
    if unit.options["how"] == "start":
        line = make_start(unit, model, tokenizer, task)
    else:
        begin = open_start(unit, model, tokenizer, task)
        line = go_on(unit, model, tokenizer, task) | dict(start_hash=begin)
    lines = [line | rows_hash(rows)]
    for split in unit.splits:
        again = rows[split].select([*range(len(rows[split]))] * REPEATS)
        lines += readouts(decoders(model, tokenizer, unit.seed), again, task, split)
    return lines


def facts() -> dict[str, dict]:
    """Of the test rows, what the analysis has to know (`evidence_logs.Rows`): a log has them REPEATS
    times, one pass after the other."""
    rows = data(DIGITS)[1]
    groups = [*range(len(rows["test"]))] * REPEATS
    return {
        "all": dict(
            n=len(groups),
            dev=len(rows["dev"]) * REPEATS,
            hash=rows_hash(rows)["test_rows_hash"],
            groups=groups,
        )
    }


def start_fields(unit: Unit, task) -> dict:
    return fields_of(task=task, **STARTS[unit.options["start"]])


def start_file(unit: Unit, fields: dict) -> Path:
    return weights_file(FOLDER, unit.options["start"], unit, fields)


def make_start(unit: Unit, model, tokenizer, task) -> dict:
    """Train the model to be the start, and keep its weights -> the first line of a log."""
    fields = start_fields(unit, task) | unit.fields
    _, line = fit(unit, model, tokenizer, task, fields)
    return line | dict(start_hash=keep_weights(model, start_file(unit, fields)))


def open_start(unit: Unit, model, tokenizer, task) -> str:
    """Give the model the weights of its start, which is trained where nobody has -> their hash."""
    file = start_file(unit, start_fields(unit, task))
    if not file.is_file():
        make_start(dataclasses.replace(unit, fields={}), model, tokenizer, task)
    model.load_state_dict(load_file(file, device=str(model.device)))
    return hash_of(file)


def go_on(unit: Unit, model, tokenizer, task) -> dict:
    """Train what began -> the first line of a log."""
    start, how, steps = (unit.options[name] for name in ("start", "how", "steps"))
    if how == "sft":
        fields = fields_of(STARTS[start]["arm"], task, steps)
        fields |= dict(seed=unit.seed + LATER)  # another order of rows and traces than the start's
        return fit(unit, model, tokenizer, task, fields | unit.fields)[1]
    fields = RL | OF_DRAWS[how] | dict(max_steps=steps)
    return reinforce(unit, model, tokenizer, task, fields | unit.fields)[1]


def reinforce(unit: Unit, model, tokenizer, task, fields: dict):
    """RL, rewarded for right answers -> the trainer, and the first line of a log."""
    from softar.rl.config import SoftGRPOConfig
    from softar.rl.grpo import SoftGRPOTrainer
    from softar.rl.rewards import reward_of

    length = dict(think_steps=task.think_steps, max_completion_length=task.max_new_tokens)

    def make(args: dict) -> SoftGRPOTrainer:
        args = SoftGRPOConfig(**length | args)
        return SoftGRPOTrainer(
            model, reward_of(task), args, train_dataset=task.train, processing_class=tokenizer
        )

    trainer, line = unit.train(make, fields)
    return trainer, line | dict(rewards=rewards_by_step(trainer))


def rewards_by_step(trainer) -> list[tuple]:
    return [
        (each["step"], each["reward"]) for each in trainer.state.log_history if "reward" in each
    ]


def policy(mixer: str, **knobs) -> SoftConfig:
    """The ways to think, all of as many forwards; answers are greedy."""
    return SoftConfig(
        mixer=mixer,
        mixer_args=knobs,
        temperature=TEMPERATURE,
        top_k=None,
        budget=DIGITS - 1,
        max_new_tokens=DIGITS + 1,
    )


def decoders(model, tokenizer, seed: int) -> dict:
    made = {
        name: SoftDecoder(model, tokenizer, config, seed=seed)
        for name, config in {
            "1 draw": policy("k-samples", k=1),
            "3 draws": policy("k-samples", k=3),
            "votes": policy("k-samples", k=1),
            "soft": policy("soft"),
            "discrete": policy("hard"),
        }.items()
    }
    return made | {"votes": SelfConsistency(made["votes"], CHAINS)}
