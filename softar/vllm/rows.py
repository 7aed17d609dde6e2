"""The soft requests of a vLLM batch: who thinks, what each reads next, what it has read. Nothing
here imports vLLM.

A request chooses as a row of `softar.generate` does, by the same `Chooser`: one for all requests of
a configuration that step together, which they enter and leave as vLLM schedules them. Everything
stays on the device and nothing waits for it. What a request has read is kept, so that it can be
computed again when vLLM has thrown it out of its cache.

Shapes: R rows of the batch, G those of one configuration that step, K tokens kept, D embedding
width.
"""

import copy
import dataclasses
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..config import SoftConfig
from ..mixers import TINY, Mixed, Rng
from ..soft import Soft, entropy, soft_embed
from ..thought import Chooser, Record

CHUNK = 64  # steps of a request that stay on the device; older ones wait on the host
PIECE = 4096  # token embeddings gathered at once when a request is computed anew


class Chooser(Chooser):
    """Of requests instead of a batch with one prompt length: of what was said before it keeps the
    last few tokens."""

    ROWS = (*Chooser.ROWS, "recent")

    def __init__(self, config: SoftConfig, prompt: Sequence[int], eos: Sequence[int], rng: Rng):
        ids = torch.tensor([prompt])
        # as numbers they would be sent to the device at every step
        unbanned = dataclasses.replace(config, banned=())
        super().__init__(unbanned, ids, None, torch.tensor(eos, dtype=torch.long), rng)
        self.banned = torch.tensor(config.banned) if config.banned else None
        self.any_thinking = True  # nobody looks
        longest = max(
            len(pattern) for pattern in (self.start, self.end, [0]) if pattern is not None
        )
        nothing = ids.new_full((1, longest - 1), -1)  # a short prompt ends in no pattern
        self.recent = torch.cat([nothing, ids], 1)[:, ids.shape[1] :]  # [1, longest - 1]

    def to(self, device: torch.device) -> "Chooser":
        out = copy.copy(self)
        for name in (*self.ROWS, "pad", "eos", "start", "end", "banned"):
            value = getattr(self, name)
            setattr(out, name, value if value is None else value.to(device, non_blocking=True))
        return out

    def think(self, logits: Tensor, looks: bool) -> tuple[Tensor, Mixed]:
        """logits [G, V] float32, not written to. looks: does anyone want the entropy?"""
        self.draws.step += 1
        looks = looks or self.config.cold_stop_entropy is not None
        h = (
            entropy(logits, self.config.temperature or 1.0)
            if looks
            else torch.zeros_like(logits[:, 0])
        )
        return h, self._think(
            logits if self.banned is None else logits.index_fill(-1, self.banned, -torch.inf)
        )

    def choose(self, h: Tensor, thought: Mixed, sampled: Tensor) -> Record:
        """sampled [G]: the tokens of those who answer."""
        answer = Mixed(None, sampled, torch.full_like(h, torch.nan))
        record = self.decide(h, thought, answer, self.recent)
        if self.recent.shape[1]:
            self.recent = torch.cat([self.recent[:, 1:], record.token[:, None]], 1)
        return record


@dataclass
class Row:
    """A request."""

    config: SoftConfig
    key: tuple  # rows of one key share a chooser
    prompt: Sequence[int]
    seed: int | None
    eos: tuple[int, ...]
    wants_record: bool
    lasts: int | None  # steps after which it surely answers; None where the host cannot know
    steps: int = 0  # tokens chosen so far
    chunks: list[Soft] = field(default_factory=list)  # what it read, [n, K], on the host
    recent: list["Step"] = field(default_factory=list)  # the steps after those
    parked: Chooser | None = None  # its state while it does not step
    alive: bool = True

    @property
    def is_over(self) -> bool:
        return self.lasts is not None and self.steps >= self.lasts

    def soft(self, first: int, last: int, device: torch.device) -> Soft:
        """What it read at steps first to last - 1, [n, K]."""
        parts = [chunk for chunk in self.chunks if len(chunk.ids)]
        parts += [
            Soft(s.record.ids[s.row, None], s.record.weights[s.row, None]) for s in self.recent
        ]
        found, at = [], 0
        for ids, weights in parts:
            low, high = max(first - at, 0), min(last - at, len(ids))
            if low < high:
                found.append([x[low:high].to(device, non_blocking=True) for x in (ids, weights)])
            at += len(ids)
        return Soft(*(torch.cat(column) for column in zip(*found, strict=True)))

    def store(self) -> None:
        """Move all but the last steps to the host."""
        if len(self.recent) < 2 * CHUNK:
            return
        old, self.recent = self.recent[:CHUNK], self.recent[CHUNK:]
        ids = torch.stack([s.record.ids[s.row] for s in old])
        weights = torch.stack([s.record.weights[s.row] for s in old])
        # Read on the same stream, should it ever be read: nothing has to wait for the copy.
        self.chunks.append(
            Soft(ids.to("cpu", non_blocking=True), weights.to("cpu", non_blocking=True))
        )


