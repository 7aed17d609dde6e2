"""The process of a model without a mask, whose slots hold random tokens until it is sure of them:
DiffusionGemma, as `generate` of transformers decodes it.

Canvases of one length are decoded one after the other behind the text that is there. An encoder
reads that text once and stores its keys and values; a decoder reads the canvas, all of it at once,
and the mixtures that it believed in before (self-conditioning, arXiv:2208.04202). Of what is drawn
from its belief the surest are accepted, the other slots get fresh random tokens; nothing is kept
for good. What comes out are the most likely tokens of the last forward, not the drawn ones.

Shapes: B rows, P prompt length, L columns, C columns of a canvas, V vocabulary, D width; n slots,
flat, row by row; K tokens of a mixture.
"""

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor, nn

from softar.soft import Soft

from .canvas import Canvas
from .config import DenoiseConfig
from .constraints import Constraints
from .net import Facts, Parts
from .process import check_options, report
from .schedules import SCHEDULES, Block, Step
from .select import Belief, Draws, mk_selector
from .soften import Slots, mk_softener
from .stops import mk_stop
from .unmasked import CanvasReader, Nothing, to_logits

STEPS = 48  # of each canvas; these four are the defaults of transformers
TEMPERATURE = (0.8, 0.4)
BOUND = 0.1  # nats
STOP = "stable"
PARITY = "diffusion_gemma"
FORBIDDEN = -1e30
SHOWN = 10  # tokens of a whole belief that a callback is told

# Options that mean something here, and their values; None allows every value.
OPTIONS = dict.fromkeys(
    (
        *("gen_length", "block_length", "steps", "temperature", "stop", "stop_args"),
        *("schedule", "schedule_args", "threshold", "factor", "entropy_bound", "select"),
        *("soften", "soften_args", "end_ids", "early_stop", "allowed", "logits_processor"),
    )
) | {"parity": (None, PARITY), "cache": ("exact",)}
COMPARES = [
    name
    for name, schedule in SCHEDULES.items()
    if schedule.compares and not (schedule.revises or schedule.refines)
]


def check_renoised(config: DenoiseConfig, facts: Facts) -> None:
    """Raise ValueError for options that mean nothing where every slot is drawn anew in each
    forward."""
    check_options(config, OPTIONS, "DiffusionGemma, which draws every slot anew in each forward")
    if config.temperature == 0:
        raise ValueError(
            "temperature=0: the model reads its belief at this temperature, give one above 0, such as 0.01"
        )
    name = config.schedule_name
    known = name not in SCHEDULES or config.schedule is None or name in COMPARES
    if not known or config.scheduler.revises or config.scheduler.refines:
        raise ValueError(
            f"schedule={name!r} shares out what is committed, and here nothing is: choose one of {COMPARES}"
        )
    if name == "uniform" and config.select not in ("confidence", "entropy"):
        raise ValueError(
            f"select={config.select!r} does nothing: what is kept is bounded by entropies, unless you give "
            f"threshold= or factor="
        )
    if not config.gen_length:
        raise ValueError(
            "gen_length=0, and the model has no mask that a template could hold: give gen_length"
        )
    if config.block_length not in (None, facts.block_length):
        raise ValueError(
            f"block_length={config.block_length} contradicts the model, whose canvases are of "
            f"{facts.block_length}: leave it out"
        )
    n = canvases(config, facts)
    if config.steps is not None and config.steps % n:
        raise ValueError(
            f"steps={config.steps} cannot be shared by {n} canvases: choose a multiple of {n}"
        )


