"""Who thinks, who answers, who is done: the state of a batch between the steps of a decode, and its
record.

Shapes: B batch, T steps, V vocabulary, K tokens kept."""

import copy
from collections.abc import Sequence
from enum import IntEnum
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import LogitsProcessorList

from .config import SoftConfig
from .mixers import Mixed, Rng, guide, hard, mk_mixer
from .soft import entropy, mk_proba_dist


class Kind(IntEnum):
    """What a recorded position is."""

    PAD = 0  # the row had ended
    SOFT = 1  # a mixture was fed back
    HARD = 2  # one token, chosen by the model, was fed back or ended the row
    FORCED = 3  # one token, put there by a rule (budget, cold stop)


class Record(NamedTuple):
    """What was fed back and why: one step [B, ...] or a whole decode [B, T, ...]. Replays in one
    forward."""

    ids: Tensor  # [B, T, K] int64
    weights: Tensor  # [B, T, K] float32; slots past a step's own K have weight 0
    token: Tensor  # [B, T] int64, the discrete token that stands for the step
    kind: Tensor  # [B, T] int8, see Kind
    # [B, T] float32, log-probability under the step's filtered distribution of the token(s) drawn,
    # or of the single token that was fed back (0 if greedy); NaN where a thought's mixer draws
    # none, for FORCED and PAD
    logp: Tensor
    # [B, T] float32 nats, of the unfiltered distribution at the thought's temperature (at 1 if that
    # is 0)
    entropy: Tensor


