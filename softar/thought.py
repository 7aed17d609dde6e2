"""Who thinks, who answers, who is done: the state of a batch between the steps of a decode, and its
record.

The state is a value, `Progress`, and `decide` takes it to the next step. The loop (softar.decode),
vLLM's plug-in (softar.vllm.rows) and what replays a finished decode go by it alike.

Shapes: B batch, T steps, V vocabulary, K tokens kept."""

import warnings
from collections.abc import Callable, Sequence
from enum import IntEnum
from typing import NamedTuple

import torch
from torch import Tensor

from . import switch as switching
from .config import SoftConfig
from .draws import ANSWER, THOUGHT
from .feedback import StepTemperature
from .mixers import BUILT_IN, Mixed, Rng, check_mixed, guide, hard, mk_mixer, name_of
from .soft import Soft, mk_proba_dist
from .tags import Speller, mk_speller, scan


class Kind(IntEnum):
    """What a recorded position is."""

    PAD = 0  # the row had ended
    SOFT = 1  # a mixture was fed back
    HARD = 2  # one token, chosen by the model, was fed back or ended the row
    FORCED = 3  # one token, put there by a rule (budget, cold stop)
    LATENT = 4  # a vector was fed back that no token stands for; the step's token is the pad token


class Record(NamedTuple):
    """What was fed back and why: one step [B, ...] or a whole decode [B, T, ...]. Replays in one
    forward."""

    ids: Tensor  # [B, T, K] int64
    weights: Tensor  # [B, T, K] float32; slots past a step's own K have weight 0
    token: Tensor  # [B, T] int64, the discrete token that stands for the step
    kind: Tensor  # [B, T] int8, see Kind
    # [B, T] float32, log-probability under the step's filtered distribution of the token(s) drawn,
    # or of the one fed back (0 if greedy); NaN where a mixer draws none, for FORCED and PAD
    logp: Tensor
    # [B, T] float32 nats, of the unfiltered distribution at SoftConfig.entropy_temperature, times the
    # factor of the step where there is a step_temperature and no switch
    entropy: Tensor

    @property
    def is_token(self) -> Tensor:
        """[...] bool, steps that a token stands for: none of kind PAD or LATENT."""
        return (self.kind != Kind.PAD) & (self.kind != Kind.LATENT)


class Progress(NamedTuple):
    """How far each row of a batch is, on its device."""

    done: Tensor  # [B] bool, the row has ended
    thinking: Tensor  # [B] bool
    closed: Tensor  # [B] bool, has thought; never thinks again
    thoughts: Tensor  # [B] int64, steps thought so far
    cold: Tensor  # [B] int64, consecutive ones of low entropy
    forced: Tensor  # [B] int64, tokens of a rule put in so far: of think_end, and what follows it
    steps: Tensor  # [B] int64
    answer_start: Tensor  # [B] int64, steps before the answer begins
    spelled: Tensor  # [B, 2] int64, how much of think_start and think_end the last tokens have
    turns: Tensor  # [B, 7] float32, softar.switch.Turns; [B, 0] where nothing switches

    def select(self, rows: Tensor) -> "Progress":
        """Of these rows [b] int64, in this order."""
        return Progress(*(column[rows] for column in self))

    def to(self, device: torch.device) -> "Progress":
        return Progress(*(column.to(device, non_blocking=True) for column in self))


def join(parts: Sequence[Progress]) -> Progress:
    """Of the rows of all, one after the other."""
    return Progress(*map(torch.cat, zip(*parts, strict=True)))


class Rules(NamedTuple):
    """What a configuration says about who thinks, with its ids as tensors on the batch's device."""

    start: Speller | None
    end: Speller | None
    put_in: Tensor  # [n] int64, what a rule puts in: think_end, and what begins a last answer
    end_length: int  # of think_end
    pad: Tensor  # [] int64
    eos: Tensor  # [n] int64
    last: Tensor | None  # [] int64, of eos, what a rule puts in
    budget: int | None
    cold_stop_entropy: float | None
    cold_stop_steps: int | None
    has_answer: bool
    hide_thought: bool
    is_soft: bool
    is_latent: bool
    switch: switching.Switch | None


