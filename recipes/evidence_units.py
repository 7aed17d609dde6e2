"""What the experiments of the evidence share: a unit, which is one arm with one seed, and the lines
of its log."""

import contextlib
import functools
import hashlib
import io
import json
import os
import re
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from datasets import Dataset
from safetensors.torch import save_file

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

    def train(self, make: Callable, fields: dict):
        """make: the trainer, of its arguments -> that trainer, afterwards, and the first line of a log."""
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
            trainer = make(dict(output_dir=folder) | self.training | fields)
            with Watch() as watch:
                trainer.train()
        return trainer, self.line(watch, trainer, fields)

    def line(self, watch: "Watch", trainer, arguments: dict) -> dict:
        """The first of a log: what was trained, and what it took; trainer None: nothing was."""
        return dict(
            experiment=self.experiment,
            setting=self.setting,
            seed=self.seed,
            device=self.device,
            processor=processor(),
            steps=0 if trainer is None else trainer.state.global_step,
            train_loss=None if trainer is None else trainer.state.log_history[-1].get("train_loss"),
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


def rows_hash(rows: dict[str, Dataset]) -> dict:
    """By which a log tells the rows of its splits: the start of a SHA-256 of their columns, as JSON."""
    texts = {split: json.dumps(some.to_dict(), sort_keys=True) for split, some in rows.items()}
    return {
        f"{split}_rows_hash": hashlib.sha256(text.encode()).hexdigest()[:16]
        for split, text in texts.items()
    }


def is_not_finite(error: Exception) -> bool:
    """Is the trouble a number that is NaN or infinite? torch says so in words alone, and
    `softar.evals.compare` in those of the first decoder that failed."""
    names = r"\b(nan|inf|infinite|FloatingPointError)\b"
    return isinstance(error, FloatingPointError) or bool(
        re.search(names, str(error), re.IGNORECASE)
    )


def weights_file(folder: Path, name: str, unit: Unit, fields: dict) -> Path:
    """Its name tells whether the weights were trained with these arguments."""
    made_with = json.dumps([fields, unit.device], sort_keys=True)
    mark = hashlib.sha256(made_with.encode()).hexdigest()[:8]
    return folder / f"{name}-seed{unit.seed}-{mark}.safetensors"


def keep_weights(model, file: Path) -> str:
    """Write them, whole or not at all -> their hash."""
    file.parent.mkdir(parents=True, exist_ok=True)
    draft = file.with_suffix(f".{os.getpid()}.partial")
    save_file(model.state_dict(), draft)
    draft.replace(file)
    return hash_of(file)


def hash_of(file: Path) -> str:
    """By which logs show that arms began with the same weights: the start of its SHA-256."""
    return hashlib.sha256(file.read_bytes()).hexdigest()[:16]


class Watch:
    """Seconds inside a `with`: of the processor, by this process, and of the wall; before one, none."""

    processor = wall = 0.0

    def __enter__(self):
        self.processor, self.wall = -time.process_time(), -time.perf_counter()
        return self

    def __exit__(self, *_):
        self.processor += time.process_time()
        self.wall += time.perf_counter()


def readouts(decoders: dict, rows, task, split: str, batch_size: int = 500) -> list[dict]:
    """A line for each decoder over the rows."""
    from softar.evals.compare import compare

    found = compare(decoders, rows, task.score, batch_size=batch_size, warmup=0, bootstrap=1)
    failures = found.failures + found.scorer_failures
    if failures or found.interrupted:
        raise RuntimeError(f"a decoder or the scorer failed: {failures or 'interrupted'}")
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


def scores_in(log: dict, readout: str, split: str, rows: int) -> np.ndarray:
    """[rows] of 0 and 1, what a log has of a read-out. A unit that failed is wrong in every row.

    Raises:
        ValueError: where the log has no such read-out, or of another number of rows.
    """
    first, *lines = log["rows"]
    if "failed" in first:
        return np.zeros(rows, np.uint8)
    found = [line for line in lines if (line["readout"], line["split"]) == (readout, split)]
    fits = [line for line in found if line["n"] == rows]
    if len(fits) != 1:
        raise ValueError(
            f"readout={readout!r}, split={split!r}, rows={rows}: the log has {len(fits)} such among "
            f"{[(line['readout'], line['split'], line['n']) for line in lines]}"
        )
    return scores_of(fits[0])


def processor() -> str | None:
    """What the machine says of its processor."""
    if not PROCESSOR.is_file():
        return None
    lines = PROCESSOR.read_text(encoding="utf-8").splitlines()
    return next((x.partition(":")[2].strip() for x in lines if x.startswith("model name")), None)
