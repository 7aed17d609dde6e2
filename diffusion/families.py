"""The diffusion models of 2026 as models of transformers: SDAR and Fast-dLLM v2 are Qwen3 and Qwen2
read block by block, A2D is a Qwen3, Qwen2 or Llama read in both directions, Open-dCoder a plain
Qwen2.

The classes bear the published names, so that what is saved names them as the originals do.
"""

from typing import NamedTuple

from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from softar.checks import check_choice

from .architectures import DreamForMaskedDiffusion, LladaForMaskedDiffusion, Published
from .experts import LLaDA2MoeModelLM, SDARMoeForCausalLM

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
    block_length: int | None = 4


class SDARForCausalLM(Qwen3ForCausalLM):
    config_class = SdarConfig


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
    block_length: int | None = 32


class Fast_dLLM_QwenForCausalLM(Qwen2ForCausalLM):
    config_class = FastDllmConfig


class A2d(Published):
    """Of a causal model read in both directions, as dllm trains it: by MDLM, or by BD3LM, which has
    a block length that its folder does not say."""

    family = "a2d"
    needs = PLAIN_QWEN
    mask_tokens = ("<|mask|>",)
    free = ("block_length", "logits_shift")


class A2dQwen3Config(A2d, Qwen3Config):
    model_type = "a2d-qwen3"


class A2DQwen3LMHeadModel(Qwen3ForCausalLM):
    config_class = A2dQwen3Config


class A2dQwen2Config(A2d, Qwen2Config):
    model_type = "a2d-qwen2"


class A2DQwen2LMHeadModel(Qwen2ForCausalLM):
    config_class = A2dQwen2Config


class A2dLlamaConfig(A2d, LlamaConfig):
    model_type = "a2d-llama"


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


class Family(NamedTuple):
    model: type[PreTrainedModel]
    config: type[Published]

    @property
    def base(self) -> str:
        """The model_type of what it is on stock transformers."""
        return self.config.__bases__[1].model_type

    @property
    def has_experts(self) -> bool:
        return self.model in (LLaDA2MoeModelLM, SDARMoeForCausalLM)


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


def kinds_on(model_type: str) -> list[str]:
    """What `kind` may be for a folder of a causal model's type."""
    every = [*FAMILIES.values(), OPEN_DCODER]
    return sorted({family.config.family for family in every if family.base == model_type})


def is_converted(settings: dict) -> bool:
    """Is it the config.json of what `convert` made of a base without a layout here?"""
    says = "logits_shift" in settings and settings.get("mask_token_id") is not None
    return says and settings.get("is_causal") is False
