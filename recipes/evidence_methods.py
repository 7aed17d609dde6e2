"""The table of methods: every way of thinking softly, on MNNS with 4 and 6 digits (RESULTS.md,
"Evidence: rules"). Net, rows and seeds are those of X1, whose logs it reads beside its own."""

import dataclasses
import functools
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from datasets import Dataset
from safetensors.torch import load_file

from softar.recipes import evidence_mnns as mnns
from softar.recipes import evidence_rl as rl
from softar.recipes.evidence_units import (
    Unit,
    hash_of,
    keep_weights,
    on_disk,
    readouts,
    rows_hash,
    weights_file,
)
from softar.recipes.sft_soft import ROWS

DIGITS = (6, 4)
SEEDS = range(3)
PAUSE = "+"  # a word that MNNS does not use: it says nothing
# Weights of the nets that are trained again, in a checkout; git ignores them
FOLDER = Path(__file__).resolve().parent.parent / "runs" / "evidence" / "nets"
BEAMS = 4  # wide; and so many votes, which take as many forwards
TEMPERATURE = 1.0  # of what draws
# Settings of read-outs among which the development rows choose
SWITCHES = {"swi, block": "block", "swi, 0.5": 0.5, "swi, 1.0": 1.0}
ANCHORS = {f"soft-beam, {anchor}": anchor for anchor in (0.25, 0.5, 0.75)}
AHEAD = {f"beam-collapse, {every}": every for every in (2, 3)}
DRAWS = {  # mixer -> its knobs
    "gumbel": dict(tau=0.5),
    "k-samples": dict(k=3),
    "mixture-of-inputs": dict(beta=1.0),
    "dirichlet": dict(gamma=1.0),
    "hybrid": dict(share=0.5),
}


class Arm(NamedTuple):
    """What is trained here."""

    row: str  # of sft_soft, whose fields it has
    fields: dict = {}
    rate: float | None = None  # None: X1's, of that row
    steps: int | None = None  # None: those of trace-soft in X1
    net: str | None = None  # of `AGAIN`, which it begins with
    digits: tuple[int, ...] = DIGITS


AGAIN = {  # X1's arms once more, as X1 keeps no weights: by X1's own arguments
    "again-discrete-traces": "discrete-traces",
    "again-trace-soft": "trace-soft",
}
PREFIX = dict(rate=3e-2, steps=500, net="again-discrete-traces", fields=dict(think_tokens=8))
ARMS = {
    "coconut": Arm("coconut", rate=1.5e-3),
    "pause": Arm("discrete"),
    "prefix-soft": Arm("trace-soft", **PREFIX),
    "prefix-hard": Arm("discrete-traces", **PREFIX),
    "learn-min-p": Arm("trace-soft", dict(learn_min_p=True, soft_min_p=0.05)),
    "learn-top-k": Arm("trace-soft", dict(learn_top_k=True, soft_top_k=8)),
    "learn-step": Arm("trace-soft", dict(learn_step_temperature=True)),
    "learn-one": Arm("trace-soft", dict(learn_temperature=True), digits=(4,)),
    "fixed-min-p": Arm("trace-soft", dict(soft_min_p=0.05), digits=(4,)),
    "fixed-top-k": Arm("trace-soft", dict(soft_top_k=8), digits=(4,)),
}
# RL of the net of trace-soft, by X4's settings: the policy's mixer, with softar's knobs
REINFORCED = {f"rl-{mixer}": mixer for mixer in ("hard", "gumbel", "mixture-of-inputs", "hybrid")}
RL_STEPS = 200
SETTINGS = {
    f"{arm}-{digits}": dict(arm=arm, digits=digits)
    for digits in DIGITS
    for arm in (
        *AGAIN,
        *(name for name, each in ARMS.items() if digits in each.digits),
        *REINFORCED,
    )
}


def facts() -> dict[str, dict]:
    """Of the rows, what the analysis has to know (`evidence_logs.Rows`): they are X1's."""
    every = mnns.facts()
    return {
        name: dict(n=every[name]["n"], dev=mnns.HELD_OUT[digits][0], hash=every[name]["hash"])
        for name, digits in {f"{digits} digits": digits for digits in DIGITS}.items()
    }


def measure(unit: Unit) -> list[dict]:
    """Train an arm, read it out in every way: the lines of its log."""
    arm, digits = unit.options["arm"], unit.options["digits"]
    task, rows = mnns.data(digits)
    model, tokenizer = mnns.untrained(unit)
    if arm in AGAIN:
        trainer, line = train_again(unit, model, tokenizer, arm)
        made = decoders(trainer, tokenizer) | untrained_ways(trainer, tokenizer)
    elif arm in REINFORCED:
        trainer, line = reinforce(unit, model, tokenizer, arm)
        made = policies(trainer, tokenizer)
    else:
        trainer, line = train(unit, model, tokenizer, arm)
        made = decoders(trainer, tokenizer)
    lines = [line | rows_hash(rows)]
    for split in unit.splits:
        lines += readouts(made, rows[split], task, split)
    return lines


def train_again(unit: Unit, model, tokenizer, arm: str):
    """As X1 does -> the trainer, and the first line of a log. The weights are kept."""
    task, fields = mnns.data(unit.options["digits"])[0], fields_again(unit, arm) | unit.fields
    trainer, line = mnns.fit(unit, model, tokenizer, task, fields)
    return trainer, line | dict(net_hash=keep_weights(model, net_file(unit, arm, fields)))


def fields_again(unit: Unit, arm: str) -> dict:
    digits, of_x1 = unit.options["digits"], AGAIN[arm]
    return mnns.fields_of(of_x1, mnns.data(digits)[0], mnns.STEPS[digits][of_x1])


