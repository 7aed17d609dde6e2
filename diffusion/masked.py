"""The process of a model of masks: in each step some of the open positions take the model's
proposals, and stay.

Shapes: B rows, L columns of the canvas; n positions, flat, row by row.
"""

import itertools
from collections.abc import Iterable

import torch
from torch import Tensor

from softar.checks import Idle, check_idle
from softar.soft import Soft

from .canvas import Canvas
from .config import DenoiseConfig
from .constraints import Constraints
from .net import Facts, Parts
from .process import report
from .proposals import Proposer
from .reader import Reader, Window, with_answer
from .record import Recorder
from .remask import remask
from .revise import Recall
from .schedules import SCHEDULES, Block, Rule, Step
from .select import Belief, Draws
from .soften import Slots, mk_softener

IDLE = (
    Idle(
        "early_stop",
        lambda c: not c.early_stop or c.block_length in (None, c.gen_length or None),
        "in a single block, behind which nothing is left",
        "give a block_length below gen_length",
    ),
)


class Masked:
    """Blocks are decoded from left to right. In each step the selector scores the model's
    proposals, the schedule's rule says which of them commit, and the softener what the remaining
    masks show next time. Caches narrow the forward to a window."""

    def __init__(
        self,
        config: DenoiseConfig,
        net: Parts,
        facts: Facts,
        input_ids: Tensor,
        real: Tensor,
        draws: Draws,
        *,
        record: bool = False,
    ):
        """input_ids: [B, P]; real: [B, P] bool, what is not padding."""
        self.config, self.draws = config, draws
        self.quirks, self.schedule = config.quirks, config.scheduler
        self.canvas = canvas = self._canvas(input_ids, facts)
        # [B] a row's own, and those of them that store; of public samplers, whose rows do not wait
        # for each other, to the last that it needed
        self.row_forwards = self.own_stores = torch.zeros_like(canvas.at_start)
        self.end_ids = facts.end_ids if config.end_ids is None else config.end_ids
        self.softener = mk_softener(config.soften, **config.soften_args)
        self.reader = self._reader(net, facts, real)
        self.constrain = Constraints(config.allowed, config.logits_processor, canvas, facts)
        self.propose = Proposer(
            config,
            facts,
            self.end_ids,
            draws,
            with_entropy=self.softener.wants_entropy,
            record=record,
        )
        # rows that wait leave the batch; a rule of the user's may do whatever it likes with them
        name = config.schedule_name
        self.narrows = self.quirks.waits and isinstance(name, str) and name in SCHEDULES
        # of a decode that is to be replayed
        self.recorder = Recorder(canvas, self._block_numbers(real)) if record else None
        # elsewhere to find out which rows are the same would wait for the device
        self.reader.shares = record and input_ids.device.type == "cpu"

    def _canvas(self, input_ids: Tensor, facts: Facts) -> Canvas:
        return Canvas(input_ids, self.config.gen_length, facts.mask_id)

    def _reader(self, net: Parts, facts: Facts, real: Tensor) -> Reader:
        check_idle(self.config, IDLE if not self.quirks.lenient else ())
        return Reader(net, facts, self.config, with_answer(real, self.config), self.canvas.fixed)

    def _block_numbers(self, real: Tensor) -> Tensor:
        """[B, L] int64, in which of the model's own blocks a column lies, -1 in none; a model that
        reads the whole canvas has one."""
        return with_answer(real, self.config).long() - 1

    def blocks(self) -> Iterable[Block]:
        if self.quirks.grid is not None:
            grid = self.quirks.grid(self.config, self.canvas.masked, self.reader.first)
            return (self.canvas.block_of(*some) for some in grid)
        spans = list(spans_of(self.config, self.canvas.masked))
        return (self.canvas.block(*span) for span in spans)

    def begin(self, block: Block) -> None:
        self.canvas.decoded = torch.zeros_like(self.canvas.masked)
        self.rule, self.recall = mk_rule(self.config, block, self.draws), Recall()
        self.outlasts, self.wanted = self.schedule.outlasts, block
        self.skipped = 0  # steps without a forward
        # [B] bool, rows that would begin the block alone, too
        self.begins = (self._seen(block).inside & self.canvas.masked).any(-1)
        if not self.softener.carries:
            self.reader.forget()
        elif not self.quirks.stays_soft:
            self.reader.forget(~self.canvas.masked)

    def more(self, block: Block, index: int) -> bool:
        busy = self.rule.busy if self.outlasts else None
        while True:
            left = self.canvas.has_masks(self.wanted, self.reader.forwards, busy)
            wants = self.rule.more(index + self.skipped, left)
            if left or not wants or self.config.remask is None or not self.quirks.waits:
                return wants
            self._skip(block, index + self.skipped)

    def _skip(self, block: Block, index: int) -> None:
        """A step of ReMDM in which no mask is left: it may mask tokens again, for which no forward is
        needed."""
        canvas, none = self.canvas, torch.zeros_like(self.canvas.masked)
        commit, drop = self.rule(
            Step(index, canvas.confidence, none, canvas.decoded, canvas.confidence)
        )
        canvas.commit(block, commit, drop, canvas.ids, canvas.confidence, self.reader.forwards)
        self.skipped += 1

    def step(self, block: Block, index: int) -> dict:
        canvas, reader = self.canvas, self.reader
        window = self._window(block, index)
        is_open = canvas.masked & self._reach(block, window)
        # a row that waits for others stays as is
        busy = torch.ones_like(is_open[:, 0])
        if self.quirks.waits:
            masks = canvas.masked & self.wanted.inside
            busy = self.rule.busy if self.outlasts else masks.any(-1)
            is_open = is_open & busy[:, None]
        candidates = is_open | canvas.decoded if self.schedule.revises else is_open
        asked = self._asked(candidates, window) & busy[:, None]
        rows, cols = asked.nonzero(as_tuple=True)
        logits = reader(canvas.ids, window, rows, cols, self._live(block))
        if self.quirks.waits:
            self.row_forwards = self.row_forwards + (busy & self.begins)
        else:
            needed = asked[:, : canvas.width].any(-1)
            self.row_forwards = self.row_forwards.masked_fill(needed, reader.forwards)
        logits = self.constrain(logits, canvas.ids, rows, cols)
        belief, token, score, prob = self.propose(logits, asked, block)

        proposal = canvas.ids.index_put((rows, cols), token)
        certain = canvas.spread(prob, rows, cols)
        order = self.propose.reorder(canvas.spread(score, rows, cols), candidates & asked)
        step = Step(index + self.skipped, order, is_open, canvas.decoded, canvas.confidence)
        if self.schedule.refines:
            change = self.recall.replace(rows, cols, belief, canvas.ids.shape)
            step = step._replace(change=change)
        if self.schedule.revises:
            now = belief.prob(canvas.ids[rows, cols][:, None])[:, 0]
            standing, differs = canvas.spread(now, rows, cols), proposal != canvas.ids
            step = step._replace(prob=certain, standing=standing, differs=differs)
        commit, drop = self.rule(step)
        if self.softener.revises:
            surer = canvas.decoded & (certain > canvas.confidence)
            commit = commit | (surer & (proposal != canvas.mask_id))
        canvas.commit(block, commit, drop, proposal, certain, reader.forwards - 1)
        if self.recorder is not None:
            self.recorder.note(reader, commit)
            if self.config.alg_temp:
                self.recorder.draws(reader.forwards - 1, is_open, order, commit)
        canvas.watch(score + prob, rows)  # some selectors look at no logit
        where, soft = self._soften(belief, rows, cols, window, busy)
        believed = asked, lambda here: belief.logits[here]
        told = dict(believed=believed, where=where, soft=soft)
        return report(self, block, asked, commit, certain, **told)

    def _seen(self, block: Block) -> Block:
        """What a result shows of it."""
        return block._replace(inside=block.inside & self.canvas.columns(0, self.canvas.width))

    def _live(self, block: Block) -> list[int] | None:
        """The rows that a step's forward computes; None: as the forward before. Of those without
        anything to be asked it need say nothing."""
        return (self.canvas.live or None) if self.narrows else None

    def _window(self, block: Block, index: int) -> Window:
        """The columns of the next forward."""
        return self.reader.window(block, whole=index == 0, look_back=self.quirks.looks_back)

    def end(self, block: Block) -> None:
        if self.config.early_stop and self.end_ids:
            self.canvas.stop(block.end, self.end_ids)

    @property
    def row_stores(self) -> Tensor:
        """[B] those of them that store."""
        if self.quirks.waits:
            return self.own_stores
        return sum((self.row_forwards > at for at in self.reader.stores), 0 * self.canvas.at_start)

    def _reach(self, block: Block, window: Window) -> Tensor:
        """[1 or B, L] bool, the columns whose masks may commit."""
        if self.quirks.competes == "block":
            return block.inside
        before = self.canvas.columns(window.lo, block.end)
        return before if self.quirks.competes == "before" else window.inside

    def _asked(self, is_open: Tensor, window: Window) -> Tensor:
        """[B, L] bool, the positions that somebody wants logits about."""
        asked, inside = is_open, window.inside
        if self.softener.everywhere or self.quirks.spills:
            asked = asked | (self.canvas.masked & inside)
        if self.softener.decoded:
            asked = asked | (self.canvas.decoded & inside)
        return asked

    def _soften(
        self, belief: Belief, rows: Tensor, cols: Tensor, window: Window, busy: Tensor
    ) -> tuple[Tensor | None, Soft | None]:
        """Give slots their mixtures -> where [B, L] bool, and which; None for none."""
        canvas, softener = self.canvas, self.softener
        if softener.fn is None or not len(rows):
            return None, None
        masked = canvas.masked[rows, cols]
        share = canvas.share_left(of_batch=self.quirks.batch_share)[rows]
        embedding = self.reader.net.embedding
        slots = Slots(belief, canvas.ids[rows, cols], masked, share, canvas.mask_id, embedding)
        shows = masked | (softener.decoded & canvas.decoded[rows, cols])
        where, soft = self.reader.soften(softener(slots), shows, rows, cols, window, busy)
        if self.recorder is not None:
            self.recorder.shows(where, soft)
        return where, soft


