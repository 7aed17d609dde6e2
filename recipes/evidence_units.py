"""What the experiments of the evidence share: a unit, which is one arm with one seed, and the lines
of its log."""

import functools
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from datasets import Dataset

PROCESSOR = Path("/proc/cpuinfo")  # of Linux


@dataclass(frozen=True)
class Unit:
    """An arm, trained with one seed and read out."""

    experiment: str
    setting: str  # its name among the experiment's
    options: dict  # what the experiment's `measure` is told
    seed: int
    device: str = "cpu"
    splits: tuple[str, ...] = ("dev", "test")
    fields: dict = field(default_factory=dict)  # of a pilot: training arguments that it tries

    @property
    def name(self) -> str:
        return f"{self.setting}-seed{self.seed}"

    @property
    def training(self) -> dict:
        """The training arguments that all experiments share."""
        return dict(
            seed=self.seed,
            use_cpu=self.device == "cpu",
            report_to="none",
            save_strategy="no",
            logging_steps=100,
            disable_tqdm=True,
        )

    def line(self, watch: "Watch", trainer, arguments: dict) -> dict:
        """The first of a log: what was trained, and what it took."""
        return dict(
            experiment=self.experiment,
            setting=self.setting,
            seed=self.seed,
            device=self.device,
            processor=processor(),
            steps=trainer.state.global_step,
            train_loss=trainer.state.log_history[-1].get("train_loss"),
            processor_seconds=watch.processor,
            seconds=watch.wall,
            arguments=arguments,
        )


@functools.cache
def scratch() -> tempfile.TemporaryDirectory:
    """A folder as long as the process lives."""
    return tempfile.TemporaryDirectory(prefix="evidence-")


def on_disk(rows: Dataset, name: str) -> Dataset:
    """The rows in files, beside which `datasets` leaves what it makes of them: trained on again, they
    are not tokenised again."""
    folder = Path(scratch().name, name)
    rows.save_to_disk(folder)
    return Dataset.load_from_disk(folder)


class Watch:
    """Seconds inside a `with`: of the processor, by this process, and of the wall."""

    def __enter__(self):
        self.processor, self.wall = -time.process_time(), -time.perf_counter()
        return self

    def __exit__(self, *_):
        self.processor += time.process_time()
        self.wall += time.perf_counter()


def readouts(decoders: dict, rows, task, split: str) -> list[dict]:
    """A line for each decoder over the rows."""
    from softar.evals.compare import compare

    found = compare(decoders, rows, task.score, batch_size=500, warmup=0, bootstrap=1)
    if found.failures or found.interrupted:
        raise RuntimeError(f"a decoder failed: {found.failures or 'interrupted'}")
    costs = {row["name"]: row["nfe"] for row in found.rows}
    return [
        read_rows(name, split, passes[0].scores, costs[name])
        for name, passes in found.passes.items()
    ]


def read_rows(readout: str, split: str, scores, nfe: float | None) -> dict:
    """One read-out. scores: [n] of 0 and 1, in hexadecimal, eight rows in two digits, the first one
    in the highest bit. nfe: forwards an answer."""
    bits = np.asarray(scores) > 0
    return dict(
        readout=readout,
        split=split,
        accuracy=float(bits.mean()),
        n=len(bits),
        nfe=nfe,
        scores=np.packbits(bits).tobytes().hex(),
    )


def scores_of(line: dict) -> np.ndarray:
    """[n] of 0 and 1: what `read_rows` wrote."""
    packed = np.frombuffer(bytes.fromhex(line["scores"]), np.uint8)
    return np.unpackbits(packed)[: line["n"]]


def processor() -> str | None:
    """What the machine says of its processor."""
    if not PROCESSOR.is_file():
        return None
    lines = PROCESSOR.read_text(encoding="utf-8").splitlines()
    return next((x.partition(":")[2].strip() for x in lines if x.startswith("model name")), None)