class Chooser:
    """Chooses each row's next token and mixture, and keeps what that depends on: who thinks, who is
    done, counters.

    Everything stays on the device; `look` is the one synchronisation of a step. Rows can leave
    (`select`) and enter (`join`), for engines whose batches change.
    """

    # the state, each [B]
    ROWS = ("done", "thinking", "closed", "thoughts", "cold", "forced", "steps", "answer_start")

    def __init__(
        self,
        config: SoftConfig,
        input_ids: Tensor,
        pad: Tensor | None,
        eos: Tensor | None,
        rng: Rng,
    ):
        device, rows = input_ids.device, len(input_ids)
        self.config, self.mixer = config, mk_mixer(config.mixer, **config.mixer_args)
        self.start, self.end = (
            _as_tensor(ids, device) for ids in (config.think_start, config.think_end)
        )
        self.pad = input_ids.new_zeros(()) if pad is None else pad.to(device)
        self.eos = input_ids.new_zeros(0) if eos is None else eos.to(device)
        self.draws = Draws(rng, rows)
        self.is_soft, self.answers = config.is_soft, config.has_answer
        self.is_greedy = not self.is_soft and not config.mixer_draws
        self.done = torch.zeros(rows, dtype=torch.bool, device=device)
        self.thinking = (
            torch.ones_like(self.done)
            if self.start is None
            else _is_open(input_ids, self.start, self.end)
        )
        self.closed = torch.zeros_like(self.done)  # has thought; never thinks again
        self.thoughts = torch.zeros(rows, dtype=torch.long, device=device)  # steps thought so far
        self.cold = torch.zeros_like(self.thoughts)  # consecutive ones of low entropy
        self.forced = torch.zeros_like(self.thoughts)  # tokens of think_end put in so far
        self.steps = torch.zeros_like(self.thoughts)
        self.answer_start = torch.zeros_like(self.thoughts)
        self.any_thinking = bool(self.thinking.any())

    def __call__(
        self, logits: Tensor, processors: LogitsProcessorList, input_ids: Tensor
    ) -> Record:
        """logits [B, V] raw and float32, input_ids [B, t] so far -> one step's Record."""
        h = entropy(logits, self.config.temperature or 1.0)
        scores = processors(input_ids, logits)
        self.draws.step += 1
        answer = self._answer(scores) if self.answers or not self.any_thinking else None
        thought = self._think(scores) if self.any_thinking else answer
        return self.decide(h, thought, answer, input_ids)

    def decide(self, h: Tensor, thought: Mixed, answer: Mixed | None, input_ids: Tensor) -> Record:
        """h [B] entropy, what each row would do thinking and answering, input_ids [B, t] so far, of
        which the last tokens count -> one step's Record."""
        config, self.steps = self.config, self.steps + 1
        thinking = self.thinking & ~self.done

        forcing = closing = torch.zeros_like(thinking)
        token, logp = thought.token, thought.logp
        if self.answers:
            self.cold = torch.where(
                thinking & (h < (config.cold_stop_entropy or 0.0)), self.cold + 1, 0
            )
            over = thinking & self._is_over()
            if self.end is None:
                self.closed, thinking = self.closed | over, thinking & ~over
            token = torch.where(thinking, token, answer.token)
            logp = torch.where(thinking, logp, answer.logp)
            if self.end is not None:
                forcing = over | (thinking & (self.forced > 0))
                token = torch.where(
                    forcing, self.end[self.forced.clamp_max(len(self.end) - 1)], token
                )
                self.forced = self.forced + forcing.long()
                whole = torch.where(
                    forcing, self.forced == len(self.end), _ends_with(input_ids, token, self.end)
                )
                closing = thinking & whole
                self.closed = self.closed | closing
            self.answer_start = torch.where(thinking, self.steps, self.answer_start)
        self.thoughts = self.thoughts + thinking.long()

        token = torch.where(self.done, self.pad, token)
        # the row reads nothing after it, so nothing is mixed
        ends = (token[:, None] == self.eos).any(1)
        mixes = thinking & ~forcing & ~closing & ~ends & self.is_soft
        kind = torch.where(mixes, int(Kind.SOFT), int(Kind.HARD)).masked_fill(
            forcing, int(Kind.FORCED)
        )
        kind = kind.masked_fill(self.done, int(Kind.PAD)).to(torch.int8)
        logp = logp.masked_fill(forcing | self.done, torch.nan)
        self.mixes = mixes
        self.thinking = thinking & ~closing
        if self.start is not None:
            self.thinking = self.thinking | (
                _ends_with(input_ids, token, self.start) & ~self.closed
            )
        single = torch.zeros_like(thought.soft.weights)
        single[:, 0] = 1.0
        ids = torch.where(mixes[:, None], thought.soft.ids, token[:, None])
        weights = torch.where(mixes[:, None], thought.soft.weights, single)
        self.bad = (h.isnan() | weights.isnan().any(-1)) & ~self.done
        return Record(ids, weights, token, kind, logp, h.masked_fill(self.done, 0.0))

    def look(self, stopped: Tensor, step: int) -> tuple[bool, bool]:
        """Take note of rows that ended; -> (every row is done, some row feeds a mixture). The
        synchronisation."""
        self.done = self.done | stopped
        alive = ~self.done
        flags = torch.stack(
            [alive.any(), (self.mixes & alive).any(), (self.thinking & alive).any(), self.bad.any()]
        )
        any_alive, any_soft, self.any_thinking, any_bad = flags.tolist()
        if any_bad:
            raise FloatingPointError(
                f"logits are NaN or infinite, or leave no token, at step {step}, rows "
                f"{self.bad.nonzero()[:, 0].tolist()}: check the weights, the dtype (try float32) and the processors"
            )
        return not any_alive, any_soft

    def select(self, rows: Sequence[int]) -> "Chooser":
        """A chooser of these rows, in this order, that goes on from where they are."""
        index = torch.tensor(rows).to(self.done.device, non_blocking=True)
        return self._with(
            [getattr(self, name)[index] for name in self.ROWS], self.draws.select(rows)
        )

    def join(self, other: "Chooser") -> "Chooser":
        """One chooser of the rows of both, which have the same configuration."""
        pairs = ([getattr(self, name), getattr(other, name)] for name in self.ROWS)
        return self._with([torch.cat(pair) for pair in pairs], self.draws.join(other.draws))

    def _with(self, state: list[Tensor], draws: "Draws") -> "Chooser":
        out = copy.copy(self)
        out.__dict__.update(zip(self.ROWS, state, strict=True), draws=draws)
        return out

    def _think(self, scores: Tensor) -> Mixed:
        c = self.config
        if self.is_greedy:  # whatever the filters are, the argmax passes them
            return hard(mk_proba_dist(scores, temperature=0.0, banned=c.banned))
        dist = mk_proba_dist(scores, **c.filters)
        soft, token, logp = self.mixer(dist, rng=self.draws.rng(0))
        if self.is_soft:
            soft = guide(soft, token, 1 - c.alpha)
        return Mixed(
            soft, token, torch.full_like(scores[:, 0], torch.nan) if logp is None else logp
        )

    def _answer(self, scores: Tensor) -> Mixed:
        dist = mk_proba_dist(scores, **self.config.answer_filters)
        samples = self.config.answer_temperature > 0
        return hard(dist, rng=self.draws.rng(1) if samples else None, sample=samples)

    def _is_over(self) -> Tensor:
        over = torch.zeros_like(self.done)
        if self.config.budget is not None:
            over = over | (self.thoughts >= self.config.budget)
        if self.config.cold_stop_entropy is not None:
            over = over | (self.cold >= self.config.cold_stop_steps)
        return over


