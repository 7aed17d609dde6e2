"""Decoders side by side: accuracy, cost and how sure one can be of the difference.

Knows no model family: a decoder is anything that turns prompts into `Decoded`.
"""

import json
import math
import shutil
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field, replace
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from rich.console import Console

from ..checks import check_choice, check_least, check_writable
from ..decoders.answer import Decoder, NamedDecoder, as_decoder
from ..results import write_csv, write_results, write_whole
from .chart import TABLE_WIDTH, comparison_table, plot_frontier
from .contest import TEMPLATE, Contest, Failure, scorer_remark
from .intervals import number_groups
from .summary import Pass, number, summarise

if TYPE_CHECKING:
    from datasets import Dataset

COSTS = ("nfe", "token_forwards")
GROUP = "group"  # column of rows that belong together


class NoAnswers(ValueError):
    """No decoder gave any."""


@dataclass(repr=False)
class Comparison:
    """What `compare` found; printed it is its table. `rows` are those of results.json, one for each
    decoder that answered anything:

    * task, model, decoder, setting, family, name, stage (None), seed, and what else its decoder's
      `columns` hold
    * n: rows that have a score; groups: of rows that belong together, n where each stands alone;
      repeats: whole passes, or 1 that was cut short; complete: there is a whole pass
    * accuracy: mean score, a row's being its mean over the repeats; accuracy_low, accuracy_high:
      95 % interval over the groups, Wilson's where all scores are 0 or 1, else by percentiles of a
      bootstrap (softar.evals.intervals); accuracy_sd: over repeats, None for one
    * gain, gain_low, gain_high: accuracy less the baseline's on the rows that both have, paired,
      its interval Bonett and Price's or by bootstrap; None for the baseline
    * agreement: share of rows with the baseline's answer, as `extract` reads it out of the text
    * nfe, token_forwards: per answer, None of a server, which does not tell; seconds_per_row
    * seconds: decoding of one pass, mean over repeats; seconds_sd: over repeats; tokens_per_s:
      returned tokens
    * tpf: returned tokens per forward; aup: accuracy under parallelism of the decoder over all of its
      settings here, best of all decoders here (softar.evals.parallelism)
    * entropy: mean nats, of the belief at each step, of diffusion at each token when it was decided;
      None where not known
    * peak_memory: bytes allocated on a GPU at most, those of every open model included; None
      elsewhere, where only the peak of the whole process since its start is known
    """

    rows: list[dict]
    baseline: str | None  # its name; None where it is not among the rows
    failures: list[Failure] = field(default_factory=list)
    scorer_failures: list[Failure] = field(default_factory=list)  # of answers that count 0 for it
    interrupted: bool = False
    overhead: float = 0.0  # share of the time after the warm-up that was not spent in decoders
    # without a row: failed, not reached, or over the budget
    left_out: list[str] = field(default_factory=list)
    # by name: texts, scores and traces
    passes: dict[str, list[Pass]] = field(default_factory=dict, repr=False)
    bootstrap: int = 1000
    seed: int = 0
    groups: "np.ndarray | None" = field(default=None, repr=False)  # [n] the number of a row's group

    def matched(self, by: str = "nfe", budget: float = math.inf) -> "Comparison":
        """The decoders at equal cost: of each decoder and model the setting that uses most of the
        budget and does not exceed it, the first of several; accuracy plays no part. Gains are over
        the setting picked of the baseline's decoder, or None where it has none inside. What was cut
        short is not picked.

        by: "nfe" or "token_forwards".   budget: per answer.
        """
        check_choice("by", by, COSTS)
        if not budget > 0:
            raise ValueError(f"budget={budget} must be > 0 {by} per answer")
        settings: dict[tuple, list[dict]] = {}
        for row in self.rows:
            settings.setdefault((row["model"], row["decoder"]), []).append(row)
        picks = {}
        for group, rows in settings.items():
            whole = [row for row in rows if row["complete"] and row[by] is not None]
            inside = [row for row in whole if row[by] <= budget]
            picks[group] = max(inside, key=lambda row: row[by]) if inside else None
        picked = {
            row["name"]: row for row in self.rows if any(row is pick for pick in picks.values())
        }
        groups = {row["name"]: (row["model"], row["decoder"]) for row in self.rows}
        of_baseline = picks.get(groups.get(self.baseline))
        baseline = of_baseline and of_baseline["name"]
        left_out = self.left_out + [
            "=".join(filter(None, group)) for group, pick in picks.items() if pick is None
        ]
        passes = {name: self.passes[name] for name in picked}
        rows = summarise(passes, picked, baseline, self.bootstrap, self.seed, self.groups)
        return replace(self, rows=rows, baseline=baseline, left_out=left_out, passes=passes)

    def __str__(self) -> str:
        text = StringIO()
        width = max(TABLE_WIDTH, shutil.get_terminal_size((TABLE_WIDTH, 24)).columns)
        Console(file=text, width=min(width, 100)).print(self.table())
        return "\n".join(line.rstrip() for line in text.getvalue().splitlines())

    __repr__ = __str__

    def table(self):
        """rich.table.Table, one line per decoder, 95 % intervals below accuracy and gain."""
        return comparison_table(self.shown(), notes="; ".join(self.notes()))

    def shown(self) -> list[dict]:
        """`rows` for a table: names without their model, which a table has beside them, or with the
        task where all rows share it. Names stay as they are where that would make two of them
        alike."""
        rows = [row | {"name": row["name"].removeprefix(f"{row['model']}=")} for row in self.rows]
        if len({(row["name"], row["model"]) for row in rows}) < len(rows):
            rows = [dict(row) for row in self.rows]
        models = {row["model"] for row in rows}
        if len(models) == 1 and None not in models:
            rows = [row | {"task": ", ".join(filter(None, [row["task"], *models]))} for row in rows]
        return rows

    def notes(self) -> list[str]:
        """What else one must know of `rows`; failures are named where they happen, and in
        `failures`."""
        short = {row["name"]: line["name"] for row, line in zip(self.rows, self.shown())}
        several = len({row["model"] for row in self.rows}) > 1
        base = self.baseline if several else short.get(self.baseline)
        notes = [f"gain over {base}"] if base and len(self.rows) > 1 else []
        notes += ["interrupted: what was done is shown"] if self.interrupted else []
        notes += [f"without a row: {', '.join(self.left_out)}"] if self.left_out else []
        mute = [short[row["name"]] for row in self.rows if self._is_mute(row["name"])]
        notes += [f"all answers are empty: {', '.join(mute)}"] if mute else []
        n, m = len(self.failures), len(self.scorer_failures)
        notes += [f"{n} failure{'s' * (n > 1)}"] * (n > 0)
        return notes + [scorer_remark(m)] * (m > 0)

    def _is_mute(self, name: str) -> bool:
        """As a chat model is that is asked without its template, or a thought that never ends."""
        return not any(a.text.strip() for p in self.passes.get(name, []) for a in p.answers if a)

    def to_pandas(self):
        """pandas.DataFrame of `rows`."""
        import pandas

        return pandas.DataFrame(self.rows)

    def save(self, folder: str | Path) -> Path:
        """Write results.json and results.csv (`rows`), rows.jsonl (a line for each answer: row,
        decoder, repeat, text, score, num_forwards, seconds), and failures.jsonl, the
        scorer's too, if there are any; each file whole or not at all -> folder."""
        folder = Path(folder)
        check_writable(folder, "folder")
        write_whole(folder / "rows.jsonl", _json_lines(self._answers()))
        if self.failures or self.scorer_failures:
            failures = (each._asdict() for each in [*self.failures, *self.scorer_failures])
            write_whole(folder / "failures.jsonl", _json_lines(failures))
        else:  # of an earlier comparison
            (folder / "failures.jsonl").unlink(missing_ok=True)
        write_csv(folder / "results.csv", self.rows)
        write_results(folder / "results.json", self.rows)
        return folder

    def _answers(self) -> Iterator[dict]:
        for name, passes in self.passes.items():
            for repeat, taken in enumerate(passes):
                for i, answer in enumerate(taken.answers):
                    if answer is not None:
                        yield dict(
                            row=i,
                            decoder=name,
                            repeat=repeat,
                            text=answer.text,
                            score=number(taken.scores[i]),
                            num_forwards=answer.num_forwards,
                            seconds=float(answer.seconds),
                        )

    def plot(self, file: str | Path, title: str = "") -> Path:
        """Accuracy against NFE and against seconds per answer
        (softar.evals.chart.plot_frontier)."""
        return plot_frontier(self.rows, file, title)


