"""Autoregressive or masked-diffusion: told from the configuration, and said where the other kind is
needed."""

import json

import pytest
import torch
from test_denoise import denoiser
from tiny import ARCHS, model_of, tokenizer_of, with_lora
from transformers import GenerationConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import softar
from softar.diffusion.models import FAMILIES
from softar.models import check_autoregressive, diffusion_sign

MASKED = (
    dict(model_type="llada2_moe", architectures=["LLaDA2MoeModelLM"]),
    dict(model_type="sdar", architectures=["SDARForCausalLM"], mask_token_id=300),
    dict(model_type="a2d-qwen3", architectures=["A2DQwen3LMHeadModel"]),
    dict(model_type="Fast_dLLM_Qwen", architectures=["Fast_dLLM_QwenForCausalLM"]),
    dict(model_type="nemotron_diffusion"),
    dict(model_type="diffusion_gemma", architectures=["DiffusionGemmaForBlockDiffusion"]),
    dict(model_type="qwen2", architectures=["Qwen2ForCausalLM"], is_causal=False),
    dict(model_type="gemma3_text", use_bidirectional_attention=True),
    dict(model_type="gemma4_text", use_bidirectional_attention="all"),
    dict(model_type="qwen2", architectures=["Qwen2ForCausalLM"], mask_token_id=0),
    dict(model_type="bert", architectures=["BertForMaskedLM"]),
    *(dict(model_type=family) for family in FAMILIES),
)


@pytest.mark.parametrize("settings", MASKED, ids=str)
def test_masked_diffusion_checkpoints_are_sent_to_the_other_loader(settings, tmp_path):
    assert diffusion_sign(settings)
    model_of().save_pretrained(tmp_path)
    tokenizer_of().save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    with pytest.raises(ValueError, match=r"masked-diffusion model: use softar\.diffusion\.load"):
        softar.load(tmp_path)


def test_no_configuration_of_transformers_is_taken_for_one_that_fills_masks():
    taken = [name for name in CONFIG_MAPPING if diffusion_sign({"model_type": name})]
    assert taken == ["diffusion_gemma", "diffusion_gemma_text"]
    for arch in ARCHS:
        check_autoregressive(model_of(arch))
    assert (
        diffusion_sign({"model_type": "gemma4_text", "use_bidirectional_attention": "vision"})
        is None
    )


def test_a_mask_token_in_the_generation_config_counts(tmp_path):
    """As Open-dCoder has it: in all else its folder is Qwen2's."""
    model = model_of("qwen2")
    tokenizer_of().save_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    assert softar.load(tmp_path)
    GenerationConfig(mask_token_id=60, eos_token_id=2).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"mask_token_id=60.*use softar\.diffusion\.load"):
        softar.load(tmp_path)


@pytest.mark.parametrize("family", ["llada", "dream"])
@pytest.mark.parametrize("wrap", [lambda model: model, with_lora], ids=["plain", "peft"])
def test_a_masked_diffusion_model_is_not_decoded_from_left_to_right(family, wrap):
    model, ids = wrap(denoiser(family)), torch.tensor([[5, 11, 12]])
    with pytest.raises(ValueError, match=r"masked-diffusion.*softar\.diffusion\.denoise"):
        softar.generate(model, ids, max_new_tokens=2)
    with pytest.raises(ValueError, match="of another kind"):
        check_autoregressive(model, "take one of another kind")
