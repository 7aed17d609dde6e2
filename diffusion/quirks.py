"""What a public sampler does otherwise than the loop: the places where it can be told so. Which
implementation does what stands in `parity`."""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from .schedules import Rule, Schedule

# (config, masks [B, L], column of each row's first token [B]) -> columns [B, L] and steps [B] of
# each block
Grid = Callable[..., list[tuple[Tensor, Tensor]]]


class Quirks(NamedTuple):
    """What an implementation does otherwise. The defaults are what most of them do."""

    rule: Callable[..., Rule] | Schedule | None = None  # a schedule, instead of the named one
    lenient: bool = True  # options that say nothing to it are let pass
    # blocks of the generated part, with the same steps each, whatever is masked in them
    even_blocks: bool = True
    one_block: bool = False  # the whole canvas is one block
    grid: Grid | None = None  # blocks of its own, of which the last may be shorter
    # masks that may commit: of the "block", all "before" its end, or of the whole "canvas"
    competes: str = "block"
    spills: bool = False  # positions outside of the block commit, too
    proposes_mask: bool = True  # the mask token may win, and the position stays masked
    batch_share: bool = True  # the share of masks left is that of the batch
    looks_back: bool = False  # with shifted logits, a cached window begins one position early
    filtered_score: bool = False  # scores are of the tempered and filtered distribution
    top_p_first: bool = False  # the nucleus is cut before top-k
    # where noise is drawn for: the "slots" asked about, the whole "canvas", or the "block", as
    # torch.multinomial does over its rows
    noise: str = "slots"
    # ends_last drops the end tokens from the softmax instead of the order; where tokens are drawn
    # only those from this one on
    renormalised_ends: int | None = None
    waits: bool = False  # a row with nothing to commit stays as it is while others go on
    # what a block has decoded softly is read so once more, by the first forward of the next
    stays_soft: bool = False
    # of block-causal models
    blocks: bool = False  # it decodes them, in blocks of the length that is asked for
    # (real [B, P], gen_length, block length) -> a grid.Grid of its own
    mk_grid: Callable | None = None
    grid_from: str = "start"  # where their blocks begin, as DenoiseConfig.grid
    short_last: bool = False  # the last block ends where the answer does
    stores_last: bool = False  # the last block is stored, too
    # the end-of-text token, which also pads, is read as padding where an earlier block holds it
    ends_are_gaps: bool = False
    # with shifted logits, the forward that stores a block decides the first token of the next
    first_from_store: bool = False
    # a cached window is the whole block as long as the first position of the sub-block is a mask;
    # else only in a sub-block's first forward
    whole_for_first: bool = False
    # every block is stored by a forward of its own, though nothing was decoded in it
    stores_each: bool = False
    # it stays in a block until no mask is left, be it for ever; here the run ends then
    is_patient: bool = False
    # (grid, P) -> [B, P] bool, tokens of the prompts that it overwrites
    loses: Callable | None = None
    # a block's first forward also stores the one before it, and that of the prompt is made for a
    # prompt without a whole block, too
    joins: bool = False
    # who ends at an end token after a block: its "rows", or all where "any" row or where "all" have
    # one; "never"; "filled": rows in which a step of the block has put it, not its first token
    stop: str = "rows"
    # with early_stop, a row also ends inside a block: "gapless" where no mask is left before the
    # token, all rows' "block" where one has it; without as well: in the "answer", gapless
    stops_inside: str | None = None


# the intended thing, and no substitution
DEFAULT = Quirks(
    lenient=False,
    even_blocks=False,
    proposes_mask=False,
    batch_share=False,
    looks_back=True,
    waits=True,
    first_from_store=True,
)
