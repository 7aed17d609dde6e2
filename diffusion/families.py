"""The diffusion models of 2026 as models of transformers: SDAR and Fast-dLLM v2 are Qwen3 and Qwen2
read block by block, A2D is a Qwen3, Qwen2 or Llama read in both directions, LLaDA2 is GLM-4-MoE
under other names, Open-dCoder a plain Qwen2.

The classes bear the published names, so that what is saved names them as the originals do.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from transformers import (
    Glm4MoeConfig,
    Glm4MoeForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.core_model_loading import (
    Concatenate,
    ConversionOps,
    WeightConverter,
    WeightRenaming,
)

from softar.checks import check_choice

from .architectures import DreamForMaskedDiffusion, LladaForMaskedDiffusion, Published

PLAIN_QWEN = dict(hidden_act="silu", use_sliding_window=False)


class SdarConfig(Published, Qwen3Config):
    """SDAR's (arXiv:2510.06303): its own name of the block length, its mask token."""

    model_type = "sdar"
    family = "sdar"
    published = {"block_size": "block_length"}
    attribute_map = published
    needs = PLAIN_QWEN
    mask_tokens = ("<|MASK|>", "<MASK>")
    usual_mask_id = 151669
    logits_shift: int = 0
    block_length: int = 4
    is_causal: bool = False
    mask_token_id: int | None = None


class SDARForCausalLM(Qwen3ForCausalLM):
    config_class = SdarConfig


class SdarMoeConfig(Published, Qwen3MoeConfig):
    model_type = "sdar_moe"
    family = "sdar"
    published = {"block_size": "block_length"}
    attribute_map = Qwen3MoeConfig.attribute_map | published
    needs = PLAIN_QWEN
    mask_tokens = SdarConfig.mask_tokens
    usual_mask_id = SdarConfig.usual_mask_id
    logits_shift: int = 0
    block_length: int = 4
    is_causal: bool = False
    mask_token_id: int | None = None


class SDARMoeForCausalLM(Qwen3MoeForCausalLM):
    config_class = SdarMoeConfig


class FastDllmConfig(Published, Qwen2Config):
    """Fast-dLLM v2's (arXiv:2509.26328), which names no mask token."""

    model_type = "Fast_dLLM_Qwen"
    family = "fast_dllm_v2"
    published = {"bd_size": "block_length"}
    attribute_map = published
    needs = PLAIN_QWEN
    mask_tokens = ("|<MASK>|",)
    usual_mask_id = 151665
    logits_shift: int = 1
    block_length: int = 32
    is_causal: bool = False
    mask_token_id: int | None = None


class Fast_dLLM_QwenForCausalLM(Qwen2ForCausalLM):
    config_class = FastDllmConfig


class A2dQwen3Config(Published, Qwen3Config):
    """Of a causal model read in both directions, as dllm trains it: by MDLM, or by BD3LM, which has
    a block length that its folder does not say."""

    model_type = "a2d-qwen3"
    family = "a2d"
    needs = PLAIN_QWEN
    mask_tokens = ("<|mask|>",)
    free = ("block_length", "logits_shift")
    logits_shift: int = 0
    block_length: int | None = None
    is_causal: bool = False
    mask_token_id: int | None = None


class A2DQwen3LMHeadModel(Qwen3ForCausalLM):
    config_class = A2dQwen3Config


class A2dQwen2Config(Published, Qwen2Config):
    model_type = "a2d-qwen2"
    family = "a2d"
    needs = PLAIN_QWEN
    mask_tokens = A2dQwen3Config.mask_tokens
    free = A2dQwen3Config.free
    logits_shift: int = 0
    block_length: int | None = None
    is_causal: bool = False
    mask_token_id: int | None = None


class A2DQwen2LMHeadModel(Qwen2ForCausalLM):
    config_class = A2dQwen2Config


class A2dLlamaConfig(Published, LlamaConfig):
    model_type = "a2d-llama"
    family = "a2d"
    needs = dict(hidden_act="silu")
    mask_tokens = A2dQwen3Config.mask_tokens
    free = A2dQwen3Config.free
    logits_shift: int = 0
    block_length: int | None = None
    is_causal: bool = False
    mask_token_id: int | None = None


class A2DLlamaLMHeadModel(LlamaForCausalLM):
    config_class = A2dLlamaConfig


class OpenDcoderConfig(Published, Qwen2Config):
    """Open-dCoder's, whose folder is that of a plain Qwen2 with a mask token in
    generation_config.json."""

    model_type = "qwen2"
    family = "open_dcoder"
    needs = PLAIN_QWEN
    mask_tokens = ("[MASK]",)
    free = ()
    logits_shift: int = 1
    is_causal: bool = False
    mask_token_id: int | None = None