def mk_rules(
    config: SoftConfig, device: torch.device, pad: Tensor | None, eos: Tensor | None
) -> Rules:
    """config: resolved. pad: [] the token of rows that have ended, None is 0. eos: [n] tokens that
    end a row; None is none."""

    start, end = (None if m is None else mk_speller(m, device) for m in config.moves)

    def move(ids: Tensor | tuple[int, ...]) -> Tensor:
        return torch.as_tensor(ids, dtype=torch.long).to(device, non_blocking=True)

    return Rules(
        start=start,
        end=end,
        put_in=move((*(config.think_end or ()), *(config.switch_final or ()))),
        end_length=len(config.think_end or ()),
        pad=move(torch.tensor(0) if pad is None else pad),
        eos=move(torch.zeros(0, dtype=torch.long) if eos is None else eos),
        last=None if eos is None or not len(eos) else move(eos).min(),
        budget=config.budget,
        cold_stop_entropy=config.cold_stop_entropy,
        cold_stop_steps=config.cold_stop_steps,
        has_answer=config.has_answer,
        hide_thought=config.has_answer and config.hide_thought,
        is_soft=config.is_soft,
        is_latent=config.is_latent,
        switch=switching.mk_switch(config, device),
    )


def begin(config: SoftConfig, input_ids: Tensor) -> Progress:
    """Where rows start that have read their prompts. input_ids: [B, P], its device is theirs."""
    B = len(input_ids)
    no = torch.zeros(B, dtype=torch.bool, device=input_ids.device)
    zero = torch.zeros(B, dtype=torch.long, device=input_ids.device)
    opened, closed, spelled, shut = _read(config, input_ids)
    thinking = ~no if config.think_start is None else opened > closed
    return Progress(
        done=no,
        thinking=thinking & ~shut,
        closed=shut,
        thoughts=zero,
        cold=zero,
        forced=zero,
        steps=zero,
        answer_start=zero,
        spelled=spelled,
        turns=switching.begin_turns(config, B, input_ids.device),
    )


# Long because what ends a thought, what is put in and what is read hang together.
def decide(
    rules: Rules, progress: Progress, h: Tensor, thought: Mixed, answer: Mixed | None
) -> tuple[Progress, Record]:
    """One step: who thinks on, who is stopped, what each row reads next.

    Args:
        h: [B] entropy, see Record. thought, answer: [B, ...] what each row would do thinking and
            answering; of an answer token and logp count; None where nobody answers, nor thinks in
            single tokens.
    """
    done, thinking, closed, thoughts, cold, forced, steps, answer_start, spelled, turns = progress
    thinking, over, closing = thinking & ~done, torch.zeros_like(done), torch.zeros_like(done)
    switch, state = rules.switch, None if rules.switch is None else switching.unpack(turns)
    if rules.has_answer:
        cold = torch.where(thinking & (h < (rules.cold_stop_entropy or 0.0)), cold + 1, 0)
        over = thinking & _is_over(rules, thoughts, cold)
        if rules.end is None or state is not None:  # nothing has to be put in
            ends = over if rules.end is None else over & state.paused
            closed, thinking, over = closed | ends, thinking & ~ends, over & ~ends
    forcing = over | (thinking & (forced > 0))
    softly, hidden, soft = thinking, thinking, thought.soft
    if state is not None:
        expired = state.left == 0
        state, turn, forcing = switching.take_turn(switch, state, h, thinking, over, forcing)
        softly, soft = thinking & turn.softly, switching.with_tags(switch, soft, turn, steps)
    steps, token, logp = steps + 1, thought.token, thought.logp
    if rules.has_answer or state is not None:
        token = torch.where(softly, token, answer.token)
        logp = torch.where(softly, logp, answer.logp)
    if rules.is_latent:
        token = torch.where(softly, rules.pad, token)
    is_said = ~softly | (not rules.is_latent)
    if rules.end is not None:
        token = torch.where(forcing, rules.put_in[forced.clamp_max(len(rules.put_in) - 1)], token)
        forced = forced + forcing.long()
        end_state, is_whole = rules.end(spelled[:, 1], token)
        ends = forced == rules.end_length
        if state is not None:
            answers = state.paused | (forced > rules.end_length)
            state, ends, forced = switching.settle(switch, state, forced, forcing)
        closing = thinking & torch.where(forcing, ends, is_whole & is_said)
        closed = closed | closing
        hidden = thinking if state is None else thinking & (~answers | (closing & ~forcing))
    if rules.hide_thought:
        answer_start = torch.where(hidden, steps, answer_start)
    thoughts = thoughts + thinking.long()
    if state is not None:
        turns = switching.pack(state)
        if rules.last is None:
            done = done | expired
        else:
            token, forcing = torch.where(expired, rules.last, token), forcing | expired

    token = torch.where(done, rules.pad, token)
    # the row reads nothing after it, so nothing is mixed
    ends = (token[:, None] == rules.eos).any(1) & (forcing | is_said)
    mixes = softly & ~forcing & ~closing & ~ends & rules.is_soft
    read = int(Kind.LATENT if rules.is_latent else Kind.SOFT)
    kind = torch.where(mixes, read, int(Kind.HARD)).masked_fill(forcing, int(Kind.FORCED))
    kind = kind.masked_fill(done, int(Kind.PAD)).to(torch.int8)
    logp = logp.masked_fill(forcing | done, torch.nan)
    thinking = thinking & ~closing
    if rules.start is not None:
        start_state, is_whole = rules.start(spelled[:, 0], token)
        thinking = thinking | (is_whole & ~closed)
    if rules.end is not None:
        first = spelled[:, 0] if rules.start is None else start_state
        spelled = torch.stack([first, end_state], 1)
    single = torch.zeros_like(soft.weights)
    single[:, 0] = 1.0
    ids = torch.where(mixes[:, None], soft.ids, token[:, None])
    weights = torch.where(mixes[:, None], soft.weights, single)
    progress = Progress(
        done, thinking, closed, thoughts, cold, forced, steps, answer_start, spelled, turns
    )
    h = h.masked_fill(softly & ~forcing & soft.weights[:, 0].isnan(), torch.nan)
    return progress, Record(ids, weights, token, kind, logp, h.masked_fill(done, 0.0))


