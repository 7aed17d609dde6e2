"""LLaDA and Dream as models of transformers: configurations, classes, and the names of their
weights."""

import re
from dataclasses import dataclass
from typing import ClassVar

from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

# Regular expressions of LLaDA's parameter names, and Llama's in their place (read backwards when
# saving).
LLADA_NAMES = {
    r"model\.transformer\.wte\.": r"model.embed_tokens.",
    r"model\.transformer\.ln_f\.": r"model.norm.",
    r"model\.transformer\.ff_out\.": r"lm_head.",
    r"transformer\.blocks\.(\d+)\.attn_norm\.": r"layers.\1.input_layernorm.",
    r"transformer\.blocks\.(\d+)\.ff_norm\.": r"layers.\1.post_attention_layernorm.",
    r"transformer\.blocks\.(\d+)\.q_proj\.": r"layers.\1.self_attn.q_proj.",
    r"transformer\.blocks\.(\d+)\.k_proj\.": r"layers.\1.self_attn.k_proj.",
    r"transformer\.blocks\.(\d+)\.v_proj\.": r"layers.\1.self_attn.v_proj.",
    r"transformer\.blocks\.(\d+)\.attn_out\.": r"layers.\1.self_attn.o_proj.",
    r"transformer\.blocks\.(\d+)\.ff_proj\.": r"layers.\1.mlp.gate_proj.",
    r"transformer\.blocks\.(\d+)\.up_proj\.": r"layers.\1.mlp.up_proj.",
    r"transformer\.blocks\.(\d+)\.ff_out\.": r"layers.\1.mlp.down_proj.",
}


# What a configuration must say, or not mention, for the model to be Llama or Qwen2 with other
# names.
LLADA_NEEDS = dict(
    activation_type="silu",
    alibi=False,
    attention_layer_norm=False,
    bias_for_layer_norm=False,
    block_group_size=1,
    block_type="llama",
    include_bias=False,
    include_qkv_bias=False,
    input_emb_norm=False,
    layer_norm_type="rms",
    layer_norm_with_affine=True,
    multi_query_attention=False,
    rope=True,
    scale_logits=False,
)


DREAM_NEEDS = dict(hidden_act="silu", use_sliding_window=False, use_mrope=False)


# What a config.json must say, since transformers would take it of a model that it knows
SIZES = ("hidden_size", "num_attention_heads", "num_hidden_layers", "vocab_size")


@dataclass(init=False, repr=False, eq=False, kw_only=True)
class Published:
    """A configuration of transformers written to and read from its published field names, with what
    it says of diffusion."""

    family: ClassVar[str]  # a short name
    # published names of fields, in to_dict too
    published: ClassVar[dict[str, str]] = {}
    # what the configuration must say, or not mention, for the stock class to be the model
    needs: ClassVar[dict]
    sizes: ClassVar[tuple[str, ...]] = (*SIZES, "rms_norm_eps", "rope_theta")
    # what the folder may leave to the caller of `load`, and what the mask token is called there
    free: ClassVar[tuple[str, ...]] = ("block_length",)
    mask_tokens: ClassVar[tuple[str, ...]] = ()
    # the released models', for folders that name none
    usual_mask_id: ClassVar[int | None] = None
    usual_eos_id: ClassVar[int | None] = None

    logits_shift: int = 0  # 1: the logits at a position are about the next
    block_length: int | None = None  # None: the whole canvas is read in both directions
    is_causal: bool = False
    mask_token_id: int | None = None

    def __post_init__(self, **kwargs):
        if self.logits_shift not in (0, 1):
            raise ValueError(
                f"logits_shift={self.logits_shift!r} must be 0, as in LLaDA, or 1, as in Dream"
            )
        # The base derives head_dim before it would look at attribute_map.
        for original, name in self.published.items():
            if original in kwargs:
                setattr(self, name, kwargs.pop(original))
        super().__post_init__(**kwargs)

    @classmethod
    def originals(cls, field: str) -> list[str]:
        """The published names of a field."""
        return [original for original, name in cls.published.items() if name == field]

    def to_dict(self) -> dict:
        named = super().to_dict()
        for original, name in self.published.items():
            named[original] = named.pop(name)
        rotation = dict(named.pop("rope_parameters"))
        for name in ("rope_theta", "partial_rotary_factor"):
            if name in rotation:
                named[name] = rotation.pop(name)
        named["rope_scaling"] = None if rotation == {"rope_type": "default"} else rotation
        return named


class LladaConfig(Published, LlamaConfig):
    """LLaDA's configuration (arXiv:2502.09992), written to and read from its original field
    names."""

    model_type = "llada"
    family = "llada"
    needs = LLADA_NEEDS
    free = ()
    published = {
        "d_model": "hidden_size",
        "n_heads": "num_attention_heads",
        "n_kv_heads": "num_key_value_heads",
        "n_layers": "num_hidden_layers",
        "mlp_hidden_size": "intermediate_size",
        "max_sequence_length": "max_position_embeddings",
        "weight_tying": "tie_word_embeddings",
    }
    attribute_map = published
    use_cache: bool = False


class LladaForMaskedDiffusion(LlamaForCausalLM):
    config_class = LladaConfig


class DreamConfig(Published, Qwen2Config):
    """Dream's configuration (arXiv:2508.15487)."""

    model_type = "Dream"
    family = "dream"
    needs = DREAM_NEEDS
    free = ()
    logits_shift: int = 1
    use_cache: bool = False


class DreamForMaskedDiffusion(Qwen2ForCausalLM):
    config_class = DreamConfig


def check_settings(settings: dict, needs: dict) -> None:
    """Raise ValueError naming a field of a configuration that makes it another architecture."""
    for field, value in needs.items():
        actual = settings.get(field)
        if actual is not None and actual != value:
            raise ValueError(f"{field}={actual!r} is not supported, only {value!r}")
    layers = settings.get("layer_types") or []
    if not isinstance(layers, list) or any(layer != "full_attention" for layer in layers):
        raise ValueError(f"layer_types={layers!r} is not supported, only full_attention everywhere")
    rows = settings.get("embedding_size")
    if rows is not None and rows != settings.get("vocab_size"):
        raise ValueError(
            f"embedding_size={rows} differs from vocab_size={settings.get('vocab_size')}"
        )


def llama_name(name: str) -> str:
    """LLaDA's name of a parameter -> Llama's."""
    for llada, llama in LLADA_NAMES.items():
        name = re.sub(llada, llama, name)
    return name
