"""Decoders that take turns over the same rows, whatever fails and whenever Ctrl-C comes."""

import functools
import time
from collections.abc import Callable, Collection
from typing import NamedTuple

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ..decoders.answer import Decoded, Decoder, Unfinished
from ..evaluate import check_score, prompt_of
from .summary import Pass

TEMPLATE = "template"  # column of texts that hold masks, which no chat template takes


class Failure(NamedTuple):
    row: int | None  # index of the row that was scored or read; None: the decoder itself failed
    decoder: str
    message: str

    def __str__(self) -> str:
        return f"{self.decoder}{'' if self.row is None else f', row {self.row}'}: {self.message}"


class Contest:
    """What each decoder gave so far, what failed, and where the time went."""

    def __init__(
        self,
        decoders: dict[str, Decoder],
        items: list[dict],
        columns: dict[str, str],  # by decoder: of the items, what it is asked
        score: Callable[[str, dict], float],
        extract: Callable[[str], str],
        *,
        batch_size: int,
        chats: Collection[str] = (),  # decoders that get texts as what a user says
        console: Console,
    ):
        self.decoders, self.items = decoders, items
        self.columns, self.chats = columns, chats
        self.score, self.extract, self.batch_size = score, extract, batch_size
        self.console, self.progress = console, None
        self.passes: dict[str, list[Pass]] = {name: [] for name in decoders}
        # a set in order: a row that fails in every repeat is listed once
        self.failures: dict[Failure, None] = {}
        self.failed: set[str] = set()  # decoders; the first failure of each is printed
        self.scorer_failures: dict[Failure, None] = {}  # as above; their answers count 0
        self.has_score = False  # did the scorer ever not fail?
        self.interrupted = False
        self.memory: dict[str, int] = {}  # bytes at most on a GPU, by decoder
        self.decoding = self.warming = 0.0  # seconds in decoders, and of those in the warm-up

    def run(self, repeats: int, warmup: int) -> None:
        """Each decoder is warmed up right before its first turn, so that it is warm when it counts.
        Ctrl-C ends it all, and what is done is kept."""
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
        )
        hidden = not self.console.is_terminal
        total = repeats * len(self.decoders) * len(self.items)
        try:
            with Progress(*columns, console=self.console, transient=True, disable=hidden) as bars:
                self.progress = functools.partial(bars.update, bars.add_task("", total=total))
                alive = [n for n in self.decoders if self.warm_up(n, warmup) and self.turn(n)]
                for _ in range(1, repeats):
                    alive = [name for name in alive if self.turn(name)]
        except KeyboardInterrupt:
            self.interrupted = True
        if self.scorer_failures and self.has_score:
            remark = scorer_remark(len(self.scorer_failures))
            self._print(f"{remark}; first {next(iter(self.scorer_failures))}")

    def answered(self) -> dict[str, list[Pass]]:
        """The passes that hold an answer, of the decoders that have any."""
        passes = {name: [p for p in taken if any(p.answers)] for name, taken in self.passes.items()}
        return {name: taken for name, taken in passes.items() if taken}

    def warm_up(self, name: str, rows: int) -> bool:
        """False where the decoder failed."""
        self.progress(description=f"{name}, warm-up")
        before, size = self.decoding, self.batch_size
        try:
            return all(
                self.answer(name, begin, min(begin + size, rows)) is not None
                for begin in range(0, min(rows, len(self.items)), size)
            )
        finally:
            self.warming += self.decoding - before

    def turn(self, name: str) -> bool:
        """One pass over the rows; False where the decoder failed."""
        n = len(self.items)
        taken = Pass([None] * n, np.full(n, np.nan), np.zeros(n, dtype=bool), [None] * n)
        self.passes[name].append(taken)
        for begin in range(0, n, self.batch_size):
            batch = self.answer(name, begin, begin + self.batch_size)
            if batch is None:
                return False
            # at once: Ctrl-C may come while they are scored
            taken.answers[begin : begin + len(batch)] = batch
            for i, decoded in enumerate(batch, begin):
                self.take(name, i, decoded)
            self.progress(description=name, advance=len(batch))
        return True

    def answer(self, name: str, begin: int, end: int) -> list[Decoded] | None:
        """What a decoder gives for some of the rows; None where it failed. A pass keeps what it did
        before that."""
        before = time.perf_counter()
        on_gpu = torch.cuda.is_available()
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        try:
            asked = [self.prompt(name, item) for item in self.items[begin:end]]
            return _decode(self.decoders[name], asked)
        except Exception as error:  # whatever it is, the others go on
            self.fail(None, name, error)
            if isinstance(error, Unfinished) and self.passes[name]:
                for i, decoded in sorted(error.done.items()):
                    self.take(name, begin + i, decoded)
            return None
        finally:
            self.decoding += time.perf_counter() - before
            if on_gpu:
                peak = torch.cuda.max_memory_allocated()
                self.memory[name] = max(peak, self.memory.get(name, 0))

    def prompt(self, name: str, item: dict):
        """What a decoder is asked by a row."""
        column = self.columns[name]
        if name in self.chats and column != TEMPLATE and isinstance(item[column], str):
            item = item | {column: [{"role": "user", "content": item[column]}]}
        return prompt_of(item, column)

    def take(self, name: str, i: int, decoded: Decoded) -> None:
        """Score an answer into the decoder's latest pass: with 0 where the scorer fails, as one that
        reads a number does on what is none. Left out, wrong answers would make a decoder better."""
        taken = self.passes[name][-1]
        taken.answers[i] = decoded
        try:
            # a copy, so that what a scorer writes into its row does not reach the next decoder's
            taken.scores[i] = check_score(self.score(decoded.text, dict(self.items[i])))
            self.has_score = True
        except Exception as error:
            taken.scores[i] = 0.0
            self.scorer_failures[_failure(i, name, error)] = None
        try:
            taken.read[i] = self.extract(decoded.text)
        except Exception as error:
            self.fail(i, name, error)
        taken.done[i] = True

    def fail(self, row: int | None, name: str, error: Exception) -> None:
        failure = _failure(row, name, error)
        if name not in self.failed:
            self.failed.add(name)
            self._print(f"failed: {failure}")
        self.failures[failure] = None

    def _print(self, line: str) -> None:
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)


def scorer_remark(n: int) -> str:
    answers = f"{n} answers, which count" if n > 1 else "1 answer, which counts"
    return f"the scorer failed on {answers} 0"


def _failure(row: int | None, name: str, error: Exception) -> Failure:
    return Failure(row, name, " ".join(f"{type(error).__name__}: {error}".split()))


def _decode(decoder: Decoder, prompts: list) -> list[Decoded]:
    answers = decoder.decode(prompts)
    if len(answers) != len(prompts):
        raise ValueError(f"{len(answers)} results for {len(prompts)} prompts")
    for answer in answers:
        if not isinstance(answer, Decoded):
            raise ValueError(f"a result is a {type(answer).__name__}, not a Decoded")
    return answers
