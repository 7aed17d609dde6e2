"""From a soft rollout to the discrete tokens and the text that a reward may see.

Everything here is a function of what was recorded, and so of actions whose log-probability is in
the score. A fresh draw from the mixtures, for the reward's eyes only, would be one more action:
without its log-probability in the score the gradient is biased, so there is none.

Shapes: B rows, T steps, K slots.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from softar.decode import SoftOutput
from softar.evaluate import answer_texts
from softar.thought import Kind, Record


def seen(out: SoftOutput, tokenizer, how: str) -> tuple[list[list[int]], list[str]]:
    """What a reward gets of each row: the tokens of `discretise`, and their text; of an answer that
    with what a token holds of it beside the end of the tag (softar.evaluate.answer_texts)."""
    ids = discretise(out.record, out.answer_start, how)
    if how == "answer":
        return ids, answer_texts(out, tokenizer)
    return ids, tokenizer.batch_decode(ids, skip_special_tokens=True)


def discretise(record: Record, answer_start: Tensor, how: str = "answer") -> list[list[int]]:
    """The tokens that stand for each row, without padding.

    Args:
        record: of a whole decode, [B, T, ...]. answer_start: [B], steps before the answer.
        how: a name in WAYS. "answer": what comes after the thought; nothing where it never ended.
            "stream": the recorded tokens, of a think step its first draw, with end-of-thought
            tokens that a rule put in. "argmax": the same with the heaviest token of each mixture.

    Returns:
        B lists of token ids.

    Raises:
        ValueError: unknown `how`; "fresh" says why there is no such thing.
    """
    check_way(how)
    masks = WAYS[how](record, answer_start)
    rows = zip(_tokens(record, how).tolist(), masks.tolist(), strict=True)
    return [[token for token, keep in zip(*row, strict=True) if keep] for row in rows]


def check_way(how: str) -> None:
    if how == "fresh":
        raise ValueError(
            "how='fresh': a draw that only the reward sees is an action whose log-probability is not in the score, "
            f"which biases the gradient; choose one of {tuple(WAYS)}"
        )
    if how not in WAYS:
        raise ValueError(f"how={how!r} is unknown: choose one of {tuple(WAYS)}")


def heaviest(record: Record) -> Tensor:
    """[B, T] the token of the largest weight of each mixture, repeated ids added up; the first of
    equals."""
    ids, weights = record.ids, record.weights
    same = ids[..., :, None] == ids[..., None, :]
    slot = (weights[..., None, :] * same).sum(-1).argmax(-1, keepdim=True)
    return ids.gather(-1, slot)[..., 0]


def _tokens(record: Record, how: str) -> Tensor:
    if how != "argmax":
        return record.token
    return torch.where(record.kind == Kind.SOFT, heaviest(record), record.token)


def _answer(record: Record, answer_start: Tensor) -> Tensor:
    steps = torch.arange(record.kind.shape[1], device=record.kind.device)
    return (record.kind != Kind.PAD) & (steps >= answer_start[:, None])


def _all(record: Record, answer_start: Tensor) -> Tensor:
    return record.kind != Kind.PAD


WAYS: dict[str, Callable[[Record, Tensor], Tensor]] = {
    "answer": _answer,
    "stream": _all,
    "argmax": _all,
}
