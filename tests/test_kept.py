"""Models stay open for as long as their files stay the same."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

import softar
from softar import make_decoder
from softar.diffusion import load as load_diffusion
from softar.models.stamp import stamp_of

PROMPT = "<bos> D4 D8 D1 D3 ->"


def save(model, tokenizer, folder):
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def shake(model, std=0.5):
    for parameter in model.parameters():
        parameter.data += std * torch.randn(parameter.shape, generator=RNG)


RNG = torch.Generator().manual_seed(0)
KINDS = {
    "autoregressive": ("mnns-soft-tiny", softar.load, "discrete"),
    "diffusion": ("mnns-diffusion-tiny", load_diffusion, "hard"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_decoder_has_the_weights_that_the_folder_has_now(kind, tmp_path):
    name, load, decoder = KINDS[kind]
    model, tokenizer = load(name)
    for _ in range(3):  # training goes on, into the same folder
        save(model, tokenizer, tmp_path)
        made = make_decoder(f"{tmp_path}={decoder}", max_new_tokens=4)
        opened = dict(made.model.named_parameters())
        assert all(torch.equal(opened[key], value) for key, value in model.named_parameters())
        assert make_decoder(f"{tmp_path}={decoder}", max_new_tokens=4).model is made.model
        shake(model)


def test_the_base_of_an_adapter_counts_too(tmp_path):
    base, tokenizer = softar.load("mnns-soft-tiny")
    save(base, tokenizer, tmp_path / "base")
    adapter = get_peft_model(
        softar.load(tmp_path / "base")[0], LoraConfig(target_modules=["q_proj"])
    )
    adapter.save_pretrained(tmp_path / "adapter")
    before = stamp_of(tmp_path / "adapter")
    assert before == stamp_of(tmp_path / "adapter")
    shake(base)
    save(base, tokenizer, tmp_path / "base")
    assert stamp_of(tmp_path / "adapter") != before
    assert stamp_of("owner/name") == stamp_of("mnns-tiny") == ()
