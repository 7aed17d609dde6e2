"""What a masked-diffusion model is and has: facts from its configuration, and the parts that the
loop runs."""

import inspect
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from softar.models import plain
from softar.models.reading import cache_name

from .architectures import Published
from .noise import UniformNoise, read_end, read_noise

# Their convolutions, pools and Fourier transforms mix padding into the tokens beside it.
READS_PADDING = ("convbert", "fnet", "funnel", "mobilebert")
LARGE = 4096  # a vocabulary where the head takes a while
WIDE = 256  # hidden states for which its matrix does not stay in the processor's cache
PIECE = 64  # of the vocabulary
CANVASES = "diffusion_gemma"  # the model type without a mask


class Facts(NamedTuple):
    """What a sampler has to know of a model."""

    mask_id: int | None  # None: it has no mask, its slots hold random tokens
    eos_id: int | None
    # tokens after which nothing more belongs to the answer, eos_id among them
    end_ids: tuple[int, ...]
    shift: int  # the logits at position i are about position i + shift
    vocab_size: int
    # `soften_args` of "soft-mask" as the model learnt them; None is a hard model
    soft_mask: dict | None
    uniform: UniformNoise | None  # None is a model of masks
    # of the blocks that it reads one after the other; None: it reads the whole canvas in both
    # directions
    block_length: int | None
    family: str  # a short name, as "sdar"
    # the token behind each row of a training in both directions, as far as the model says it
    rows_end: int | None = None


class Parts(NamedTuple):
    """A model taken apart, so that the loop computes logits only where it needs them."""

    embedding: nn.Module  # [B, T] ids -> [B, T, D]
    # (embeds, attention_mask, position_ids [B, T], cache) -> hidden [B, T, D]. attention_mask is
    # [B, L], what is no padding, or [B, 1, T, K] bool, which of the K keys of the cache and the
    # forward each position sees; None: all. Positions count from 0 and, where None, from the left
    # edge
    body: Callable[..., Tensor]
    head: Callable[[Tensor], Tensor]  # hidden [n, D] -> logits [n, V]
    can_cache: bool


def facts(model: nn.Module) -> Facts:
    """Raises ValueError for a model that is not a masked-diffusion model, or whose mask token is not
    known."""
    try:
        config = plain(model).config
    except AttributeError:
        raise ValueError(
            f"{type(model).__name__} is no language model of transformers: open one with softar.diffusion.load"
        ) from None
    if config.model_type == CANVASES:
        return _facts_of_canvases(plain(model))
    mask_id = config.mask_token_id if "mask_token_id" in config else None
    if mask_id is None:
        raise ValueError(
            f"{type(plain(model)).__name__} names no mask token: load it with softar.diffusion.load, or set "
            f"model.config.mask_token_id"
        )
    if not 0 <= mask_id < config.vocab_size:
        raise ValueError(
            f"mask_token_id={mask_id} lies outside the vocabulary of {config.vocab_size}"
        )
    ends = end_tokens(plain(model))
    shift = config.logits_shift if "logits_shift" in config else 0
    soft_mask = config.soft_mask if "soft_mask" in config else None
    named = config.diffusion_process if "diffusion_process" in config else None
    uniform = read_noise(named, mask_id, config.vocab_size)
    family = "converted" if "logits_shift" in config else "masked_lm"
    family = config.family if isinstance(config, Published) else family
    return Facts(
        mask_id,
        ends[0] if ends else None,
        ends,
        shift,
        config.vocab_size,
        soft_mask,
        uniform,
        config.block_length if "logits_shift" in config and "block_length" in config else None,
        family if uniform is None else "duo",
        read_end(named, config.vocab_size),
    )


def _facts_of_canvases(model: PreTrainedModel) -> Facts:
    ends, vocab_size = end_tokens(model), model.config.get_text_config().vocab_size
    length = model.config.canvas_length
    return Facts(None, ends[0] if ends else None, ends, 0, vocab_size, None, None, length, CANVASES)


def check_has_mask(facts: Facts, what: str) -> Facts:
    """The same. Raises ValueError for a model without a mask token, which `what` needs."""
    if facts.mask_id is None:
        raise ValueError(f"{what} needs a mask token, and {facts.family} has none")
    return facts


