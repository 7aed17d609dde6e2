"""Blocks of soft and of single tokens by turns within a thought, told by its entropy (SwiReasoning,
arXiv:2510.05069).

A thought begins with a soft block. A row goes on in single tokens when its entropy falls below a
reference, and softly again when it rises above, after `dwell` steps at least. The reference is the
entropy at which the row's block began, or a number. At a switch the belief is read with a share of
a tag in it, think_start's or think_end's, which fades to nothing over the decode. A budget bounds the
switches to single tokens: from half of it on each puts think_end in, from which the row may yet come
back; one more closes the thought, begins the answer and bounds its length.

Of the public code this is without: the newline that its first step reads, mathematical symbols that
are never read softly, and an answer's length that counts what begins it.

Everything stays on the device. Shapes: B batch, K tokens kept, n tokens of a tag."""

from typing import NamedTuple

import torch
from torch import Tensor

from .config import BLOCK, SoftConfig
from .mixers import MOST
from .soft import Soft

# What a rule is putting in
NOTHING, END, FINAL = range(3)  # FINAL: think_end and what begins the last answer


class Tag(NamedTuple):
    """What is mixed in at a switch."""

    ids: Tensor  # [n] int64, in equal parts
    share: float  # of the tag at step 0


class Switch(NamedTuple):
    """What a configuration says of the turns."""

    reference: float | None  # nats; None: the entropy at which a block began
    dwell: int
    opening: Tag | None  # at a switch to soft
    closing: Tag | None  # to single tokens
    horizon: int  # steps after which the tags have faded
    budget: int | None
    answer: int  # tokens of a last answer
    lengths: tuple[int, int]  # of think_end, and of it with what begins a last answer
    is_replayed: bool = False  # what is read holds the tags already


class Turns(NamedTuple):
    """The state of rows [B]."""

    is_single: Tensor  # bool, in a block of single tokens
    age: Tensor  # float32, steps since its block began
    reference: Tensor  # float32 nats; -1 before the thought began
    count: Tensor  # float32, switches to single tokens so far
    due: Tensor  # float32, NOTHING, END or FINAL
    paused: Tensor  # bool, think_end was put in, and it has not thought softly since
    left: Tensor  # float32, tokens that its last answer may still have; -1: as many as it likes


BEGINNING = (0.0, 0.0, -1.0, 0.0, float(NOTHING), 0.0, -1.0)


class Turn(NamedTuple):
    """A step's choice, of rows [B] bool that think."""

    softly: Tensor  # they read a mixture
    opens: Tensor  # they begin a soft block
    closes: Tensor  # one of single tokens


def mk_switch(config: SoftConfig, device: torch.device) -> Switch | None:
    """config: resolved. None: every thought is soft throughout."""
    if config.switch is None:
        return None

    def tag(ids: tuple[int, ...] | None, share: float | None) -> Tag | None:
        return Tag(torch.tensor(ids).to(device, non_blocking=True), share) if share else None

    return Switch(
        reference=None if config.switch == BLOCK else min(config.switch, MOST),
        dwell=config.switch_dwell,
        opening=tag(config.think_start, config.switch_open),
        closing=tag(config.think_end, config.switch_close),
        horizon=config.max_new_tokens,
        budget=config.switch_budget,
        answer=config.switch_answer or 0,
        lengths=(n := len(config.think_end or ()), n + len(config.switch_final or ())),
    )


def replayed(switch: Switch | None) -> Switch | None:
    """For going once more through what was read."""
    return None if switch is None else switch._replace(is_replayed=True)


def begin_turns(config: SoftConfig, rows: int, device: torch.device) -> Tensor:
    """The state, packed, of rows that have read their prompts; [B, 0] where nothing switches."""
    values = () if config.switch is None else BEGINNING
    return torch.tensor(values, device=device).expand(rows, -1)


def unpack(turns: Tensor) -> Turns:
    """[B, 7] float32, as it travels with the rows."""
    state = Turns(*turns.unbind(1))
    return state._replace(is_single=state.is_single > 0, paused=state.paused > 0)


def pack(state: Turns) -> Tensor:
    return torch.stack([column.float() for column in state], 1)


def take_turn(
    switch: Switch, state: Turns, h: Tensor, thinking: Tensor, over: Tensor, forcing: Tensor
) -> tuple[Turns, Turn, Tensor]:
    """One step.

    Args:
        h: [B] entropy of the belief, unfiltered, at temperature 1. thinking, over, forcing: [B]
            bool, those that think, of them those that another rule stops, or puts something into.

    Returns:
        The state, the choice, and `forcing` with those into which the budget puts something.
    """
    due = torch.where(over & (state.due == END), NOTHING, state.due)
    forcing = forcing | (thinking & (due > NOTHING))
    free = thinking & ~forcing
    mark = h if switch.reference is None else torch.full_like(h, switch.reference)
    begins = free & (state.reference < 0)
    reference = torch.where(begins, mark, state.reference)
    age = state.age + 1
    falls = free & ~state.is_single & (h < reference)
    rises = free & state.is_single & (h > reference) & (age >= switch.dwell)
    is_single = (state.is_single | falls) & ~rises
    closes = falls & ~begins  # a thought that begins in single tokens closes no block
    count = state.count + closes
    if switch.budget is not None:
        due = torch.where(closes & (2 * count >= switch.budget), END, due)
        due = torch.where(closes & (count > switch.budget), FINAL, due)
    state = Turns(
        is_single=is_single,
        age=torch.where(begins | falls | rises, 0.0, age),
        reference=torch.where(falls | rises, mark, reference),
        count=count,
        due=due,
        paused=state.paused & ~rises,
        left=(state.left - 1).clamp_min(-1),
    )
    softly = ~is_single if switch.closing is None else ~is_single | closes
    return state, Turn(softly, rises, closes), forcing


def with_tags(switch: Switch, soft: Soft, turn: Turn, steps: Tensor) -> Soft:
    """What is read softly, [B, K] -> [B, K + n], with the tags where blocks begin. steps: [B] int64,
    those before this one."""
    if switch.is_replayed:
        return soft
    ids, weights, rest = [soft.ids], [], 1.0
    fading = (1 - steps / switch.horizon).clamp_min(0)
    for tag, at in ((switch.opening, turn.opens), (switch.closing, turn.closes)):
        if tag is not None:
            share, n = at * fading * tag.share, len(tag.ids)
            rest = rest - share
            ids.append(tag.ids.expand(len(share), n))
            weights.append((share / n)[:, None].expand(-1, n))
    if not weights:
        return soft
    return Soft(torch.cat(ids, 1), torch.cat([soft.weights * rest[:, None], *weights], 1))


def settle(
    switch: Switch, state: Turns, forced: Tensor, forcing: Tensor
) -> tuple[Turns, Tensor, Tensor]:
    """After a token was put in. forced: [B] int64, how many by now. forcing: [B] bool, into which
    rows -> the state, whose thoughts that ends [B] bool, and forced."""
    end, final = switch.lengths
    whole = forcing & (forced == torch.where(state.due == FINAL, final, end))
    pauses, lasts = whole & (state.due == END), whole & (state.due == FINAL)
    state = state._replace(
        due=torch.where(whole, NOTHING, state.due),
        paused=state.paused | pauses,
        left=torch.where(lasts, switch.answer, state.left),
    )
    return state, whole & ~pauses, torch.where(pauses, 0, forced)