class Draws:
    """Random numbers for each step and purpose. Rows with generators of their own draw by (row,
    step, purpose), so that neither neighbours nor what they do (thinking longer, say) changes a
    row's numbers."""

    def __init__(self, rng: Rng, rows: int):
        self.step, self.shared, self.own = -1, rng, None
        if rng is not None and not isinstance(rng, torch.Generator):
            if len(rng) != rows:
                raise ValueError(
                    f"rng holds {len(rng)} generators for {rows} rows: pass one per row, or a single one"
                )
            self.seeds = [int(torch.randint(2**48, (), generator=g, device=g.device)) for g in rng]
            self.own = [torch.Generator(g.device) for g in rng]

    def rng(self, purpose: int) -> Rng:
        if self.own is None:
            return self.shared
        for generator, seed in zip(self.own, self.seeds, strict=True):
            generator.manual_seed(seed + 2 * self.step + purpose)
        return self.own

    def select(self, rows: Sequence[int]) -> "Draws":
        out = copy.copy(self)
        if self.own is not None:
            out.seeds, out.own = ([values[i] for i in rows] for values in (self.seeds, self.own))
        return out

    def join(self, other: "Draws") -> "Draws":
        out = copy.copy(self)
        # a row's number of steps is its own: what the counters differ by goes into the seed
        if self.own is not None:
            out.seeds = self.seeds + [seed + 2 * (other.step - self.step) for seed in other.seeds]
            out.own = self.own + other.own
        return out


def stack(records: list[Record]) -> Record:
    """Steps [B, K_t] -> [B, T, K], K the largest; added slots repeat the step's token with weight
    0."""
    K = max(r.ids.shape[1] for r in records)

    def widen(r: Record) -> Record:
        extra = K - r.ids.shape[1]
        ids = torch.cat([r.ids, r.token[:, None].expand(-1, extra)], 1)
        return r._replace(ids=ids, weights=torch.nn.functional.pad(r.weights, (0, extra)))

    return Record(*(torch.stack(column, 1) for column in zip(*map(widen, records), strict=True)))


def _as_tensor(ids: tuple[int, ...] | None, device: torch.device) -> Tensor | None:
    return None if ids is None else torch.tensor(ids, device=device)


def _ends_with(input_ids: Tensor, token: Tensor, pattern: Tensor) -> Tensor:
    """Does each row, with its new token, end in the pattern? [B, t], [B], [n] -> [B] bool."""
    n = len(pattern)
    if n - 1 > input_ids.shape[1]:
        return torch.zeros_like(token, dtype=torch.bool)
    tail = torch.cat([input_ids[:, input_ids.shape[1] - n + 1 :], token[:, None]], 1)
    return (tail == pattern).all(1)


def _last_match(input_ids: Tensor, pattern: Tensor) -> Tensor:
    """Column where the last occurrence of the pattern ends, -1 for none. [B, t], [n] -> [B]."""
    n = len(pattern)
    if n > input_ids.shape[1]:
        return input_ids.new_full((len(input_ids),), -1)
    hit = (input_ids.unfold(1, n, 1) == pattern).all(-1)
    columns = torch.arange(n - 1, input_ids.shape[1], device=input_ids.device)
    return torch.where(hit, columns, -1).amax(1)


def _is_open(input_ids: Tensor, start: Tensor, end: Tensor) -> Tensor:
    """Has the prompt opened a thought that it did not close? [B, P] -> [B] bool."""
    return _last_match(input_ids, start) > _last_match(input_ids, end)
