"""Log-probabilities of what a recorded decode has drawn.

Each forward of the decode is made again on what it read, for the slots that it committed and, where
they were drawn, those that it could have drawn: of a row's forwards, and of all rows, `chunk` canvases
at a time, whose pieces are handed out one after the other. Whoever sums a loss over pieces, each with
a backward of its own, needs memory for one of them, whatever the number of steps. Forwards of a piece
that read the same, as those of answers to one prompt do until their draws part, are made once.

Weights of mixtures are never differentiated: what a slot shows is a transition, as the canvas is.

Shapes: B rows, L columns, V vocabulary, D width; p canvases of a piece, each a row at one of its
forwards, u of them different; n slots, flat; b block length, g copies of blocks, T places of a packed
row.
"""

import hashlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from softar.checks import check_choice, check_least
from softar.soft import Soft, soft_embed

from .config import DenoiseConfig
from .net import Facts, Parts, facts, parts
from .order import choices, open_slots
from .proposals import never_proposed
from .record import Trajectory, check_recordable

CHUNK = 16
ESTIMATES = ("one-step", "left-to-right")


class Piece(NamedTuple):
    """Committed slots of a trajectory, and what the policy thought of each."""

    rows: Tensor  # [n]
    cols: Tensor  # [n]
    # [n, V] float32 (float64 of float64), over the temperature; the lowest number for what is never
    # proposed
    logits: Tensor
    # [n, L] log-probabilities of each column to be the next slot, where slots were drawn, too
    choices: Tensor | None = None

    def log_probs(self, token: Tensor) -> Tensor:
        """[n] of the tokens [n] of all slots, and of having drawn these."""
        logp = self.logits.log_softmax(-1).gather(-1, token[:, None])[:, 0]
        if self.choices is None:
            return logp
        return logp + self.choices.gather(-1, self.cols[:, None])[:, 0]


def log_probs(model: nn.Module, trajectory: Trajectory, config: DenoiseConfig, **how) -> Tensor:
    """[B, L] of each committed token, and of the draw of its slot, 0 elsewhere: the sum over a row is
    the log-probability of all that was drawn in it. Arguments are those of `replay`; with gradient it
    holds all pieces."""
    values = [], [], []
    for piece in replay(model, trajectory, config, **how):
        rows, cols = piece.rows, piece.cols
        logp = piece.log_probs(trajectory.after[rows, cols])
        for part, value in zip(values, (rows, cols, logp), strict=True):
            part.append(value)
    if not values[0]:
        return torch.zeros(trajectory.after.shape, device=trajectory.after.device)
    rows, cols, logp = map(torch.cat, values)
    return logp.new_zeros(trajectory.after.shape).index_put((rows, cols), logp)


def replay(
    model: nn.Module,
    trajectory: Trajectory,
    config: DenoiseConfig,
    *,
    method: str = "exact",
    chunk: int = CHUNK,
    hidden: Tensor | None = None,
    embedding_grad: bool = True,
) -> Iterator[Piece]:
    """The logits that each committed token was drawn from, piece by piece.

    Args:
        model: that decoded, or another of its kind. Its mode is the caller's: denoise decodes in
            eval mode.
        trajectory: of `denoise(..., record=True)`. config: what it was decoded with.
        method: "exact" makes each forward again that has committed something. "grouped" gives the same
            for block-causal models, from rows that hold the finished canvas once and behind it each
            step's block. Estimates, without soft slots: "one-step" reads the canvas once, with all
            slots masked (diffu-GRPO, arXiv:2504.12216, section 3.1); "left-to-right" as if the slots
            had been decoded one by one from the left (JustGRPO, arXiv:2601.15165).
        chunk: canvases, or copies of blocks, in a forward, at most. Each has logits [V] for the slots
            that it committed; where slots were drawn, for all that were open.
        hidden: [B, L] bool, tokens of the prompt that "one-step" masks too; None: none.
        embedding_grad: do the input embeddings get gradient through mixtures? Single tokens give
            them theirs.

    Raises:
        ValueError: before the first forward, for a decode that cannot be replayed.
    """
    model_facts = facts(model)
    config = config.as_trained(model_facts)
    check_recordable(config, model_facts)
    check_choice("method", method, METHODS)
    check_least({"chunk": chunk}, chunk=1)
    if method == "grouped" and model_facts.block_length is None:
        raise ValueError(
            f"method='grouped' is for block-causal models, and {type(model).__name__} reads the whole canvas: give "
            f"'exact'"
        )
    if config.alg_temp and method in ESTIMATES:
        raise ValueError(
            f"alg_temp={config.alg_temp} draws the slots, and method={method!r} knows no order: give 'exact', or "
            f"alg_temp=0"
        )
    if hidden is not None and method != "one-step":
        raise ValueError(f"hidden does not go with method={method!r}: it is of 'one-step' alone")
    view, packs, read = METHODS[method]
    steps = view(trajectory, model_facts.mask_id, hidden)
    net = _Net(model, model_facts, config, embedding_grad)
    return (read(net, steps, *pack) for pack in packs(steps, chunk))