def net_file(unit: Unit, arm: str, fields: dict) -> Path:
    return weights_file(FOLDER, f"{arm}-{unit.options['digits']}", unit, fields)


def open_net(unit: Unit, model, tokenizer, arm: str) -> str:
    """Give the model the weights of that net, which is trained where nobody has -> their hash."""
    plain = dataclasses.replace(unit, fields={})
    file = net_file(unit, arm, fields_again(plain, arm))
    if not file.is_file():
        train_again(plain, model, tokenizer, arm)
    model.load_state_dict(load_file(file, device=str(model.device)))
    return hash_of(file)


def train(unit: Unit, model, tokenizer, arm: str):
    """-> the trainer, and the first line of a log."""
    digits, about = unit.options["digits"], {}
    task, net = mnns.data(digits)[0], ARMS[arm].net
    if net is not None:
        about["net_hash"] = open_net(unit, model, tokenizer, net)
    learnt = pauses(digits) if arm == "pause" else task
    fields = fields_of(arm, digits) | unit.fields
    trainer, line = mnns.fit(unit, model, tokenizer, learnt, fields)
    return trainer, line | about | dict(decodes=trainer.decoding("soft").shown)


def reinforce(unit: Unit, model, tokenizer, arm: str):
    """-> the trainer, and the first line of a log."""
    net = open_net(unit, model, tokenizer, "again-trace-soft")
    fields = rl.RL | dict(soft_mixer=REINFORCED[arm], max_steps=RL_STEPS) | unit.fields
    task = mnns.data(unit.options["digits"])[0]
    trainer, line = rl.reinforce(unit, model, tokenizer, task, fields)
    return trainer, line | dict(net_hash=net)


def policies(trainer, tokenizer) -> dict:
    """As it was rolled out, softly and discretely; answers are greedy."""
    from softar.decoders.soft import SoftDecoder

    drawn, of = trainer.args.decoding().changed(answer_temperature=0.0), (trainer.model, tokenizer)
    ways = {"drawn": drawn} | {
        name: drawn.changed(mixer=mixer, mixer_args={})
        for name, mixer in (("soft", "soft"), ("discrete", "hard"))
    }
    return {name: SoftDecoder(*of, how, seed=trainer.args.seed) for name, how in ways.items()}


def fields_of(arm: str, digits: int) -> dict:
    """The training arguments of an arm."""
    each, task = ARMS[arm], mnns.data(digits)[0]
    fields = dict(
        max_steps=each.steps or mnns.STEPS[digits]["trace-soft"],
        learning_rate=each.rate or mnns.RATES[each.row],
        think_steps=task.think_steps,
        eval_new_tokens=task.max_new_tokens,
    )
    stages = dict(latent_stages=task.think_steps) if each.row == "coconut" else {}
    return mnns.TRAINING | ROWS[each.row] | fields | stages | each.fields


@functools.cache
def pauses(digits: int):
    """The task, with PAUSE in place of each sum of a thought."""
    task = mnns.data(digits)[0]
    rows = {"prompt": task.train["prompt"], "answer": task.train["answer"]}
    thought = f" {PAUSE}" * task.think_steps
    rows["completion"] = [f"{thought} {answer}" for answer in rows["answer"]]
    return replace(task, train=on_disk(Dataset.from_dict(rows), f"pause-{digits}"))


def decoders(trainer, tokenizer) -> dict:
    """As it was trained, softly and discretely."""
    from softar.decoders.soft import SoftDecoder

    how = dict(seed=trainer.args.seed)
    return {
        name: SoftDecoder(trainer.model, tokenizer, trainer.decoding(name), **how)
        for name in ("discrete", "soft")
    }


def untrained_ways(trainer, tokenizer) -> dict:
    """What needs no training of its own, and what it is compared with."""
    from softar.decoders.beam import BeamDecoder, BeamOptions
    from softar.decoders.beam_collapse import BeamCollapse
    from softar.decoders.search import SearchDecoder
    from softar.decoders.soft import SelfConsistency, SoftDecoder
    from softar.decoders.soft_beam import SoftBeam

    think, hard = trainer.decoding("soft"), trainer.decoding("discrete")
    ways = {name: think.changed(switch=at, switch_dwell=1) for name, at in SWITCHES.items()}
    ways["hidden"] = think.changed(mixer="hidden")
    ways["hidden, norm"] = think.changed(mixer="hidden", rescale="norm")
    for mixer, knobs in DRAWS.items():
        ways[mixer] = think.changed(mixer=mixer, mixer_args=knobs, temperature=TEMPERATURE)
    ways["sampled"] = hard.changed(mixer_args={"sample": True}, temperature=TEMPERATURE)
    ways["votes"] = hard.changed(mixer_args={"sample": True}, temperature=mnns.VOTES["temperature"])
    of = trainer.model, tokenizer
    made = {name: SoftDecoder(*of, how, seed=trainer.args.seed) for name, how in ways.items()}
    made["votes"] = SelfConsistency(made["votes"], BEAMS)
    span = dict(max_new_tokens=think.max_new_tokens, budget=think.budget)
    made["beam"] = BeamDecoder(*of, BeamOptions(num_beams=BEAMS, **span))
    searches = {name: SoftBeam(BEAMS, anchor) for name, anchor in ANCHORS.items()}
    searches |= {name: BeamCollapse(BEAMS, every) for name, every in AHEAD.items()}
    return made | {name: SearchDecoder(*of, think, search) for name, search in searches.items()}
