"""The loss of soft SFT.

Shapes: B batch, T positions, M traces per row, V vocabulary, N target tokens of a batch.
"""

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..soft import Soft, entropy

PIECE = (
    2**25
)  # numbers in float32 at once: 128 MiB; more are computed in pieces, and again backwards


def soft_loss(
    logits: Tensor,
    labels: Tensor,
    thought: Tensor,
    *,
    thought_weight: float = 1.0,
    soft_labels: Soft | None = None,
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of the raw logits, summed over the target tokens; and the entropies of the
    thought's steps.

    Raw: the filters and the temperature that shape the inputs have no part in the likelihood.

    Args:
        logits: [B, T, V], or of the last positions alone; labels: [B, T], -100 off the targets;
            thought: [B, T] bool.
        thought_weight: weight of the thought's tokens, the others have 1.
        soft_labels: ids and weights [B, T, M]: the target at each position is this distribution
            instead of the label.

    Returns:
        loss [] float32, a sum; entropies [n] float32 nats of the n steps that predict a thought
            token.
    """
    first, vocab = labels.shape[1] - logits.shape[1], logits.shape[-1]
    labels, thought = labels[:, first:], thought[:, first:]
    target = labels[:, 1:] != -100
    is_thought = thought[:, 1:][target]
    if soft_labels is None:
        ids = labels[:, 1:][target][:, None]
        weights = torch.ones_like(ids, dtype=torch.float32)
    else:
        ids, weights = (x[:, first + 1 :][target] for x in soft_labels)
    scale = torch.where(is_thought, thought_weight, 1.0)
    rows = (logits[:, :-1][target], ids, weights, scale, is_thought)  # [N, ...]
    pieces = [*zip(*(x.split(max(1, PIECE // vocab)) for x in rows), strict=True)]
    if len(pieces) == 1:
        return _piece(*pieces[0])
    how = dict(use_reentrant=False, preserve_rng_state=False)
    losses, entropies = zip(*(checkpoint(_piece, *piece, **how) for piece in pieces), strict=True)
    return torch.stack(losses).sum(), torch.cat(entropies)


def _piece(
    logits: Tensor, ids: Tensor, weights: Tensor, scale: Tensor, is_thought: Tensor
) -> tuple[Tensor, Tensor]:
    """Of n target tokens: logits [n, V]; ids and weights [n, M], what they should be; scale [n]."""
    logits = logits.float()
    ce = -(weights * logits.log_softmax(-1).gather(-1, ids)).sum(-1)
    return (scale * ce).sum(), entropy(logits[is_thought])
