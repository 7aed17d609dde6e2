"""What the answers of lm-eval's tasks cost, and how they were decoded: written into its results, and
read out of them as rows of a sweep."""

import json
from dataclasses import dataclass
from pathlib import Path

from ..specs import format_options


@dataclass
class Costs:
    """Of the answers of one task, as this process decoded them."""

    answers: int = 0
    forwards: float = 0.0  # each answer's own, up to its last token
    positions: float = 0.0
    tokens: int = 0
    seconds: float = 0.0

    def add(self, forwards: list[float], positions: float, tokens: int, seconds: float) -> None:
        """A batch. forwards: of each of its answers."""
        self.answers += len(forwards)
        self.forwards += sum(forwards)
        self.positions += positions
        self.tokens += tokens
        self.seconds += seconds

    def row(self) -> dict:
        """As in the rows of `softar.compare`."""
        return dict(
            n=self.answers,
            nfe=self.forwards / self.answers,
            tpf=self.tokens / self.forwards if self.forwards else None,
            token_forwards=self.positions / self.answers,
            tokens_per_s=self.tokens / self.seconds,
            seconds=self.seconds,
            seconds_per_row=self.seconds / self.answers,
        )


def read_harness(folder: str | Path) -> list[dict]:
    """The rows of `softar-eval`'s results below a folder, for `aggregate` and `plot_sweep`; [] where
    there are none. Of two results of the same run the later counts.

    The accuracy is the task's first metric. What differs between the runs of one decoder is what
    varies.
    """
    rows: dict[tuple, dict] = {}
    for file in sorted(Path(folder).rglob("results_*.json")):
        try:
            data = json.loads(file.read_text())
            own = data["config"]["softar"]
        except (ValueError, KeyError, TypeError):
            continue  # of another program
        for task, cost in own["costs"].items():
            row = dict(
                task=task,
                role="soft" if own["is_soft"] else "baseline",
                spec=f"{own['model']}={own['decoder']}",
                model=own["model"],
                seed=data["config"].get("torch_seed"),
                accuracy=_first_metric(data["results"][task]),
                settings=own["settings"],
                **cost,
            )
            key = (task, row["role"], row["spec"], json.dumps(row["settings"]), row["seed"])
            rows[key] = row
    _name(list(rows.values()))
    return list(rows.values())


def _first_metric(results: dict) -> float:
    """Of a task's results, "metric,filter" -> value; "alias" and standard errors are none."""
    values = [v for k, v in results.items() if "," in k and "_stderr" not in k]
    return next(float(v) for v in values if isinstance(v, (int, float)))


def _name(rows: list[dict]) -> None:
    """Add what varies, and the name of the run."""
    decoders: dict[tuple, list[dict]] = {}
    for row in rows:
        decoders.setdefault((row["role"], row["spec"]), []).append(row["settings"])
    for row in rows:
        others = decoders[row["role"], row["spec"]]
        names = dict.fromkeys(name for settings in others for name in settings)
        varied = [n for n in names if len({json.dumps(s.get(n)) for s in others}) > 1]
        row["varied"] = format_options({n: row["settings"].get(n) for n in varied}, " ")
        row["run"] = f"{row['task']}-{row['role']}-{row['spec']}-{row['varied']}-seed{row['seed']}"