def mk_rule(config: DenoiseConfig, block: Block, draws: Draws) -> Rule:
    if config.remask is not None:
        return remask(block, config, draws)
    return config.scheduler(block, config, draws, **config.schedule_args)


def spans_of(config: DenoiseConfig, masked: Tensor) -> list[tuple[int, int, Tensor]]:
    """(start, end, steps [B]) of each block, from left to right; masked: [B, L] bool.

    Blocks are counted from the right end, so that they lie where they would for a row alone, and
    those without a mask in any row are left out. A row shares its steps among the blocks that it
    has masks in.
    """
    L = masked.shape[1]
    b = config.block_length or config.gen_length or L
    if config.quirks.one_block:
        return [(0, L, _full(masked, config.steps or 1))]
    if config.quirks.even_blocks:
        n = config.gen_length // b
        steps = _full(masked, (config.steps or config.gen_length) // n)
        return [(L - k * b, L - (k - 1) * b, steps) for k in range(n, 0, -1)]
    edges = [max(0, L - k * b) for k in range(-(-L // b), -1, -1)]
    spans = [*itertools.pairwise(edges)]
    counts = torch.stack([masked[:, lo:hi].sum(-1) for lo, hi in spans], -1)  # [B, blocks]
    blocks = (counts > 0).sum(-1).clamp_min(1)  # [B] that the row has masks in
    if config.steps is not None and (short := (config.steps < blocks).nonzero()[:, 0].tolist()):
        raise ValueError(
            f"steps={config.steps} cannot be shared by the {int(blocks.max())} blocks of rows {short}: give at least "
            f"{int(blocks.max())}, or a larger block_length"
        )
    return [
        (lo, hi, count.clamp_min(1) if config.steps is None else config.steps // blocks)
        for (lo, hi), count in zip(spans, counts.unbind(-1), strict=True)
        if count.any()
    ]


def _full(masked: Tensor, steps: int) -> Tensor:
    return masked.new_full((len(masked),), steps, dtype=torch.long)
