"""The soft requests of a vLLM batch: who thinks, what each reads next, what it has read.

A request chooses as a row of `softar.generate` does, by the same `decide`: all requests of a
configuration that step together are one `Group`, which they enter and leave as vLLM schedules them.
Everything stays on the device and nothing waits for it. What a request has read is stored, so that
it can be computed again when vLLM has thrown it out of its cache.

Shapes: R rows of the batch, G those of one configuration that step, K tokens kept, D embedding
width.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..config import SoftConfig
from ..draws import THOUGHT, RowDraws
from ..mixers import BUILT_IN, Mixed
from ..soft import Soft, entropy, soft_embed
from ..thought import Progress, Record, begin, decide, join, mk_rules, mk_think
from .finite import without
from .record import log_columns

CHUNK = 64  # steps of a request that stay on the device; older ones wait on the host
PIECE = 4096  # token embeddings gathered at once: what they need is no part of vLLM's own count
INDICES = 1024  # kept on the device


class Step(NamedTuple):
    """A step of a request."""

    record: Record  # of all rows that stepped together
    row: int  # which of them
    before: Progress  # of them all, until then

    @property
    def soft(self) -> Soft:
        """What it read, [1, K]."""
        row = slice(self.row, self.row + 1)
        return Soft(self.record.ids[row], self.record.weights[row])


@dataclass
class Row:
    """A request."""

    config: SoftConfig
    key: tuple  # rows of one key step together
    prompt: Sequence[int]
    draws: RowDraws | None  # None: it shares a generator with all that have no seed
    eos: tuple[int, ...]
    wants_record: bool
    lasts: int | None  # steps after which it surely answers; None where the host cannot know
    steps: int = 0  # tokens chosen so far
    chunks: list[Soft] = field(default_factory=list)  # what it read, [n, K], on the host
    recent: list[Step] = field(default_factory=list)  # the steps after those
    parked: Progress | None = None  # [1] while it does not step
    alive: bool = True

    @property
    def is_over(self) -> bool:
        return self.lasts is not None and self.steps >= self.lasts

    def soft(self, first: int, last: int, device: torch.device) -> Soft:
        """What it read at steps first to last - 1, [n, K]."""
        parts, start = [], 0
        for part in [*self.chunks, *(step.soft for step in self.recent)]:
            end = start + len(part.ids)
            if start < last and end > first:
                steps = slice(max(first - start, 0), last - start)
                parts.append([column[steps].to(device, non_blocking=True) for column in part])
            start = end
        return Soft(*(torch.cat(column) for column in zip(*parts, strict=True)))

    def store(self) -> None:
        """Move all but the last steps to the host."""
        if len(self.recent) < 2 * CHUNK:
            return
        old, self.recent = self.recent[:CHUNK], self.recent[CHUNK:]
        # Read on the same stream, should it ever be read: nothing has to wait for the copy.
        columns = zip(*(step.soft for step in old), strict=True)
        self.chunks.append(Soft(*(torch.cat(c).to("cpu", non_blocking=True) for c in columns)))


class Group:
    """The rows of one configuration that stepped last, and their progress."""

    def __init__(self, row: Row, device: torch.device):
        self.config, self.device, self.wants_record = row.config, device, row.wants_record
        # as numbers they would be sent to the device at every step
        config = replace(row.config, banned=())
        self.rules = mk_rules(config, device, None, torch.tensor(row.eos, dtype=torch.long))
        self.mix = without(row.config.banned, mk_think(config), device)
        self.rows: list[Row] = []
        self.progress: Progress | None = None  # of the rows, in their order; None without any
        self.record: Record | None = None  # of their last step

    def seat(self, rows: list[Row]) -> None:
        """Make these the rows, in this order; who leaves is parked."""
        if len(rows) == len(self.rows) and all(a is b for a, b in zip(rows, self.rows)):
            return
        remain = {id(row) for row in rows}
        for place, row in enumerate(self.rows):
            if id(row) not in remain and row.alive:
                row.parked = self._select([place])
        places = {id(row): place for place, row in enumerate(self.rows)}
        newcomers = [row for row in rows if id(row) not in places]
        parts = [] if self.progress is None else [self.progress]
        for row in newcomers:
            places[id(row)] = len(places)
            parts.append(self._start(row) if row.parked is None else row.parked)
            row.parked = None
        self.progress = join(parts)
        order = [places[id(row)] for row in rows]
        if order != [*range(len(places))]:
            self.progress = self._select(order)
        self.rows = rows

    def unseat(self, row: Row) -> None:
        others = [place for place, other in enumerate(self.rows) if other is not row]
        if len(others) < len(self.rows):
            self.progress = self._select(others) if others else None
            self.rows = [self.rows[place] for place in others]

    def think(self, logits: Tensor, shared: torch.Generator) -> tuple[Tensor, Mixed]:
        """logits [G, V] float32, not written to -> the entropy, where anyone wants it, and what
        each row would do thinking."""
        c, rng = self.config, shared
        if c.mixer_draws or c.mixer not in BUILT_IN:
            # vLLM ends a request whose logits are not finite (softar.vllm.finite); until then its
            # draws, or a user's mixer, must not end the engine
            broken = ~logits.amax(-1, keepdim=True).isfinite()
            if logits.is_cuda or broken.any():  # to look would be to wait for a GPU
                logits = logits.masked_fill(broken, 0)
            if self.rows[0].draws is not None:
                rng = [row.draws.at(row.steps, THOUGHT) for row in self.rows]
        h = torch.zeros_like(logits[:, 0])
        if self.wants_record or (c.cold_stop_entropy, c.switch) != (None, None):
            h = entropy(logits, c.entropy_temperature)
        return h, self.mix(logits, rng)

    def choose(self, h: Tensor, thought: Mixed, sampled: Tensor) -> Record:
        """sampled [G]: the tokens of those who answer."""
        answer = Mixed(None, sampled, torch.full_like(h, torch.nan))
        before = self.progress
        self.progress, record = decide(self.rules, before, h, thought, answer)
        # what no token was left for reads no number in place of a single token, too
        weights = record.weights.masked_fill(record.entropy.isnan()[:, None], torch.nan)
        self.record = record._replace(weights=weights)
        for place, row in enumerate(self.rows):
            row.recent.append(Step(self.record, place, before))
            row.steps += 1
            row.store()
        return self.record

    def _start(self, row: Row) -> Progress:
        return begin(row.config, torch.tensor([row.prompt])).to(self.device)

    def _select(self, places: list[int]) -> Progress:
        return self.progress.select(torch.tensor(places).to(self.device, non_blocking=True))


class Turn(NamedTuple):
    """A group between its thought and vLLM's choice."""

    group: Group
    index: Tensor | None  # [G] their places in the batch; None: they are the batch, in its order
    h: Tensor
    thought: Mixed


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
        self.indices: dict[tuple, Tensor] = {}

    def add(
        self,
        name: str,
        config: SoftConfig,
        prompt: Sequence[int],
        seed: int | None,
        eos: Sequence[int],
        wants_record: bool,
    ) -> None:
        """Take up a request. config: resolved. eos: ids that end it."""
        lasts = None
        is_counted = config.think_start is None and config.switch_budget is None
        if config.budget is not None and is_counted and not wants_record:
            lasts = config.budget + len(config.think_end or [None])
        draws = None if seed is None else RowDraws(torch.Generator().manual_seed(seed))
        key = (repr(config), config.spelling, tuple(eos), seed is not None, wants_record)
        self.rows[name] = Row(config, key, prompt, draws, tuple(eos), wants_record, lasts)

    def drop(self, names: Sequence[str]) -> None:
        for name in names:
            row = self.rows.pop(name, None)
            if row is not None:
                row.alive = False
                if not any(row.key == other.key for other in self.rows.values()):
                    self.groups.pop(row.key, None)
        if not self.rows:
            self.indices.clear()

    def step(
        self,
        logits: Tensor,
        names: Sequence[str],
        ends: Sequence[int],
        skipped: Sequence[bool],
        sample: Callable[[], Any],
    ) -> Any:
        """A runner's step: thoughts, vLLM's choice, and what each request takes of the two.

        Args:
            logits, names, ends, skipped: as for `think`. sample: vLLM's own, gives its
                SamplerOutput.

        Returns:
            That output, with the tokens and records of those who think.
        """
        turns = self.think(logits, names, ends, skipped)
        out = sample()
        self.choose(turns, out.sampled_token_ids)
        for turn in turns:
            if turn.group.wants_record:
                out.logprobs_tensors = write(turn, out.logprobs_tensors, len(names))
        return out

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
        if key not in self.groups:
            self.groups[key] = Group(rows[0], self.device)
        group = self.groups[key]
        group.seat(list(rows))
        index = self._index(places, len(logits))
        logits = logits if index is None else logits[index]
        return Turn(group, index, *group.think(logits.float(), self.shared))

    def choose(self, turns: list[Turn], sampled: Tensor) -> None:
        """After it: sampled [R, 1] gets the tokens of those who think; those who answer keep
        vLLM's."""
        tokens = sampled[:, 0]
        for group, index, h, thought in turns:
            answers = (tokens if index is None else tokens[index]).long()
            record = group.choose(h, thought, answers)
            if index is None:
                tokens.copy_(record.token)
            else:
                tokens[index] = record.token.to(tokens.dtype)

    def feed(
        self, embeds: Tensor, names: Sequence[str], computed: Sequence[int], counts: Sequence[int]
    ) -> None:
        """Write what the requests read into the inputs of a forward.

        Args:
            embeds: [tokens, D], the requests one after the other. names: [R]. computed: [R]
                positions in their caches.
            counts: [R] positions that this forward computes.
        """
        latest: dict[tuple, list[tuple[int, int]]] = {}  # rows of a group's record, their places
        offset = 0  # of the request's first position in embeds
        for name, position, count in zip(names, computed, counts, strict=True):
            row = self.rows.get(name)
            if row is not None:
                # Of its steps, which begin behind the prompt, these are inputs here
                start = int(position) - len(row.prompt)
                first, last = max(start, 0), min(start + count, row.steps)
                place = offset + first - start
                if last - first == 1 and self._is_latest(row, first):
                    latest.setdefault(row.key, []).append((row.recent[-1].row, place))
                elif first < last:  # it was thrown out of the cache, and reads again what it read
                    soft = row.soft(first, last, self.device)
                    self._mix(soft, row.config, embeds[place : place + last - first])
            offset += count
        for key, pairs in latest.items():
            self._feed_latest(self.groups[key], *zip(*pairs), embeds)

    def _is_latest(self, row: Row, step: int) -> bool:
        """Does the group's last record hold this step?"""
        is_last = step == row.steps - 1
        return is_last and row.recent[-1].record is self.groups[row.key].record

    def _feed_latest(
        self, group: Group, rows: tuple[int, ...], places: tuple[int, ...], embeds: Tensor
    ) -> None:
        soft = Soft(group.record.ids, group.record.weights)
        index = self._index(rows, len(soft.ids))
        if index is not None:
            soft = Soft(soft.ids[index], soft.weights[index])
        first, n = places[0], len(places)
        if places == tuple(range(first, first + n)):
            self._mix(soft, group.config, embeds[first : first + n])
        else:
            mixed = embeds.new_empty(n, embeds.shape[1])
            self._mix(soft, group.config, mixed)
            embeds[self._index(places, None)] = mixed

    def _mix(self, soft: Soft, config: SoftConfig, out: Tensor) -> None:
        """Mixtures [n, K] into out [n, D], some at a time."""
        n = max(PIECE // soft.ids.shape[1], 1)
        for piece in zip(soft.ids.split(n), soft.weights.split(n), out.split(n), strict=True):
            ids, weights, rows = piece
            rows.copy_(soft_embed(Soft(ids, weights), self.embedding, rescale=config.rescale))

    def _rewind(self, row: Row, steps: int) -> None:
        """vLLM threw away the last tokens it sampled (a reset of the cache with asynchronous
        scheduling)."""
        gone = row.steps - steps
        undone = row.recent[-gone]
        self.groups[row.key].unseat(row)
        row.parked = undone.before.select(self._index((undone.row,), None))
        row.steps, row.recent = steps, row.recent[:-gone]

    def _index(self, places: tuple[int, ...], everything: int | None) -> Tensor | None:
        """On the device; the same ones come step after step. None for 0, 1, ..., everything - 1."""
        if everything is not None and places == tuple(range(everything)):
            return None
        if places not in self.indices:
            if len(self.indices) >= INDICES:
                self.indices.clear()
            pinned = self.device.type == "cuda"
            self.indices[places] = torch.tensor(places, pin_memory=pinned).to(
                self.device, non_blocking=True
            )
        return self.indices[places]


class Lookup(nn.Module):
    """The model's embedding, as `soft_embed` takes it."""

    def __init__(self, lookup: Callable[[Tensor], Tensor]):
        super().__init__()
        self.lookup = lookup

    def forward(self, ids: Tensor) -> Tensor:
        return self.lookup(ids.flatten()).unflatten(0, ids.shape)


def write(turn: Turn, out: Any, size: int) -> Any:
    """The record of a turn into vLLM's LogprobsTensors of a batch of `size` requests: each [R,
    width], the ranks [R]. Returns them.

    out: None where no other request asked for log-probabilities.
    """
    record = turn.group.record
    columns = record.ids.shape[1] + 2
    if out is None:
        from vllm.v1.outputs import LogprobsTensors

        logs, ranks = record.logp.new_zeros(size, columns), record.token.new_zeros(size)
        out = LogprobsTensors(logs.to(torch.int32), logs, ranks)
    more = columns - out.logprobs.shape[1]
    if more > 0:  # somebody asked for the log-probabilities of a few tokens only
        names = ("logprob_token_ids", "logprobs")
        out = out._replace(
            **{name: nn.functional.pad(getattr(out, name), (0, more)) for name in names}
        )
    ids, logs = log_columns(record, out.logprobs.shape[1])
    index = slice(None) if turn.index is None else turn.index
    out.logprob_token_ids[index] = ids.to(out.logprob_token_ids.dtype)
    out.logprobs[index] = logs
    out.selected_token_ranks[index] = record.kind.to(out.selected_token_ranks.dtype)
    return out
