"""Soft beam search: beam search whose hypotheses read mixtures.

A hypothesis reads, in the place of its newest token, a mixture that is anchored on it: a share
`anchor` of the token, the rest the belief that it was chosen from. Hypotheses are scored by the
log-probabilities of their tokens, the anchors. transformers' own beam search expands and prunes
them and gathers the rows of the cache; what each reads is decided here, by the rules of
softar.thought. It knows a hypothesis by its tokens, as transformers does not tell which became
which.

Shapes: N prompts, B beams, R = N B hypotheses, P prompt length, T steps, V vocabulary, K tokens kept.
"""

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)

from .. import guard
from ..checks import check_choice, check_least, check_types
from ..config import SWITCHES, SoftConfig
from ..decode import SoftOutput, generate
from ..mixers import Mixed, guide, hard
from ..models.kind import uncompiled
from ..placement import evaluating
from ..processors import asked_of, leaves_none
from ..soft import Soft, entropy, mk_proba_dist, soft_inputs
from ..soft import hard as one_token
from ..step import LIMITS
from ..thought import Kind, Progress, Record, begin, decide, mk_rules, stack
from .beam import NEUTRAL, counted
from .run import check_search, run_search, search_output

# Of SoftConfig, what the search decides itself
FIXED = [
    *"mixer mixer_args softness answer_temperature answer_top_k answer_top_p answer_min_p".split(),
    *SWITCHES,
]


@dataclass(frozen=True)
class SoftBeam:
    """How a soft beam search goes; the filters of the belief are those of SoftConfig."""

    num_beams: int = 4
    # share of a hypothesis's own token in what it reads: 1 is beam search, 0 the belief alone, so
    # that children of one parent differ in their scores and tokens, not in what they read
    anchor: float = 0.5
    length_penalty: float = 1.0  # hypotheses are compared by log-probability / length ** this
    early_stopping: bool | str = False  # as in transformers; "never" is the text

    def __post_init__(self):
        check_types(self)
        check_least(self, num_beams=1)
        if not 0 <= self.anchor <= 1:
            raise ValueError(
                f"anchor={self.anchor} must lie in [0, 1]: 1 is beam search, 0 reads the belief alone"
            )
        check_choice("early_stopping", self.early_stopping, (True, False, "never"))

    @property
    def changes(self) -> dict[str, Any]:
        """Fields of SoftConfig by which it reads."""
        own = dict(mixer="soft", mixer_args={}, answer_temperature=0.0, switch=None)
        return own | {"softness": 1 - self.anchor}


def soft_beam(
    model,
    input_ids: Tensor,
    attention_mask: Tensor,
    config: SoftConfig,
    search: SoftBeam,
    stops: Sequence[StoppingCriteria] = (),
    tokenizer=None,
) -> tuple[SoftOutput, list[float] | None]:
    """Decode by soft beam search.

    Args:
        model: a causal LM of transformers, plain or wrapped by PEFT.
        input_ids, attention_mask: [N, P], padded on the left.
        config: resolved; where the thought is and the filters of its belief.
        stops: where a text ends, beside length and end tokens; asked of any rows at any step.
        tokenizer: for the model's own stop strings, as for `softar.generate`.

    Returns:
        The best hypothesis of each prompt, logp of its record the log-probability of each token that
        was not forced, unfiltered; and the forwards of each prompt, which count every beam. One beam
        is `softar.generate` itself, and forwards are then None.

    Raises:
        ValueError: more beams than tokens in the vocabulary, or what `softar.generate` refuses.
    """
    model, config = uncompiled(model), config.changed(**search.changes)
    check_search(model, input_ids, attention_mask, search.num_beams)
    if search.num_beams == 1:
        how = dict(config=config, stopping_criteria=stops, tokenizer=tokenizer)
        return generate(model, input_ids, attention_mask, **how), None
    settings = NEUTRAL | dict(
        num_beams=search.num_beams,
        length_penalty=search.length_penalty,
        early_stopping=search.early_stopping,
    )
    of = model, input_ids, attention_mask, config, search
    return run_search(_search, *of, settings, stops, tokenizer)


