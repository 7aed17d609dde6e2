"""What a masked-diffusion model is and has: facts from its configuration, and the parts that the
loop runs."""

import inspect
from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor, nn
from transformers import LlamaForCausalLM, PreTrainedModel, Qwen2ForCausalLM

from softar.models import plain

from .architectures import DreamConfig, LladaConfig
from .noise import UniformNoise, read_noise


class Facts(NamedTuple):
    """What a sampler has to know of a model."""

    mask_id: int
    eos_id: int | None
    # tokens after which nothing more belongs to the answer, eos_id among them
    end_ids: tuple[int, ...]
    shift: int  # the logits at position i are about position i + shift
    vocab_size: int
    # `soften_args` of "soft-mask" as the model learnt them; None is a hard model
    soft_mask: dict | None
    uniform: UniformNoise | None  # None is a model of masks


class Parts(NamedTuple):
    """A model taken apart, so that the loop computes logits only where it needs them."""

    embedding: nn.Module  # [B, T] ids -> [B, T, D]
    # (embeds, attention_mask [B, L], position_ids [B, T], cache) -> hidden [B, T, D]; positions
    # count from 0 and, where None, from the left edge
    body: Callable[..., Tensor]
    head: Callable[[Tensor], Tensor]  # hidden [n, D] -> logits [n, V]
    can_cache: bool


def facts(model: nn.Module) -> Facts:
    """Raises ValueError for a model that is not a masked-diffusion model, or whose mask token is not
    known."""
    config = plain(model).config
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
    shift = config.logits_shift if isinstance(config, (LladaConfig, DreamConfig)) else 0
    soft_mask = config.soft_mask if "soft_mask" in config else None
    named = config.diffusion_process if "diffusion_process" in config else None
    uniform = read_noise(named, mask_id, config.vocab_size)
    return Facts(
        mask_id, ends[0] if ends else None, ends, shift, config.vocab_size, soft_mask, uniform
    )


def parts(model: nn.Module) -> Parts:
    """How to run a model's embedding, body and head apart; PEFT's wrapper is seen through, its
    layers are not."""
    inner = plain(model)
    embedding = inner.get_input_embeddings()
    if isinstance(inner, (LlamaForCausalLM, Qwen2ForCausalLM)):

        def body(
            embeds: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None, cache=None
        ) -> Tensor:
            return inner.model(
                inputs_embeds=embeds,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=cache,
                use_cache=cache is not None,
                is_causal=False,
            ).last_hidden_state

        return Parts(embedding, body, inner.lm_head, can_cache=True)

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
    # RoBERTa and its kin keep the rows of the table up to the pad token's index for padding.
    tables = [
        module for name, module in inner.named_modules() if name.endswith("position_embeddings")
    ]
    pads = [
        table.padding_idx for table in tables if getattr(table, "padding_idx", None) is not None
    ]
    first = pads[0] + 1 if pads else 0
    return Parts(embedding, whole, lambda logits: logits, can_cache=False)


def end_tokens(model: PreTrainedModel) -> tuple[int, ...]:
    """The tokens that end a text, by the model's two configurations, each of which names none, one
    or several."""
    named = [model.config.eos_token_id]
    if model.can_generate():
        named.append(model.generation_config.eos_token_id)
    flat = [i for ids in named for i in (ids if isinstance(ids, list) else [ids])]
    return tuple(dict.fromkeys(i for i in flat if i is not None))
