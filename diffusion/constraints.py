"""What may stand where: the token ids that a slot allows, and logits processors of transformers; and
what a model thinks of a few labels, without a decode.

Shapes: B rows, T positions, L columns of the canvas, V vocabulary, K labels; n slots, flat, row by
row.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from softar.guard import check_ids, check_unpadded
from softar.models import room_of
from softar.placement import evaluating

from .canvas import Canvas
from .inputs import check_width, real_of, warn_of_ends
from .knobs import is_pair
from .losses import forward_masked
from .net import Facts, check_has_mask, facts, parts


class Constraints:
    """Edits the logits of slots before anything is proposed, so that confidences are those of what
    is left."""

    def __init__(
        self,
        allowed: dict | None,
        processor: Callable[[Tensor, Tensor], Tensor] | None,
        canvas: Canvas,
        facts: Facts,
    ):
        """allowed: as DenoiseConfig has it. Raises ValueError for slots that are none and ids that
        cannot stand there."""
        self.processor, self.width = processor, canvas.width
        self.table: Tensor | None = None  # [sets, V] bool, true for what is forbidden
        if not allowed:
            return
        masked = canvas.masked[:, : canvas.width]
        self.number = torch.full_like(canvas.ids, -1)  # [B, L] of each slot's set
        self.table = torch.ones(len(allowed), facts.vocab_size, dtype=torch.bool)
        out = {facts.mask_id} if facts.uniform is None else {*facts.uniform.left_out}
        # those of a single row come last, so that they count
        for number, (key, ids) in enumerate(sorted(allowed.items(), key=lambda it: is_pair(it[0]))):
            rows, col = _place(key, masked)
            if wrong := sorted({i for i in ids if not 0 <= i < facts.vocab_size or i in out}):
                raise ValueError(
                    f"allowed[{key}] holds {wrong}: give ids below {facts.vocab_size}, the vocabulary, that the "
                    f"model may propose"
                )
            self.table[number, list(ids)] = False
            self.number[rows, col] = number
        self.table = self.table.to(canvas.ids.device)

    def __call__(self, logits: Tensor, canvas: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
        """logits [n, V] of the slots (rows, cols) of a canvas [B, L] -> the same, edited."""
        if self.processor is not None:
            # what a row has behind the answer depends on the other rows
            edited = self.processor(canvas[rows, : self.width], logits)
            if not torch.is_tensor(edited) or edited.shape != logits.shape:
                raise ValueError(
                    f"logits_processor={self.processor!r:.80} must return scores [n, V] like those it gets"
                )
            logits = edited.float()
        if self.table is None:
            return logits
        number = self.number[rows, cols]
        forbidden = self.table[number.clamp_min(0)] & (number >= 0)[:, None]
        return logits.masked_fill(forbidden, torch.finfo(logits.dtype).min)


def _place(key, masked: Tensor) -> tuple[Tensor, int]:
    """The rows and the column of a slot, which has a mask there. masked: [B, L] bool."""
    B, L = masked.shape
    row, col = key if is_pair(key) else (None, key)
    if not -L <= col < L or not (row is None or -B <= row < B):
        raise ValueError(
            f"allowed names the slot {key}, and the canvas is of {B} rows and {L} columns"
        )
    rows = masked[:, col].nonzero()[:, 0]
    if row is not None:
        rows = rows[rows == row % B]
    if not len(rows):
        raise ValueError(f"allowed names the slot {key}, where there is no mask to fill")
    return rows, col % L


@torch.no_grad()
def label_probs(
    model: nn.Module, input_ids: Tensor, labels: Sequence[int], attention_mask: Tensor | None = None
) -> Tensor:
    """How likely each of a few tokens is at each mask, among themselves: one forward, and nothing is
    committed. A classifier by a template, as "The film was [MASK]."

    Args:
        input_ids: [B, T] with masks; attention_mask: [B, T], None means no padding, which is looked
            for as `denoise` does.
        labels: K token ids.

    Returns:
        [n, K] float32 of the n masks, row by row; each sums to 1.

    Raises:
        ValueError: for a row without a mask, ids outside of the vocabulary, padding that the model
            reads, and a uniform-state model, which has no masks.
    """
    known, net = check_has_mask(facts(model), "label_probs"), parts(model)
    check_ids("input_ids", input_ids, 2, known.vocab_size, "label_probs")
    check_width(input_ids, room_of(model, trained=True))
    chosen = torch.as_tensor(list(labels), device=input_ids.device)
    check_ids("labels", chosen, 1, known.vocab_size)
    if known.uniform is not None:
        raise ValueError("the model's diffusion_process is uniform: it has no masks to look at")
    real = real_of(model, known, input_ids, attention_mask)
    masked = input_ids == known.mask_id
    if bare := (~masked.any(1)).nonzero()[:, 0].tolist():
        raise ValueError(
            f"rows {bare} hold no mask (id {known.mask_id}): put it where the label belongs"
        )
    if attention_mask is None:
        check_unpadded(model, input_ids)
    warn_of_ends(model, known, input_ids, real)
    with evaluating(model):
        embeds = net.embedding(input_ids)
        _, logits = forward_masked(net, known, embeds, attention_mask, masked, input_ids)
    return logits[:, chosen].float().softmax(-1)
