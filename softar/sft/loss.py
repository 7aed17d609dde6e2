"""The loss of soft SFT.

Shapes: B batch, T positions, M traces per row, V vocabulary, N target tokens of a batch.
"""

import torch
from torch import Tensor

from ..soft import Soft, entropy


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
    first = labels.shape[1] - logits.shape[1]
    labels, thought = labels[:, first:], thought[:, first:]
    target = labels[:, 1:] != -100
    chosen = logits[:, :-1][target].float()  # [N, V]
    is_thought = thought[:, 1:][target]
    logp = chosen.log_softmax(-1)
    if soft_labels is None:
        ce = -logp.gather(-1, labels[:, 1:][target][:, None])[:, 0]
    else:
        ids, weights = (x[:, first + 1 :][target] for x in soft_labels)
        ce = -(weights * logp.gather(-1, ids)).sum(-1)
    ce = torch.where(is_thought, thought_weight * ce, ce)
    return ce.sum(), entropy(chosen[is_thought])