def _search(
    model,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria,
    generation_config,
    config: SoftConfig,
    search: SoftBeam,
    **model_kwargs,
) -> tuple[SoftOutput, list[float]]:
    """input_ids: [R, P], each prompt B times."""
    started = time.perf_counter()
    guard.check_reads(model, config, input_ids, model_kwargs)
    guard.check_positions(model, input_ids, generation_config, model_kwargs)
    hypotheses = Hypotheses(config, search.num_beams, input_ids, generation_config)
    asked = asked_of(logits_processor, input_ids, model_kwargs.get("attention_mask"))
    with evaluating(model), counted(model) as shapes, reading(model, hypotheses.inputs(model)):
        sequences = model._beam_search(
            input_ids,
            LogitsProcessorList([hypotheses.look, *asked, hypotheses]),
            stopping_criteria,
            generation_config,
            **model_kwargs,
        )
    prompts = input_ids[:: search.num_beams]
    texts = StoppingCriteriaList(c for c in stopping_criteria if not isinstance(c, LIMITS))
    progress, record = hypotheses.path(prompts, sequences[:, prompts.shape[1] :], texts)
    forwards = len(shapes) * search.num_beams
    cost = forwards, sum(rows * columns for rows, columns in shapes)
    out = search_output(prompts, progress, record, cost, started, config, search)
    return out, [float(forwards)] * len(prompts)


class _Step(NamedTuple):
    """Of R hypotheses before they choose a token."""

    parent: Tensor  # [R] int64, which of the step before each was
    token: Tensor  # [R] int64, its newest token
    belief: Soft  # [R, K]
    h: Tensor  # [R] entropy
    tops: tuple[
        Tensor, Tensor
    ]  # [R, M] log-probabilities and ids, of all tokens that can be chosen