class Llada2Config(Published, Glm4MoeConfig):
    """LLaDA2.0's and 2.1's (arXiv:2512.15745), which names neither its mask nor its end token."""

    model_type = "llada2_moe"
    family = "llada2"
    published = {"num_experts": "n_routed_experts", "num_shared_experts": "n_shared_experts"}
    attribute_map = Glm4MoeConfig.attribute_map | published
    needs = dict(
        attention_bias=False,
        hidden_act="silu",
        moe_router_enable_expert_bias=True,
        norm_head=False,
        norm_softmax=False,
        num_nextn_predict_layers=0,
        score_function="sigmoid",
        use_bias=False,
        use_qk_norm=True,
        use_qkv_bias=False,
        use_rmsnorm=True,
        use_sliding_window=False,
        using_split_qkv_in_self_attention=False,
    )
    mask_tokens = ("<|mask|>",)
    usual_mask_id = 156895
    usual_eos_id = 156892
    logits_shift: int = 0
    block_length: int = 32
    use_qk_norm: bool = True
    num_mtp_layers: int = 0
    is_causal: bool = False
    mask_token_id: int | None = None


class LLaDA2MoeModelLM(Glm4MoeForCausalLM):
    config_class = Llada2Config
    _keys_to_ignore_on_load_unexpected = None  # GLM's own numbers of layers


class SplitHeads(ConversionOps):
    """Rows [q heads | k heads | v heads] of one matrix to three."""

    @torch.no_grad
    def convert(
        self, input_dict: dict, source_patterns: list, target_patterns: list, *, config, **kwargs
    ) -> dict[str, Tensor]:
        (tensors,) = input_dict.values()
        tensor = tensors[0] if isinstance(tensors, list) else tensors
        keys = config.num_key_value_heads * config.head_dim
        parts = tensor.split([len(tensor) - 2 * keys, keys, keys])
        return dict(zip(target_patterns, (p.contiguous() for p in parts), strict=True))

    @property
    def reverse_op(self) -> ConversionOps:
        return Concatenate(dim=0)


LLADA2_NAMES = {
    r"model\.word_embeddings\.": "model.embed_tokens.",
    r"attention\.dense\.": "self_attn.o_proj.",
    r"attention\.query_layernorm\.": "self_attn.q_norm.",
    r"attention\.key_layernorm\.": "self_attn.k_norm.",
    r"mlp\.gate\.expert_bias": "mlp.gate.e_score_correction_bias",
}
register_checkpoint_conversion_mapping(
    "LLaDA2MoeModelLM",
    [
        *(WeightRenaming(theirs, ours) for theirs, ours in LLADA2_NAMES.items()),
        WeightConverter(
            "attention.query_key_value.weight",
            [f"self_attn.{part}_proj.weight" for part in "qkv"],
            operations=[SplitHeads()],
        ),
        *get_checkpoint_conversion_mapping("glm4_moe"),
    ],
    overwrite=True,
)
register_checkpoint_conversion_mapping(
    "SDARMoeForCausalLM", get_checkpoint_conversion_mapping("qwen3_moe"), overwrite=True
)


class Family(NamedTuple):
    model: type[PreTrainedModel]
    config: type[Published]

    @property
    def base(self) -> str:
        """The model_type of what it is on stock transformers."""
        return self.config.__bases__[1].model_type


# By the model_type of config.json.
FAMILIES: dict[str, Family] = {
    model.config_class.model_type: Family(model, model.config_class)
    for model in (
        LladaForMaskedDiffusion,
        DreamForMaskedDiffusion,
        SDARForCausalLM,
        SDARMoeForCausalLM,
        Fast_dLLM_QwenForCausalLM,
        A2DQwen3LMHeadModel,
        A2DQwen2LMHeadModel,
        A2DLlamaLMHeadModel,
        LLaDA2MoeModelLM,
    )
}
OPEN_DCODER = Family(Qwen2ForCausalLM, OpenDcoderConfig)


def family_of(settings: dict, kind: str | None, generation: dict) -> Family | None:
    """The family of a folder; None: none of these.

    Args:
        kind: what the caller says, a short name as "open_dcoder", for folders that say no more
            than the causal model that they were made from.
        settings, generation: fields of config.json and generation_config.json, which of an
            Open-dCoder names a mask token.

    Raises:
        ValueError: for a kind that is unknown or cannot be.
    """
    model_type = settings["model_type"]
    known = FAMILIES.get(model_type)
    if model_type == OPEN_DCODER.base and generation.get("mask_token_id") is not None:
        known = OPEN_DCODER
    if kind is None or (known is not None and known.config.family == kind):
        return known
    every = [*FAMILIES.values(), OPEN_DCODER]
    check_choice("kind", kind, sorted({family.config.family for family in every}))
    bases = {family.base: family for family in every if family.config.family == kind}
    if model_type not in bases:
        types = sorted({*bases} | {family.config.model_type for family in bases.values()})
        raise ValueError(
            f"its config.json says model_type={model_type!r}, and kind={kind!r} is one of {types}"
        )
    return bases[model_type]