def prompt_masks(
    trajectory: Trajectory, share: float, rng: torch.Generator | None = None
) -> Tensor:
    """[B, L] bool: each token that the caller gave, with this probability; what "one-step" takes as
    `hidden` (arXiv:2504.12216 has 0.15). A number is drawn for each of them alone, row by row, so that
    the padding of a batch does not show."""
    given = (trajectory.before == trajectory.after) & (trajectory.block >= 0)
    source = given.device if rng is None else rng.device
    drawn = torch.rand(int(given.sum()), generator=rng, device=source) < share
    return given.masked_scatter(given, drawn.to(given.device))


class _Net(NamedTuple):
    model: nn.Module
    facts: Facts
    config: DenoiseConfig
    embedding_grad: bool

    @property
    def parts(self) -> Parts:
        return parts(self.model)

    def embed(self, ids: Tensor, steps: Trajectory, rows: Tensor, at: Tensor, place) -> Tensor:
        """ids [p, T] as inputs [p, T, D], with the mixtures that the forwards `at` [p, g] of the rows
        [p] read; place(canvas, copy, column) says where each stands."""
        embedding = self.parts.embedding
        embeds = embedding(ids)
        reads = steps.soft_at[rows][:, None] == at[..., None]  # [p, g, M]
        canvas, copy, slot = (reads & (at >= 0)[..., None]).nonzero(as_tuple=True)
        if not len(canvas):
            return embeds
        source = rows[canvas], slot
        soft = Soft(steps.soft_ids[source], steps.soft_weights[source])
        mixed = soft_embed(soft, embedding, rescale=self.config.rescale)
        mixed = mixed if self.embedding_grad else mixed.detach()
        where = canvas, place(canvas, copy, steps.soft_column[source])
        return embeds.index_put(where, mixed.to(embeds.dtype))

    def asked(self, steps: Trajectory, rows: Tensor, at: Tensor) -> Tensor:
        """[p, L] bool of the forwards `at` [p] of the rows [p]: the slots whose logits are needed."""
        commits = (steps.committed_at[rows] == at[:, None]) & (at >= 0)[:, None]
        return commits | open_slots(steps, rows, at) if self.config.alg_temp else commits

    def piece(self, hidden: Tensor, source: tuple, steps: Trajectory, place: tuple) -> Piece:
        """hidden [p, T, D]; source: where the output about each slot is; place: of each slot that is
        asked about its forward among those of the piece, row and column, and the row's forward."""
        logits = self.parts.head(hidden[source])
        logits = logits if logits.dtype == torch.float64 else logits.float()
        forward, rows, cols, at = place
        never = torch.tensor(never_proposed(self.config, self.facts), device=cols.device)
        least = torch.finfo(logits.dtype).min
        drawn = None
        if self.config.alg_temp:
            here = steps.committed_at[rows, cols] == at
            scored = logits.index_fill(-1, never, least)
            drawn = choices(self.config, steps, scored, (forward, rows, cols), here)
            logits, rows, cols = logits[here], rows[here], cols[here]
        logits = logits / self.config.temperature
        return Piece(rows, cols, logits.index_fill(-1, never, least), drawn)


