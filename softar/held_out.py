"""Held-out rows of the SFT trainers: how they are prepared, what an evaluation notes of them, and how well
they are answered."""

from collections.abc import Callable

import torch
from datasets import Dataset
from torch import Tensor


class EvaluatedRows:
    """Mixin of a trainer, first among its bases. What an evaluation notes is a mean over all its rows at
    once, whatever the size of a batch and whichever process had it. accelerate fills the last batches
    of several processes up with rows that were there before, in full: those do not count.

    Rows that are handed to `evaluate` are prepared as the constructor's are, and decoded where there is
    a score. The trainer says how: `check_held_out(rows)` raises ValueError for rows that cannot be, and
    `check_tokenised(rows)` for what TRL made of them, `prepared(rows)` is what TRL tokenises,
    `scored(rows)` their accuracies by name.
    """

    _score: Callable[[str, dict], float] | None = None
    _held_out = None  # the constructor's rows, as they were given
    _decoded: Dataset | None = None  # of the evaluation that runs
    _evaluated: dict[str, Tensor] | None = None  # by name: sum and count, of this process

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        """Of the constructor's rows, or of others in the formats that it takes: a data set, or several
        by name, each under a prefix of its own. Raises ValueError for rows that cannot be read."""
        given = not (eval_dataset is None or isinstance(eval_dataset, str))
        if given:
            self.check_held_out(eval_dataset)
        rows = self._held_out if eval_dataset is None else eval_dataset
        if isinstance(rows, dict):
            metrics = {}
            for name, each in rows.items():
                prefix = f"{metric_key_prefix}_{name}"
                metrics |= self.evaluate(each if given else name, ignore_keys, prefix)
            return metrics
        if isinstance(rows, str):
            rows = self._held_out[rows]
        if given:
            eval_dataset = self.prepared(rows)
        count = self.args.eval_decode_rows
        if self._score is not None and rows is not None and count:
            self._decoded = rows.select(range(min(len(rows), count)))
        try:
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        finally:
            self._decoded = None

    def get_eval_dataloader(self, eval_dataset=None):
        is_own = eval_dataset is None or eval_dataset is self.eval_dataset
        if not (is_own or isinstance(eval_dataset, str)):  # which the constructor has looked at
            self.check_tokenised(eval_dataset)
        return super().get_eval_dataloader(eval_dataset)

    def note_evaluated(self, name: str, total: Tensor, count: Tensor) -> None:
        """Of one batch; outside an evaluation nothing is kept."""
        if self._evaluated is not None:
            sums = self._evaluated.setdefault(name, torch.zeros(2, device=total.device))
            if self._has_own_rows:
                sums += torch.stack([total, count]).detach()

    def prediction_step(self, model, inputs, *args, **kwargs):
        B = len(inputs["labels"])
        own = self._count_own(B)
        self._has_own_rows = own > 0
        if 0 < own < B:
            inputs = {name: value[:own] for name, value in inputs.items()}
        loss, *read = super().prediction_step(model, inputs, *args, **kwargs)
        if 0 < own < B:  # the processes gather these, and leave out what follows the last row
            read = [
                x if x is None else torch.cat([x, x[-1:].expand(B - own, *x[0].shape)])
                for x in read
            ]
        return loss, *read

    def _count_own(self, B: int) -> int:
        """How many of this process' B rows come for the first time: the first ones."""
        state = self.accelerator.gradient_state
        if not state.end_of_dataloader or state.remainder <= 0:
            return B
        return min(B, max(0, state.remainder - B * self.accelerator.process_index))

    def evaluation_loop(self, *args, metric_key_prefix: str = "eval", **kwargs):
        """All that is found of the rows is there when it is logged and callbacks look at it."""
        self._evaluated = {}
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        found, self._evaluated = self._evaluated, None
        for name, sums in found.items():
            total, count = self.accelerator.reduce(sums).tolist()
            if count:
                output.metrics[f"{metric_key_prefix}_{name}"] = total / count
        if self._decoded is not None:
            for name, value in self.scored(self._decoded).items():
                output.metrics[f"{metric_key_prefix}_{name}"] = value
        return output