class Step(NamedTuple):
    record: Record  # of all rows that stepped together
    row: int  # which of them
    before: tuple[Tensor, ...]  # their state until then


@dataclass
class Turn:
    """A group between its thought and vLLM's choice."""

    group: "Group"
    rows: list[Row]
    index: Tensor | None  # [G] their places in the batch; None: they are the batch, in its order
    h: Tensor
    thought: Mixed


class Group:
    """The rows of one configuration that stepped last."""

    def __init__(self, config: SoftConfig):
        self.config = config
        self.chooser: Chooser | None = None
        self.rows: list[Row] = []
        self.record: Record | None = None

    def seat(self, rows: list[Row], fresh: Callable[[Row], Chooser]) -> None:
        """Make these the rows of the chooser, in this order."""
        if len(rows) == len(self.rows) and all(a is b for a, b in zip(rows, self.rows)):
            return
        old = {id(row): i for i, row in enumerate(self.rows)}
        new = {id(row) for row in rows}
        for i, row in enumerate(self.rows):
            if id(row) not in new and row.alive:
                row.parked = self.chooser.select([i])
        stay = [row for row in rows if id(row) in old]
        come = [row for row in rows if id(row) not in old]
        parts = [self.chooser.select([old[id(row)] for row in stay])] if stay else []
        parts += [row.parked or fresh(row) for row in come]
        chooser = functools.reduce(lambda a, b: a.join(b), parts)
        for row in come:
            row.parked = None
        place = {id(row): i for i, row in enumerate(stay + come)}
        order = [place[id(row)] for row in rows]
        self.chooser = chooser if order == sorted(order) else chooser.select(order)
        self.rows = rows

    def unseat(self, row: Row) -> None:
        place = next((i for i, r in enumerate(self.rows) if r is row), None)
        if place is not None:
            others = [i for i in range(len(self.rows)) if i != place]
            row.parked = self.chooser.select([place])
            self.chooser = self.chooser.select(others) if others else None
            self.rows = [self.rows[i] for i in others]


