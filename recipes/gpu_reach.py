"""The part of gpu.py that runs X2 of the evidence on SmolLM2-135M; see gpu_parts.py for what a part is."""

import copy
import tempfile
from pathlib import Path

from gpu_parts import DEVICE, Left, Record

from softar.recipes import evidence_reach
from softar.recipes.evidence_reach import NETS, TRAINED, Net
from softar.recipes.evidence_units import Unit

NET = "smollm2-gpu"
ARMS = tuple(evidence_reach.settings("smollm2"))
SEEDS, ROWS, BATCH = (0, 1), 12_000, 128
PILOT, PILOT_SEED, BAND = "discrete-traces", 999, (0.55, 0.9)  # as the rules of X2 say
TIMED, WARM_UP, TRAIN = 6, 0.15, 0.11  # steps that are timed; of a seed's time: the warm-up, an arm


def net(is_dry: bool) -> Net:
    """SmolLM2 opened once, with more rows a step than a CPU takes; dry: the small net, for two steps."""
    base = NETS["small" if is_dry else "smollm2"]
    model, tokenizer = base.load(0, str(DEVICE))
    sizes = dict(rows=40, dev=4, test=6) if is_dry else dict(rows=ROWS, dev=300, test=1000)
    stages = tuple(stage._replace(rows=sizes["rows"]) for stage in base.stages[-1:])
    batch = dict(per_device_train_batch_size=8 if is_dry else BATCH)
    return base._replace(
        load=lambda seed, device: (copy.deepcopy(model), tokenizer),
        training=base.training | batch,
        stages=stages,
        **sizes,
        batch_size=500,
        edits=False,
    )


def reach(record: Record, is_dry: bool, left: Left) -> None:
    """Each seed's arms from one warm-up, all for as many seconds as fit, which steps timed here say.
    A pilot on development rows comes first: where discrete traces do not land in the band, no test
    row is read. They are read once; a row for each read-out, with the verdict on every one."""
    NETS[NET] = net(is_dry)
    evidence_reach.data(NET)
    with tempfile.TemporaryDirectory() as folder:
        evidence_reach.WARM_UPS = Path(folder)
        rates = seconds_a_step()
        record(
            dict(what="ms a step", note=", ".join(f"{a} {1000 * s:.0f}" for a, s in rates.items()))
        )
        set_steps(rates, 0 if is_dry else left() / (len(SEEDS) + WARM_UP + 2 * TRAIN))
        if not passes(pilot(record)) and not is_dry:
            return
        for number, seed in enumerate(SEEDS):
            whole = 0 if is_dry else left() / (len(SEEDS) - number)
            set_steps(rates, whole)
            for arm in ARMS:
                if left() < (0 if is_dry else 2 * TRAIN * whole):
                    return record(dict(what=arm, seed=seed, note="no time left"))
                for row in rows_of(arm, seed):
                    record(row)


def pilot(record: Record) -> float:
    """Accuracy of PILOT, read discretely, on development rows."""
    (score,) = (
        row["accuracy"]
        for row in rows_of(PILOT, PILOT_SEED, split="dev")
        if row["readout"] == "discrete"
    )
    said = "" if passes(score) else f": outside {BAND[0]} to {BAND[1]}, so no test row is read"
    record(dict(what="pilot", seed=PILOT_SEED, accuracy=score, note=f"{PILOT}, discrete{said}"))
    return score


def passes(score: float) -> bool:
    return BAND[0] <= score <= BAND[1]


def unit(arm: str, seed: int, **more) -> Unit:
    device = "cuda" if DEVICE.type == "cuda" else "cpu"
    return Unit("X2", arm, dict(net=NET, arm=arm), seed, device, **more)


def seconds_a_step() -> dict[str, float]:
    """Of each arm, from a few steps behind a warm-up of as few: so that all train equally long."""
    few = NETS[NET]
    NETS[NET] = few._replace(stages=tuple(stage._replace(steps=2) for stage in few.stages))
    found = {}
    for arm in ARMS:
        if arm != "warm":
            fields = dict(max_steps=TIMED, warmup_steps=1)
            runs = [
                evidence_reach.measure(unit(arm, 999, splits=(), fields=fields))[0]["seconds"]
                for _ in range(2)
            ]
            found[arm] = min(runs) / TIMED
    NETS[NET] = few
    return found


def set_steps(rates: dict[str, float], seconds: float) -> None:
    """seconds: of a seed. An arm has TRAIN of them, the warm-up WARM_UP at a discrete arm's rate; at
    least two steps."""
    steps = {arm: max(2, int(TRAIN * seconds / rate)) for arm, rate in rates.items()}
    warm = max(2, int(WARM_UP * seconds / rates["discrete"]))
    stages = tuple(stage._replace(steps=warm) for stage in NETS[NET].stages)
    NETS[NET] = NETS[NET]._replace(steps=dict.fromkeys(TRAINED, 2) | steps, stages=stages)


def rows_of(arm: str, seed: int, split: str = "test") -> list[dict]:
    first, *lines = evidence_reach.measure(unit(arm, seed, splits=(split,)))
    names = ("steps", "seconds", "train_loss", "test_rows_hash", "warm_up")
    about = {name: first[name] for name in names}
    return [dict(what=arm, seed=seed) | about | line for line in lines]