def parts(model: nn.Module) -> Parts:
    """How to run a model's embedding, body and head apart; PEFT's wrapper is seen through, its
    layers are not. Raises ValueError for a model without a head."""
    inner = plain(model)
    if inner.get_output_embeddings() is None:
        raise ValueError(
            f"{type(inner).__name__} has no head that predicts tokens: open the model with softar.diffusion.load"
        )
    if inner.config.model_type == CANVASES:
        return _parts_of_canvases(inner)
    embedding = inner.get_input_embeddings()
    if "logits_shift" in inner.config:
        by = cache_name(inner.model)

        def body(
            embeds: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None, cache=None
        ) -> Tensor:
            return inner.model(
                inputs_embeds=embeds,
                attention_mask=_for_attention(attention_mask, embeds, inner.config),
                position_ids=position_ids,
                **({} if by is None else {by: cache}),
                use_cache=cache is not None,
                is_causal=False,
            ).last_hidden_state

        return Parts(
            embedding, body, _for_few(inner.lm_head, inner.config.vocab_size), can_cache=True
        )

    def whole(
        embeds: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None, cache=None
    ) -> Tensor:
        # A masked LM's head is more than one matrix, so the logits themselves stand for the hidden
        # states.
        positions = (
            {}
            if position_ids is None or not takes_positions
            else {"position_ids": position_ids + first}
        )
        return inner(inputs_embeds=embeds, attention_mask=attention_mask, **positions).logits

    takes_positions = "position_ids" in inspect.signature(inner.forward).parameters
    first = max((_first(table, inner.config) for table in _tables(inner)), default=0)
    return Parts(embedding, whole, lambda logits: logits, can_cache=False)


def _for_few(head: nn.Module, vocab_size: int) -> Callable[[Tensor], Tensor]:
    """The head, faster for few rows: MKL reads its matrix once for up to 3 rows and for 16, and two
    to four times for those between. In narrow pieces, which stay in the processor's cache, it is
    read once for any number, but dearer from 12 rows on; so those become 16."""

    if vocab_size < LARGE or not torch.backends.mkl.is_available():
        return head

    def for_few(hidden: Tensor) -> Tensor:
        n, width = hidden.shape[0], hidden.shape[-1]
        is_plain = hidden.device.type == "cpu" and hidden.dtype == torch.float32
        if not is_plain or hidden.dim() != 2 or not 4 <= n < 16 or width < WIDE:
            return head(hidden)
        if n < 12 and _is_matrix(head, hidden.dtype):
            pieces = head.weight.view(-1, PIECE, width).transpose(1, 2)
            logits = torch.bmm(hidden.expand(len(pieces), n, width), pieces)
            return logits.transpose(0, 1).reshape(n, -1)
        return head(torch.nn.functional.pad(hidden, (0, 0, 0, 16 - n)))[:n]

    return for_few


def _is_matrix(head: nn.Module, dtype: torch.dtype) -> bool:
    """Is calling it multiplying by a matrix of whole pieces, here and now, with nobody watching?"""
    if type(head) is not nn.Linear or head.bias is not None or torch.is_grad_enabled():
        return False
    is_here = type(head.weight) is nn.Parameter and head.weight.device.type == "cpu"
    is_watched = head._forward_hooks or head._forward_pre_hooks
    fits = head.weight.dtype == dtype and len(head.weight) % PIECE == 0
    return is_here and fits and head.weight.is_contiguous() and not is_watched


def _for_attention(mask: Tensor | None, embeds: Tensor, config) -> Tensor | None:
    """A mask as the model's attention takes it: of all implementations sdpa alone reads a 4-D one
    of bool, the others add it to the scores."""
    how = config._attn_implementation
    if mask is None or mask.ndim == 2 or how == "sdpa":
        return mask
    if "flash" in how:
        raise ValueError(
            f"attn_implementation={how!r} takes no mask of blocks: load the model with 'sdpa'"
        )
    unseen = torch.finfo(embeds.dtype).min
    return embeds.new_zeros(mask.shape).masked_fill(~mask, unseen)


def _parts_of_canvases(inner: PreTrainedModel) -> Parts:
    """The body is the module itself: its encoder and its decoder are run by turns."""
    cap = inner.config.get_text_config().final_logit_softcapping

    def head(hidden: Tensor) -> Tensor:
        logits = inner.lm_head(hidden).float().div_(cap).tanh_()
        return logits * cap if logits.requires_grad else logits.mul_(cap)

    return Parts(inner.model.decoder.embed_tokens, inner.model, head, can_cache=True)


def _tables(inner: PreTrainedModel) -> list[nn.Embedding]:
    """Its learnt positions."""
    named = ((name.rpartition(".")[2], module) for name, module in inner.named_modules())
    return [m for name, m in named if name == "position_embeddings" and isinstance(m, nn.Embedding)]


def _first(table: nn.Embedding, config) -> int:
    """The row of the first position. RoBERTa and its kin keep the rows up to the pad token's index
    for padding, Nystromformer and YOSO two rows more than they say."""
    if table.padding_idx is not None:
        return table.padding_idx + 1
    return table.num_embeddings - config.max_position_embeddings


def end_tokens(model: PreTrainedModel) -> tuple[int, ...]:
    """The tokens that end a text, by the model's two configurations, each of which names none, one
    or several."""
    config = model.config.get_text_config()
    named = [config.eos_token_id if "eos_token_id" in config else None]
    if model.can_generate():
        named.append(model.generation_config.eos_token_id)
    flat = [i for ids in named for i in (ids if isinstance(ids, list) else [ids])]
    return tuple(dict.fromkeys(i for i in flat if i is not None))
