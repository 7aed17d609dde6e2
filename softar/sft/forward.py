"""Soft teacher forcing: the forward pass in which a model reads its own mixtures.

Shapes: B batch, T positions, V vocabulary, K tokens kept, D embedding width.
"""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from ..checks import check_choice, check_least
from ..guard import check_ids, check_unpadded
from ..models.kind import plain, recomputes
from ..models.reading import IN_PLACE, cache_name, counts_anew, reads_moved_rows, reads_on
from ..models.room import room_of
from ..soft import Soft, soft_inputs, token_inputs

# (logits [..., V], gold [...]), and maybe hidden= [..., D] -> the mixture that is read next
Feed = Callable[..., Soft]
# logits [..., V] and the last hidden states [..., D] that made them, None where nobody asks for them
Seen = tuple[Tensor, Tensor | None]


# Wide because it is one pass in two modes: six say what is read, each mode has knobs of its own.
def soft_forward(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    soft_mask: Tensor,
    feed: Feed | None,
    *,
    mode: str = "parallel",
    passes: int | None = None,
    grad_passes: int | None = None,
    window: int | None = None,
    last: int | None = None,
    hidden: bool = False,
    position_ids: Tensor | None = None,
) -> Tensor:
    """Soft teacher forcing: logits of a forward pass in which marked positions read the model's own
    mixtures.

    Position t with soft_mask[t] reads feed(logits[t - 1], input_ids[t]) instead of its token.
    "sequential" computes this exactly, one cached step per marked column, with gradient through
    time. "parallel" starts from the gold tokens and refreshes all marked positions at once,
    `passes` times (Jacobi iteration; parallel scheduled sampling, arXiv:1906.04331): after r
    refreshes the first r marked positions of a row are exact, so passes = span length equals
    sequential. Where that saves a fifth of the positions, and the model's cache holds nothing but
    keys and values, a refresh computes the marked columns alone and what is before them is read once.

    Rows whose marks begin in other columns are moved, so that there are as many marked columns as
    the longest span has, unless the batch becomes more than a quarter wider or, in parallel, that
    saves less than a fifth.

    Args:
        input_ids: [B, T], gold tokens. attention_mask: [B, T], None means no padding, and what looks
            like it is an error. soft_mask: [B, T] bool, False in column 0.
        feed: logits [..., V] and gold ids [...] to the mixture read next; differentiable where
            gradients shall flow. None: the last hidden state is read (Coconut, arXiv:2412.06769).
        passes: refreshes, each one forward, before the last forward. None, and at most: the longest
            span of the batch (of all processes' batches, under FSDP2 and ZeRO-3).
        grad_passes: how many of the passes + 1 forwards, counted from the last, carry gradient.
            None: all. 1 treats the soft inputs as constants. Earlier ones run without a graph.
        window: sequential only: cut the gradient through time every `window` marked columns
            (truncated BPTT).
        last: only the logits of so many last positions, the one before the first marked column
            among them; the model takes `logits_to_keep`. None: of all.
        hidden: feed also gets hidden=, [..., D] the last hidden states, which made those logits.
        position_ids: [B, T] of packed rows, parallel only: a 0 begins an example (each token of the
            padding is one), which sees no other where softar.models.check_keeps_apart passes the
            model. The mask is not read, and each pass computes whole rows, as prompts stand between
            thoughts.

    Returns:
        [B, T, V] logits in the model's dtype, or [B, last, V].

    Raises:
        ValueError: an unknown mode, a count out of its range, ids outside the vocabulary, masks of
            another shape, a row's or example's first token marked, logits left out that a mixture is
            made of, ids that look padded without a mask, or sequential with packed rows, under
            gradient checkpointing (transformers then drops the cache), or of a model with a state
            (Mamba, Jamba, LFM2, ...).
    """
    check_choice("mode", mode, MODES)
    counts = dict(passes=passes, grad_passes=grad_passes, window=window, last=last)
    check_least(counts, passes=0, grad_passes=1, window=1, last=1)
    if mode == "sequential" and position_ids is not None:
        raise ValueError(
            "mode='sequential' goes by columns, and packed rows by examples: use 'parallel'"
        )
    if mode == "sequential":
        check_sequential(model)
    _check_fits(model, input_ids, attention_mask, soft_mask)
    begins = position_ids == 0 if position_ids is not None else torch.zeros_like(soft_mask)
    begins[:, 0] = True
    if (soft_mask & begins).any():
        where = "column 0" if position_ids is None else "a token at position 0"
        raise ValueError(f"soft_mask marks {where}: the first token has no belief before it")
    if attention_mask is None and position_ids is None:
        check_unpadded(model, input_ids)
    T = input_ids.shape[1]
    first = 0 if last is None else max(0, T - last)
    if soft_mask[:, : first + 1].any():
        raise ValueError(
            f"last={last} of {T} positions: the mixtures are made of logits before those, take more"
        )
    if position_ids is None and counts_anew(model):  # told by the mask where its positions are
        attention_mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    elif position_ids is not None or (attention_mask is not None and attention_mask.all()):
        attention_mask = None  # lets attention take its fast path, or tell examples by positions
    example = begins.flatten().cumsum(0)[soft_mask.flatten()]  # the number of each marked token's
    longest = most_of_all(int(example.bincount(minlength=1).max()), model)
    passes = longest if passes is None else min(passes, longest)  # more would change nothing
    batch, shift, once = (input_ids, attention_mask, soft_mask), None, False
    if mode == "sequential":
        batch, shift = _aligned(model, *batch) or (batch, None)
    elif position_ids is None and not has_split_weights(model):  # which run as many forwards each
        batch, shift, once = _cheapest(model, *batch, passes)
    advance = _mk_advance(model, batch[1], position_ids, hidden or feed is None, first)
    if mode == "sequential":
        parts = _sequential(model, batch, feed, advance, window)
    else:
        parts = _parallel(model, batch, feed, advance, passes, grad_passes, first, once)
    return torch.cat(parts, 1) if shift is None else _moved_back(parts, shift, T - first)


