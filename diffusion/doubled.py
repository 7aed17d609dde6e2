"""The doubled row that block-causal models are trained on: a noisy copy, of which each block is
predicted, and a clean one, of which it sees the blocks before (BD3LM, arXiv:2503.09573; SDAR, Fast-dLLM
v2 and LLaDA2 have the same). One forward then says about all blocks of a row what decoding says about
each: the block with its masks, behind what stands before it.

Shapes: B rows, T positions, D width; n positions, flat, row by row.
"""

import torch
from torch import Tensor

from .net import Facts, Parts


def documents_of(attention_mask: Tensor) -> Tensor:
    """[B, T], 0 at padding and else the number of a token's document from 1 on (or True, where a row
    is one) -> [B, T] int64, from 0 on; -1 at padding."""
    return attention_mask.long() - 1


def positions_of(documents: Tensor) -> Tensor:
    """[B, T] int64, which begin anew with each document."""
    column = torch.arange(documents.shape[1], device=documents.device).expand_as(documents)
    begins = torch.ones_like(documents, dtype=torch.bool)
    begins[:, 1:] = documents[:, 1:] != documents[:, :-1]
    return column - torch.where(begins, column, 0).cummax(1).values


def apart(documents: Tensor) -> Tensor:
    """The mask [B, 1, T, T] bool under which each document sees itself alone, as `doubled` takes
    them; padding sees itself."""
    same = _same(documents)
    same.diagonal(dim1=1, dim2=2).fill_(True)
    return same[:, None]


def _same(documents: Tensor) -> Tensor:
    """[B, T, T] bool: of one document, and no padding."""
    same = documents[:, :, None] == documents[:, None, :]
    return same & (documents >= 0)[:, :, None]


def doubled(documents: Tensor, block_length: int) -> tuple[Tensor, Tensor]:
    """Where the tokens of a doubled row stand, and what sees what.

    documents: [B, T] int64, the number of each token's document, -1 at padding. Documents lie one
    behind the other in a row; each has positions and blocks of its own, and sees itself alone.

    Returns:
        positions [B, 2 T] int64, twice the same, and the mask [B, 1, 2 T, 2 T] bool, for SDPA: the
        noisy copy first, which sees its own block, and the clean blocks before it; clean tokens see
        their own block and those before. Padding sees itself.

    Of memory the mask takes 4 T^2 bytes a row. SDPA on a CPU adds one in the dtype of the queries,
    16 T^2 bytes a row in float32 whatever the number of heads; an attention that forms all scores
    takes that for each head, several times. FlexAttention would need no mask, but has no backward
    on a CPU (torch 2.13).
    """
    (B, T), position = documents.shape, positions_of(documents)
    block, same = position // block_length, _same(documents)
    own = block[:, :, None] == block[:, None, :]
    before = block[:, None, :] < block[:, :, None]
    sees = torch.zeros(B, 2 * T, 2 * T, dtype=torch.bool, device=documents.device)
    sees[:, :T, :T] = own.logical_and_(same)
    sees[:, :T, T:] = before.logical_and_(same)
    sees[:, T:, T:] = own.logical_or_(before)
    sees.diagonal(dim1=1, dim2=2).fill_(True)
    return position.repeat(1, 2), sees[:, None]


def forward_doubled(
    net: Parts, facts: Facts, noisy: Tensor, clean: Tensor, documents: Tensor, asked: Tensor
) -> tuple[Tensor, Tensor]:
    """Logits about the positions `asked` of the noisy copy: embeddings noisy, clean [B, T, D],
    documents [B, T] as in `doubled`, asked [B, T] bool -> their rows [n], logits [n, V].

    With shifted logits what is said about the first token of a block comes from the clean copy, whose
    output before it is that of decoding's store forward; a document's first token has its own.
    Columns that no block with an asked position sees are left out: the noisy copy begins where the
    first such block of any row does, and the clean one ends where the last one begins.
    """
    positions, sees = doubled(documents, facts.block_length)
    rows, cols = asked.nonzero(as_tuple=True)
    position, T = positions[rows, cols], asked.shape[1]
    lo, hi = 0, T
    if len(cols):
        begins = cols - position % facts.block_length
        lo, hi = int(begins.min()), int(begins.max())
    seen = slice(lo, T + hi)
    embeds = torch.cat([noisy[:, lo:], clean[:, :hi]], 1)
    hidden = net.body(embeds, sees[:, :, seen, seen], positions[:, seen])
    source = torch.where(position < facts.shift, cols, cols - facts.shift)
    crosses = (position % facts.block_length < facts.shift) & (position >= facts.shift)
    return rows, net.head(hidden[rows, source + T * crosses - lo])
