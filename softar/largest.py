"""The largest logits of a vocabulary, by the maxima of its chunks.

On a CPU `argmax` and `topk` take ten times as long as a pass of `amax`; so a chunk is chosen by its
maximum, and what is looked for lies inside the chosen ones. Elsewhere, and where the vocabulary is
small, they are called as they are.

Shapes: ... any leading dims, V vocabulary, K asked for.
"""

import torch
from torch import Tensor

CHUNKS = (256, 128, 64)  # the widest that divides the vocabulary
LARGE = 4096  # a vocabulary where that is faster


def chunk_of(vocab_size: int) -> int | None:
    return next((size for size in CHUNKS if vocab_size % size == 0), None)


class Largest:
    """Of x, [..., V], never written to; without gradients."""

    def __init__(self, x: Tensor):
        self.x, self._id = x.detach(), None
        V, size = x.shape[-1], chunk_of(x.shape[-1])
        wins = size is not None and V >= LARGE and x.device.type == "cpu" and x.numel() > 0
        # [..., V / chunk, chunk], and the maxima of the chunks; None where that wins nothing
        self.chunks = self.x.unflatten(-1, (-1, size)) if wins else None
        self.peaks = self.chunks.amax(-1) if wins else None

    @property
    def id(self) -> Tensor:
        """[...] where it is; of equal ones the lowest, as `argmax` says."""
        if self._id is None:  # functools.cached_property holds a lock, which does not compile
            self._id = self._found()
        return self._id

    def _found(self) -> Tensor:
        if self.chunks is None:
            return self.x.argmax(-1)
        first = self.peaks.argmax(-1)
        slot = self._inside(first[..., None]).argmax(-1)
        return first * self.chunks.shape[-1] + slot

    def ids(self, k: int) -> Tensor:
        """[..., K] where the k largest are, the largest first; `id` leads."""
        if self.chunks is None or k * self.chunks.shape[-1] > self.x.shape[-1] // 4:
            ids = self.x.topk(k, -1).indices
        else:  # they lie in the k chunks of largest maximum
            size, chosen = self.chunks.shape[-1], self.peaks.topk(k, -1).indices
            slots = self._inside(chosen).topk(k, -1).indices
            ids = chosen.gather(-1, slots // size) * size + slots % size
        lead = self.id[..., None]  # equal ones come in any order
        return torch.cat([lead, ids[..., 1:].where(ids[..., 1:] != lead, ids[..., :1])], -1)

    def _inside(self, chosen: Tensor) -> Tensor:
        """[..., K] chunks -> [..., K * chunk] what they hold, one after the other."""
        at = chosen[..., None].expand(*chosen.shape, self.chunks.shape[-1])
        return self.chunks.gather(-2, at).flatten(-2)
