"""transformers' logits processors in the loops of softar: which are asked, of what text, and what they
have to leave."""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import (
    EncoderNoRepeatNGramLogitsProcessor,
    EncoderRepetitionPenaltyLogitsProcessor,
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
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
# They look at which tokens a text holds, or which stand side by side
READING = (
    RepetitionPenaltyLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    SequenceBiasLogitsProcessor,
    EncoderRepetitionPenaltyLogitsProcessor,  # of the prompt, which of these models nothing encodes
    EncoderNoRepeatNGramLogitsProcessor,
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
    processors: Sequence,
    prompts: Tensor,
    attention_mask: Tensor | None,
    silent: list[Tensor] | None = None,
) -> LogitsProcessorList:
    """Those that a loop asks, in which a row alone is the row in a batch.

    prompts, attention_mask: [N, P], padded on the left. silent: the loop appends to it, for each
    step, the rows [N] bool of which no token stands for it; None: there are none.
    """
    asked = [each for each in processors if not isinstance(each, SAMPLING)]
    is_ragged = attention_mask is not None and attention_mask.dim() == 2
    if not is_ragged or attention_mask.all():
        pads = torch.zeros_like(prompts[:, 0])
    else:
        pads = attention_mask[:, : prompts.shape[1]].long().argmax(1)
    if silent is not None or pads.any():
        asked = [
            OfOwnText(each, prompts, pads, silent) if isinstance(each, READING) else each
            for each in asked
        ]
    return LogitsProcessorList(asked)


class OfOwnText(LogitsProcessor):
    """A processor that is shown what a row has read and said, and neither the padding before it nor
    the tokens of latent steps: that is often an end token, which would be penalised or banned as if
    it had been said.

    pads: [N] int64, of the prompts [N, P]. silent: see asked_of.
    """

    def __init__(
        self, inner: LogitsProcessor, prompts: Tensor, pads: Tensor, silent: list[Tensor] | None
    ):
        self.inner, self.prompts, self.pads, self.silent = inner, prompts, pads, silent
        own = (row[n:][None] for row, n in zip(prompts, pads.tolist(), strict=True))
        self.each = [_of_prompt(inner, ids) for ids in own]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        P = self.prompts.shape[1]
        pads, each, begins = self.pads, self.each, input_ids[:, :P]
        if not torch.equal(begins, self.prompts):  # beams, of any of the prompts
            at = (begins[:, None] == self.prompts).all(2).long().argmax(1)
            pads, each = pads[at], [each[i] for i in at.tolist()]
        said = torch.arange(input_ids.shape[1], device=input_ids.device) >= pads[:, None]
        if is_set := isinstance(self.inner, RepetitionPenaltyLogitsProcessor):
            # its prompt_ignore_length counts columns: padding shows the first token instead
            input_ids = input_ids.where(said, input_ids.gather(1, pads[:, None]))
            said = torch.ones_like(said)
        if self.silent:
            said[:, P:] &= ~torch.stack(self.silent, 1)
        elif is_set:
            return self.inner(input_ids, scores)
        rows = zip(each, input_ids, said, scores, strict=True)
        return torch.cat([inner(ids[own][None], row[None]) for inner, ids, own, row in rows])


def _of_prompt(inner: LogitsProcessor, ids: Tensor) -> LogitsProcessor:
    """The processor, of one that keeps the prompts with this one, [1, n], in their place."""
    if isinstance(inner, EncoderNoRepeatNGramLogitsProcessor):
        return EncoderNoRepeatNGramLogitsProcessor(inner.ngram_size, ids)
    if isinstance(inner, EncoderRepetitionPenaltyLogitsProcessor):
        inner = copy.copy(inner)
        inner.encoder_input_ids = ids
    return inner


def leaves_none(scores: Tensor) -> Tensor:
    """[B] bool: rows of scores [B, V] in which processors leave no token."""
    return ~(scores.amax(-1) > -torch.inf)
