"""What the logs of the evidence hold: which seeds are whole, and which rows each unit had right.

Shapes: S seeds, n rows.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from softar.evals.intervals import number_groups
from softar.recipes.evidence_units import scores_in

DEV, TEST = "dev", "test"  # splits
ROWS_FILE = "rows.json"  # beside the folders of the logs


class Rows(NamedTuple):
    """Test rows that read-outs answer, and what the analysis has to know of them."""

    n: int
    dev: int | None = None  # development rows, where claims choose by them
    number: int = 0  # of its own among those of an experiment, for the bootstrap
    groups: np.ndarray | None = None  # [n] the number of each row's group; None: each is one
    beside: np.ndarray | None = None  # [n] bool: those that every gain is also taken on
    floor: float | None = None  # share of rows whose neighbour has the same answer
    hash: str | None = None  # as in the logs


class Read(NamedTuple):
    """One read-out of one arm."""

    rows: str  # the name of the rows that it answers
    setting: str
    readout: str


@dataclass(frozen=True)
class Logs:
    """The units of an experiment that are there."""

    folder: Path
    planned: list[int]  # all seeds that the rules name
    whole: list[int]  # those of which every unit is there
    missing: dict[int, list[str]]  # of the others that have begun: the settings that are not there
    rows: dict[str, Rows]
    units: dict[tuple[str, int], dict] = field(repr=False, default_factory=dict)
    borrowed: dict[str, Path] = field(default_factory=dict)  # settings of others, and their folder

    def scores(self, read: Read, split: str = TEST) -> np.ndarray:
        """[S, n] of 0 and 1, by whole seed; of DEV, [S, dev]. A unit that failed is wrong in every row.

        Raises:
            ValueError: for a log without this read-out, or with other rows.
        """
        rows = self.rows[read.rows]
        return np.stack([self._scores(read, rows, seed, split) for seed in self.whole])

    def _scores(self, read: Read, rows: Rows, seed: int, split: str) -> np.ndarray:
        log = self.units[read.setting, seed]
        file = self.borrowed.get(read.setting, self.folder) / f"{read.setting}-seed{seed}.json"
        hash_there = log["rows"][0].get(f"{TEST}_rows_hash")
        if rows.hash is not None and hash_there not in (None, rows.hash):
            raise ValueError(
                f"{file}: answers the rows {hash_there}, the experiment has "
                f"{rows.hash}: run this unit again with the code of the others"
            )
        try:
            return scores_in(log, read.readout, split, rows.n if split == TEST else rows.dev)
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from None

    def steps(self, setting: str) -> np.ndarray:
        """[S] of training; nan of one that failed."""
        firsts = [self.units[setting, seed]["rows"][0] for seed in self.whole]
        return np.array([first.get("steps", np.nan) for first in firsts], float)

    def seconds(self, setting: str) -> np.ndarray:
        """[S] of the processor, that the training of each whole seed took; nan of one that failed."""
        firsts = [self.units[setting, seed]["rows"][0] for seed in self.whole]
        return np.array([first.get("processor_seconds", np.nan) for first in firsts], float)

    def forwards(self, read: Read) -> np.ndarray:
        """[S] mean forwards an answer, by whole seed; nan where the log has none, or failed."""
        found = []
        for seed in self.whole:
            lines = self.units[read.setting, seed]["rows"][1:]
            all_of = [x["nfe"] for x in lines if (x["readout"], x["split"]) == (read.readout, TEST)]
            found.append(all_of[0] if all_of and all_of[0] is not None else np.nan)
        return np.array(found, float)

    @property
    def failed(self) -> list[str]:
        return [
            f"{setting}-seed{seed}"
            for (setting, seed), log in sorted(self.units.items())
            if "failed" in log["rows"][0]
        ]


def read_log(file: Path) -> tuple[str, int, dict]:
    """Setting, seed and all that it says. Raises ValueError for a file that is no log of a unit."""
    try:
        log = json.loads(file.read_text(encoding="utf-8"))
        return log["rows"][0]["setting"], log["rows"][0]["seed"], log
    except (ValueError, LookupError, TypeError) as error:
        raise ValueError(f"{file} is no log of a unit ({error}): take it away") from None


def read_logs(
    folder: Path, settings, seeds, rows: dict[str, Rows], borrowed: dict[str, Path] | None = None
) -> Logs:
    """The logs below a folder, which need not be there.

    Args:
        settings, seeds: of the experiment's units, all that there shall be.
        borrowed: settings of other experiments whose logs count as well, and the folder of each.

    Raises:
        ValueError: for a file that is no log of a unit of the experiment.
    """
    units: dict[tuple[str, int], dict] = {}
    for file in sorted(folder.glob("*.json")):
        setting, seed, log = read_log(file)
        if setting not in settings or seed not in seeds or file.stem != f"{setting}-seed{seed}":
            raise ValueError(
                f"{file} says that it is {setting!r} with seed {seed}: the experiment has seeds "
                f"{seeds[0]} to {seeds[-1]} of {[*settings]}, each in a file of its name"
            )
        units[setting, seed] = log
    for name, of in (borrowed or {}).items():
        files = {seed: of / f"{name}-seed{seed}.json" for seed in seeds}
        units |= {(name, s): read_log(file)[2] for s, file in files.items() if file.is_file()}
    every = [*settings, *(borrowed or {})]
    left = {seed: [name for name in every if (name, seed) not in units] for seed in seeds}
    begun = {seed for seed in seeds if any((name, seed) in units for name in settings)}
    return Logs(
        folder=folder,
        planned=[*seeds],
        whole=[seed for seed in seeds if not left[seed]],
        missing={seed: names for seed, names in left.items() if names and seed in begun},
        rows=rows,
        units=units,
        borrowed=borrowed or {},
    )


def read_rows_of(folder: Path) -> dict[str, dict[str, Rows]]:
    """Experiment -> name -> rows, as `write_rows_of` left them.

    Raises:
        ValueError: where they are not there.
    """
    file = folder / ROWS_FILE
    if not file.is_file():
        raise ValueError(
            f"logs={str(folder)!r}: there is no {ROWS_FILE} in it: give the folder tests/evidence of a checkout"
        )
    found = json.loads(file.read_text(encoding="utf-8"))
    return {
        experiment: {
            name: rows_from(facts, number) for number, (name, facts) in enumerate(every.items())
        }
        for experiment, every in found.items()
    }


def rows_from(facts: dict, number: int = 0) -> Rows:
    """facts: n and, where there are such: dev; groups, a name for each row; beside, row numbers; floor;
    hash."""
    groups, beside = facts.get("groups"), facts.get("beside")
    return Rows(
        n=facts["n"],
        dev=facts.get("dev"),
        number=number,
        groups=None if groups is None else number_groups(groups),
        beside=None if beside is None else np.isin(np.arange(facts["n"]), beside),
        floor=facts.get("floor"),
        hash=facts.get("hash"),
    )
