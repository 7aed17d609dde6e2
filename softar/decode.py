"""THE autoregressive loop: a language model that reads back what a mixer makes of its own distribution.

`generate` is the front door; `soft_decode` is the loop itself in the form that transformers' `model.generate` takes as
`custom_generate=`. Soft everywhere or only in the thinking span, then a discrete answer; hard decoding is the case of
one token of weight 1. transformers prepares inputs, cache, processors and stopping criteria, so whatever works with
`model.generate` works here.

Shapes: B batch, P prompt length, T steps, V vocabulary, K tokens kept, D embedding width.
"""

import copy
import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteriaList,
    StopStringCriteria,
)
from transformers.generation.logits_process import (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopHLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from .config import SoftConfig
from .mixers import Mixed, Rng, hard, mk_mixer
from .sft.forward import guide
from .soft import Soft, check_dist, entropy, mk_proba_dist, soft_embed

# What generate's own settings must not decide: `SoftConfig` does. Sampling is switched on, with neutral values: what is
# None generate fills from the model's configuration, and without do_sample it warns of it; the loop drops the warpers.
SAMPLING = (TemperatureLogitsWarper, TopHLogitsWarper, TopKLogitsWarper, TopPLogitsWarper, MinPLogitsWarper,
            TypicalLogitsWarper, EpsilonLogitsWarper, EtaLogitsWarper)  # fmt: skip
OVERRIDES = dict(max_length=None, min_length=None, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0,
                 typical_p=1.0, epsilon_cutoff=0.0, eta_cutoff=0.0, num_beams=1, num_return_sequences=1,
                 use_cache=True, return_dict_in_generate=True)  # fmt: skip


class Kind(IntEnum):
    """What a recorded position is."""

    PAD = 0  # the row had ended
    SOFT = 1  # a mixture was fed back
    HARD = 2  # one token, chosen by the model, was fed back or ended the row
    FORCED = 3  # one token, put there by a rule (budget, cold stop)


class Record(NamedTuple):
    """What was fed back and why: one step [B, ...] or a whole decode [B, T, ...]. Replays in one forward."""

    ids: Tensor  # [B, T, K] int64
    weights: Tensor  # [B, T, K] float32; slots past a step's own K have weight 0
    token: Tensor  # [B, T] int64, the discrete token that stands for the step
    kind: Tensor  # [B, T] int8, see Kind
    logp: Tensor  # [B, T] float32, log-probability under the step's filtered distribution of the token(s) drawn, or of
    # the single token that was fed back (0 if greedy); NaN where a thought's mixer draws none, for FORCED and PAD
    entropy: (
        Tensor  # [B, T] float32 nats, of the unfiltered distribution at the thought's temperature (at 1 if that is 0)
    )


@dataclass(frozen=True)
class SoftOutput:
    sequences: Tensor  # [B, P + T] int64: the prompt and the tokens that stand for the steps
    record: Record
    prompt_length: int
    answer_start: Tensor  # [B] int64, steps before the answer begins; 0 where the configuration has no separate thought
    num_forwards: int  # NFE: forward passes of the model, the prompt's included
    token_forwards: int  # positions computed in them, over all rows, padding included
    seconds: float

    @property
    def completions(self) -> Tensor:
        """[B, T] the generated part of `sequences`."""
        return self.sequences[:, self.prompt_length :]

    @property
    def answers(self) -> list[Tensor]:
        """Per row the tokens after the thought, without padding."""
        rows = zip(self.completions, self.record.kind, self.answer_start.tolist(), strict=True)
        return [tokens[start:][kind[start:] != Kind.PAD] for tokens, kind, start in rows]


def generate(
    model: PreTrainedModel,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    config: SoftConfig | None = None,
    rng: Rng = None,
    callback: Callable[[dict], None] | None = None,
    tokenizer=None,
    streamer=None,
    logits_processor: Sequence | None = None,
    stopping_criteria: Sequence | None = None,
    generation_config: GenerationConfig | None = None,
) -> SoftOutput:
    """Decode softly.

    Args:
        model: a causal LM of transformers, plain or wrapped by PEFT.
        input_ids: [B, P] prompts, padded on the left. attention_mask: [B, P]; None means no padding.
        config: what is fed back, where, and for how long. Default: SoftConfig().
        rng: torch.Generator for every draw, or one per row; a row with its own generator decodes the same alone and
            in a batch. None uses torch's global one.
        callback: called after each step with {"step", "record" (Record of [B, ...]), "sequences" ([B, P + step + 1])}.
        tokenizer: needed only where config names think_start or think_end as text, or for stop strings.
        streamer: a transformers streamer; gets the tokens that stand for the steps.
        logits_processor, stopping_criteria: lists of transformers', applied as in `model.generate`.
        generation_config: end-of-sequence and pad ids, penalties, cache implementation; default the model's own. Its
            sampling settings and lengths do not count: `config` alone says how a step is chosen.

    Returns:
        SoftOutput. Rows end at their EOS token and are padded to the longest.

    Raises:
        ValueError: bad configuration or inputs, before the first forward.
        FloatingPointError: NaN or infinite logits; names the step and the rows.
    """
    config = (config or SoftConfig()).resolve(tokenizer)
    _check_inputs(input_ids, attention_mask)
    settings = copy.deepcopy(generation_config or model.generation_config)
    settings.update(**OVERRIDES, max_new_tokens=config.max_new_tokens)
    stopping_criteria = StoppingCriteriaList(stopping_criteria or [])
    if settings.stop_strings is not None:  # generate keeps the tokenizer from a custom loop
        stopping_criteria.append(StopStringCriteria(tokenizer, settings.stop_strings))
        settings.stop_strings = None
    return model.generate(
        input_ids=input_ids,
        attention_mask=torch.ones_like(input_ids) if attention_mask is None else attention_mask,
        generation_config=settings,
        logits_processor=LogitsProcessorList(logits_processor or []),
        stopping_criteria=stopping_criteria,
        custom_generate=functools.partial(
            soft_decode, soft_config=config, rng=rng, callback=callback, soft_streamer=streamer
        ),
    )


def soft_decode(
    model: PreTrainedModel,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    soft_config: SoftConfig | None = None,
    rng: Rng = None,
    callback: Callable[[dict], None] | None = None,
    soft_streamer=None,
    **model_kwargs,
) -> SoftOutput | Tensor:
    """The loop, for `model.generate(**inputs, custom_generate=softar.soft_decode, soft_config=SoftConfig(...))`.

    Length, EOS, processors and criteria come from generate's own arguments; sampling settings do not count. Returns
    the sequences, or the SoftOutput with return_dict_in_generate=True. A streamer has to be passed as soft_streamer:
    generate keeps the one named streamer from a custom loop.
    """
    started = time.perf_counter()
    config = (soft_config or SoftConfig()).resolve(None)
    _check_inputs(input_ids, model_kwargs.get("attention_mask"))
    embedding = _check_model(model, config, model_kwargs)
    processors = LogitsProcessorList(p for p in logits_processor if not isinstance(p, SAMPLING))
    chooser = _Chooser(config, input_ids, generation_config._pad_token_tensor, generation_config._eos_token_tensor, rng)
    if soft_streamer is not None:
        soft_streamer.put(input_ids.cpu())

    prompt_length, positions = input_ids.shape[1], input_ids.numel()
    forwards = -(-prompt_length // (generation_config.prefill_chunk_size or prompt_length))
    records: list[Record] = []
    outputs = model._prefill(input_ids, generation_config, model_kwargs)
    while True:
        model_kwargs = model._update_model_kwargs_for_generation(outputs, model_kwargs)
        logits = outputs.logits[:, -1].to(copy=True, dtype=torch.float32, device=input_ids.device)
        record = chooser(logits, processors, input_ids)
        records.append(record)
        input_ids = torch.cat([input_ids, record.token[:, None]], 1)
        finished, any_soft = chooser.look(stopping_criteria(input_ids, None), step=len(records) - 1)
        if soft_streamer is not None:
            soft_streamer.put(record.token.cpu())
        if callback is not None:
            callback({"step": len(records) - 1, "record": record, "sequences": input_ids})
        if finished:
            break
        embeds = None
        if any_soft:
            embeds = soft_embed(Soft(record.ids, record.weights), embedding, rescale=config.rescale)[:, None]
        # is_first_iteration is what makes transformers take the embeddings instead of the last token.
        inputs = model.prepare_inputs_for_generation(
            input_ids, next_sequence_length=1, inputs_embeds=embeds, is_first_iteration=any_soft, **model_kwargs
        )
        outputs = model(**inputs, return_dict=True)
        forwards, positions = forwards + 1, positions + len(input_ids)
    if soft_streamer is not None:
        soft_streamer.end()
    if not generation_config.return_dict_in_generate:
        return input_ids
    seconds = time.perf_counter() - started
    return SoftOutput(input_ids, _stack(records), prompt_length, chooser.answer_start, forwards, positions, seconds)


class _Chooser:
    """Chooses each row's next token and mixture, and keeps what that depends on: who thinks, who is done, counters.

    Everything stays on the device; `look` is the one synchronisation of a step. Rows can leave (`select`) and enter
    (`join`), for engines whose batches change.
    """

    ROWS = ("done", "thinking", "closed", "thoughts", "cold", "forced", "steps", "answer_start")  # the state, each [B]

    def __init__(self, config: SoftConfig, input_ids: Tensor, pad: Tensor | None, eos: Tensor | None, rng: Rng):
        device, rows = input_ids.device, len(input_ids)
        self.config, self.mixer = config, mk_mixer(config.mixer, **config.mixer_args)
        self.start, self.end = (_as_tensor(ids, device) for ids in (config.think_start, config.think_end))
        self.pad = input_ids.new_zeros(()) if pad is None else pad.to(device)
        self.eos = input_ids.new_zeros(0) if eos is None else eos.to(device)
        self.draws = _Draws(rng, rows)
        # A thought of single tokens is an ordinary chain of thought: no embedding is ever mixed.
        self.is_soft = not (config.alpha == 0 or config.mixer == "hard" or config.temperature == 0)
        draws = config.mixer_args.get("sample", False) if config.mixer == "hard" else config.mixer != "soft"
        self.is_greedy = not self.is_soft and not draws
        self.answers = self.end is not None or config.budget is not None or config.cold_stop_entropy is not None
        self.done = torch.zeros(rows, dtype=torch.bool, device=device)
        self.thinking = torch.ones_like(self.done) if self.start is None else _is_open(input_ids, self.start, self.end)
        self.closed = torch.zeros_like(self.done)  # has thought; never thinks again
        self.thoughts = torch.zeros(rows, dtype=torch.long, device=device)  # steps thought so far
        self.cold = torch.zeros_like(self.thoughts)  # consecutive ones of low entropy
        self.forced = torch.zeros_like(self.thoughts)  # tokens of think_end put in so far
        self.steps = torch.zeros_like(self.thoughts)
        self.answer_start = torch.zeros_like(self.thoughts)
        self.any_thinking = bool(self.thinking.any())

    def __call__(self, logits: Tensor, processors: LogitsProcessorList, input_ids: Tensor) -> Record:
        """logits [B, V] raw and float32, input_ids [B, t] so far -> one step's Record."""
        h = entropy(logits, self.config.temperature or 1.0)
        scores = processors(input_ids, logits)
        self.draws.step += 1
        answer = self._answer(scores) if self.answers or not self.any_thinking else None
        thought = self._think(scores) if self.any_thinking else answer
        return self.decide(h, thought, answer, input_ids)

    def decide(self, h: Tensor, thought: Mixed, answer: Mixed | None, input_ids: Tensor) -> Record:
        """h [B] entropy, what each row would do thinking and answering, input_ids [B, t] so far, of which the last
        tokens count -> one step's Record."""
        config, self.steps = self.config, self.steps + 1
        thinking = self.thinking & ~self.done

        forcing = closing = torch.zeros_like(thinking)
        token, logp = thought.token, thought.logp
        if self.answers:
            self.cold = torch.where(thinking & (h < (config.cold_stop_entropy or 0.0)), self.cold + 1, 0)
            over = thinking & self._is_over()
            if self.end is None:
                self.closed, thinking = self.closed | over, thinking & ~over
            token = torch.where(thinking, token, answer.token)
            logp = torch.where(thinking, logp, answer.logp)
            if self.end is not None:
                forcing = over | (thinking & (self.forced > 0))
                token = torch.where(forcing, self.end[self.forced.clamp_max(len(self.end) - 1)], token)
                self.forced = self.forced + forcing.long()
                whole = torch.where(forcing, self.forced == len(self.end), _ends_with(input_ids, token, self.end))
                closing = thinking & whole
                self.closed = self.closed | closing
            self.answer_start = torch.where(thinking, self.steps, self.answer_start)
        self.thoughts = self.thoughts + thinking.long()

        token = torch.where(self.done, self.pad, token)
        ends = (token[:, None] == self.eos).any(1)  # the row reads nothing after it, so nothing is mixed
        mixes = thinking & ~forcing & ~closing & ~ends & self.is_soft
        kind = torch.where(mixes, int(Kind.SOFT), int(Kind.HARD)).masked_fill(forcing, int(Kind.FORCED))
        kind = kind.masked_fill(self.done, int(Kind.PAD)).to(torch.int8)
        logp = logp.masked_fill(forcing | self.done, torch.nan)
        self.mixes = mixes
        self.thinking = thinking & ~closing
        if self.start is not None:
            self.thinking = self.thinking | (_ends_with(input_ids, token, self.start) & ~self.closed)
        single = torch.zeros_like(thought.soft.weights)
        single[:, 0] = 1.0
        ids = torch.where(mixes[:, None], thought.soft.ids, token[:, None])
        weights = torch.where(mixes[:, None], thought.soft.weights, single)
        self.bad = (h.isnan() | weights.isnan().any(-1)) & ~self.done
        return Record(ids, weights, token, kind, logp, h.masked_fill(self.done, 0.0))

    def look(self, stopped: Tensor, step: int) -> tuple[bool, bool]:
        """Take note of rows that ended; -> (every row is done, some row feeds a mixture). The synchronisation."""
        self.done = self.done | stopped
        alive = ~self.done
        flags = torch.stack([alive.any(), (self.mixes & alive).any(), (self.thinking & alive).any(), self.bad.any()])
        any_alive, any_soft, self.any_thinking, any_bad = flags.tolist()
        if any_bad:
            raise FloatingPointError(
                f"logits are NaN or infinite, or leave no token, at step {step}, rows "
                f"{self.bad.nonzero()[:, 0].tolist()}: check the weights, the dtype (try float32) and the processors"
            )
        return not any_alive, any_soft

    def select(self, rows: Sequence[int]) -> "_Chooser":
        """A chooser of these rows, in this order, that goes on from where they are."""
        index = torch.tensor(rows).to(self.done.device, non_blocking=True)
        return self._with([getattr(self, name)[index] for name in self.ROWS], self.draws.select(rows))

    def join(self, other: "_Chooser") -> "_Chooser":
        """One chooser of the rows of both, which have the same configuration."""
        pairs = ([getattr(self, name), getattr(other, name)] for name in self.ROWS)
        return self._with([torch.cat(pair) for pair in pairs], self.draws.join(other.draws))

    def _with(self, state: list[Tensor], draws: "_Draws") -> "_Chooser":
        out = copy.copy(self)
        out.__dict__.update(zip(self.ROWS, state, strict=True), draws=draws)
        return out

    def _think(self, scores: Tensor) -> Mixed:
        c = self.config
        if self.is_greedy:  # whatever the filters are, the argmax passes them
            return hard(mk_proba_dist(scores, temperature=0.0, banned=c.banned))
        dist = mk_proba_dist(
            scores,
            temperature=c.temperature,
            top_k=c.top_k,
            top_p=c.top_p,
            min_p=c.min_p,
            keep=c.keep,
            banned=c.banned,
        )
        soft, token, logp = self.mixer(dist, rng=self.draws.rng(0))
        if self.is_soft:
            soft = guide(soft, token, 1 - c.alpha)
        return Mixed(soft, token, torch.full_like(scores[:, 0], torch.nan) if logp is None else logp)

    def _answer(self, scores: Tensor) -> Mixed:
        c = self.config
        dist = mk_proba_dist(
            scores,
            temperature=c.answer_temperature,
            top_k=c.answer_top_k,
            top_p=c.answer_top_p,
            min_p=c.answer_min_p,
        )
        samples = c.answer_temperature > 0
        return hard(dist, rng=self.draws.rng(1) if samples else None, sample=samples)

    def _is_over(self) -> Tensor:
        over = torch.zeros_like(self.done)
        if self.config.budget is not None:
            over = over | (self.thoughts >= self.config.budget)
        if self.config.cold_stop_entropy is not None:
            over = over | (self.cold >= self.config.cold_stop_steps)
        return over


class _Draws:
    """Random numbers for each step and purpose. Rows with generators of their own draw by (row, step, purpose), so that
    neither neighbours nor what they do (thinking longer, say) changes a row's numbers."""

    def __init__(self, rng: Rng, rows: int):
        self.step, self.shared, self.own = -1, rng, None
        if rng is not None and not isinstance(rng, torch.Generator):
            if len(rng) != rows:
                raise ValueError(f"rng holds {len(rng)} generators for {rows} rows: pass one per row, or a single one")
            self.seeds = [int(torch.randint(2**48, (), generator=g, device=g.device)) for g in rng]
            self.own = [torch.Generator(g.device) for g in rng]

    def rng(self, purpose: int) -> Rng:
        if self.own is None:
            return self.shared
        for generator, seed in zip(self.own, self.seeds, strict=True):
            generator.manual_seed(seed + 2 * self.step + purpose)
        return self.own

    def select(self, rows: Sequence[int]) -> "_Draws":
        out = copy.copy(self)
        if self.own is not None:
            out.seeds, out.own = ([values[i] for i in rows] for values in (self.seeds, self.own))
        return out

    def join(self, other: "_Draws") -> "_Draws":
        out = copy.copy(self)
        if self.own is not None:  # a row's number of steps is its own: what the counters differ by goes into the seed
            out.seeds = self.seeds + [seed + 2 * (other.step - self.step) for seed in other.seeds]
            out.own = self.own + other.own
        return out


def _check_inputs(input_ids: Tensor, attention_mask: Tensor | None) -> None:
    if input_ids.dim() != 2 or input_ids.is_floating_point():
        raise ValueError(f"input_ids of shape {tuple(input_ids.shape)}, {input_ids.dtype}: need [B, P] integers")
    if input_ids.numel() == 0:  # a prompt given as inputs_embeds alone looks the same
        raise ValueError(f"input_ids of shape {tuple(input_ids.shape)} is an empty prompt: start from a BOS token")
    if attention_mask is None:
        return
    if attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask of shape {tuple(attention_mask.shape)} does not fit input_ids of {tuple(input_ids.shape)}"
        )
    mask = attention_mask.bool()
    if empty := (~mask.any(1)).nonzero()[:, 0].tolist():
        raise ValueError(f"attention_mask leaves rows {empty} an empty prompt: start from a BOS token")
    if holed := (mask[:, :-1] & ~mask[:, 1:]).any(1).nonzero()[:, 0].tolist():
        raise ValueError(f"attention_mask has padding on the right in rows {holed}: set tokenizer.padding_side='left'")


def _check_model(model: PreTrainedModel, config: SoftConfig, model_kwargs: dict) -> torch.nn.Module:
    """-> the input embedding; raises ValueError for a model that cannot read mixtures."""
    name = type(model).__name__
    try:
        embedding = model.get_input_embeddings()
    except NotImplementedError:
        embedding = None
    if embedding is None or model.config.is_encoder_decoder:
        raise ValueError(f"{name} is not a decoder with input embeddings: soft decoding needs a causal LM")
    if not model_kwargs["use_cache"]:
        raise ValueError("use_cache=False: soft inputs live in the KV cache only; set use_cache=True")
    if model.training and model.is_gradient_checkpointing:
        raise ValueError(f"{name} is in training mode with gradient checkpointing, which drops the cache: call eval()")
    vocab = model.config.get_text_config(decoder=True).vocab_size
    c = config
    check_dist(vocab, c.temperature, c.top_k, c.top_p, c.min_p, c.keep, c.banned)
    check_dist(vocab, c.answer_temperature, c.answer_top_k, c.answer_top_p, c.answer_min_p)
    for name, ids in (("think_start", c.think_start), ("think_end", c.think_end)):
        if any(not 0 <= i < vocab for i in ([ids] if isinstance(ids, int) else ids or ())):
            raise ValueError(f"{name}={ids} must be token ids below {vocab}, the model's vocabulary")
    return embedding


def _stack(records: list[Record]) -> Record:
    """Steps [B, K_t] -> [B, T, K], K the largest; added slots repeat the step's token with weight 0."""
    K = max(r.ids.shape[1] for r in records)

    def widen(r: Record) -> Record:
        extra = K - r.ids.shape[1]
        ids = torch.cat([r.ids, r.token[:, None].expand(-1, extra)], 1)
        return r._replace(ids=ids, weights=torch.nn.functional.pad(r.weights, (0, extra)))

    return Record(*(torch.stack(column, 1) for column in zip(*map(widen, records), strict=True)))


def _as_tensor(ids: int | tuple[int, ...] | None, device: torch.device) -> Tensor | None:
    if ids is None:
        return None
    return torch.tensor([ids] if isinstance(ids, int) else ids, device=device)


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