# Wide because it asks one question, with every way to ask it
def compare(
    decoders: dict[str, Decoder] | list[NamedDecoder],
    rows: "Dataset | list[dict]",
    score: Callable[[str, dict], float],
    *,
    column: str | None = None,
    group: str | None = None,
    baseline: str | None = None,
    batch_size: int = 64,
    repeats: int = 1,
    warmup: int = 8,
    bootstrap: int = 1000,
    seed: int = 0,
    console: Console | None = None,
    task: str = "",
    extract: Callable[[str], str] = str.strip,
    chats: Collection[str] = (),
) -> Comparison:
    """Decode the same rows with every decoder and say which is better, at what cost, and how sure
    that is.

    Args:
        decoders: by label, or a list of those that have their own.
        score: (text, row) -> a number, 1 for right and 0 for wrong.
        extract: what of a text is the answer, for the agreement of two decoders; a Task has its
            own.
        column: of `rows`, what is decoded; None: `prompt`, but of diffusion decoders, which fill
            masks, `template` if there is one.
        group: column that says which rows belong together, as the wordings of one problem do: they
            are drawn together in every interval. None: `group` if there is one; a row without it,
            or with None there, stands alone.
        baseline: label of the decoder that gains are over; None: the first.
        repeats: passes over the rows; in each all decoders take their turn.
        warmup: rows that each decoder decodes before its first pass, outside the clock.
        bootstrap: resamples for scores between 0 and 1, the same ones for all decoders.   seed: of
            the resampling.
        console: rich's, for the progress bar (only on a terminal) and the first failure of each
            decoder; None: stderr.

    An answer on which the scorer fails, or gives what is no finite number, counts 0: the console says
    once of how many, and of which first; all are in `scorer_failures`. A decoder that fails is left
    with what it has, in `n` rows, and the others go on; an answer that `extract` fails on is left out
    of the agreement. Both are in `failures`. Ctrl-C ends the decoding and what is done is kept. A
    decoder with a whole pass counts by its whole passes, one without by the rows that it did (then
    `complete` is False).

    Raises:
        ValueError: before anything is decoded, for arguments that do not fit; at the end, if no
            decoder answered, or the scorer failed on every answer.
    """
    started = time.perf_counter()
    named, items = _named(decoders), _items(rows)
    if not items:
        raise ValueError("the dataset is empty: there is nothing to compare on")
    sizes = dict(batch_size=batch_size, repeats=repeats, warmup=warmup, bootstrap=bootstrap)
    check_least(sizes, batch_size=1, repeats=1, warmup=0, bootstrap=1)
    columns = {name: column or _column_of(decoder, items[0]) for name, decoder in named.items()}
    _check_columns(items, {*columns.values()}, group)
    groups = number_groups([_group(item.get(group or GROUP)) for item in items])
    baseline = next(iter(named)) if baseline is None else baseline
    for option, label in [("baseline", baseline), *(("chats", label) for label in chats)]:
        check_choice(option, label, named)
    console = Console(stderr=True) if console is None else console
    how = dict(batch_size=batch_size, chats=chats, console=console)
    contest = Contest(named, items, columns, score, extract, **how)
    contest.run(repeats, warmup)
    passes = contest.answered()
    scored = {name: taken for name, taken in passes.items() if any(p.done.any() for p in taken)}
    if not contest.interrupted:
        _check_scores(scored, contest)
    baseline = baseline if baseline in scored else None
    labels = {
        name: _labels(name, decoder, task, seed) | dict(peak_memory=contest.memory.get(name))
        for name, decoder in named.items()
    }
    summary = summarise(scored, labels, baseline, bootstrap, seed, groups)
    whole = time.perf_counter() - started
    return Comparison(
        rows=summary,
        baseline=baseline,
        failures=list(contest.failures),
        scorer_failures=list(contest.scorer_failures),
        interrupted=contest.interrupted,
        overhead=(whole - contest.decoding) / (whole - contest.warming),
        left_out=[name for name in named if name not in scored],
        passes=passes,
        bootstrap=bootstrap,
        seed=seed,
        groups=groups,
    )


