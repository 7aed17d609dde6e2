"""transformers' logits processors in the loops of softar: which are asked, of what text, and what they
have to leave."""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopHLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

# They choose tokens, which `SoftConfig` does
SAMPLING = (
    TemperatureLogitsWarper,
    TopHLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    MinPLogitsWarper,
    TypicalLogitsWarper,
    EpsilonLogitsWarper,
    EtaLogitsWarper,
)


def check_given(processors: Sequence | None) -> None:
    """Raise ValueError for one of the caller's that chooses tokens. Those that come from a model's own
    settings are left out by `asked_of`."""
    for each in processors or ():
        if isinstance(each, SAMPLING):
            raise ValueError(
                f"logits_processor holds a {type(each).__name__}, which is not followed in soft decoding: "
                "SoftConfig says how tokens are chosen (temperature=, top_k=, answer_temperature=, ...)"
            )


def asked_of(
    processors: Sequence, prompts: Tensor, attention_mask: Tensor | None
) -> LogitsProcessorList:
    """Those that a loop asks, in which a row alone is the row in a batch.

    prompts, attention_mask: [N, P], padded on the left.
    """
    asked = [each for each in processors if not isinstance(each, SAMPLING)]
    if attention_mask is not None and attention_mask.dim() == 2 and not attention_mask.all():
        pads = attention_mask[:, : prompts.shape[1]].long().argmax(1)
        asked = [
            OfOwnText(each, prompts, pads)
            if isinstance(each, RepetitionPenaltyLogitsProcessor)
            else each
            for each in asked
        ]
    return LogitsProcessorList(asked)


class OfOwnText(LogitsProcessor):
    """A processor that takes ids as a set, shown the first token of a row in the place of the padding
    before it: padding is often an end token, which would be penalised as if it had been said.

    pads: [N] int64, of the prompts [N, P].
    """

    def __init__(self, inner: LogitsProcessor, prompts: Tensor, pads: Tensor):
        self.inner, self.prompts, self.pads = inner, prompts, pads

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        pads, begins = self.pads, input_ids[:, : self.prompts.shape[1]]
        if not torch.equal(begins, self.prompts):  # beams, of any of the prompts
            pads = pads[(begins[:, None] == self.prompts).all(2).long().argmax(1)]
        columns = torch.arange(input_ids.shape[1], device=input_ids.device)
        first = input_ids.gather(1, pads[:, None])
        return self.inner(torch.where(columns < pads[:, None], first, input_ids), scores)


def leaves_none(scores: Tensor) -> Tensor:
    """[B] bool: rows of scores [B, V] in which processors leave no token."""
    return ~(scores.amax(-1) > -torch.inf)