def canvases(config: DenoiseConfig, facts: Facts) -> int:
    """How many hold `gen_length` tokens; the rest of the last one is shown in no result."""
    return -(-config.gen_length // facts.block_length)


class Renoised:
    """Each step keeps, in its row's canvas `canvas.ids`, the most likely tokens; what the decoder
    reads is `noisy`. Rows that are decoded wait for the others; `canvas.masked` are the slots of
    those that are not."""

    def __init__(
        self,
        config: DenoiseConfig,
        net: Parts,
        facts: Facts,
        input_ids: Tensor,
        real: Tensor,
        draws: Draws,
    ):
        """input_ids: [B, P]; real: [B, P] bool, what is not padding."""
        check_renoised(config, facts)
        self.is_public = config.parity is not None
        if self.is_public:
            draws.check_one(PARITY)
        length = input_ids.shape[1] + canvases(config, facts) * facts.block_length
        # the stand-in for a mask is the id behind the last token
        canvas = Canvas(input_ids, config.gen_length, facts.vocab_size, length=length)
        if self.is_public:  # whose results are whole canvases
            canvas.width = length
        self.pad = _pad_of(net.body, facts)
        canvas.ids = canvas.ids.masked_fill(canvas.masked, self.pad)
        if config.schedule is None and config.schedule_name == "uniform":
            config = replace(config, entropy_bound=BOUND, select="entropy")
        self.config, self.facts, self.canvas, self.draws = config, facts, canvas, draws
        self.end_ids = facts.end_ids if config.end_ids is None else config.end_ids
        if config.early_stop is False:
            self.end_ids = ()
        self.steps = STEPS  # of one canvas, at most
        if config.steps is not None:
            self.steps = config.steps // canvases(config, facts)
        self.make_stop = mk_stop(config.stop or STOP, **config.stop_args)
        self.select = mk_selector(config.select)
        self.softener = None
        if config.soften is not None:
            self.softener = mk_softener(config.soften, **config.soften_args)
        self.reader = CanvasReader(net, real, length, by_column=self.is_public)
        self.constrain = Constraints(config.allowed, config.logits_processor, canvas, facts)
        self.nothing = Nothing(net.embedding, facts.vocab_size)
        self.ended = torch.zeros_like(canvas.at_start, dtype=torch.bool)
        self.row_forwards = self.row_stores = torch.zeros_like(canvas.at_start)

    def blocks(self) -> Iterable[Block]:
        """As many canvases as are asked for, until all rows have ended."""
        first, last = self.canvas.prompt_length, self.canvas.ids.shape[1]
        steps = torch.full_like(self.canvas.at_start, self.steps)
        length = self.facts.block_length
        for start in range(first, last, length):
            if start > first and self.end_ids and bool(self.ended.all()):
                return
            yield self.canvas.block(start, start + length, steps)

    def begin(self, block: Block) -> None:
        config, canvas = self.config, self.canvas
        if not self.is_public:  # public code decodes rows on that have ended
            self.reader.drop(self.ended)
            canvas.masked = canvas.masked & ~self.ended[:, None]
        self.reader.store(canvas.ids, block.start)
        self.row_stores, self.row_forwards = (
            count + ~self.ended for count in (self.row_stores, self.row_forwards)
        )
        self.reader.open(block.end)
        self.rule = config.scheduler(block, config, self.draws, **config.schedule_args)
        self.stop = self.make_stop()
        slots = canvas.masked & block.inside
        self.noisy = _inside(block, canvas.ids.masked_scatter(slots, self._noise(slots)))
        # of the rows that are read [., C, V], logits: the decoder mixes by them
        self.conditioning: Tensor | None = None

    def more(self, block: Block, index: int) -> bool:
        return self.canvas.has_masks(block, self.reader.forwards) and index < self.steps

    def step(self, block: Block, index: int) -> dict:
        canvas, draws = self.canvas, self.draws
        is_open = canvas.masked & block.inside
        self.row_forwards = self.row_forwards + (is_open.any(-1) & ~self.ended)
        # public code draws for rows that are decoded, too
        asked = block.inside.expand_as(is_open) if self.is_public else is_open
        rows, cols = asked.nonzero(as_tuple=True)
        belief = Belief(self._processed(block, index, asked), with_entropy=True)
        token, drawn = belief.top_token, self._draw(belief, asked)
        prob = belief.prob(token[:, None])[:, 0]
        # where nothing is left that may stand there; no logit comes near, at whatever temperature
        prob = prob.masked_fill(belief.largest[:, 0] < FORBIDDEN, torch.nan)
        score = self.select(belief, drawn, lambda: draws.at(asked)).float()
        score = canvas.spread(score, rows, cols)
        accept, _ = self.rule(Step(index, score, asked, canvas.decoded, canvas.confidence))
        accepted = accept[rows, cols]
        shown = torch.where(accepted, drawn, self._noise(asked))
        where, soft = self._condition(belief, shown, accepted, asked)

        proposal, certain = canvas.ids.masked_scatter(asked, token), canvas.spread(prob, rows, cols)
        changed = is_open if index == 0 else is_open & (proposal != canvas.ids)
        canvas.put(changed, proposal, certain, self.reader.forwards - 1)
        canvas.watch(prob, rows)
        # rows that are decoded keep what they read, though nothing of theirs is looked at any more
        self.noisy = _inside(block, canvas.ids.masked_scatter(asked, shown))
        entropy = -canvas.spread(belief.negative_entropy, rows, cols)
        decoded = self.stop(_inside(block, canvas.ids), _inside(block, entropy))
        canvas.masked = canvas.masked & ~(block.inside & decoded[:, None])
        believed = asked, lambda here: belief.logits[here]
        told = dict(believed=believed, where=where, soft=soft)
        return report(self, block, is_open, changed, certain, **told)

    def end(self, block: Block) -> None:
        """What stands behind a row's end token is padding."""
        canvas = self.canvas
        canvas.masked = canvas.masked & ~block.inside
        if not self.end_ids:
            return
        is_end = block.inside & torch.isin(canvas.ids, canvas.ids.new_tensor(self.end_ids))
        behind = (is_end.cumsum(-1) - is_end.long() > 0) | self.ended[:, None]
        canvas.fill(behind & block.inside, self.pad)
        self.ended = self.ended | is_end.any(-1)

    def _processed(self, block: Block, index: int, asked: Tensor) -> Tensor:
        """-> [n, V] float32 logits of the slots `asked` [B, L], constrained and tempered."""
        canvas, conditioning = self.canvas, self.conditioning
        logits = raw = self.reader(self.noisy, conditioning, asked.any(-1))
        self.conditioning = None
        rows, cols = asked.nonzero(as_tuple=True)
        shown = canvas.ids.masked_scatter(block.inside, self.noisy)
        logits = self.constrain(logits, shown, rows, cols)
        temperature = self._temperature(index)
        return logits.div_(temperature) if logits is raw else logits / temperature

    def _temperature(self, index: int) -> Tensor:
        """As LinearTemperatureScheduleLogitsProcessor has it: float32, and the last one is not
        reached."""
        ends = self.config.temperature or TEMPERATURE
        first, last = ends if isinstance(ends, (tuple, list)) else (ends, ends)
        return last + (first - last) * (torch.tensor(self.steps - index) / self.steps)

    def _draw(self, belief: Belief, asked: Tensor) -> Tensor:
        """[n] tokens."""
        if not self.is_public:
            return belief.draw(self.draws.at(asked))
        probs = belief.logits.softmax(-1).to(self.draws.source)
        return torch.multinomial(probs, 1, generator=self.draws.rng)[:, 0].to(asked.device)

    def _noise(self, slots: Tensor) -> Tensor:
        """[n] random tokens for the slots [B, L] bool."""
        V, draws = self.facts.vocab_size, self.draws
        if not self.is_public:
            return (draws.at(slots) * V).long().clamp_max(V - 1)
        size = (int(slots.sum()),)
        return torch.randint(V, size, generator=draws.rng, device=draws.source).to(slots.device)

    def _condition(
        self, belief: Belief, shown: Tensor, accepted: Tensor, asked: Tensor
    ) -> tuple[Tensor | None, Soft | None]:
        """Give the next forward its mixtures -> where [B, L] bool, and which; None for none.
        shown: [n] tokens that the slots hold now; accepted: [n] bool, those that were drawn."""
        V, length = self.facts.vocab_size, self.facts.block_length
        if self.softener is None:
            logits = belief.logits
            values, ids = belief.top(min(SHOWN, V))
            soft = Soft(ids, belief.weigh(values))
        elif self.softener.fn is None:
            return None, None
        else:
            share = (~accepted).view(-1, length).float().mean(-1).repeat_interleave(length)
            ids = shown.masked_fill(~accepted, V)
            soft = self.softener.fn(Slots(belief, ids, ~accepted, share, V, self.nothing))
            logits = to_logits(soft, V)
        logits = logits.to(self.reader.net.body.dtype).view(-1, length, V)
        read = asked.any(-1)[self.reader.rows]
        if len(logits) < len(read):
            every = logits.new_zeros(len(read), length, V)
            every[read] = logits
            logits = every
        self.conditioning = logits
        return asked, soft


def _inside(block: Block, values: Tensor) -> Tensor:
    """[B, L] -> [B, C]."""
    return values[:, block.start : block.end]


def _pad_of(body: nn.Module, facts: Facts) -> int:
    """What stands behind an end token."""
    pad = body.config.get_text_config().pad_token_id
    return pad if pad is not None else facts.eos_id or 0
