"""What a decode did, kept such that its draws can be scored again: which token each forward put where,
and the mixtures that it read.

The slots that commit are chosen by a rule that looks at the model's belief alone, and their tokens
are then draws from it; so the probability of what was drawn is the product of the committed tokens'
probabilities, each given what its forward read; and of the slots' own, where they are draws, too
(order.py). `check_recordable` refuses whatever else would have a part in it.

Shapes: B rows, L columns of the canvas (of a block-causal model up to the end of its last block), M
the most soft slots that a row's forwards have read, K tokens of a mixture; m of them, flat.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from softar.soft import Soft

from .canvas import Canvas
from .config import DenoiseConfig
from .net import Facts
from .reader import Reader
from .schedules import SCHEDULES
from .select import SELECTORS, mk_selector
from .soften import mk_softener


class Trajectory(NamedTuple):
    """Tensors of rows, so that rows can be taken apart and put together."""

    before: Tensor  # [B, L] int64, the canvas that decoding began with
    after: Tensor  # [B, L] int64, as it ended
    committed_at: Tensor  # [B, L] int64, the forward (from 0) that decided each token, else -1
    # [B, L] int64, which of the model's own blocks a column lies in, 0 where it reads the whole
    # canvas; -1 for padding
    block: Tensor
    # of each soft slot that a forward with a part in the row read: which forward (-1: there is no
    # such slot), which column, and the mixture
    soft_at: Tensor  # [B, M] int64
    soft_column: Tensor  # [B, M] int64
    soft_ids: Tensor  # [B, M, K] int64
    soft_weights: Tensor  # [B, M, K] float32
    # of a decode that draws its slots, too (alg_temp), else -1: the first forward in which a column
    # could be drawn, and as which of the slots of its forward it was
    opened_at: Tensor  # [B, L] int64
    drawn_as: Tensor  # [B, L] int64

    def rows(self, which: Tensor | slice) -> "Trajectory":
        return Trajectory(*(part[which] for part in self))


class Recorder:
    """Follows a decode, and gives its trajectory at the end."""

    def __init__(self, canvas: Canvas, block: Tensor):
        self.canvas, self.block, self.before = canvas, block, canvas.ids
        self.opened_at = torch.full_like(canvas.ids, -1)
        self.drawn_as = torch.full_like(canvas.ids, -1)
        self.mixtures: Soft | None = None  # [B, L, K] what was shown last in each slot
        self.read: list[tuple[int, Tensor, Soft]] = []  # forward, [m, 2] row and column, [m, K]

    def note(self, reader: Reader, commit: Tensor) -> None:
        """The reader's last forward has committed `commit` [B, L] bool: keep the mixtures that it
        read in those rows."""
        if reader.where is None:
            return
        rows, cols = (reader.where & commit.any(-1, keepdim=True)).nonzero(as_tuple=True)
        mixed = Soft(*(part[rows, cols] for part in self.mixtures))
        self.read.append((reader.forwards - 1, torch.stack([rows, cols], -1), mixed))

    def draws(self, forward: int, is_open: Tensor, order: Tensor, commit: Tensor) -> None:
        """Of the slots `is_open` [B, L] bool this forward draws `commit` [B, L] bool, one by one: those
        of the highest `order` [B, L] float32, scores with noise. No draw is where all of them commit."""
        fresh = is_open & (self.opened_at < 0)
        self.opened_at = self.opened_at.masked_fill(fresh, forward)
        ranked = order.masked_fill(~commit, -torch.inf).argsort(
            dim=-1, descending=True, stable=True
        )
        drawn = commit & (is_open & ~commit).any(-1, keepdim=True)
        self.drawn_as = torch.where(drawn, ranked.argsort(-1), self.drawn_as)

    def shows(self, where: Tensor, soft: Soft) -> None:
        """From now on the slots `where` [B, L] bool show these mixtures [m, K]."""
        K = soft.ids.shape[-1]
        if self.mixtures is None:
            self.mixtures = Soft(*(part.new_zeros(*where.shape, K) for part in soft))
        K = max(K, self.mixtures.ids.shape[-1])  # those of one step may be wider than another's
        self.mixtures = Soft(
            *(
                widened(old, K).index_put(where.nonzero(as_tuple=True), widened(new, K))
                for old, new in zip(self.mixtures, soft, strict=True)
            )
        )

    def trajectory(self) -> Trajectory:
        canvas = self.canvas
        K = max((mixed.ids.shape[-1] for *_, mixed in self.read), default=1)
        none = canvas.ids.new_zeros(0, 2), Soft(canvas.ids.new_zeros(0, K), torch.zeros(0, K))
        read = [(-1, *none), *self.read]
        at = torch.cat([place.new_full((len(place),), forward) for forward, place, _ in read])
        place = torch.cat([place for _, place, _ in read])
        ids = torch.cat([widened(mixed.ids, K) for *_, mixed in read])
        weights = torch.cat([widened(mixed.weights, K).to(ids.device) for *_, mixed in read])
        rows, cols = place.unbind(-1)
        counts = rows.bincount(minlength=len(canvas.ids))
        order = rows.argsort(stable=True)
        number = (
            torch.arange(len(rows), device=rows.device) - (counts.cumsum(0) - counts)[rows[order]]
        )
        shape, where = (len(counts), int(counts.max())), (rows[order], number)
        return Trajectory(
            self.before,
            canvas.ids,
            canvas.committed_at,
            self.block,
            at.new_full(shape, -1).index_put(where, at[order]),
            at.new_zeros(shape).index_put(where, cols[order]),
            ids.new_zeros(*shape, K).index_put(where, ids[order]),
            weights.new_zeros(*shape, K).index_put(where, weights[order]),
            self.opened_at,
            self.drawn_as,
        )


def widened(part: Tensor, K: int) -> Tensor:
    """Ids or weights [..., K'] -> [..., K], with tokens of weight 0 at the end."""
    return torch.nn.functional.pad(part, (0, K - part.shape[-1]))


def check_recordable(config: DenoiseConfig, facts: Facts) -> None:
    """Raise ValueError for a decode whose draws have no probability that a replay could give; config:
    as the model was trained."""
    if facts.mask_id is None or facts.uniform is not None:
        raise ValueError(
            f"a model of family {facts.family} redraws its slots in each forward: only what fills masks for good can "
            f"be recorded for a replay"
        )
    for name, is_wrong, why in UNFIT:
        if is_wrong(config):
            raise ValueError(f"{name}={getattr(config, name)!r:.80} cannot be replayed: {why}")


BELIEF_ONLY = [name for name, selector in SELECTORS.items() if not selector.looks_at_token]
WHOLE = "draws are scored under the whole belief, leave it out"
REVISES = "it takes decoded tokens back, and only what stays has a probability here; leave it out"
UNFIT: tuple[tuple[str, Callable[[DenoiseConfig], bool], str], ...] = (
    ("parity", lambda c: c.parity is not None, "defects of a public sampler are not, leave it out"),
    ("temperature", lambda c: not c.temperature, "nothing is drawn, give one above 0"),
    (
        "select",
        lambda c: mk_selector(c.select).looks_at_token and not c.scheduler.is_random,
        f"which slots commit depends on the tokens drawn; choose one of {BELIEF_ONLY}, or give a "
        f"softar.diffusion.select.Selector(function, looks_at_token=False)",
    ),
    ("schedule", lambda c: c.scheduler.revises, REVISES),
    ("soften", lambda c: mk_softener(c.soften, **c.soften_args).revises, REVISES),
    (
        "soften_args",
        lambda c: c.soften == "soft-mask" and c.soften_args.get("algorithm") == "temperature",
        "its mixtures hold the whole vocabulary for each slot and forward; give algorithm='top-k'",
    ),
    ("remask", lambda c: c.remask is not None, REVISES),
    ("ends_last", lambda c: c.ends_last, "whether a slot waits depends on the token drawn for it"),
    (
        "alg_temp",
        lambda c: c.alg_temp > 0 and c.schedule_name not in SCHEDULES,
        "what a schedule of yours makes of drawn scores is not known; give 0",
    ),
    ("top_k", lambda c: c.top_k is not None, WHOLE),
    ("top_p", lambda c: c.top_p is not None, WHOLE),
    ("cfg_scale", lambda c: c.cfg_scale > 0, "a replay reads the canvas once, give 0"),
    (
        "cache",
        lambda c: c.cache in ("prefix", "dual"),
        "its keys and values are stale, leave it out",
    ),
    ("allowed", lambda c: bool(c.allowed), WHOLE),
    ("logits_processor", lambda c: c.logits_processor is not None, WHOLE),
)