def _check_fits(model, input_ids: Tensor, attention_mask: Tensor | None, soft_mask: Tensor) -> None:
    """Raise ValueError for ids outside the vocabulary, or masks of another shape."""
    vocab_size = plain(model).config.get_text_config(decoder=True).vocab_size
    check_ids("input_ids", input_ids, 2, vocab_size, "soft_forward")
    for name, mask in (("attention_mask", attention_mask), ("soft_mask", soft_mask)):
        if mask is not None and mask.shape != input_ids.shape:
            raise ValueError(
                f"{name} of shape {tuple(mask.shape)} does not fit input_ids of {tuple(input_ids.shape)}"
            )


def check_sequential(model: nn.Module) -> None:
    """Raise ValueError for a model, plain or wrapped by PEFT, that mode="sequential" would read wrongly,
    or not at all."""
    if not reads_on(model):
        raise ValueError(
            f"mode='sequential' reads thoughts behind a cache of keys and values, which {type(plain(model)).__name__} "
            "does not go on from by itself: use 'parallel', which reads whole rows"
        )


def has_split_weights(model: nn.Module) -> bool:
    """Are its weights split over processes, by FSDP2 or ZeRO-3?"""
    return isinstance(model, FSDPModule) or hasattr(next(model.parameters()), "ds_id")


def most_of_all(n: int, model: nn.Module) -> int:
    """n, or of a split model the largest n of all processes: each forward waits for the others', so
    that all have to run as many."""
    if not has_split_weights(model):
        return n
    most = torch.tensor(n, device=next(model.parameters()).device)
    torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX)
    return int(most)


def from_position(first: int, length: int) -> dict[str, int]:
    """How a model of transformers is asked for the logits of positions `first` to `length` alone."""
    return {"logits_to_keep": length - first} if first else {}


def _parallel(model, batch, feed, advance, passes, grad_passes, start, once):
    """Logits from `start` on, in one or two parts; once: what is before the marks is read once."""
    input_ids, _, soft_mask = batch
    gold = token_inputs(model, input_ids)
    cache, parts, begin, end = None, [], 0, input_ids.shape[1]
    if once:
        begin, end = _span(soft_mask)
    if begin > 0:
        cache = DynamicCache(config=model.config)
        before, _ = advance({name: tokens[:, :begin] for name, tokens in gold.items()}, cache)
        parts = [before] * (start < begin)
    gold = inputs = {name: tokens[:, begin:] for name, tokens in gold.items()}
    rows, cols = soft_mask[:, begin:].nonzero(as_tuple=True)
    at = cols - 1 - (end - begin)  # counted from the end: there may be fewer logits than columns
    first_with_grad = 0 if grad_passes is None else passes + 1 - grad_passes
    for r in range(passes):
        with torch.set_grad_enabled(torch.is_grad_enabled() and r >= first_with_grad):
            some = {name: tokens[:, : end - begin] for name, tokens in inputs.items()}
            # Only the marked positions pay for the softmax, the mixing and the lookup.
            seen = _picked(advance(some, _copied(cache)), rows, at)
            mixed = _next(model, seen, feed, input_ids[:, begin:][rows, cols])
        # with a graph in any case: gold keeps its gradient
        inputs = {
            name: tokens.index_put((rows, cols), mixed[name].to(tokens.dtype))
            for name, tokens in gold.items()
        }
    return [*parts, advance(inputs, cache)[0]]