class Hypotheses(LogitsProcessor):
    """What the hypotheses of a search believe, and how far the thought of each is."""

    def __init__(self, config: SoftConfig, num_beams: int, input_ids: Tensor, settings):
        self.config, self.B = config, num_beams
        eos = settings._eos_token_tensor
        self.rules = mk_rules(config, input_ids.device, settings._pad_token_tensor, eos)
        self.progress = begin(config, input_ids)
        self.start = self.progress.select(torch.arange(0, len(input_ids), num_beams))
        # of so many candidates transformers takes its choice
        self.most = max(2, 1 + len(self.rules.eos)) * num_beams
        self.tokens = None  # [R, P + t]
        self.h = None  # [R]
        self.parent = torch.arange(len(input_ids), device=input_ids.device)
        self.steps: list[_Step] = []

    def look(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Takes the entropy of what the model itself says."""
        self.h = entropy(scores, self.config.entropy_temperature)
        return scores

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Log-probabilities [R, V], those of the rows that a rule forces a token on with that token
        alone."""
        c, rules = self.config, self.rules
        belief = mk_proba_dist(scores, **c.filters)
        h = self.h.masked_fill(entropy(scores).isnan(), torch.nan)  # no token is left
        first = hard(belief)
        after, record = decide(rules, self.progress, h, first, first)
        if c.banned:
            thinks = (after.thoughts > self.progress.thoughts)[:, None]
            ids = torch.as_tensor(c.banned, device=scores.device)
            scores = torch.where(thinks, scores.index_fill(-1, ids, -torch.inf), scores)
        forced = (record.kind == Kind.FORCED)[:, None]
        if rules.end is not None and forced.any():
            alone = torch.full_like(scores, -torch.inf).scatter(-1, record.token[:, None], 0.0)
            scores = torch.where(forced, alone, scores)
        lost = leaves_none(scores) & (record.kind != Kind.PAD)  # by `banned` too
        self._check_finite(record._replace(entropy=record.entropy.masked_fill(lost, torch.nan)))
        tops = scores.topk(min(self.most, scores.shape[-1]))
        self.steps.append(_Step(self.parent, input_ids[:, -1], belief, h, tops))
        self.tokens = input_ids
        return scores

    def inputs(self, model) -> Callable[[Tensor], dict[str, Tensor]]:
        """A function of the sequences [R, P + t]: what their newest tokens are read as; {}: as
        tokens."""

        def read(sequences: Tensor) -> dict[str, Tensor]:
            if not self.steps:  # the prompts
                return {}
            record = self._advance(sequences)
            if not self.rules.is_soft or not (record.kind == Kind.SOFT).any():
                return {}
            soft = Soft(record.ids[:, None], record.weights[:, None])
            return soft_inputs(model, soft, rescale=self.config.rescale)

        return read

    def _advance(self, sequences: Tensor) -> Record:
        R, B, token = len(sequences), self.B, sequences[:, -1]
        now, before = sequences[:, :-1].view(R // B, B, -1), self.tokens.view(R // B, B, -1)
        # [N, B, B]; hypotheses that are the same have read the same
        same = (now[:, :, None] == before[:, None]).all(-1)
        groups = torch.arange(0, R, B, device=token.device)[:, None]
        self.parent = (groups + same.int().argmax(-1)).flatten()
        nothing = torch.full_like(self.steps[-1].h, torch.nan)
        progress = self.progress.select(self.parent)
        self.progress, record = self._decide(progress, self.steps[-1], self.parent, token, nothing)
        return record

    def _decide(
        self, progress: Progress, step: _Step, rows: Tensor, token: Tensor, logp: Tensor
    ) -> tuple[Progress, Record]:
        """The step from the hypotheses `rows` by these tokens."""
        belief = Soft(step.belief.ids[rows], step.belief.weights[rows])
        soft = guide(belief, token, 1 - self.config.softness)
        thought, answer = Mixed(soft, token, logp), Mixed(one_token(token), token, logp)
        return decide(self.rules, progress, step.h[rows], thought, answer)

    def path(self, prompts: Tensor, completions: Tensor, stops) -> tuple[Progress, Record]:
        """How the finished hypotheses [N, T] went, from the prompts [N, P] on."""
        N, B, device = len(completions), self.B, completions.device
        groups, progress, records = torch.arange(0, N * B, B, device=device), self.start, []
        rows = groups
        for t, token in enumerate(completions.unbind(1)):
            step = self.steps[t]
            if t > 0:
                same = (step.parent.view(N, B) == rows[:, None]) & (
                    step.token.view(N, B) == completions[:, t - 1, None]
                )
                rows = groups + same.int().argmax(-1)
            values, ids = (top[rows] for top in step.tops)
            logp = values.masked_fill(ids != token[:, None], -torch.inf).amax(-1)
            progress, record = self._decide(progress, step, rows, token, logp)
            ended = (record.token[:, None] == self.rules.eos).any(1)
            ended = ended | stops(torch.cat([prompts, completions[:, : t + 1]], 1), None)
            progress = progress._replace(done=progress.done | ended)
            records.append(record)
        return progress, stack(records)

    def _check_finite(self, record: Record) -> None:
        if rows := record.entropy.isnan().nonzero()[:, 0].tolist():
            prompts = sorted({row // self.B for row in rows})
            raise FloatingPointError(
                f"logits are NaN or infinite, or leave no token, at step {len(self.steps)}, rows {prompts}: check "
                f"the weights, the dtype (try float32), the processors and `banned`"
            )


@contextmanager
def reading(model, inputs: Callable[[Tensor], dict[str, Tensor]]) -> Iterator[None]:
    """Meanwhile the model's forwards in a search read `inputs(sequences)` in the place of the newest
    tokens."""
    own = vars(model).get("prepare_inputs_for_generation")  # PEFT's, in virtual tokens
    prepare = model.prepare_inputs_for_generation

    @functools.wraps(prepare)
    def prepared(input_ids: Tensor, *args, **kwargs) -> dict:
        mixed = inputs(input_ids)
        prepared = prepare(input_ids, *args, **kwargs)
        # prepared as a step of a token, as in softar.decode
        return prepared | {"input_ids": None} | mixed if mixed else prepared

    model.prepare_inputs_for_generation = prepared
    try:
        yield
    finally:
        if own is None:
            del model.prepare_inputs_for_generation
        else:
            model.prepare_inputs_for_generation = own
