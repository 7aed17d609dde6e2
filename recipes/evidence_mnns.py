"""X1 of the evidence: MNNS with 4, 5 and 6 digits (RESULTS.md, "Evidence: rules")."""

import functools
from dataclasses import replace

from softar.recipes.evidence_units import Unit, on_disk, read_rows, readouts, rows_hash
from softar.recipes.sft_soft import ROWS

DIGITS = (4, 5, 6)
HELD_OUT = {4: (100, 200), 5: (300, 600), 6: (300, 600)}  # multisets: development, test
TRAIN = 10_000
NET = dict(hidden_size=64, intermediate_size=256, num_attention_heads=4, num_key_value_heads=4)
VOTES = dict(votes=8, temperature=0.7)
DOSES = (1, 2, 4, 8, 16)  # tokens that are left of each step
ARMS = ("no-cot", "discrete", "discrete-traces", "scheduled-sampling", "guided-soft", "trace-soft")
TRAINING = dict(
    per_device_train_batch_size=64,
    lr_scheduler_type="cosine",
    warmup_steps=0.05,
    weight_decay=0.01,
    soft_mode="sequential",
    soft_top_k=0,
)
# of those that read given tokens, and of those that read what they make
RATES = dict.fromkeys(("no-cot", "discrete", "discrete-traces"), 3e-3)
RATES |= dict.fromkeys(("scheduled-sampling", "guided-soft", "trace-soft"), 1.5e-3)
STEPS = {  # digits -> arm -> steps that take equally long, as RESULTS.md says
    4: dict(zip(ARMS, (3600, 2700, 2700, 1750, 1900, 1700))),
    5: dict(zip(ARMS, (5650, 4000, 4000, 2500, 2200, 2450))),
    6: dict(zip(ARMS, (8300, 7500, 7500, 4550, 3800, 4250))),
}
SEEDS = range(8)
SETTINGS = {
    f"{arm}-{digits}": dict(arm=arm, digits=digits, steps=STEPS[digits][arm])
    for digits in reversed(DIGITS)
    for arm in ARMS
}


@functools.cache
def data(digits: int):
    """-> the task, and its held-out rows by split."""
    from softar.tasks import mnns

    dev, test = HELD_OUT[digits]
    task = mnns(digits, 0, held_out=dev + test, orders=1, size=TRAIN)
    rows = task.test
    learnt = task.train.select_columns(["prompt", "completion", "traces", "answer"])
    return replace(task, train=on_disk(learnt, f"mnns-{digits}")), {
        "dev": rows.select(range(dev)),
        "test": rows.select(range(dev, dev + test)),
    }


def facts() -> dict[str, dict]:
    """Of the test rows of each size, what the analysis has to know (`evidence_logs.Rows`). Beside all
    rows those count whose answer is more than the parity of the digits' sum, S0 or S1."""
    found = {}
    for digits in reversed(DIGITS):
        rows = data(digits)[1]["test"]
        answers = [*rows["answer"]]
        another = [answers[(i + 1) % len(answers)] for i in range(len(answers))]  # `of_another`
        found[f"{digits} digits"] = dict(
            n=len(answers),
            hash=rows_hash({"test": rows})["test_rows_hash"],
            beside=[i for i, answer in enumerate(answers) if answer not in ("S0", "S1")],
            floor=sum(map(str.__eq__, answers, another)) / len(answers),
        )
    return found


def untrained(unit: Unit):
    """-> the net of all arms before it learns, and its tokenizer."""
    import softar

    return softar.load(
        "mnns-tiny", seed=unit.seed, device=unit.device, largest_sum=9 * max(DIGITS), **NET
    )


def fit(unit: Unit, model, tokenizer, task, fields: dict):
    """Supervised training -> the trainer, and the first line of a log."""
    from softar.sft.config import SoftSFTConfig
    from softar.sft.trainer import SoftSFTTrainer

    def make(args: dict) -> SoftSFTTrainer:
        args = SoftSFTConfig(**args)
        return SoftSFTTrainer(model, args, train_dataset=task.train, processing_class=tokenizer)

    return unit.train(make, fields)


def fields_of(arm: str, task, steps: int) -> dict:
    """The training arguments of an arm."""
    span = dict(
        think_steps=task.think_steps if arm != "no-cot" else 0, eval_new_tokens=task.max_new_tokens
    )
    return TRAINING | ROWS[arm] | dict(max_steps=steps, learning_rate=RATES[arm]) | span


def measure(unit: Unit) -> list[dict]:
    """Train an arm and read it out in every way: the lines of its log."""
    from softar.tasks import no_thought

    arm, digits, steps = (unit.options[name] for name in ("arm", "digits", "steps"))
    task, rows = data(digits)
    model, tokenizer = untrained(unit)
    learnt = task if arm != "no-cot" else no_thought(task)
    trainer, line = fit(unit, model, tokenizer, learnt, fields_of(arm, task, steps) | unit.fields)
    args = trainer.args
    lines = [line | rows_hash(rows)]
    for split in unit.splits:
        lines += readouts(decoders(model, tokenizer, args, arm), rows[split], task, split)
        if args.is_soft:
            lines += list(doses(model, tokenizer, args, rows[split], task, split))
    return lines


def decoders(model, tokenizer, args, arm: str) -> dict:
    from softar.decoders.soft import SelfConsistency, SoftDecoder

    made = {
        name: SoftDecoder(model, tokenizer, args.decoding(name), seed=args.seed)
        for name in ("soft", "discrete")
    }
    if arm == "discrete-traces":
        drawn = replace(
            args.decoding("discrete"), mixer_args={"sample": True}, temperature=VOTES["temperature"]
        )
        voter = SoftDecoder(model, tokenizer, drawn, seed=args.seed)
        made["votes"] = SelfConsistency(voter, VOTES["votes"])
    return made


def doses(model, tokenizer, args, rows, task, split: str):
    """The answers after the rows' own thoughts, whole and cut, and after the next row's."""
    from softar.evals.edited import answers_after, cut, of_another, thoughts_of
    from softar.evaluate import encode

    ids = encode(tokenizer, [*rows["prompt"]])["input_ids"].to(model.device)
    thought = thoughts_of(model, ids, args.decoding("soft"))
    edited = {"own": thought, "another row's": of_another(thought)}
    edited |= {f"top {k}": cut(thought, k) for k in DOSES}
    for name, each in edited.items():
        tokens = answers_after(model, ids, each)
        scores = [task.score(tokenizer.decode(t), row) for t, row in zip(tokens, rows, strict=True)]
        yield read_rows(f"after {name}", split, scores, nfe=None)