def _cheapest(model, input_ids, attention_mask, soft_mask, passes: int):
    """How parallel passes compute the fewest positions -> the batch, by how many columns its rows
    were moved or None, and whether what is before the marks is read once."""
    batch = input_ids, attention_mask, soft_mask
    if passes == 0 or not _keeps_prefix(model):
        return batch, None, False
    fewest, most = _positions(soft_mask, passes), (passes + 1) * input_ids.shape[1]
    moved = _aligned(model, *batch)
    if moved is not None and _positions(moved[0][2], passes) < WORTH * min(fewest, most):
        return *moved, True
    return batch, None, fewest < WORTH * most


def _span(soft_mask: Tensor) -> tuple[int, int]:
    """The column before the first that any row [B, T] marks, and the last that any marks: between
    them are all that a refresh computes."""
    columns = soft_mask.any(0).nonzero()[:, 0]
    return int(columns[0]) - 1, int(columns[-1])


def _positions(soft_mask: Tensor, passes: int) -> int:
    """How many positions of a row parallel passes compute, what is before the marks once."""
    begin, end = _span(soft_mask)
    return soft_mask.shape[1] + passes * (end - begin)


def _keeps_prefix(model) -> bool:
    """Can a model, plain or wrapped by PEFT, go on from one cache in more than one way, by several
    positions?"""
    inner = plain(model)
    if recomputes(inner) and model.training:
        return False  # drops the cache
    if not reads_moved_rows(model) or not reads_on(model):
        return False
    layers = DynamicCache(config=inner.config).layers  # of other kinds `_copied` knows nothing
    return all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers)


def _copied(cache: DynamicCache | None) -> DynamicCache | None:
    """Goes on without the other: a layer makes new tensors of what it appends, and never writes
    into what it has."""
    if cache is None:
        return None
    other = copy.copy(cache)
    other.layers = [copy.copy(layer) for layer in cache.layers]
    return other


def _mk_advance(
    model, attention_mask: Tensor | None, positions: Tensor | None, hidden: bool, start: int
):
    """-> (inputs [B, t, ...], the cache of what is before them or None) to the logits, without
    those of positions before `start`, but for the last; and the last hidden states [B, t, D], or
    None."""
    by = cache_name(model)
    if attention_mask is not None:
        positions = _counted(attention_mask)

    def advance(inputs: dict[str, Tensor], cache: DynamicCache | None):
        begin = 0 if cache is None else cache.get_seq_length()
        end = begin + inputs["inputs_embeds"].shape[1]
        if plain(model).config.model_type in IN_PLACE:
            inputs = {name: tokens.clone() for name, tokens in inputs.items()}
        outputs = model(
            **inputs,
            attention_mask=None if attention_mask is None else attention_mask[:, :end],
            position_ids=None if positions is None else positions[:, begin:end],
            **(dict(use_cache=False) if cache is None else {by: cache, "use_cache": True}),
            **(from_position(min(start, end - 1) - begin, end - begin) if begin < start else {}),
            output_hidden_states=hidden,
        )
        return outputs.logits, outputs.hidden_states[-1] if hidden else None

    return advance


def _aligned(model, input_ids: Tensor, attention_mask: Tensor | None, soft_mask: Tensor):
    """The rows moved to the right, behind padding, so that their first marks stand in one column:
    ids, mask and marks [B, W]; and by how many columns each row was moved. None where that leaves no
    fewer marked columns, or takes more than WIDER columns or than the model has room for."""
    if not reads_moved_rows(model):
        return None
    T = input_ids.shape[1]
    begins = soft_mask.int().argmax(1)
    shift = torch.where(soft_mask.any(1), begins.max() - begins, 0)
    at = torch.arange(T + int(shift.max()), device=shift.device) - shift[:, None]
    is_row = (at >= 0) & (at < T)
    at = at.clamp(0, T - 1)
    marks = soft_mask.gather(1, at) & is_row
    if marks.any(0).sum() >= soft_mask.any(0).sum():
        return None
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    mask = mask.gather(1, at) * is_row
    W = int(mask.any(0).nonzero().max()) + 1
    if W > T and (W > WIDER * T or W > (room_of(model, trained=True) or W)):
        return None
    return (input_ids.gather(1, at)[:, :W], mask[:, :W], marks[:, :W]), shift


