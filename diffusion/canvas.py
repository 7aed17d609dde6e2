"""The sequences that are being decoded, and what is known of each of their positions.

Shapes: B rows, L columns of the canvas; n positions, flat, row by row.
"""

import torch
from torch import Tensor

from .schedules import Block


class Canvas:
    """Prompts [B, P] with `gen_length` masks behind them; behind those, where a process needs them,
    columns that no result shows, up to `length`: masks before column `stop` [B], `filler` after."""

    def __init__(
        self,
        input_ids: Tensor,
        gen_length: int,
        mask_id: int,
        *,
        length: int | None = None,
        stop: Tensor | None = None,
        filler: int = 0,
    ):
        self.mask_id, self.prompt_length = mask_id, input_ids.shape[1]
        self.width = self.prompt_length + gen_length  # columns of the result
        length = self.width if length is None else length
        tail = input_ids.new_full((len(input_ids), length - self.prompt_length), mask_id)
        # [B, L]; never written to, so that it can be handed out
        self.ids = torch.cat([input_ids, tail], 1).long()
        if stop is not None:
            column = torch.arange(length, device=self.ids.device)
            self.ids = self.ids.masked_fill(column >= stop[:, None], filler)
        self.masked = self.ids == mask_id  # of a uniform-state model: what was a mask at the start
        self.fixed = ~self.masked  # what the caller gave
        self.at_start = self.masked.sum(-1)
        self.committed_at = torch.full_like(self.ids, -1)
        self.confidence = torch.full(self.ids.shape, torch.nan, device=self.ids.device)
        self.decoded = torch.zeros_like(self.masked)  # in the current block
        # [B] int64, positions of which the last forward said nothing. A step only sets it and the
        # next `has_masks` raises it, so that one wait for the device answers both questions.
        self.bad = torch.zeros_like(self.at_start)
        # rows that the last `has_masks` found with masks in its block, or busy; and anywhere
        self.live = self.alive = [*range(len(self.ids))]

    def block(self, start: int, end: int, steps: Tensor) -> Block:
        inside = self.columns(start, end)[None]
        return Block(start, end, (self.masked & inside).sum(-1), steps, inside)

    def block_of(self, inside: Tensor, steps: Tensor) -> Block:
        """A block of other columns in each row, [B, L] bool."""
        columns = inside.any(0).nonzero()[:, 0].tolist()
        count = (self.masked & inside).sum(-1)
        return Block(columns[0], columns[-1] + 1, count, steps, inside)

    def has_masks(self, block: Block, forwards: int, busy: Tensor | None = None) -> bool:
        """Has the block masks? The one synchronisation of a step, which also notes the rows that
        have some, or are busy [B] bool. Raises FloatingPointError where the last of so many forwards
        gave NaN, or -inf for all tokens."""
        inside = (self.masked & block.inside).any(-1)
        of_rows = (inside, inside if busy is None else busy, self.masked.any(-1), self.bad > 0)
        left, live, alive, bad = torch.stack(of_rows).tolist()
        self.live, self.alive = ([r for r, has in enumerate(x) if has] for x in (live, alive))
        if any(bad):
            rows = [row for row, is_bad in enumerate(bad) if is_bad]
            raise FloatingPointError(
                f"the logits of forward {forwards - 1} are NaN, or -inf for every token, in rows {rows}: check the "
                f"weights and the dtype, try float32"
            )
        return any(left)

    def watch(self, certain: Tensor, rows: Tensor) -> None:
        """Note positions [n] in rows [n] that are certain to a NaN degree."""
        self.bad = torch.zeros_like(self.bad).index_add(0, rows, certain.isnan().long())

    def columns(self, lo: int, hi: int) -> Tensor:
        """[L] bool, true in [lo, hi)."""
        index = torch.arange(self.ids.shape[1], device=self.ids.device)
        return (index >= lo) & (index < hi)

    def spread(self, values: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
        """[n] -> [B, L], -inf elsewhere."""
        return torch.full_like(self.confidence, -torch.inf).index_put((rows, cols), values)

    def put(self, where: Tensor, tokens: Tensor, certain: Tensor, forward: int) -> None:
        """Write tokens [B, L] that were this certain [B, L] `where` [B, L] bool, and note the
        forward that decided them."""
        self.ids = torch.where(where, tokens, self.ids)
        self.confidence = torch.where(where, certain, self.confidence)
        self.committed_at = self.committed_at.masked_fill(where, forward)

    def fill(self, where: Tensor, token: int) -> None:
        """Write a token `where` [B, L] bool that no forward decided."""
        self.ids = self.ids.masked_fill(where, token)
        self.confidence = self.confidence.masked_fill(where, torch.nan)
        self.committed_at = self.committed_at.masked_fill(where, -1)

    def commit(
        self,
        block: Block,
        commit: Tensor,
        drop: Tensor | None,
        tokens: Tensor,
        certain: Tensor,
        forward: int,
    ) -> None:
        """As `put` where `commit` says so, and mask the positions `drop` [B, L] again."""
        self.put(commit, tokens, certain, forward)
        if drop is not None:
            self.ids = self.ids.masked_fill(drop, self.mask_id)
        self.masked = self.ids == self.mask_id
        self.decoded = (self.decoded | commit) & ~self.masked & block.inside

    def share_left(self, *, of_batch: bool) -> Tensor:
        """[B] masks left, as a share of those at the start."""
        if of_batch:
            return (self.masked.sum() / self.at_start.sum()).expand(len(self.ids))
        return self.masked.sum(-1) / self.at_start.clamp_min(1)

    def ended(self, end_ids: tuple[int, ...]) -> Tensor:
        """[B] bool, the rows that have generated an end token."""
        return (torch.isin(self.ids, self.ids.new_tensor(end_ids)) & ~self.fixed).any(-1)

    def end(self, rows: Tensor, end_ids: tuple[int, ...]) -> None:
        """Write the first of the end tokens over whatever stands after a generated one, in the `rows`
        [B] bool."""
        is_end = torch.isin(self.ids, self.ids.new_tensor(end_ids))
        is_end[:, : self.prompt_length] = False
        after = (is_end.cumsum(-1) > is_end.long()) & rows[:, None]
        self.ids = self.ids.masked_fill(after, end_ids[0])
        self.masked = self.masked & ~after

    def stop(self, end: int, end_ids: tuple[int, ...]) -> None:
        """Fill the rows that have generated an end token before column `end` with the first of
        those tokens."""
        ids, generated = self.ids[:, :end], ~self.fixed[:, :end]
        ended = torch.isin(ids, ids.new_tensor(end_ids)) & generated
        rest = self.masked & ended.any(-1, keepdim=True)
        self.ids = self.ids.masked_fill(rest, end_ids[0])
        self.masked = self.masked & ~rest