def check_finite(record: Record, step: int) -> None:
    """Raise FloatingPointError that names the rows of this step whose logits were no numbers."""
    if rows := is_bad(record).nonzero()[:, 0].tolist():
        raise FloatingPointError(
            f"logits are NaN or infinite, or leave no token, at step {step}, rows {rows}: check the "
            f"weights, the dtype (try float32), the processors and `banned`"
        )


def is_bad(record: Record) -> Tensor:
    """[B] bool. Not looked at where the NaN arises, which would be a second synchronisation: it goes
    through all before the host looks, and rows that had ended hold none."""
    return record.entropy.isnan() | record.weights.isnan().any(-1)


def replay(
    rules: Rules, progress: Progress, record: Record, done: Tensor
) -> tuple[Progress, Record]:
    """Go once more through a decode that has happened, by the same rules.

    Args:
        progress: from `begin`. record: [B, T, ...] what was read. done: [B, T] bool, rows that had
            ended before a step.

    Returns:
        The progress after the last step, and the record by these rules.
    """
    records, rules = [], rules._replace(switch=switching.replayed(rules.switch))
    for t in range(record.token.shape[1]):
        step = Record(*(column[:, t] for column in record))
        read = Mixed(Soft(step.ids, step.weights), step.token, step.logp)
        progress = progress._replace(done=done[:, t])
        progress, step = decide(rules, progress, step.entropy, read, read)
        records.append(step)
    return progress, stack(records)


def mk_think(config: SoftConfig, step: StepTemperature | None = None) -> Callable[..., Mixed]:
    """A function of logits [B, V] float32, random numbers, and the last hidden state [B, D] where
    the mixer or the configuration's step temperature, `step`, wants it: what each row would do
    thinking. Of a mixer that is not softar's the first mixture is looked at (check_mixed)."""
    mixer, is_soft = mk_mixer(config.mixer, **config.mixer_args), config.is_soft
    filters, wants_hidden = config.filters, mixer.hidden
    is_known = isinstance(config.mixer, str) and config.mixer in BUILT_IN
    if not is_soft and not config.mixer_draws:
        # whatever the filters are, the argmax passes them
        mixer, filters = hard, dict(temperature=0.0, banned=config.banned)
        wants_hidden, is_known = False, True
    elif config.is_latent:  # and reads none of it
        filters = dict(temperature=0.0)

    def think(logits: Tensor, rng: Rng, hidden: Tensor | None = None) -> Mixed:
        nonlocal is_known
        more = {"hidden": hidden} if wants_hidden else {}
        own = {}
        if step is not None:
            own = {"temperature": config.temperature * step(hidden).to(logits.device)}
        dist = mk_proba_dist(logits, **filters | own)
        mixed = mixer(dist, rng=rng, **more)
        if not is_known:
            check_mixed(mixed, *logits.shape, name_of(config.mixer))
            is_known = True
        soft, token, logp, vector, perturbed = mixed
        if is_soft:
            soft = guide(soft, token, 1 - config.softness)
        if config.banned:  # single tokens hide that no other was left
            nothing_left = dist.weights[..., :1].isnan()
            soft = soft._replace(weights=soft.weights.masked_fill(nothing_left, torch.nan))
        nothing = torch.full_like(logits[:, 0], torch.nan)
        return Mixed(soft, token, nothing if logp is None else logp, vector, perturbed)

    return think


