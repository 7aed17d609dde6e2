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
    varies: its settings, and how lm-eval was told to ask a task.
    """
    rows: dict[str, dict] = {}
    for file in sorted(Path(folder).rglob("results_*.json")):
        try:
            data = json.loads(file.read_text())
            own = data["config"]["softar"]
        except (ValueError, KeyError, TypeError):
            continue  # of another program
        torch_seed = data["config"].get("torch_seed")
        for task, cost in own["costs"].items():
            row = dict(
                task=task,
                role="soft" if own["is_soft"] else "baseline",
                spec=f"{own['model']}={own['decoder']}",
                model=own["model"],
                seed=torch_seed if own.get("seed") is None else own["seed"],
                accuracy=_first_metric(data["results"][task]),
                settings=own["settings"],
                asked=_asked(data, task),
                **cost,
            )
            names = ("task", "role", "spec", "settings", "asked", "seed")
            # examples are drawn by a seed of their own, which is no setting: --seed sets it, too
            drawn = data["config"].get("fewshot_seed")
            rows[json.dumps([*(row[name] for name in names), drawn], sort_keys=True)] = row
    _name(list(rows.values()))
    return list(rows.values())


def _asked(data: dict, task: str) -> dict:
    """How lm-eval asked the task, by the names of its options; None where it was not told."""
    config = data["config"]
    return dict(
        num_fewshot=data.get("n-shot", {}).get(task),
        limit=config.get("limit"),
        gen_kwargs=config.get("gen_kwargs"),
        apply_chat_template=(data.get("chat_template_sha") or "")[:8] or None,
        fewshot_as_multiturn=data.get("fewshot_as_multiturn"),
        system_instruction=data.get("system_instruction"),
    )


def _first_metric(results: dict) -> float:
    """Of a task's results, "metric,filter" -> value; "alias" and standard errors are none."""
    values = [v for k, v in results.items() if "," in k and "_stderr" not in k]
    return next(float(v) for v in values if isinstance(v, (int, float)))


def _name(rows: list[dict]) -> None:
    """Add what varies, and the name of the run."""
    for row in rows:
        others = [r for r in rows if (r["role"], r["spec"]) == (row["role"], row["spec"])]
        # each task has examples of its own
        same = [r for r in others if r["task"] == row["task"]]
        varied = _differing(row, others, "settings") | _differing(row, same, "asked")
        row["varied"] = format_options(varied, " ")
        row["run"] = f"{row['task']}-{row['role']}-{row['spec']}-{row['varied']}-seed{row['seed']}"


def _differing(row: dict, others: list[dict], column: str) -> dict:
    """What of a row's column, a dict, is not the same in all the others."""
    dicts = [other[column] for other in others]
    names = dict.fromkeys(name for each in dicts for name in each)
    varied = [n for n in names if len({json.dumps(each.get(n)) for each in dicts}) > 1]
    return {n: row[column].get(n) for n in varied}