class Rows:
    """All soft requests of a runner.

    lookup: [n] ids -> [n, D], the model's own embedding. seed: of the draws of requests without a
    seed.
    """

    def __init__(self, lookup: Callable[[Tensor], Tensor], device: torch.device, seed: int):
        self.embedding, self.device = Lookup(lookup), device
        self.shared = torch.Generator(device).manual_seed(seed)
        self.rows: dict[str, Row] = {}
        self.groups: dict[tuple, Group] = {}
        self.cached: dict[tuple, Tensor] = {}

    def add(
        self,
        name: str,
        config: SoftConfig,
        prompt,
        seed: int | None,
        eos: Sequence[int],
        wants_record: bool,
    ):
        lasts = None
        if config.budget is not None and config.think_start is None and not wants_record:
            lasts = config.budget + len(config.think_end or [None])
        key = (repr(config), tuple(eos), seed is not None, wants_record)
        self.rows[name] = Row(config, key, prompt, seed, tuple(eos), wants_record, lasts)

    def drop(self, names: Sequence[str]) -> None:
        for name in names:
            row = self.rows.pop(name, None)
            if row is not None:
                row.alive = False
                if not any(row.key == other.key for other in self.rows.values()):
                    self.groups.pop(row.key, None)
        if not self.rows:
            self.cached.clear()

    def think(
        self, logits: Tensor, names: Sequence[str], ends: Sequence[int], skipped: Sequence[bool]
    ) -> list[Turn]:
        """Before vLLM samples, as it writes into the logits.

        Args:
            logits: [R, V]. names: [R] the requests. ends: [R] positions computed after this step.
            skipped: [R] requests that get no token in this step: their prompt is not through.
        """
        turns: dict[tuple, list[tuple[int, Row]]] = {}
        for place, name in enumerate(names):
            row = self.rows.get(name)
            if row is None or skipped[place]:
                continue
            step = int(ends[place]) - len(row.prompt)
            if step < row.steps:
                self._rewind(row, step)
            if not row.is_over:
                turns.setdefault(row.key, []).append((place, row))
        return [self._think(key, logits, *zip(*pairs)) for key, pairs in turns.items()]

    def _think(
        self, key: tuple, logits: Tensor, places: tuple[int, ...], rows: tuple[Row, ...]
    ) -> Turn:
        group = self.groups.setdefault(key, Group(rows[0].config))
        group.seat(list(rows), self._fresh)
        index = self._index(places, len(logits))
        h, thought = group.chooser.think(
            (logits if index is None else logits[index]).float(), rows[0].wants_record
        )
        return Turn(group, list(rows), index, h, thought)

    def choose(self, turns: list[Turn], sampled: Tensor) -> None:
        """After it: sampled [R, 1] gets the tokens of those who think; those who answer keep
        vLLM's."""
        for turn in turns:
            group, column = turn.group, sampled[:, 0]
            before = tuple(getattr(group.chooser, name) for name in Chooser.ROWS)
            own = (column if turn.index is None else column[turn.index]).long()
            record = group.record = group.chooser.choose(turn.h, turn.thought, own)
            if turn.index is None:
                column.copy_(record.token)
            else:
                column[turn.index] = record.token.to(column.dtype)
            for i, row in enumerate(turn.rows):
                row.recent.append(Step(record, i, before))
                row.steps += 1
                row.store()

    def write(self, turn: Turn, out):
        """The record of a turn into vLLM's LogprobsTensors: each [R, width], the ranks [R]. Returns
        them."""
        record = turn.group.record
        more = record.ids.shape[1] + 2 - out.logprobs.shape[1]
        if more > 0:  # somebody asked for the log-probabilities of a few tokens only
            wide = (nn.functional.pad(x, (0, more)) for x in (out.logprob_token_ids, out.logprobs))
            out = out._replace(**dict(zip(("logprob_token_ids", "logprobs"), wide)))
        ids, logs = log_columns(record, out.logprobs.shape[1])
        index = slice(None) if turn.index is None else turn.index
        out.logprob_token_ids[index] = ids.to(out.logprob_token_ids.dtype)
        out.logprobs[index] = logs
        out.selected_token_ranks[index] = record.kind.to(out.selected_token_ranks.dtype)
        return out

    def feed(
        self, embeds: Tensor, names: Sequence[str], computed: Sequence[int], counts: Sequence[int]
    ) -> None:
        """Write what the requests read into the inputs of a forward.

        Args:
            embeds: [tokens, D], the requests one after the other. names: [R]. computed: [R]
                positions in their caches.
            counts: [R] positions that this forward computes.
        """
        now: dict[tuple, list[tuple[int, int]]] = {}
        offset = 0
        for name, first, count in zip(names, computed, counts, strict=True):
            row = self.rows.get(name)
            if row is not None:
                low = int(first) - len(row.prompt)
                high = min(low + count, row.steps)
                at, low = offset + max(-low, 0), max(low, 0)
                if low < high:
                    group, last = self.groups[row.key], row.recent[-1]
                    if high - low == 1 and high == row.steps and last.record is group.record:
                        now.setdefault(row.key, []).append((last.row, at))
                    else:
                        self._replay(row, low, high, embeds[at : at + high - low])
            offset += count
        for key, pairs in now.items():
            record, config = self.groups[key].record, self.groups[key].config
            rows, places = zip(*pairs)
            index = self._index(rows, len(record.ids))
            soft = Soft(record.ids, record.weights)
            soft = soft if index is None else Soft(soft.ids[index], soft.weights[index])
            # rows at a time: what they need is no part of vLLM's own count
            n = max(PIECE // soft.ids.shape[1], 1)
            pieces = (
                Soft(soft.ids[i : i + n], soft.weights[i : i + n]) for i in range(0, len(rows), n)
            )
            made = [
                soft_embed(piece, self.embedding, rescale=config.rescale).to(embeds.dtype)
                for piece in pieces
            ]
            mixed = made[0] if len(made) == 1 else torch.cat(made)
            if places == tuple(range(places[0], places[0] + len(places))):
                embeds[places[0] : places[0] + len(places)] = mixed
            else:
                embeds[self._index(places, None)] = mixed

    def _replay(self, row: Row, low: int, high: int, out: Tensor) -> None:
        """A request that was thrown out of the cache reads again what it read."""
        ids, weights = row.soft(low, high, self.device)
        n = max(PIECE // ids.shape[1], 1)
        for at in range(0, len(ids), n):
            piece = Soft(ids[at : at + n], weights[at : at + n])
            out[at : at + n] = soft_embed(piece, self.embedding, rescale=row.config.rescale).to(
                out.dtype
            )

    def _rewind(self, row: Row, steps: int) -> None:
        """vLLM threw away the last tokens it sampled (a reset of the cache with asynchronous
        scheduling)."""
        gone = row.steps - steps
        undone = row.recent[-gone]
        self.groups[row.key].unseat(row)
        draws = copy.copy(row.parked.draws)
        draws.step -= gone
        row.parked = row.parked._with([state[undone.row, None] for state in undone.before], draws)
        row.steps, row.recent = steps, row.recent[:-gone]

    def _fresh(self, row: Row) -> Chooser:
        rng = self.shared if row.seed is None else [torch.Generator().manual_seed(row.seed)]
        return Chooser(row.config, row.prompt, row.eos, rng).to(self.device)

    def _index(self, places: tuple[int, ...], everything: int | None) -> Tensor | None:
        """On the device; the same ones come step after step. None for 0, 1, ..., everything - 1."""
        if everything is not None and places == tuple(range(everything)):
            return None
        if places not in self.cached:
            if len(self.cached) > 1024:
                self.cached.clear()
            pinned = self.device.type == "cuda"
            self.cached[places] = torch.tensor(places, pin_memory=pinned).to(
                self.device, non_blocking=True
            )
        return self.cached[places]


class Lookup(nn.Module):
    """The model's embedding, as `soft_embed` takes it."""

    def __init__(self, lookup: Callable[[Tensor], Tensor]):
        super().__init__()
        self.lookup = lookup

    def forward(self, ids: Tensor) -> Tensor:
        return self.lookup(ids.flatten()).unflatten(0, ids.shape)


def log_columns(record: Record, width: int) -> tuple[Tensor, Tensor]:
    """A step as vLLM sends log-probabilities: ids and values [G, width].

    Column 0 holds the token and its log-probability, 1 the entropy, the rest the mixture, equal ids
    summed.
    """
    ids, weights, token = record.ids, record.weights, record.token[:, None]
    same = ids[:, :, None] == ids[:, None, :]  # [G, K, K]
    weights = (weights[:, None, :] * same).sum(-1)  # all slots of an id carry its sum
    own = (weights * (ids == token)).amax(-1, keepdim=True)  # [G, 1]
    gone = weights == 0  # a filter dropped it
    ids, weights = torch.where(gone, token, ids), torch.where(gone, own, weights)
    more = width - 2 - ids.shape[1]
    ids = torch.cat([token, token, ids, token.expand(-1, more)], 1)
    logs = torch.cat([weights, own.expand(-1, more)], 1).clamp_min(TINY).log()
    return ids, torch.cat([record.logp[:, None], record.entropy[:, None], logs], 1)
