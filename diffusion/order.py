"""The probability of the order in which slots were drawn, where a decode draws these too (alg_temp).

A forward draws without replacement from softmax(score / alg_temp) over its open slots, so what it
drew has the probability of Plackett and Luce: of each slot among those that were left. DCoLT
(arXiv:2505.10446) learns a module's score so; here the score is the belief's own.

Shapes: m open slots, flat, L columns of the canvas; n of them committed.
"""

import torch
from torch import Tensor

from .config import DenoiseConfig
from .record import Trajectory
from .select import Belief, mk_selector


def open_slots(steps: Trajectory, rows: Tensor, at: Tensor) -> Tensor:
    """[p, L] bool of the forwards `at` [p] of the rows [p]: what they drew from, none where they drew
    nothing."""
    opened, until, at = steps.opened_at[rows], steps.committed_at[rows], at[:, None]
    draws = ((until == at) & (steps.drawn_as[rows] >= 0)).any(-1, keepdim=True)
    left = (at <= until) | (until < 0)  # a row may be over before its last slots are
    return draws & (opened >= 0) & (opened <= at) & left


def choices(
    config: DenoiseConfig, steps: Trajectory, logits: Tensor, place: tuple, here: Tensor
) -> Tensor:
    """[n, L] log-probabilities of each column to be drawn when the slots `here` [m] bool were; of a
    slot that nobody drew, as nothing else was left, 0 for its own.

    logits: [m, V] float32 or float64, without a temperature; place: of each slot its forward (any
    number), row and column [m]. The decode has refused selectors that draw.
    """
    forward, rows, cols = place
    score = mk_selector(config.select)(Belief(logits), steps.after[rows, cols], None)
    score = score if score.dtype == torch.float64 else score.float()
    which = forward.unique(return_inverse=True)[1]
    L = steps.after.shape[1]
    shape, least = (int(which.max()) + 1 if len(which) else 0, L), torch.finfo(score.dtype).min
    scores = score.new_full(shape, least).index_put((which, cols), score / config.alg_temp)
    drawn = torch.where(here, steps.drawn_as[rows, cols], L)
    number = drawn.new_full(shape, -1).index_put((which, cols), drawn)[which[here]]  # [n, L]
    mine, own = drawn[here, None], torch.arange(L, device=cols.device) == cols[here, None]
    left = own | ((number >= mine) & (mine >= 0))
    return scores[which[here]].masked_fill(~left, least).log_softmax(-1)
