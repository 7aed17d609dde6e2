"""A causal language model made into a masked-diffusion one, as Dream was made from Qwen2.5."""

import copy

import torch
from torch import Tensor
from transformers import (
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen2ForCausalLM,
    Qwen3ForCausalLM,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from softar.checks import check_values, shorten
from softar.models import check_autoregressive
from softar.models.origin import note_origin
from softar.placement import evaluating

from .architectures import DreamForMaskedDiffusion, LladaForMaskedDiffusion, check_settings
from .block_reader import PrefixCache
from .families import A2DLlamaLMHeadModel, A2DQwen2LMHeadModel, A2DQwen3LMHeadModel
from .folder import check_reading
from .net import Parts, parts
from .tokenizer import introduce

# Whose logits are shifted, and who read the whole canvas
SHIFTED = {LlamaForCausalLM: LladaForMaskedDiffusion, Qwen2ForCausalLM: DreamForMaskedDiffusion}
# What all else is made: the layout of the base, which says of shift and blocks.
A2D = {
    LlamaForCausalLM: A2DLlamaLMHeadModel,
    Qwen2ForCausalLM: A2DQwen2LMHeadModel,
    Qwen3ForCausalLM: A2DQwen3LMHeadModel,
}
REMEDY = (
    f"give one of {', '.join(kind.__name__ for kind in A2D)}, another causal model whose layers all see all, or an "
    f"adapter merged into it"
)
MASK_TOKEN = "<|mask|>"
# Fields that the new model's configuration sets by itself.
REPLACED = (
    "model_type",
    "architectures",
    "transformers_version",
    "is_causal",
    "use_cache",
    "mask_token_id",
)


def convert(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    mask_token: str = MASK_TOKEN,
    shift: int = 1,
    block_length: int | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A masked-diffusion model that starts from a causal one's weights and reads in both directions
    (Dream, arXiv:2508.15487, section 3), or block by block (BD3LM, arXiv:2503.09573). It has to be
    trained before it is of use (`softar.diffusion.sft`).

    The weights are taken over, not copied, and the tokenizer is changed in place: neither
    can be used for anything else afterwards.

    Args:
        model: a LlamaForCausalLM, which becomes a LladaForMaskedDiffusion with logits_shift 1, a
            Qwen2ForCausalLM, which becomes a DreamForMaskedDiffusion, or a Qwen3ForCausalLM, which
            becomes an A2D model, as all three do unshifted or with blocks, and a Llama with biases,
            a stretched rotation or heads of another width, too. Any other causal model
            of transformers whose layers all see all (Gemma, Mistral, OLMo, ...) keeps its class and
            layout, and its config.json says what it was made.
        mask_token: added where the tokenizer has neither a mask token nor this token. It takes the
            first row of the embedding behind the tokenizer's own; only where there is none does the
            embedding grow, by one row.
        shift: 1 leaves the logits at a position about the next token, which is what the weights
            know; 0 has them learn to be about their own.
        block_length: of the blocks that it reads one after the other; None: the whole canvas.

    Returns:
        What `softar.diffusion.load` returns for a saved one: the model in eval mode, the tokenizer.

    Raises:
        ValueError: naming the class, or the field of the configuration, that is not supported.
    """
    check_values(convert, mask_token=mask_token, shift=shift, block_length=block_length)
    check_reading(shift, block_length)
    _check_model(model)
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise ValueError(
            f"tokenizer={tokenizer!r}: give the model's tokenizer, which gets the mask token"
        )
    _check_mask_token(tokenizer, mask_token)
    new_class, settings = A2D.get(type(model)), model.config.to_dict()
    changes = {"logits_shift": shift, "block_length": block_length}
    if new_class is not None:
        check_settings(settings, new_class.config_class.needs)
        if shift and block_length is None and _is_all_published(model):
            new_class = SHIFTED[type(model)]
    words, rows = len(tokenizer), model.get_input_embeddings().num_embeddings
    if words > rows:
        raise ValueError(
            f"the tokenizer's {words} tokens do not fit the embedding's {rows} rows: is it this model's?"
        )
    trial = copy.deepcopy(tokenizer)  # only adding the token tells its id
    _name_mask(trial, mask_token)
    if trial.mask_token_id > rows:
        raise ValueError(
            f"mask_token={trial.mask_token!r} has id {trial.mask_token_id}, far beyond the embedding's {rows} rows"
        )

    if new_class is None:
        new = model
        new.config.update(changes | {"is_causal": False})
    else:
        fields = {name: value for name, value in settings.items() if name not in REPLACED}
        config = new_class.config_class(**fields, **changes)
        config._attn_implementation = model.config._attn_implementation
        new = _take_over(model, new_class, config)
        new.generation_config = copy.deepcopy(model.generation_config)

    is_new = _name_mask(tokenizer, mask_token)
    mask_id = tokenizer.mask_token_id
    if mask_id == rows:
        # which would draw the row at random
        new.resize_token_embeddings(rows + 1, mean_resizing=False)
    if is_new or mask_id == rows:
        _set_to_mean(new, mask_id, words)
    new.config.mask_token_id = mask_id
    new.name_or_path = new.config._name_or_path = model.name_or_path
    note_origin(new, model.name_or_path, tokenizer)  # an adapter on it would have no base
    introduce(new, tokenizer)
    return new.eval(), tokenizer


def _check_model(model) -> None:
    """Raise ValueError for a model that no masked-diffusion model is made of."""
    if isinstance(model, PreTrainedModel):
        check_autoregressive(model, REMEDY)
        if getattr(model, "quantization_method", None) is not None:
            raise ValueError(
                "model is quantised, and its weights cannot be taken over: load it de-quantised"
            )
        if len(places := {p.device for p in model.parameters()}) > 1 or model.device.type == "meta":
            raise ValueError(
                f"model lies in several places, {sorted(map(str, places))}: load it in one"
            )
        if any(".base_layer." in name for name, _ in model.named_parameters()):
            raise ValueError("model holds an adapter: merge it, and give the model itself")
    if type(model) not in A2D and (why := _why_not(model)):
        raise ValueError(
            f"model is a {type(model).__name__}, of which no masked-diffusion model is made here: {why}; {REMEDY}"
        )


@torch.no_grad()
def _why_not(model) -> str | None:
    """Why a causal model cannot be read in both directions or block by block as it is; None where
    it can, which is tried with four tokens. What is saved then is its own layout with
    `logits_shift`, `block_length` and `is_causal` in config.json."""
    is_plain = isinstance(model, PreTrainedModel)
    if not is_plain or model.config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return "it is no causal model of transformers"
    config = model.config
    if config.get_text_config() is not config:
        return "it reads more than text"
    if "layer_types" in config and {*config.layer_types} != {"full_attention"}:
        return f"layer_types={config.layer_types}"
    if "sliding_window" in config and config.sliding_window:
        return f"sliding_window={config.sliding_window}"
    if not {"model", "lm_head"} <= model._modules.keys():
        return "its parts have other names than model and lm_head"
    as_it_was = dict(config.__dict__)
    with evaluating(model):
        try:
            ids = torch.arange(4)[None].to(model.device)
            causal = model(ids, use_cache=False).logits
            config.update({"logits_shift": 0, "is_causal": False})
            net = parts(model)
            return _difference(net, net.embedding(ids), causal)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever its code does not take
            return f"it fails, {type(error).__name__}: {shorten(str(error))}"
        finally:
            config.__dict__.clear()
            config.__dict__.update(as_it_was)


def _difference(net: Parts, embeds: Tensor, causal: Tensor) -> str | None:
    """In what a net does not compute what the loop takes for granted. embeds: of four tokens
    [1, 4, D]; causal: their logits, read from left to right [1, 4, V]."""
    share = 1e-2 if torch.finfo(causal.dtype).bits > 16 else 5e-2
    scale = share * causal.abs().max().item()

    def read(embeds, mask=None, positions=None, cache=None) -> Tensor:
        return net.head(net.body(embeds, mask, positions, cache))

    def mask(rows: Tensor) -> Tensor:
        return (rows > 0)[None, None]

    ones, place = embeds.new_ones(4, 4), torch.arange(5, device=embeds.device)[None]
    if not torch.allclose(read(embeds, mask(ones.tril())), causal, atol=scale):
        return "under a causal mask of four dimensions its logits are others"
    whole = read(embeds)
    if torch.allclose(whole[:, 0], causal[:, 0]):
        return "without a mask it still reads from left to right"
    first, second = embeds.split([1, 3], 1)
    alone = [read(torch.cat([e, second], 1), mask(ones.diag().diag())) for e in (first, -first)]
    if not torch.allclose(alone[0][:, 1:], alone[1][:, 1:], atol=scale):
        return "it reads what stands before a token otherwise than by attention, too"
    padded = torch.cat([first, embeds], 1), (place > 0).long(), (place - 1).clamp_min(0)
    if not torch.allclose(read(*padded)[:, 1:], whole, atol=scale):
        return "it reads a row that is padded on the left otherwise than the row alone"
    blocks, cache = ones.tril() + ones.tril(1) * (place[0, :4, None] % 2 == 0), PrefixCache()
    for lo in (0, 2):
        cache.lo, cache.hi, cache.end = lo, lo + 2, lo + 2
        last = read(embeds[:, lo : lo + 2], None, place[:, lo : lo + 2], cache)
    if not torch.allclose(last, read(embeds, mask(blocks))[:, 2:], atol=scale):
        return "its logits over the keys and values of earlier blocks are others"
    return None


def _is_all_published(model: PreTrainedModel) -> bool:
    """Has the layout of SHIFTED a name for all that the model is? Dream's has Qwen2's; LLaDA's code
    reads no biases, no stretched rotation and no width of heads."""
    config = model.config
    if type(model) is not LlamaForCausalLM:
        return type(model) in SHIFTED
    is_stretched = config.rope_parameters["rope_type"] != "default"
    is_wide = config.head_dim * config.num_attention_heads != config.hidden_size
    return not (config.attention_bias or config.mlp_bias or is_stretched or is_wide)


def _take_over(model: PreTrainedModel, new_class: type, config) -> PreTrainedModel:
    """A model of `new_class` on the very tensors of `model`."""
    with torch.device("meta"):
        new = new_class(config)
    new.load_state_dict(model.state_dict(), assign=True)
    new.tie_weights()
    # The rotary frequencies are not in a state dict.
    new.model.rotary_emb = type(new.model.rotary_emb)(config).to(model.device)
    return new


def _check_mask_token(tokenizer: PreTrainedTokenizerBase, mask_token: str) -> None:
    own = tokenizer.mask_token
    if own is not None and mask_token not in (own, MASK_TOKEN):
        raise ValueError(
            f"mask_token={mask_token!r} does nothing: {own!r} is the tokenizer's mask token"
        )
    if own is None and mask_token in ("", *tokenizer.special_tokens_map.values()):
        raise ValueError(f"mask_token={mask_token!r} must be a token that stands for nothing else")


def _name_mask(tokenizer: PreTrainedTokenizerBase, mask_token: str) -> bool:
    """Give the tokenizer a mask token where it has none; was it a new word to it?"""
    if tokenizer.mask_token_id is not None:
        return False
    is_new = mask_token not in tokenizer.get_vocab()
    tokenizer.add_special_tokens({"mask_token": mask_token})
    return is_new


@torch.no_grad()
def _set_to_mean(model: PreTrainedModel, row: int, words: int) -> None:
    """Row `row` of the embedding and of the head becomes the mean of the first `words` rows.

    A spare row was never trained, and the first norm would blow up whatever is in it. The mean is
    an embedding of about the size and direction that the layers have met, and as an input it says
    nothing in particular: it is the uniform mixture of all tokens, where soft masks begin. In the
    head it gives the mask an average logit.
    """
    for part in (model.get_input_embeddings(), model.get_output_embeddings()):
        for rows in part.parameters():  # of the head perhaps a bias, too
            rows[row] = rows[:words].mean(0, dtype=torch.float32).to(rows.dtype)  # row >= words