def _column_of(decoder: Decoder, row: dict) -> str:
    """What of the rows a decoder is asked where nobody says which column."""
    fills = isinstance(decoder, NamedDecoder) and decoder.columns.get("family") == "diffusion"
    return TEMPLATE if TEMPLATE in row and (fills or "prompt" not in row) else "prompt"


def _check_columns(items: list[dict], columns: set[str], group: str | None) -> None:
    for asked in columns:
        if bare := [i for i, item in enumerate(items) if asked not in item]:
            has = list(items[bare[0]])
            raise ValueError(f"column={asked!r} is missing: row {bare[0]} has {has}")
    if group is not None and not any(group in item for item in items):
        raise ValueError(f"group={group!r} is no column: row 0 has {list(items[0])}")


def _group(value):
    """Of a row, as something that can be a key."""
    return json.dumps(value) if isinstance(value, (list, dict)) else value


def _json_lines(values: Iterable[dict]) -> str:
    return "".join(json.dumps(value) + "\n" for value in values)


def _items(rows: "Dataset | list[dict]") -> list[dict]:
    if isinstance(rows, (list, tuple)):
        if wrong := [i for i, row in enumerate(rows) if not isinstance(row, dict)]:
            raise ValueError(f"rows[{wrong[0]}]={rows[wrong[0]]!r} must be a dict, column -> value")
        return list(rows)
    from datasets import Dataset

    if not isinstance(rows, Dataset):
        raise ValueError(
            f"rows is a {type(rows).__name__}: give a datasets.Dataset or a list of dicts"
        )
    return rows.to_list()  # at once, which is faster than row by row


