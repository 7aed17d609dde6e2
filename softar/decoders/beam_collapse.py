"""Collapsed beams: beam search that looks ahead, and whose beams become one soft path.

From a soft prefix a beam search of width B goes `every` tokens ahead. Its beams, weighted by
softmax(score / tau), are collapsed position by position into mixtures, which are read in one
forward in place of what the beams read; from there the next search begins. With every = 1 that is
soft decoding of the B likeliest tokens at temperature tau. The thought alone is decoded so; the answer
is greedy.

Rows of a batch whose thoughts end at different places go on apart, so that each decodes as it does
alone.

Shapes: n rows that are in step, B beams, L positions of a block, P prompt length, t tokens so far,
V vocabulary.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import LogitsProcessorList, StoppingCriteria, StoppingCriteriaList
from transformers.cache_utils import LinearAttentionCacheLayerMixin

from .. import guard
from ..checks import check_least, check_types
from ..config import SWITCHES, SoftConfig
from ..decode import SoftOutput
from ..mixers import Mixed
from ..models.kind import uncompiled
from ..models.reading import ONE_BY_ONE, cache_in
from ..placement import evaluating
from ..processors import asked_of, leaves_none
from ..soft import Soft, entropy, mk_proba_dist, soft_inputs, tempered
from ..thought import Kind, Progress, Record, Rules, begin, check_finite, decide, mk_rules
from .group import Group
from .run import check_search, run_search, search_output

# Of SoftConfig, what the search decides itself
FIXED = [
    *"mixer mixer_args softness temperature top_k top_p min_p keep answer_temperature".split(),
    *"answer_top_k answer_top_p answer_min_p step_temperature".split(),
    *SWITCHES,
]


@dataclass(frozen=True)
class BeamCollapse:
    """How far beams look ahead before they are collapsed, and how."""

    num_beams: int = 4
    every: int = 2  # tokens that the beams go ahead
    tau: float = 1.0  # temperature of the weights of the beams; towards 0 the best alone counts

    def __post_init__(self):
        check_types(self)
        check_least(self, num_beams=1, every=1)
        if not 0 < self.tau < math.inf:
            raise ValueError(f"tau={self.tau} must be > 0 and finite; 1 weighs by probability")

    @property
    def changes(self) -> dict[str, Any]:
        """Fields of SoftConfig by which it reads."""
        own = dict(mixer="soft", mixer_args={}, softness=1.0, answer_temperature=0.0, switch=None)
        filters = dict(top_p=None, min_p=None, keep=None, step_temperature=None)
        return own | filters | {"temperature": self.tau, "top_k": self.num_beams}


def beam_collapse(
    model,
    input_ids: Tensor,
    attention_mask: Tensor,
    config: SoftConfig,
    search: BeamCollapse,
    stops: Sequence[StoppingCriteria] = (),
    tokenizer=None,
) -> tuple[SoftOutput, list[float]]:
    """Decode by collapsed beams.

    Args:
        model: a causal LM of transformers, plain or wrapped by PEFT.
        input_ids, attention_mask: [N, P], padded on the left.
        config: resolved; where the thought is.
        stops: where a text ends, beside length and end tokens; asked of any rows at any step.
        tokenizer: for the model's own stop strings, as for `softar.generate`.

    Returns:
        The soft paths, whose entropies are means over the beams where they stood; and the forwards
        of each row, which count every beam.

    Raises:
        ValueError: more beams than tokens in the vocabulary, a model that keeps a state instead of
            keys and values and cannot read several positions from there, or what `softar.generate`
            refuses.
    """
    model, config = uncompiled(model), config.changed(**search.changes)
    check_search(model, input_ids, attention_mask, search.num_beams)
    of = model, input_ids, attention_mask, config, search
    return run_search(_search, *of, guard.OVERRIDES, stops, tokenizer)


class Block(NamedTuple):
    """What beams found, collapsed: a mixture for each position."""

    mixtures: Soft  # [n, L, B]
    token: Tensor  # [n, L] int64, the heaviest token of each
    h: Tensor  # [n, L] entropy, mean over the beams
    lengths: Tensor  # [n] int64, positions that some beam reached


def _search(
    model,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config,
    config: SoftConfig,
    search: BeamCollapse,
    **inputs,
) -> tuple[SoftOutput, list[float]]:
    started = time.perf_counter()
    guard.check_reads(model, config, input_ids, inputs)
    guard.check_positions(model, input_ids, generation_config, inputs)
    check_rereads(model, inputs, search)
    pad, eos = generation_config._pad_token_tensor, generation_config._eos_token_tensor
    rules = mk_rules(config, input_ids.device, pad, eos)
    processors = asked_of(logits_processor, input_ids, inputs.get("attention_mask"))
    path = Path(model, config, search, rules, processors, input_ids)
    with evaluating(model):
        groups = [path.begin(input_ids, generation_config, inputs)]
        while groups:
            groups += path.advance(groups.pop(), stopping_criteria)
    progress, record = path.finished()
    cost = int(path.forwards.max()), path.positions
    out = search_output(input_ids, progress, record, cost, started, config, search)
    return out, path.forwards.tolist()


def check_rereads(model, inputs: dict, search: BeamCollapse) -> None:
    """Raise ValueError for a model whose cache cannot be copied, or not go on by several positions."""
    name, cache = type(model).__name__, cache_in(inputs)
    if cache is None:
        raise ValueError(
            f"{name} has no cache that beams can look ahead from: give another decoder"
        )
    # a state, which goes on by one
    recurs = any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in cache.layers)
    if search.every > 1 and (recurs or model.config.model_type in ONE_BY_ONE):
        raise ValueError(
            f"every={search.every}: {name} goes on by one position at a time: give every=1"
        )


class Path:
    """The soft paths of a batch, as far as they are."""

    def __init__(self, model, config, search, rules: Rules, processors, input_ids: Tensor):
        self.model, self.config, self.rules, self.processors = model, config, rules, processors
        # a beam ends by its tokens alone; what a rule ends is the path
        self.beam_rules = rules._replace(budget=None, cold_stop_entropy=None)
        self.B, self.every, self.P = search.num_beams, search.every, input_ids.shape[1]
        N, T, where = len(input_ids), config.max_new_tokens, dict(device=input_ids.device)
        self.progress = begin(config, input_ids)
        token, nan = rules.pad.repeat(N, T), torch.full((N, T), torch.nan, **where)
        ids, weights = _single(token, self.B)
        kind = torch.full((N, T), int(Kind.PAD), dtype=torch.int8, **where)
        self.record = Record(ids, weights, token, kind, nan, torch.zeros(N, T, **where))
        self.forwards = torch.zeros(N)  # of each row, those of its beams counted
        self.positions = 0

    def begin(self, input_ids: Tensor, settings, inputs: dict) -> Group:
        outputs = self.model._prefill(input_ids, settings, inputs)
        inputs = self.model._update_model_kwargs_for_generation(outputs, inputs, num_new_tokens=0)
        self.forwards += -(-self.P // (settings.prefill_chunk_size or self.P))
        self.positions += input_ids.numel()
        rows = torch.arange(len(input_ids), device=input_ids.device)
        logits, h = self._look(input_ids, outputs)
        return Group(rows, input_ids, logits, h, inputs, self.progress)

    def advance(self, group: Group, stopping_criteria) -> list[Group]:
        """A block of each row that is free to think, a token of each other -> what goes on of them."""
        room = self.config.max_new_tokens - (group.tokens.shape[1] - self.P)
        p, free = group.progress, group.progress.thinking & (group.progress.forced == 0)
        length = torch.full_like(p.thoughts, min(self.every, room))
        if self.rules.budget is not None:
            length = length.minimum(self.rules.budget - p.thoughts)
        groups = []
        for L, _, part in group.split(length.masked_fill(~free, 0)):
            block = self._block(part, L) if L > 0 else self._token(part)
            groups += self._read(part, block, stopping_criteria)
        return groups

    def _token(self, group: Group) -> Block:
        """The likeliest token of each row; a rule may put another in its place."""
        token = group.logits.argmax(-1)[:, None]
        return Block(_single(token, self.B), token, group.h[:, None], torch.ones_like(token[:, 0]))

    def _block(self, group: Group, L: int) -> Block:
        """Look L tokens ahead."""
        n, B, device = len(group.rows), self.B, group.tokens.device
        # in the order of the mixer `soft`
        first = mk_proba_dist(group.logits, top_k=B, banned=self.config.banned).ids
        # the logits themselves: their common constant is none of the beams'
        scores = self._allowed(group.logits).gather(-1, first)  # [n, B]
        self._check(group.tokens, group.h.masked_fill(leaves_none(scores), torch.nan))
        ahead = group.select(torch.arange(n, device=device).repeat_interleave(B)) if L > 1 else None
        progress = group.progress.select(torch.arange(n, device=device).repeat_interleave(B))
        token, h = first.flatten(), group.h.repeat_interleave(B)
        ended = torch.zeros(n * B, dtype=torch.bool, device=device)
        tokens, alive, entropies = [], [], []  # of each position [n B]
        for step in range(L):
            one = Mixed(Soft(token[:, None], torch.ones_like(h)[:, None]), token, h)
            progress, _ = decide(self.beam_rules, progress, h, one, one)
            tokens, alive = [*tokens, token], [*alive, ~ended]
            entropies = [*entropies, h]
            ended = ended | ~progress.thinking | (token[:, None] == self.rules.eos).any(1)
            if step == L - 1:
                break
            ahead = self._forward(ahead, token[:, None], None, group.rows, B)
            scores, parent, token = self._expand(scores, ahead.logits, ended)
            h, ended, progress = ahead.h[parent], ended[parent], progress.select(parent)
            cache_in(ahead.inputs).reorder_cache(parent)
            ahead = ahead._replace(tokens=ahead.tokens[parent])
            tokens, alive, entropies = (
                [column[parent] for column in columns] for columns in (tokens, alive, entropies)
            )
        columns = (torch.stack(c, -1).view(n, B, L) for c in (tokens, alive, entropies))
        return collapse(scores, *columns, self.config.temperature)

    def _expand(self, scores: Tensor, logits: Tensor, ended: Tensor) -> tuple[Tensor, ...]:
        """scores [n, B], logits [n B, V] and who has ended [n B], whose one child is itself -> the best
        B scores [n, B], and of each the parent and the token [n B]."""
        (n, B), V = scores.shape, logits.shape[-1]
        logp = self._allowed(logits.log_softmax(-1))
        itself = torch.full_like(logp[:1], -torch.inf)
        itself[:, 0] = 0.0
        logp = torch.where(ended[:, None], itself, logp).view(n, B, V)
        scores, best = (scores[..., None] + logp).flatten(1).topk(B)
        groups = torch.arange(0, n * B, B, device=scores.device)[:, None]
        return scores, (groups + best // V).flatten(), (best % V).flatten()

    def _allowed(self, scores: Tensor) -> Tensor:
        if not self.config.banned:
            return scores
        banned = torch.as_tensor(self.config.banned, device=scores.device)
        return scores.index_fill(-1, banned, -torch.inf)

    def _read(self, group: Group, block: Block, stopping_criteria) -> list[Group]:
        """Go through a block's positions by the rules, up to where a row's thought ends, and read
        them."""
        ended, cut = torch.zeros_like(block.lengths, dtype=torch.bool), block.lengths
        progress, states, records = group.progress, [], []
        nothing = torch.full_like(block.h[:, 0], torch.nan)
        first = group.logits.argmax(-1)  # by the path's own belief: an answer is none of the beams'
        answer = Mixed(_single(first, self.B), first, torch.zeros_like(nothing))
        for j in range(block.token.shape[1]):
            mixture, token = Soft(*(column[:, j] for column in block.mixtures)), block.token[:, j]
            step = Mixed(mixture, token, nothing)
            before = progress.thoughts
            progress, record = decide(self.rules, progress, block.h[:, j], step, answer)
            stops = (record.kind != Kind.SOFT) & ~ended
            # one that begins behind the block's first position begins a block of its own
            end = torch.where((progress.thoughts == before) & (j > 0), j, j + 1)
            cut, ended = torch.where(stops, cut.minimum(end), cut), ended | stops
            states, records = [*states, progress], [*records, record]
        record = Record(*(torch.stack(column, 1) for column in zip(*records, strict=True)))
        at, groups = group.tokens.shape[1] - self.P, []
        for c, index, part in group.split(cut):
            steps = Record(*(column[index, :c] for column in record))
            self._note(part.rows, at, steps)
            tokens = torch.cat([part.tokens, steps.token], 1)
            progress = states[c - 1].select(index)
            done = stopping_criteria(tokens, None)
            self.progress = Progress(
                *(
                    whole.index_copy(0, part.rows, new)
                    for whole, new in zip(self.progress, progress, strict=True)
                )
            )
            for is_done, left, rest in part._replace(progress=progress).split(done.long()):
                if not is_done:
                    soft = Soft(steps.ids[left], steps.weights[left])
                    soft = soft if (steps.kind[left] == Kind.SOFT).any() else None
                    groups.append(self._forward(rest, steps.token[left], soft, rest.rows, 1))
        return groups

    def _note(self, rows: Tensor, at: int, steps: Record) -> None:
        columns = torch.arange(at, at + steps.token.shape[1], device=rows.device)
        for whole, new in zip(self.record, steps, strict=True):
            whole[rows[:, None], columns] = new

    def _forward(
        self, group: Group, tokens: Tensor, soft: Soft | None, rows: Tensor, width: int
    ) -> Group:
        """Read tokens [m, c], or in their place mixtures [m, c, B]. rows: of the batch, each of which
        `width` rows of the group belong to."""
        c, model = tokens.shape[1], self.model
        tokens = torch.cat([group.tokens, tokens], 1)
        inputs = group.longer(c)
        step = model.prepare_inputs_for_generation(
            tokens, next_sequence_length=c, is_first_iteration=False, **inputs
        )
        if soft is not None:
            mixed = soft_inputs(model, soft, rescale=self.config.rescale)
            step = step | {"input_ids": None} | mixed
        outputs = model(**step, return_dict=True)
        self.forwards[rows.cpu()] += width
        self.positions += len(tokens) * c
        logits, h = self._look(tokens, outputs)
        return group._replace(tokens=tokens, logits=logits, h=h, inputs=inputs)

    def _look(self, tokens: Tensor, outputs) -> tuple[Tensor, Tensor]:
        """The processed logits of the next step, and the entropy of the raw ones."""
        logits = outputs.logits[:, -1].to(copy=True, dtype=torch.float32, device=tokens.device)
        h = entropy(logits, self.config.temperature)
        scores = self.processors(tokens, logits)
        h = h.masked_fill(leaves_none(scores), torch.nan)
        self._check(tokens, h)
        return scores, h

    def _check(self, tokens: Tensor, h: Tensor) -> None:
        if h.isnan().any():
            blank = Record(tokens, h[:, None], tokens, tokens, h, h)
            check_finite(blank, tokens.shape[1] - self.P)

    def finished(self) -> tuple[Progress, Record]:
        T = int((self.record.kind != Kind.PAD).any(0).sum())
        return self.progress, Record(*(column[:, :T] for column in self.record))


def collapse(scores: Tensor, tokens: Tensor, alive: Tensor, h: Tensor, tau: float) -> Block:
    """Beams as mixtures.

    Args:
        scores: [n, B] log-probabilities up to a constant of each row. tokens, alive, h: [n, B, L], of
            each beam its tokens, whether it has got so far, and the entropy before each token.
    """
    scores = scores[:, :, None].expand_as(h).transpose(1, 2)  # [n, L, B]
    tokens, alive, h = (column.transpose(1, 2) for column in (tokens, alive, h))
    reached = alive.any(-1)  # [n, L]
    weights = tempered(scores.masked_fill(~alive & reached[..., None], -torch.inf), tau).softmax(-1)
    same = tokens[..., :, None] == tokens[..., None, :]
    heaviest = (same * weights[..., None, :]).sum(-1).argmax(-1, keepdim=True)
    token = tokens.gather(-1, heaviest)[..., 0]
    mean = h[..., 0] + (weights * (h - h[..., :1])).sum(-1)  # exact where they agree
    return Block(Soft(tokens, weights), token, mean, reached.sum(-1))


def _single(token: Tensor, K: int) -> Soft:
    """[...] -> mixtures [..., K] of that token alone."""
    ids = token[..., None].repeat(*[1] * token.dim(), K)
    weights = torch.zeros_like(ids, dtype=torch.float32)
    weights[..., 0] = 1.0
    return Soft(ids, weights)
