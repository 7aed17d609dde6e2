"""Damaged folders: each is refused in one line that names it, or does no harm."""

import fractions
import re
import shutil

import damage
import pytest
import torch
from test_denoise import denoiser
from tiny import VOCAB, model_of, tokenizer_of
from transformers import BertConfig, BertForMaskedLM

from softar import diffusion
from softar.decoders.card import describe
from softar.diffusion import families
from softar.models import embedded, load, opening

IDS = torch.tensor([[1, 11, 12]])


def bert():
    sizes = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return BertForMaskedLM(BertConfig(vocab_size=VOCAB, eos_token_id=2, **sizes))


def of_family(model_type):
    family = families.FAMILIES[model_type]
    sizes = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
    experts = dict(n_routed_experts=4, moe_intermediate_size=8, num_experts_per_tok=2)
    sizes |= experts if family.has_experts else {}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        ids = dict(vocab_size=VOCAB, eos_token_id=2, mask_token_id=46)
        return family.model(family.config(num_key_value_heads=1, **ids, **sizes))


FAMILIES = {
    "llama": (load, model_of),
    "llada": (diffusion.load, denoiser),
    "bert": (diffusion.load, bert),
    "a2d": (diffusion.load, lambda: of_family("a2d-llama")),
    "llada2": (diffusion.load, lambda: of_family("llada2_moe")),
}


@pytest.fixture(scope="module", params=FAMILIES)
def whole(request, tmp_path_factory):
    """A loader, a folder that it opens, and the model's logits."""
    opener, build = FAMILIES[request.param]
    path = tmp_path_factory.mktemp(request.param)
    model = build()
    model.save_pretrained(path)
    tokenizer = tokenizer_of(model.config.vocab_size)
    tokenizer.mask_token = "w46"
    tokenizer.save_pretrained(path)
    return opener, path, opener(path)[0](IDS).logits.detach()


@pytest.mark.parametrize("name", [*damage.FILES, *damage.WEIGHTS])
def test_damaged_folder_is_refused_in_a_line_or_does_no_harm(name, whole, tmp_path):
    opener, path, wanted = whole
    shutil.copytree(path, folder := tmp_path / "model")
    (damage.FILES | damage.WEIGHTS)[name](folder)
    describe(str(folder))
    try:
        model = opener(folder)[0]
    except ValueError as error:
        assert "\n" not in str(error) and f"model={str(folder)!r} could not be loaded" in str(error)
        if name in damage.WEIGHTS:
            assert re.search(r"do not fit.*(missing|mismatched|unexpected) keys '", str(error))
    else:
        torch.testing.assert_close(model(IDS).logits, wanted, rtol=0, atol=0)
        assert name not in damage.WEIGHTS


def test_mistakes_of_softar_itself_are_not_taken_for_damage():
    with pytest.raises(TypeError), opening("some"):
        embedded.word_tokenizer(None)
    with pytest.raises(torch.OutOfMemoryError), opening("some"):
        raise torch.OutOfMemoryError
    with pytest.raises(ValueError, match="model='some' could not be loaded: ZeroDivisionError"):
        with opening("some"):
            fractions.Fraction(1, 0)


@pytest.mark.parametrize("name", ["v_head.summary.weight", "value_head.weight"])
def test_a_value_head_beside_the_weights_is_left_out_and_said_so(name, whole, tmp_path, caplog):
    """As TRL's policies of PPO are saved; the model is the same without it."""
    opener, path, wanted = whole
    folder = shutil.copytree(path, tmp_path / "model")
    damage.tensors(lambda state: state | {name: torch.zeros(1, 8)})(folder)
    torch.testing.assert_close(opener(folder)[0](IDS).logits, wanted, rtol=0, atol=0)
    told = [record.getMessage() for record in caplog.records if record.name == "softar"]
    assert any(f"{folder}: its {name!r}, a value head of RL, is left out" == line for line in told)
    damage.tensors(lambda state: state | {f"x_{name}": torch.zeros(1, 8)})(folder)
    if opener is load:  # a masked LM's checkpoint may have other heads
        with pytest.raises(ValueError, match=f"unexpected keys 'x_{name}'"):
            opener(folder)
