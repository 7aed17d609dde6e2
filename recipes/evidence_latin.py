"""X3 of the evidence: Latin squares by masked diffusion (RESULTS.md, "Evidence: rules")."""

import dataclasses
import functools
from collections.abc import Callable

from torch import Tensor

from softar.diffusion.head import SoftMaskHead
from softar.diffusion.sft import DiffusionSFTConfig, DiffusionSFTTrainer
from softar.diffusion.soften import Slots, soft_mask
from softar.recipes.evidence_units import Unit, on_disk, readouts, rows_hash
from softar.soft import Soft

DEV, TEST, CURVE = 500, 5000, 1000
TRAIN = 40_000  # squares drawn, of which those that are held out fall away
SPARE = 800  # templates more than TEST and DEV, for those that `data` leaves out
ROWS_SEED = 1  # of the squares: 0 drew those of section 10
STEPS, BUDGET, OTHERS = 2000, 12, (4, 8, 20)
TRAINING = dict(
    per_device_train_batch_size=128,
    learning_rate=3e-3,
    lr_scheduler_type="cosine",
    warmup_steps=100,
    weight_decay=0.01,
    normalise="masks",
)
SOFT = dict(softmasking_prob=0.8, head_scale=0.5, head_centre=-1.3, head_steepness=3.9)
ARMS = {
    "hard": dict(max_steps=STEPS),
    "hard-long": dict(max_steps=2700),
    "soft-mask": dict(max_steps=STEPS, head_k=5, **SOFT),
    "soft-mask-1": dict(max_steps=STEPS, head_k=1, **SOFT),
    "shuffled": dict(max_steps=STEPS, head_k=5, **SOFT),
}
SEEDS = range(100, 116)
SETTINGS = {arm: dict(arm=arm) for arm in ARMS}


def from_another_row(soft: Soft, masked: Tensor) -> Soft:
    """To each of the m masked slots of n, which stand row by row, the mixture of the masked slot m / 2
    on: of two rows or more, as full of masks, that is another one's. masked: [n] bool; the other
    slots keep what they have."""
    at = masked.nonzero()[:, 0]
    other = at.roll(len(at) // 2)
    return Soft(*(part.index_copy(0, at, part[other]) for part in soft))


def shuffled(slots: Slots, **knobs) -> Soft:
    """soft_mask, with the belief about a slot of another row."""
    return from_another_row(soft_mask(slots, **knobs), slots.masked)


class ShuffledHead(SoftMaskHead):
    def forward(self, slots: Slots) -> Soft:
        return from_another_row(super().forward(slots), slots.masked)


@dataclasses.dataclass
class ShuffledConfig(DiffusionSFTConfig):
    def head(self, make: type = ShuffledHead, learnt: dict | None = None) -> SoftMaskHead:
        return super().head(make, learnt)


@functools.cache
def data():
    """-> the task, and its held-out rows by split; a row's `group` is its square. None is one that the
    settings were chosen on (section 10), and none is in both splits."""
    from softar.tasks import latin

    task = latin(held_out=TEST + DEV + SPARE, size=TRAIN, seed=ROWS_SEED)
    rows = task.test.add_column("group", task.test["answer"])
    chosen_on = {*latin(size=1).test["answer"]}
    fresh = [i for i, square in enumerate(rows["group"]) if square not in chosen_on]
    test = rows.select(fresh[:TEST])
    tested = {*test["group"]}
    others = [i for i in fresh[TEST:] if rows[i]["group"] not in tested]
    if len(others) < DEV:
        raise ValueError(
            f"SPARE={SPARE}: {len(others)} templates are left to develop on: draw more"
        )
    learnt = on_disk(task.train.select_columns(["prompt", "completion"]), "latin")
    task = dataclasses.replace(task, train=learnt)
    return task, {"dev": rows.select(others[:DEV]), "test": test}


def facts() -> dict[str, dict]:
    return facts_of(data()[1]["test"])


def facts_of(rows) -> dict[str, dict]:
    """Of the test rows, and of the first of them, what the analysis has to know
    (`evidence_logs.Rows`)."""
    numbers: dict[str, int] = {}
    groups = [numbers.setdefault(square, len(numbers)) for square in rows["group"]]
    of_test = rows_hash({"test": rows})["test_rows_hash"]
    return {
        name: dict(n=n, hash=of_test, groups=groups[:n])
        for name, n in {"all": len(groups), f"first {CURVE}": min(CURVE, len(groups))}.items()
    }


def measure(unit: Unit) -> list[dict]:
    """Train an arm and decode with it: the lines of its log."""
    from softar.diffusion import load

    arm = unit.options["arm"]
    task, rows = data()
    model, tokenizer = load("latin-diffusion-tiny", seed=unit.seed, device=unit.device)
    make = ShuffledConfig if arm == "shuffled" else DiffusionSFTConfig
    fields = TRAINING | ARMS[arm] | unit.fields
    line = fit(unit, model, tokenizer, task, fields, make)
    soft = how_soft(arm, line["arguments"]["head"])
    made = functools.partial(decoders, model, tokenizer, soft)
    return [line | rows_hash(rows), *answers(unit, made, task, rows, (BUDGET,), OTHERS)]


def fit(unit: Unit, model, tokenizer, task, fields: dict, config: type = DiffusionSFTConfig):
    """Supervised training -> the first line of a log."""

    def make(args: dict) -> DiffusionSFTTrainer:
        args = config(**args)
        return DiffusionSFTTrainer(
            model, args, train_dataset=task.train, processing_class=tokenizer
        )

    trainer, line = unit.train(make, fields)
    head = None if trainer.head is None else trainer.head.settings()
    return line | dict(arguments=fields | {"head": head})


def how_soft(arm: str, head: dict | None) -> dict | None:
    """Fields of a softly decoding DenoiseConfig; None: the arm has no such way."""
    if arm == "shuffled":
        return dict(soften=functools.partial(shuffled, **head))
    return None if head is None else dict(soften="soft-mask", soften_args=head)


def answers(unit: Unit, made: Callable, task, rows: dict, budgets: tuple, others: tuple) -> list:
    """The lines of a log after its first. made: decoders by name, of so many forwards each; those of
    `budgets` answer all rows, of `others` the first."""
    lines = []
    for split in unit.splits:
        few = rows[split].select(range(min(CURVE, len(rows[split]))))
        for forwards, some in ((budgets, rows[split]), (others, few)):
            lines += readouts(made(forwards), some, task, split)
    return lines


def decoders(model, tokenizer, soft: dict | None, budgets: tuple[int, ...], **fields) -> dict:
    """Hard ones, and those as `soft` says, of so many forwards each. fields: of a DenoiseConfig."""
    from softar.diffusion.config import DenoiseConfig
    from softar.diffusion.decoders import DiffusionDecoder

    ways = {"hard": dict(soften="hard")} | ({} if soft is None else {"soft": soft})
    return {
        f"{name}, {steps}": DiffusionDecoder(
            model, tokenizer, DenoiseConfig(gen_length=0, steps=steps, **way, **fields)
        )
        for name, way in ways.items()
        for steps in budgets
    }
