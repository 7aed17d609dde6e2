"""What a soft request read, from the engine's log-probabilities and over HTTP."""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..mixers import TINY
from ..thought import Kind, Record


class Read(NamedTuple):
    """A step of the record: what the model read back, and why."""

    token: int  # that stands for it
    ids: tuple[int, ...]  # each once
    weights: tuple[float, ...]
    kind: int  # see softar.Kind
    logp: float  # as in softar's Record
    entropy: float  # nats


def record_of(output) -> list[Read]:
    """The steps of a CompletionOutput whose request asked for its record, or of a part of one that
    was streamed."""
    from vllm.logprobs import FlatLogprobs

    flat = output.logprobs
    if not isinstance(flat, FlatLogprobs):
        raise ValueError('no record: ask for it with extra_args={"soft": {"record": True}}')
    steps = []
    for start, end in zip(flat.start_indices, flat.end_indices):
        mixture = dict(
            zip(flat.token_ids[start + 2 : end], map(math.exp, flat.logprobs[start + 2 : end]))
        )
        steps.append(
            Read(
                token=flat.token_ids[start],
                ids=tuple(mixture),
                weights=tuple(mixture.values()),
                kind=flat.ranks[start],
                logp=flat.logprobs[start],
                entropy=flat.logprobs[start + 1],
            )
        )
    return steps


def log_columns(record: Record, width: int) -> tuple[Tensor, Tensor]:
    """A step as vLLM sends log-probabilities: ids and values [G, width].

    Column 0 holds the token and its log-probability, 1 the entropy, the rest the mixture, equal ids
    summed.
    """
    ids, weights, token = record.ids, record.weights, record.token[:, None]
    same = ids[:, :, None] == ids[:, None, :]  # [G, K, K]
    weights = (weights[:, None, :] * same).sum(-1)  # all slots of an id carry its sum
    of_token = (weights * (ids == token)).amax(-1, keepdim=True)  # [G, 1]
    is_dropped = weights == 0  # by a filter
    ids, weights = torch.where(is_dropped, token, ids), torch.where(is_dropped, of_token, weights)
    more = width - 2 - ids.shape[1]
    ids = torch.cat([token, token, ids, token.expand(-1, more)], 1)
    logs = torch.cat([weights, of_token.expand(-1, more)], 1).clamp_min(TINY).log()
    return ids, torch.cat([record.logp[:, None], record.entropy[:, None], logs], 1)


def to_record(steps: Sequence[Read]) -> Record:
    """Steps -> Record of one row, [1, T, ...] and [1, T, K], K the widest mixture."""
    width = max((len(step.ids) for step in steps), default=1)
    rows = []
    for step in steps:
        more = width - len(step.ids)
        rows.append(([*step.ids, *[step.token] * more], [*step.weights, *[0.0] * more]))
    return Record(
        ids=torch.tensor([ids for ids, _ in rows], dtype=torch.int64).view(1, -1, width),
        weights=torch.tensor([w for _, w in rows], dtype=torch.float32).view(1, -1, width),
        token=torch.tensor([[step.token for step in steps]], dtype=torch.int64),
        kind=torch.tensor([[step.kind for step in steps]], dtype=torch.int8),
        logp=torch.tensor([[step.logp for step in steps]], dtype=torch.float32),
        entropy=torch.tensor([[step.entropy for step in steps]], dtype=torch.float32),
    )


# --- over HTTP ---

FIELD = "soft"  # of a choice
DIGITS = 9  # that tell a float32 from all others


def as_json(steps: Iterable[Read]) -> dict[str, list]:
    """Steps as a choice's field: plain lists, null for what is not a number."""
    steps = list(steps)
    return {
        "token": [step.token for step in steps],
        "kind": [Kind(step.kind).name.lower() for step in steps],
        "entropy": [_short(step.entropy) for step in steps],
        "logp": [_short(step.logp) for step in steps],
        "ids": [list(step.ids) for step in steps],
        "weights": [[_short(w) for w in step.weights] for step in steps],
    }


def from_json(soft: dict[str, list]) -> list[Read]:
    """A choice's field "soft" -> its steps; NaN for null."""
    names = ("token", "ids", "weights", "kind", "logp", "entropy")
    return [
        Read(
            token,
            tuple(ids),
            tuple(weights),
            int(Kind[kind.upper()]),
            *(math.nan if number is None else number for number in numbers),
        )
        for token, ids, weights, kind, *numbers in zip(*(soft[n] for n in names), strict=True)
    ]


def _short(x: float) -> float | None:
    return float(f"{x:.{DIGITS}g}") if math.isfinite(x) else None
