"""diffusion-rl of the evidence: RL of masked diffusion on Latin squares at 8 forwards (RESULTS.md,
"Evidence: rules")."""

import dataclasses
import functools

from softar.recipes import evidence_latin as latin
from softar.recipes.evidence_rl import rewards_by_step
from softar.recipes.evidence_units import Unit, Watch, on_disk, rows_hash
from softar.recipes.grpo_diffusion import ROWS, asked

START = "latin-diffusion-tiny"  # the shipped net, which all arms begin with
FORWARDS, OTHERS = 8, (4, 12, 20)  # of the policies, and for the curve
DRAWN_AT = 0.1  # alg_temp of the read-outs whose slots are drawn
DEV, TEST = 500, 2000
DRAWN = 30_000  # templates, most of them of squares that the shipped net was trained on
ROWS_SEED = 2
RL = dict(
    gen_length=0,  # templates have masks of their own
    steps=FORWARDS,
    temperature=0.25,
    alg_temp=0.05,
    per_device_train_batch_size=512,
    num_generations=8,
    replay_chunk=256,
    learning_rate=4e-4,
    lr_scheduler_type="linear",
    warmup_steps=5,
    adam_beta2=0.99,
    beta=0.0,
    loss_type="grpo",
    scale_rewards="none",
    logging_steps=10,
)
# what a forward commits is no draw: the surest slots
SUREST = dict(how="hard", alg_temp=0.0, per_device_train_batch_size=256)
SFT = latin.TRAINING
SETTINGS = {  # of a rate of its own: chosen for it on development rows
    "start": dict(how="start"),
    "hard": dict(how="hard", max_steps=150),
    "soft-mask": dict(how="soft-mask", max_steps=150),
    "hard-surest": dict(**SUREST, max_steps=900, learning_rate=1e-4),
    "hard-one-step": dict(
        **SUREST, max_steps=2050, learning_rate=1e-4, replay="one-step", hide_prompt=0.15
    ),
    "sft-hard": dict(how="sft", max_steps=5000, learning_rate=1e-3),
    "sft-soft-mask": dict(how="sft", max_steps=4000, learning_rate=3e-3, softmasking_prob=0.8),
}
SEEDS = range(3)


@functools.cache
def data():
    """-> the task, and its held-out rows by split; a row's `group` is its square. To develop on are
    rows that the shipped net was tried on before (RESULTS.md 10 and 22), to test on new ones of
    squares that neither these nor those that it was trained on have."""
    from softar.tasks import latin as squares

    task = squares()
    known = {*task.train["answer"], *task.test["answer"]}
    task = dataclasses.replace(task, train=unended(task.train), test=unended(task.test))
    drawn = unended(squares(held_out=DRAWN, seed=ROWS_SEED, size=0).test)
    fresh = [i for i, square in enumerate(drawn["answer"]) if square not in known]
    if len(fresh) < TEST:
        raise ValueError(f"DRAWN={DRAWN}: {len(fresh)} templates are left to test on: draw more")
    rows = {"dev": task.test.select(range(DEV)), "test": drawn.select(fresh[:TEST])}
    rows = {split: some.add_column("group", some["answer"]) for split, some in rows.items()}
    return dataclasses.replace(task, train=on_disk(task.train, "latin-shipped")), rows


def unended(rows):
    """Templates as all of the units had them, without the end token that training puts behind a square
    (RESULTS.md, X3, says what that does)."""
    texts = [text.removesuffix(" <eos>") for text in rows["template"]]
    return rows.remove_columns("template").add_column("template", texts)


def facts() -> dict[str, dict]:
    rows = data()[1]
    of = latin.facts_of(rows["test"])
    return {name: each | dict(dev=len(rows["dev"])) for name, each in of.items()}


def measure(unit: Unit) -> list[dict]:
    """Go on from the shipped net, and decode with what came of it: the lines of its log."""
    from softar.diffusion import load
    from softar.diffusion.net import facts as facts_of

    task, rows = data()
    model, tokenizer = load(START, device=unit.device)
    begins = facts_of(model).soft_mask  # hard training makes the net forget it
    line = train(unit, model, tokenizer, task)
    soft = latin.how_soft(unit.setting, facts_of(model).soft_mask or begins)

    def made(forwards: tuple[int, ...]) -> dict:
        some = latin.decoders(model, tokenizer, soft, forwards)
        if forwards == (FORWARDS,):
            drawn = latin.decoders(model, tokenizer, soft, forwards, alg_temp=DRAWN_AT)
            some |= {f"drawn {name}": decoder for name, decoder in drawn.items()}
        return some

    return [line | rows_hash(rows), *latin.answers(unit, made, task, rows, (FORWARDS,), OTHERS)]


def train(unit: Unit, model, tokenizer, task) -> dict:
    """-> the first line of a log."""
    how, fields = unit.options["how"], {k: v for k, v in unit.options.items() if k != "how"}
    if how == "start":
        return unit.line(Watch(), None, {})
    if how == "sft":
        learnt = dataclasses.replace(
            task, train=task.train.select_columns(["prompt", "completion"])
        )
        return latin.fit(unit, model, tokenizer, learnt, SFT | fields | unit.fields)
    return reinforce(unit, model, tokenizer, task, RL | ROWS[how] | fields | unit.fields)


def reinforce(unit: Unit, model, tokenizer, task, fields: dict) -> dict:
    """GRPO, rewarded for valid squares -> the first line of a log."""
    from softar.rl import DiffusionGRPOTrainer
    from softar.rl.diffusion_config import DiffusionGRPOConfig
    from softar.rl.rewards import reward_of

    def make(args: dict) -> DiffusionGRPOTrainer:
        args, rows = DiffusionGRPOConfig(**args), asked(task.train)
        return DiffusionGRPOTrainer(
            model, reward_of(task), args, train_dataset=rows, processing_class=tokenizer
        )

    trainer, line = unit.train(make, fields)
    return line | dict(rewards=rewards_by_step(trainer))
