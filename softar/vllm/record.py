"""What a soft request read, from the engine's log-probabilities and over HTTP."""

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from ..thought import Record


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


FIELD = "soft"  # of a choice


DIGITS = 9  # that tell a float32 from all others


def as_json(steps: Iterable[Read]) -> dict[str, list]:
    """What `record_of` gives, as a choice's field: plain lists, null for what is not a number."""
    from ..thought import Kind

    steps = list(steps)
    return {
        "token": [step.token for step in steps],
        "kind": [Kind(step.kind).name.lower() for step in steps],
        "entropy": [_short(step.entropy) for step in steps],
        "logp": [_short(step.logp) for step in steps],
        "ids": [list(step.ids) for step in steps],
        "weights": [[_short(w) for w in step.weights] for step in steps],
    }


def to_record(soft: dict[str, list]) -> "Record":
    """A choice's field "soft" -> Record of one row, [1, T, ...] and [1, T, K], K the widest
    mixture."""
    import torch

    from ..thought import Kind, Record

    width = max(map(len, soft["ids"]), default=1)
    rows = list(zip(soft["token"], soft["ids"], soft["weights"], strict=True))
    ids = [[*ids, *[token] * (width - len(ids))] for token, ids, _ in rows]
    weights = [[*weights, *[0.0] * (width - len(weights))] for *_, weights in rows]
    logp, entropy = (
        [math.nan if x is None else x for x in soft[name]] for name in ("logp", "entropy")
    )
    return Record(
        ids=torch.tensor(ids, dtype=torch.int64).view(1, -1, width),
        weights=torch.tensor(weights, dtype=torch.float32).view(1, -1, width),
        token=torch.tensor([soft["token"]], dtype=torch.int64),
        kind=torch.tensor([[Kind[name.upper()] for name in soft["kind"]]], dtype=torch.int8),
        logp=torch.tensor([logp], dtype=torch.float32),
        entropy=torch.tensor([entropy], dtype=torch.float32),
    )


def _short(x: float) -> float | None:
    return float(f"{x:.{DIGITS}g}") if math.isfinite(x) else None
