"""Coconut's curriculum (arXiv:2412.06769): stage by stage the steps of a thought give way to latents,
positions that read the last hidden state before them, and the loss is of what is left.

Shapes: B batch, T positions.
"""

import math
from typing import NamedTuple

import torch
from datasets import Dataset
from torch import Tensor, nn

from ..feedback import check_reads_vectors
from ..models import room_of
from ..tags import Moves, matches, single
from .data import spelled, thought_mask, thought_of


class Curriculum(NamedTuple):
    """What a stage makes of a row. Stage s has s * latents of them in the place of the first s
    steps; the last one in the place of the whole thought."""

    stages: int  # the last one; before it come 0, the text as it is, and those between
    latents: int  # for each stage
    span: dict  # what tells the thought, as thought_mask takes it
    step_end: Moves  # how the text that ends a step is spelled; (): every token is a step
    pad: int  # the token that stands where latents are
    multiple: int = 1  # of this many columns is a batch

    def row(self, ids: list[int], labels: list[int], inside: list[bool], stage: int) -> tuple:
        """A row at a stage -> ids, labels (-100 at latents), and the column of its first latent.
        inside: which positions are thought."""
        columns = [column for column, is_thought in enumerate(inside) if is_thought]
        if not columns:
            raise ValueError("a row has no thought that latents could replace: drop it")
        start, end = columns[0], columns[-1] + 1
        if start == 0:
            raise ValueError(
                "a row begins with its thought, so nothing comes before: give a prompt"
            )
        behind = self.behind(ids[start:end], stage) + start
        n = stage * self.latents
        return (
            ids[:start] + [self.pad] * n + ids[behind:],
            labels[:start] + [-100] * n + labels[behind:],
            start,
        )

    def behind(self, thought: list[int], stage: int) -> int:
        """Tokens of a thought that latents replace at a stage."""
        if stage in (0, self.stages):
            return len(thought) if stage else 0
        ends = [column + 1 for column in matches(self.step_end, thought)]
        if not self.step_end:
            ends = [*range(1, len(thought) + 1)]
        return [0, *ends, *[len(thought)] * stage][stage]

    def batch(self, batch: dict[str, Tensor], stages: list[int]) -> dict[str, Tensor]:
        """A collated batch with each row at its own stage, and `latent_mask` [B, T] bool. Rows are
        padded on both sides, so that the first latents of all stand in one column."""
        mask = batch["attention_mask"].bool()
        inside = thought_mask(batch["input_ids"], batch["labels"], **self.span) & mask
        columns = (batch["input_ids"].tolist(), batch["labels"].tolist(), inside.tolist())
        rows = []
        for n, stage, *row in zip(mask.sum(1).tolist(), stages, *columns, strict=True):
            rows.append(self.row(*(column[:n] for column in row), stage))
        first = max(start for _, _, start in rows)
        width = max(first - start + len(ids) for ids, _, start in rows)
        width += -width % self.multiple

        def lay(values: list[list[int]], fill: int) -> Tensor:
            """Each behind `first - start` of the fill, [B, T]."""
            laid = []
            for own, (_, _, start) in zip(values, rows, strict=True):
                left = [fill] * (first - start) + own
                laid.append(left + [fill] * (width - len(left)))
            return torch.tensor(laid, device=mask.device)

        ids, labels, _ = zip(*rows, strict=True)
        latent = [[0] * first + [1] * (stage * self.latents) for stage in stages]
        latent = [own + [0] * (width - len(own)) for own in latent]
        return {
            "input_ids": lay(ids, self.pad),
            "labels": lay(labels, -100),
            "attention_mask": lay([[1] * len(own) for own in ids], 0),
            "latent_mask": torch.tensor(latent, device=mask.device).bool(),
        }


def mk_curriculum(model, tokenizer, rows: dict, args, span: dict) -> Curriculum | None:
    """Of these options, for rows and a model that can follow it; ValueError for others."""
    if args.latent_stages is None:
        return None
    check_reads_vectors(model)
    step_end = spelled(tokenizer, args.latent_step_end)
    counts = args.latent_stages, args.latents_per_step
    multiple = args.pad_to_multiple_of or 1
    curriculum = Curriculum(*counts, span, step_end, tokenizer.pad_token_id, multiple)
    check_curriculum(rows, curriculum, room_of(model))
    check_step_end(rows["train"], curriculum, args.latent_step_end)
    if args.max_steps <= 0 and isinstance(rows["train"], Dataset):
        args.stage_steps(steps_of(len(rows["train"]), args))
    return curriculum


def steps_of(rows: int, args) -> int:
    """Optimiser steps of a training of num_train_epochs, as transformers counts them."""
    size = args.train_batch_size * args.world_size
    batches = rows // size if args.dataloader_drop_last else math.ceil(rows / size)
    steps = max(1, math.ceil(batches / args.gradient_accumulation_steps))
    return math.ceil(steps * args.num_train_epochs)