def mk_propose(
    config: SoftConfig, step_temperature: StepTemperature | None = None
) -> Callable[..., tuple[Mixed, Mixed | None]]:
    """A function of logits [B, V] float32, a function that gives the random numbers of a purpose
    (softar.draws), whether anybody is thinking, and maybe the last hidden state [B, D]: what each
    row would do thinking, and answering (None where nobody can)."""
    think, thought_draws = mk_think(config, step_temperature), config.mixer_draws
    filters, answer_draws = config.answer_filters, config.answer_temperature > 0
    has_single = config.has_single

    def propose(
        logits: Tensor, draw: Callable[[int], Rng], any_thinking: bool, hidden: Tensor | None = None
    ) -> tuple[Mixed, Mixed | None]:
        answer = None
        if has_single or not any_thinking:
            rng = draw(ANSWER) if answer_draws else None
            answer = hard(mk_proba_dist(logits, **filters), rng=rng, sample=answer_draws)
        if not any_thinking:
            return answer, answer
        return think(logits, draw(THOUGHT) if thought_draws else None, hidden), answer

    return propose


def stack(records: list[Record]) -> Record:
    """Steps [B, K_t] -> [B, T, K], K the largest; added slots repeat the step's token with weight
    0."""
    K = max(r.ids.shape[1] for r in records)

    def widen(r: Record) -> Record:
        extra = K - r.ids.shape[1]
        ids = torch.cat([r.ids, r.token[:, None].expand(-1, extra)], 1)
        return r._replace(ids=ids, weights=torch.nn.functional.pad(r.weights, (0, extra)))

    return Record(*(torch.stack(column, 1) for column in zip(*map(widen, records), strict=True)))


def warn_unopened(config: SoftConfig, progress: Progress) -> None:
    """Warn where no row of a decode has thought, nor closed a thought in its prompt, as a chat
    template does where none is wanted: all was discrete, and nothing else would say so."""
    if not bool(((progress.thoughts > 0) | progress.closed).any()):
        warnings.warn(
            f"no thought began, so all was decoded discretely: think_start={config.think_start!r} came neither in a "
            f"prompt nor in what was decoded; end the prompts with it, or leave think_start out",
            stacklevel=2,
        )


def _is_over(rules: Rules, thoughts: Tensor, cold: Tensor) -> Tensor:
    """Does the budget or the cold stop end this thought? [B], [B] -> [B] bool."""
    over = torch.zeros_like(thoughts, dtype=torch.bool)
    if rules.budget is not None:
        over = over | (thoughts >= rules.budget)
    if rules.cold_stop_entropy is not None:
        over = over | (cold >= rules.cold_stop_steps)
    return over


def _read(config: SoftConfig, input_ids: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What the prompts [B, P] say of their thoughts: the columns [B] where think_start and think_end
    were last whole (-1: never), how much of them the last tokens have spelled [B, 2], and where the
    end of the thought is the end of the prompt [B] bool: a chat template closes the thought that it
    does not want, and white space may follow."""
    B = len(input_ids)
    columns, states = [[-1] * B, [-1] * B], [[0] * B, [0] * B]
    shut = [False] * B
    if config.think_end is not None:
        rows, space = input_ids.tolist(), {*(config.spelling[2] if config.spelling else ())}
        for i, moves in enumerate(config.moves):
            if moves is not None:
                columns[i], states[i] = scan(moves, rows)
        both = enumerate(zip(*columns, strict=True))
        shut = [end > start and space.issuperset(rows[b][end + 1 :]) for b, (start, end) in both]
    where = dict(device=input_ids.device)
    spelled = torch.tensor(states, **where).T.contiguous()
    return *torch.tensor(columns, **where), spelled, torch.tensor(shut, **where)