def _moved_back(parts: list[Tensor], shift: Tensor, length: int) -> Tensor:
    """Logits of moved rows, in parts [B, t, V] side by side -> [B, length, V] of the rows as they
    were, 0 in what was cut off; copied once."""
    rows, pieces = [part.unbind() for part in parts], []
    for row, begin in enumerate(shift.tolist()):
        left = length
        for part in rows:
            here = part[row][begin : begin + left]
            begin, left = max(0, begin - len(part[row])), left - len(here)
            pieces.append(here)
        pieces.append(parts[0].new_zeros(left, parts[0].shape[-1]))
    return torch.cat(pieces).view(len(shift), length, -1)


def _picked(seen: Seen, *at) -> Seen:
    return tuple(None if x is None else x[at] for x in seen)


def _next(model, seen: Seen, feed: Feed | None, gold: Tensor) -> dict[str, Tensor]:
    """The inputs after positions [...] with these logits and hidden states."""
    logits, hidden = seen
    if feed is None:
        return {"inputs_embeds": hidden}
    more = {} if hidden is None else {"hidden": hidden}
    return soft_inputs(model, feed(logits, gold, **more))


def _sequential(model, batch, feed, advance, window):
    if recomputes(plain(model)) and model.training:
        raise ValueError(
            "sequential soft teacher forcing needs gradient_checkpointing=False: checkpointed layers drop the "
            "KV cache. Switch it off or use mode='parallel'"
        )
    input_ids, _, soft_mask = batch
    gold = token_inputs(model, input_ids)
    cache = DynamicCache(config=model.config)
    columns = soft_mask.any(0).nonzero()[:, 0].tolist()
    ends = [*columns, input_ids.shape[1]]
    seen = advance({name: tokens[:, : ends[0]] for name, tokens in gold.items()}, cache)
    logits = [seen[0]]
    for step, (t, end) in enumerate(zip(columns, ends[1:], strict=True), 1):
        last = _picked(seen, slice(None), -1)
        if window is not None and step > 1 and (step - 1) % window == 0:
            last = tuple(None if x is None else x.detach() for x in last)
            for layer in cache.layers:
                layer.keys, layer.values = layer.keys.detach(), layer.values.detach()
        inputs = {name: tokens[:, t:end] for name, tokens in gold.items()}
        rows = soft_mask[:, t]
        for name, mixed in _next(model, last, feed, input_ids[:, t]).items():
            tokens = inputs[name]
            first = torch.where(_over(rows, mixed), mixed.to(tokens.dtype), tokens[:, 0])
            inputs[name] = torch.cat([first[:, None], tokens[:, 1:]], 1)
        seen = advance(inputs, cache)
        logits.append(seen[0])
    return logits


def mixed_forward(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    soft_mask: Tensor,
    mixtures: Soft,
    *,
    last: int | None = None,
) -> Tensor:
    """Logits [B, T, V] of a forward pass in which marked positions read these mixtures, ids and
    weights [B, T, K], in place of their tokens; otherwise as for soft_forward."""
    mixed = soft_inputs(model, Soft(mixtures.ids[soft_mask], mixtures.weights[soft_mask]))
    inputs = {
        name: tokens.masked_scatter(_over(soft_mask, tokens), mixed[name].to(tokens.dtype))
        for name, tokens in token_inputs(model, input_ids).items()
    }
    T = input_ids.shape[1]
    some = from_position(0 if last is None else max(0, T - last), T)
    if counts_anew(model):
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        some["position_ids"] = _counted(mask)
    return model(**inputs, attention_mask=attention_mask, use_cache=False, **some).logits


def _counted(attention_mask: Tensor) -> Tensor:
    """Positions [B, T] as decoding has them, 0 in padding on the left."""
    return (attention_mask.cumsum(1) - 1).clamp_min(0)


def _over(mask: Tensor, values: Tensor) -> Tensor:
    """The mask with an axis of 1 for each further axis of the values."""
    return mask[(...,) + (None,) * (values.dim() - mask.dim())]


MODES = ("parallel", "sequential")
WIDER = 1.25  # columns of moved rows, over those of the batch
WORTH = (
    0.8  # positions that parallel passes compute in a way that takes a cache, over those without
)