def texts_of(row: dict) -> list[tuple[list[int], list[int]]]:
    """What of a row is trained on -> ids and labels of each, a prompt's -100: of its traces, where it
    has some."""
    ids, labels = row["input_ids"], row.get("labels", row["input_ids"])
    n = next((i for i, label in enumerate(labels) if label != -100), len(labels))
    traces = row.get("trace_ids")
    return [(t, [-100] * n + t[n:]) for t in traces] if traces else [(ids, labels)]


def check_step_end(dataset, curriculum: Curriculum, text: str | None) -> None:
    """Raise ValueError for an end of steps that stands in no thought of the Dataset: each would be
    one step."""
    if not curriculum.step_end or not isinstance(dataset, Dataset):
        return
    for ids, labels in (each for row in dataset for each in texts_of(row)):
        inside = thought_of(ids, labels, curriculum.span)
        thought = [label for label, is_thought in zip(labels, inside, strict=True) if is_thought]
        if matches(curriculum.step_end, thought):
            return
    raise ValueError(
        f"latent_step_end={text!r} stands in no thought of the training data: name a text that does, or "
        "leave it out, and every token is a step"
    )


def check_curriculum(rows, curriculum: Curriculum, room: int | None) -> None:
    """Raise ValueError for a closing tag of several tokens, and for rows of a Dataset without a
    thought, with nothing before it or behind it, or too long at some stage; of a dict each. Streams
    are seen only once."""
    end = curriculum.span["end"]
    if end and single(end) is None:
        raise ValueError(
            "latent_stages needs a think_end of one token, so that the thought before it can go: add it "
            "to the tokenizer as a special token"
        )
    for dataset in rows.values():
        if isinstance(dataset, dict):
            check_curriculum(dataset, curriculum, room)
        for number, row in enumerate(dataset if isinstance(dataset, Dataset) else ()):
            for ids, labels in texts_of(row):
                try:
                    check_row(ids, labels, curriculum, room)
                except ValueError as error:
                    raise ValueError(f"row {number} of the data{error}") from None


def check_row(ids: list[int], labels: list[int], curriculum: Curriculum, room: int | None) -> None:
    """Raise ValueError, what goes on after the row's name, for a row that some stage cannot use."""
    inside = thought_of(ids, labels, curriculum.span)
    try:
        each = [curriculum.row(ids, labels, inside, s) for s in range(curriculum.stages + 1)]
    except ValueError as error:
        raise ValueError(f": {error}") from None
    if all(label == -100 for label in each[-1][1]):
        raise ValueError(
            " has no answer behind its thought, so its last stage would train on nothing: give think_end "
            "or think_steps, or drop it"
        )
    longest = max(len(ids) for ids, *_ in each)
    if room is not None and longest > room:
        raise ValueError(
            f" has {longest} positions with its latents, and the model's end at {room}: lower "
            "latents_per_step, or drop such rows"
        )


class LatentStages:
    """Mixin of SoftSFTTrainer: rows at their stages, and the optimiser forgotten at each new one.
    All of it follows from the step and the seed, so that a resumed run goes on exactly."""

    _curriculum: Curriculum | None = None

    @property
    def stage(self) -> int:
        """Of the next step; of a trainer that does not train, the last."""
        if not self.state.max_steps:
            return self._curriculum.stages
        length = self.args.stage_steps(self.state.max_steps)
        return min(self._curriculum.stages, self.state.global_step // length)

    def stage_batches(self, batches: list[dict[str, Tensor]]) -> None:
        """The micro-batches of the next step at its stage, or a row at one drawn uniformly
        (latent_uniform_prob): by one pair of numbers for each row of the global batch, of which each
        process takes its own. In place."""
        args, last, step = self.args, self._curriculum.stages, self.state.global_step
        if step in [stage * args.stage_steps(self.state.max_steps) for stage in range(1, last + 1)]:
            self.optimizer.state.clear()
        world, rank = self.accelerator.num_processes, self.accelerator.process_index
        shape = (args.gradient_accumulation_steps, world, args.per_device_train_batch_size, 2)
        uniform = torch.rand(shape, generator=self._seeded(1, shared=True))[:, rank]
        for i, (batch, numbers) in enumerate(zip(batches, uniform, strict=False)):
            pairs = numbers[: len(batch["input_ids"])].tolist()
            stages = [
                int(where * (last + 1)) if chance < args.latent_uniform_prob else self.stage
                for chance, where in pairs
            ]
            batches[i] = self._curriculum.batch(batch, stages)

    def staged(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """A batch at the current stage; as it is where it stands at its own already."""
        if self._curriculum is None or "latent_mask" in inputs:
            return inputs
        return self._curriculum.batch(inputs, [self.stage] * len(inputs["input_ids"]))

    def prediction_step(self, model, inputs, *args, **kwargs):
        """With the labels that the logits are of: those of the rows at their stage. Logits that
        completion_logits left out are 0."""
        loss, logits, labels = super().prediction_step(model, inputs, *args, **kwargs)
        if logits is not None and labels is not None:
            labels = self.staged(inputs)["labels"].to(labels.device)
            logits = nn.functional.pad(logits, (0, 0, labels.shape[1] - logits.shape[1], 0))
        return loss, logits, labels
