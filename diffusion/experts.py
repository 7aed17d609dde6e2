"""Diffusion models of experts: LLaDA2 is GLM-4-MoE under other names, SDAR's mixture Qwen3-MoE.

On disk every expert has matrices of its own, in transformers they are packed: by its own checkpoint
conversion, forwards while streaming, backwards when saving.
"""

import torch
from torch import Tensor
from transformers import Glm4MoeConfig, Glm4MoeForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM
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

from .architectures import Published


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
        norm_topk_prob=True,
        num_nextn_predict_layers=0,
        score_function="sigmoid",
        use_bias=False,
        use_qk_norm=True,
        use_qkv_bias=False,
        use_rmsnorm=True,
        use_sliding_window=False,
        using_split_qkv_in_self_attention=False,
    )
    sizes = (
        *Published.sizes,
        "first_k_dense_replace",
        "intermediate_size",
        "moe_intermediate_size",
        "n_group",
        "n_routed_experts",
        "n_shared_experts",
        "num_experts_per_tok",
        "num_key_value_heads",
        "partial_rotary_factor",
        "routed_scaling_factor",
        "topk_group",
    )
    mask_tokens = ("<|mask|>",)
    usual_mask_id = 156895
    usual_eos_id = 156892
    block_length: int | None = 32
    head_dim: int | None = None
    use_qk_norm: bool = True
    num_mtp_layers: int = 0

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        size, rest = divmod(self.n_routed_experts, max(self.n_group, 1))
        if rest or size < 2 or not 1 <= self.topk_group <= self.n_group:
            raise ValueError(
                f"num_experts={self.n_routed_experts} in n_group={self.n_group} groups, of which topk_group="
                f"{self.topk_group} are kept: groups must be of one size, two experts or more"
            )
        if self.num_experts_per_tok > size * self.topk_group:
            raise ValueError(
                f"num_experts_per_tok={self.num_experts_per_tok} is more than the {size * self.topk_group} "
                f"experts of topk_group={self.topk_group} groups"
            )
        if self.num_experts_per_tok < 2:  # the original leaves the weight of a single one as it is
            raise ValueError(f"num_experts_per_tok={self.num_experts_per_tok} must be 2 or more")


class LLaDA2MoeModelLM(Glm4MoeForCausalLM):
    config_class = Llada2Config
    _keys_to_ignore_on_load_unexpected = None  # GLM's own numbers of layers


class SdarMoeConfig(Published, Qwen3MoeConfig):
    """SDAR's of 30B."""

    model_type = "sdar_moe"
    family = "sdar"
    published = {"block_size": "block_length", "num_experts": "num_local_experts"}
    attribute_map = published
    needs = dict(hidden_act="silu", use_sliding_window=False)
    sizes = (*Published.sizes, "norm_topk_prob", "num_experts_per_tok", "num_local_experts")
    mask_tokens = ("<|MASK|>", "<MASK>")
    usual_mask_id = 151669
    block_length: int | None = 4


class SDARMoeForCausalLM(Qwen3MoeForCausalLM):
    config_class = SdarMoeConfig


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


def check_experts(config: Published, names: list[str]) -> None:
    """Raise ValueError unless a checkpoint's tensors `names` hold every expert once: when they are
    packed into one tensor, their numbers are lost."""
    stored = {name for name in names if ".mlp.experts." in name and name.endswith("_proj.weight")}
    if not stored:  # no experts, or packed ones
        return
    layers = range(config.num_hidden_layers)
    if isinstance(config, Llada2Config):
        layers, count = layers[config.first_k_dense_replace :], config.n_routed_experts
    else:
        sparse = [n for n in layers if (n + 1) % config.decoder_sparse_step == 0]
        layers, count = [n for n in sparse if n not in config.mlp_only_layers], config.num_experts
    wanted = {
        f"model.layers.{layer}.mlp.experts.{expert}.{part}_proj.weight"
        for layer in layers
        for expert in range(count)
        for part in ("gate", "up", "down")
    }
    for what, wrong in (("missing", wanted - stored), ("unexpected", stored - wanted)):
        if wrong:
            raise ValueError(
                f"its weights do not fit its config.json, {count} experts in {len(layers)} layers: {what} keys "
                f"{', '.join(map(repr, sorted(wrong)[:3]))}, {len(wrong)} in all"
            )