def _named(decoders: dict[str, Decoder] | list[NamedDecoder]) -> dict[str, Decoder]:
    if not decoders:
        raise ValueError("decoders is empty: give at least one")
    if isinstance(decoders, dict):
        return {
            label: as_decoder(decoder, f"decoders[{label!r}]")
            for label, decoder in decoders.items()
        }
    named: dict[str, Decoder] = {}
    for i, decoder in enumerate(decoders):
        if not isinstance(decoder, NamedDecoder):
            raise ValueError(
                f"decoders[{i}] has no name and columns: give a dict of label -> decoder"
            )
        if decoder.name in named:
            raise ValueError(
                f"two decoders are called {decoder.name!r}: give a dict of label -> decoder"
            )
        named[decoder.name] = decoder
    return named


def _check_scores(passes: dict[str, list[Pass]], contest: Contest) -> None:
    if not passes:
        raise NoAnswers(f"every decoder failed, first: {next(iter(contest.failures))}")
    if not contest.has_score:
        first = next(iter(contest.scorer_failures))
        raise ValueError(f"the scorer failed on every row, first: {first}")


def _labels(name: str, decoder: Decoder, task: str, seed: int) -> dict:
    """What a decoder's row says beside its numbers."""
    labels = dict(
        task=task, model=None, decoder=name, setting="", family=None, stage=None, seed=seed
    )
    return labels | (decoder.columns if isinstance(decoder, NamedDecoder) else {})