def _packs(steps: Trajectory, chunk: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows [p] and of each the forwards [p, g] that committed something, -1 for none; p g is at most
    `chunk`."""
    every = [row[row >= 0].unique() for row in steps.committed_at.unbind()]
    packs = [(r, part) for r, row in enumerate(every) for part in row.split(chunk) if len(part)]
    packs.sort(key=lambda pack: len(pack[1]), reverse=True)
    while packs:
        g = len(packs[0][1])
        now, packs = packs[: max(chunk // g, 1)], packs[max(chunk // g, 1) :]
        rows = torch.tensor([r for r, _ in now], device=steps.after.device)
        yield rows, nn.utils.rnn.pad_sequence([at for _, at in now], True, -1)


def _canvases(steps: Trajectory, chunk: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Rows [p], a forward [p] of each that committed something, and a number [p] of what it read;
    equal numbers stand together; p is at most `chunk`."""
    every, numbers = [], {}
    for r in range(len(steps.after)):
        for at, read in _read(steps.rows(slice(r, r + 1))):
            number = numbers.setdefault(read, len(numbers))
            every.append((number, r, at))
    every.sort()
    for i in range(0, len(every), chunk):
        number, rows, at = torch.tensor(every[i : i + chunk], device=steps.after.device).unbind(1)
        yield rows, at, number


def _read(steps: Trajectory) -> Iterator[tuple[int, bytes]]:
    """The forwards of one row that committed something, and of each a digest of all that it read."""
    forwards = steps.committed_at[steps.committed_at >= 0].unique()
    canvases = _canvas(steps, forwards.new_zeros(1), forwards[None])[0].cpu().numpy()
    shown = steps.block, steps.soft_at, steps.soft_column, steps.soft_ids, steps.soft_weights
    block, soft_at, *mixtures = (part[0].cpu().numpy() for part in shown)
    for at, canvas in zip(forwards.tolist(), canvases):
        its = soft_at == at
        parts = canvas, block, *(part[its] for part in mixtures)
        digest = hashlib.blake2b(b"".join(part.tobytes() for part in parts), digest_size=16)
        yield at, digest.digest()


def _canvas(steps: Trajectory, rows: Tensor, at: Tensor) -> Tensor:
    """[p, g, L] ids that stood in the rows [p] before the forwards [p, g]."""
    order = steps.committed_at[rows][:, None]
    known = (order >= 0) & (order < at[..., None])
    return torch.where(known, steps.after[rows][:, None], steps.before[rows][:, None])


def _whole(net: _Net, steps: Trajectory, rows: Tensor, at: Tensor, number: Tensor) -> Piece:
    """The forwards `at` [p], each over its whole canvas; those of one number are one."""
    which = number.unique_consecutive(return_inverse=True)[1]
    first = torch.cat([which.new_ones(1), which.diff()]).nonzero()[:, 0]  # [u] of p
    canvas, cols = net.asked(steps, rows, at).nonzero(as_tuple=True)
    hidden, start = _outputs(net, steps, rows[first], at[first, None])
    # with shifted logits nothing is about the first token, whose own output stands in
    source = which[canvas], torch.maximum(cols - net.facts.shift, start[which[canvas]])
    return net.piece(hidden, source, steps, (canvas, rows[canvas], cols, at[canvas]))


def _outputs(net: _Net, steps: Trajectory, rows: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
    """[u, L, D] of the forwards `at` [u, 1], and the first column [u] of each row."""
    block = steps.block[rows]
    there = block >= 0
    ids = _canvas(steps, rows, at)[:, 0]
    embeds = net.embed(ids, steps, rows, at, lambda canvas, copy, column: column)
    mask = None if bool(there.all()) else there.long()
    if net.facts.block_length is not None:
        sees = there[:, None] & (block[:, None] <= block[..., None])
        mask = (sees | torch.eye(sees.shape[-1], dtype=torch.bool, device=sees.device))[:, None]
    positions = (there.long().cumsum(1) - 1).clamp_min(0)
    return net.parts.body(embeds, mask, positions), there.long().argmax(1)


def _packed(net: _Net, steps: Trajectory, rows: Tensor, at: Tensor) -> Piece:
    """The forwards `at` [p, g], of a row in one: the finished canvas, and for each of them its block
    as it stood then. A copy sees itself, and what is finished of the blocks before it."""
    b, shift, block = net.facts.block_length, net.facts.shift, steps.block[rows]
    L, g = block.shape[1], at.shape[1]
    asked = net.asked(steps, rows.repeat_interleave(g), at.flatten()).view(*at.shape, L)
    number = block[:, None].masked_fill(~asked, -1).amax(-1)  # [p, g] of the block
    start = (block[:, None] == number[..., None]).long().argmax(-1)
    column = (start[..., None] + torch.arange(b, device=at.device)).clamp_max(L - 1)  # [p, g, b]
    its = block[:, None].expand(-1, g, -1).gather(-1, column)
    its = its.masked_fill((its != number[..., None]) | (number < 0)[..., None], -1)
    # a block at the right edge is shorter, and its last column would come again
    fresh = start[..., None] + torch.arange(b, device=at.device) < L
    its = its.masked_fill(~fresh, -1).flatten(1)
    ids = torch.cat([steps.after[rows], _canvas(steps, rows, at).gather(-1, column).flatten(1)], 1)

    def place(canvas: Tensor, copy: Tensor, column: Tensor) -> Tensor:
        return L + copy * b + column - start[canvas, copy]

    blocks = torch.cat([block, its], 1)  # [p, T]
    copy = torch.arange(L + g * b, device=at.device).sub(L).div(b, rounding_mode="floor")
    copy = copy.clamp_min(-1)  # -1 is what is finished
    earlier, same = blocks[:, None] < blocks[..., None], blocks[:, None] == blocks[..., None]
    sees = (copy[None] == -1) & earlier | (copy[None] == copy[:, None]) & same
    sees = sees & (blocks >= 0)[:, None]
    sees = sees | torch.eye(L + g * b, dtype=torch.bool, device=at.device)
    clean = ((block >= 0).long().cumsum(1) - 1).clamp_min(0)
    positions = torch.cat([clean, clean.gather(1, column.flatten(1))], 1)
    embeds = net.embed(ids, steps, rows, at, place)
    hidden = net.parts.body(embeds, sees[:, None], positions)
    canvas, which, cols = asked.nonzero(as_tuple=True)
    first = (block >= 0).long().argmax(1)[canvas]
    source = torch.maximum(cols - shift, first)
    inside = source >= start[canvas, which]
    source = torch.where(inside, place(canvas, which, source), source)
    place = canvas * g + which, rows[canvas], cols, at[canvas, which]
    return net.piece(hidden, (canvas, source), steps, place)


def _as_recorded(trajectory: Trajectory, mask_id: int, hidden: Tensor | None) -> Trajectory:
    return trajectory


def _bare(trajectory: Trajectory, order: Tensor) -> Trajectory:
    """As if its slots had been decoded in this order, without mixtures."""
    return trajectory._replace(committed_at=order, soft_at=trajectory.soft_at[:, :0])


def _one_step(trajectory: Trajectory, mask_id: int, hidden: Tensor | None) -> Trajectory:
    steps = _bare(trajectory, trajectory.committed_at.clamp_max(0))
    if hidden is None:
        return steps
    return steps._replace(before=steps.before.masked_fill(hidden, mask_id))


def _left_to_right(trajectory: Trajectory, mask_id: int, hidden: Tensor | None) -> Trajectory:
    committed = trajectory.committed_at >= 0
    return _bare(trajectory, (committed.cumsum(1) - 1).masked_fill(~committed, -1))


# how it takes a trajectory, what of it stands in a forward, and how that is read
METHODS: dict[str, tuple[Callable, Callable, Callable]] = {
    "exact": (_as_recorded, _canvases, _whole),
    "grouped": (_as_recorded, _packs, _packed),
    "one-step": (_one_step, _canvases, _whole),
    "left-to-right": (_left_to_right, _canvases, _whole),
}
