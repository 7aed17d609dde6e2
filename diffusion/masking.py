"""Which tokens of a batch training masks: how much of each document or block, and which of it.

What has a noise level of its own is a unit: a document, or a block of one (BD3LM,
arXiv:2503.09573, section 5; Fast-dLLM v2, arXiv:2509.26328).

Shapes: B rows, T positions, of which units have the numbers 0, 1, ... in each row.
"""

import torch
from torch import Tensor

from .doubled import positions_of


def units_of(documents: Tensor, block_length: int | None) -> Tensor:
    """The number of each token's unit in its row: [B, T] int64 from 0 on.

    documents: [B, T], as `doubled` has them; block_length: of blocks with levels of their own, None
    where a document has one level.
    """
    if block_length is None:
        return documents.clamp_min(0)
    begins = (positions_of(documents) % block_length == 0) & (documents >= 0)
    return (begins.cumsum(1) - 1).clamp_min(0)


def even_levels(
    common: float, places: list[int], of: int, units: Tensor, maskable: Tensor
) -> Tensor:
    """Levels [B, T] of units, by their numbers, in [0, 1): those of a row's units that hold maskable
    tokens lie evenly, and so do those of rows with equally many; each of them is uniform if `common`
    is: the antithetic draws of MDLM (arXiv:2406.07524, section 3.5).

    places: of the rows in the step's global batch of so many; units: [B, T]; maskable: [B, T] bool.
    """
    # a prompt's blocks are never masked: counted, they would push the answer's together
    trained = counts_by_unit(maskable, units) > 0
    counts = trained.sum(1, keepdim=True).clamp_min(1)  # [B, 1]
    number = (trained.cumsum(1) - 1).clamp_min(0)
    row = torch.tensor(places, device=units.device)[:, None] / of
    return (common + (row + number) / counts) % 1


def mask_at_rate(maskable: Tensor, rate: Tensor, uniform: Tensor, units: Tensor) -> Tensor:
    """Each token is masked with its own probability (LLaDA, arXiv:2502.09992, section 2.1); a unit
    may stay whole.

    maskable: [B, T] bool, never the prompt; rate: [B, T]; uniform: [B, T] in [0, 1); units: [B, T],
    which say nothing here -> [B, T] bool.
    """
    return (uniform < rate) & maskable


def mask_share(maskable: Tensor, rate: Tensor, uniform: Tensor, units: Tensor) -> Tensor:
    """A share of each unit's tokens, rounded down but at least one, without replacement: how
    BERT-like models are fine-tuned at variable rates. Shapes as in `mask_at_rate`."""
    count = (counts_of(maskable, units) * rate).long().clamp_min(1)
    return (_rank(maskable, uniform, units) < count) & maskable


def at_least_one(masked: Tensor, maskable: Tensor, uniform: Tensor, documents: Tensor) -> Tensor:
    """With one mask more in the documents that stayed whole, where their number is lowest. Only for
    a loss that weighs all masks the same: 1 / rate says nothing about a mask that was not drawn."""
    units = documents.clamp_min(0)
    first = (_rank(maskable, uniform, units) == 0) & maskable
    return masked | (first & (counts_of(masked, units) == 0))


def counts_of(marked: Tensor, units: Tensor) -> Tensor:
    """How many positions of a unit are marked [B, T] bool, at each of its positions: [B, T]."""
    return counts_by_unit(marked, units).gather(1, units)


def counts_by_unit(marked: Tensor, units: Tensor) -> Tensor:
    """The same at each unit's number: [B, T], 0 behind the last."""
    return torch.zeros_like(units).scatter_add(1, units, marked.long())


def _rank(maskable: Tensor, uniform: Tensor, units: Tensor) -> Tensor:
    """The place of each maskable token among those of its unit, by its number: [B, T] from 0 on."""
    key = (units + uniform.double()).masked_fill(~maskable, torch.inf)
    counts = counts_by_unit(maskable, units)
    return key.argsort(1).argsort(1) - (counts.cumsum(1) - counts).gather(1, units)


NOISES = {"rate": mask_at_rate, "share": mask_share}
