"""SDAR, Fast-dLLM v2, A2D, LLaDA2 and Open-dCoder from their original folders: what is loaded,
saved, run in parts, refused. Their logits are compared in test_golden.py."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_diffusion_models import by_parts, refuses, with_lora, words
from tiny import model_of
from transformers import DynamicCache

import softar
from softar.decoders.card import describe
from softar.diffusion.families import FAMILIES
from softar.diffusion.models import load, load_original
from softar.diffusion.net import facts, parts
from softar.training import prepare_trained

FOLDERS = Path(__file__).parent / "golden-block" / "checkpoints"
MASK, EOS, TURN_END = 300, 301, 302
# the family, its shift, its block length, its end tokens, and what has to be said of the folder
TOLD = {
    "a2d_llama": ("a2d", 0, None, (EOS,), {}),
    "a2d_qwen2": ("a2d", 0, None, (EOS,), {}),
    "a2d_qwen3": ("a2d", 0, None, (EOS,), {}),
    "fastv2_gqa": ("fast_dllm_v2", 1, 32, (TURN_END, EOS), {}),
    "fastv2_tied": ("fast_dllm_v2", 1, 32, (TURN_END, EOS), {}),
    "llada2_moe": ("llada2", 0, 32, (EOS,), {"mask_token_id": MASK}),
    "llada2_moe_b": ("llada2", 0, 32, (EOS,), {"mask_token_id": MASK}),
    "opendcoder": ("open_dcoder", 1, None, (EOS,), {}),
    "opendcoder_b": ("open_dcoder", 1, None, (EOS,), {}),
    "sdar_b4": ("sdar", 0, 4, (EOS, TURN_END), {}),
    "sdar_b8": ("sdar", 0, 8, (EOS, TURN_END), {}),
    "sdar_tied": ("sdar", 0, 4, (EOS, TURN_END), {}),
}
every_folder = pytest.mark.parametrize("name", TOLD)
one_of_each = pytest.mark.parametrize(
    "name", ["a2d_qwen3", "fastv2_tied", "llada2_moe_b", "opendcoder_b", "sdar_b8"]
)


def opened(name, folder=None, **options):
    return load(folder or FOLDERS / name, **(TOLD[name][-1] | options))


def ids(length=12, seed=1):
    return torch.randint(3, 290, (2, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(model, mask=None, positions=None, cache=None):
    return by_parts(model, ids(), mask, positions, cache)


def block_mask(length, block):
    blocks = torch.arange(length) // block
    return (blocks[None] <= blocks[:, None])[None, None]


def fields_of(folder):
    return json.loads((folder / "config.json").read_text())


def weights_of(folder):
    return {
        k: v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()
    }


def edited(name, folder, change=dict, drop=(), **fields):
    """A copy of a folder with other weights and fields of config.json."""
    shutil.copytree(FOLDERS / name, folder)
    save_file(change(weights_of(folder)), folder / "model.safetensors", metadata={"format": "pt"})
    config = {k: v for k, v in (fields_of(folder) | fields).items() if k not in drop}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@every_folder
def test_facts_come_from_the_folder(name):
    family, shift, block_length, ends, _ = TOLD[name]
    told = facts(opened(name)[0])
    assert (told.mask_id, told.eos_id, told.end_ids) == (MASK, ends[0], ends)
    assert (told.shift, told.vocab_size) == (shift, 320)
    assert (told.block_length, told.family) == (block_length, family)


@every_folder
def test_saved_again_it_is_the_original(name, tmp_path):
    """Names, tensors and every field, so that the original code reads it too."""
    model, _ = opened(name)
    model.save_pretrained(tmp_path)
    before, after = weights_of(FOLDERS / name), weights_of(tmp_path)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    old, new = fields_of(FOLDERS / name), fields_of(tmp_path)
    left = ("transformers_version", "torch_dtype", "attn_implementation")
    assert {k: new[k] for k in old if k not in left} == {
        k: v for k, v in old.items() if k not in left
    }
    again, _ = load(tmp_path)
    assert facts(again) == facts(model) and torch.equal(logits(again), logits(model))


@one_of_each
def test_shards_bfloat16_and_a_device_map(name, tmp_path):
    model, _ = opened(name, dtype="bfloat16")
    model.save_pretrained(tmp_path, max_shard_size="60KB")
    assert len([*tmp_path.glob("*.safetensors")]) > 2
    assert weights_of(tmp_path).keys() == weights_of(FOLDERS / name).keys()
    again, _ = load(tmp_path, device_map={"": "cpu"}, dtype="bfloat16")
    assert again.dtype == torch.bfloat16 and torch.equal(logits(again), logits(model))


def test_a_rotation_that_is_stretched_is_saved_as_it_was(tmp_path):
    yarn = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=128)
    model, _ = load(edited("sdar_b4", tmp_path / "a", rope_scaling=yarn))
    assert not torch.equal(logits(model), logits(opened("sdar_b4")[0]))
    model.save_pretrained(tmp_path / "b")
    assert fields_of(tmp_path / "b")["rope_scaling"] == yarn
    assert fields_of(tmp_path / "b")["rope_theta"] == 1e6
    assert torch.equal(logits(load(tmp_path / "b")[0]), logits(model))


@one_of_each
def test_no_mask_is_no_causal_mask(name):
    """Without a mask, and under one of four dimensions that is all True, every position sees every
    other; under one of blocks, those of its own and of earlier blocks."""
    model, _ = opened(name)
    whole = logits(model)
    everywhere = torch.ones(1, 1, 12, 12, dtype=torch.bool)
    torch.testing.assert_close(logits(model, everywhere), whole, atol=1e-4, rtol=0)
    torch.testing.assert_close(logits(model, torch.ones(2, 12)), whole, atol=1e-4, rtol=0)
    one_block = logits(model, block_mask(12, 4))
    x = ids()
    with torch.no_grad():
        first = by_parts(model, x[:, :4])
    torch.testing.assert_close(one_block[:, :4], first, atol=1e-4, rtol=0)
    assert not torch.allclose(one_block[:, :4], whole[:, :4], atol=1e-2)


@one_of_each
def test_attention_of_every_implementation_takes_a_mask_of_blocks(name):
    model, _ = opened(name)
    mask = block_mask(12, 4)
    eager, _ = opened(name, attn_implementation="eager")
    assert eager.config._attn_implementation == "eager"
    torch.testing.assert_close(logits(eager, mask), logits(model, mask), atol=1e-4, rtol=0)
    torch.testing.assert_close(logits(eager), logits(model), atol=1e-4, rtol=0)
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(
        ValueError, match=r"attn_implementation='flash_attention_2' takes no mask of"
    ):
        logits(model, mask)


@one_of_each
def test_a_block_against_a_cache_of_those_before_it(name):
    model, _ = opened(name)
    net, mask, columns, x = parts(model), block_mask(12, 4), torch.arange(12)[None], ids()
    memory = DynamicCache()
    with torch.no_grad():
        embeds = net.embedding(x)
        net.body(embeds[:, :8], mask[..., :8, :8], columns[:, :8], memory)
        block = net.body(embeds[:, 8:], mask[..., 8:, :], columns[:, 8:], memory)
    torch.testing.assert_close(net.head(block), logits(model, mask)[:, 8:], atol=1e-4, rtol=0)


@one_of_each
def test_adapters(name, tmp_path):
    base = tmp_path / "base"
    opened(name)[0].save_pretrained(base)
    model, _ = load(base)
    known, bare = facts(model), logits(model)
    wrapped = with_lora(model)
    assert facts(wrapped) == known and not torch.allclose(logits(wrapped), bare, atol=1e-3)
    wrapped.save_pretrained(tmp_path / "adapter")
    again, _ = load(tmp_path / "adapter")
    assert facts(again) == known and torch.equal(logits(again), logits(wrapped))
    merged = wrapped.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    assert weights_of(tmp_path / "merged").keys() == weights_of(base).keys()
    again, _ = load(tmp_path / "merged")
    torch.testing.assert_close(logits(again), logits(merged), atol=0, rtol=0)


def test_experts_of_sdar(tmp_path):
    """Its 30B is Qwen3-MoE; each expert has matrices of its own on disk."""
    family = FAMILIES["sdar_moe"]
    sizes = dict(hidden_size=16, intermediate_size=24, moe_intermediate_size=8, num_experts=4)
    heads = dict(num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=8)
    config = family.config(
        **sizes, **heads, num_experts_per_tok=2, vocab_size=320, block_length=8, mask_token_id=MASK
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = family.model(config).eval()
    model.save_pretrained(tmp_path)
    names = weights_of(tmp_path).keys()
    assert "model.layers.1.mlp.experts.3.up_proj.weight" in names and len(names) == 2 * (9 + 12) + 3
    saved = fields_of(tmp_path)
    assert (saved["block_size"], saved["model_type"]) == (8, "sdar_moe")
    # under the name that the original code reads
    assert saved["num_experts"] == 4 and "num_local_experts" not in saved
    assert saved["architectures"] == ["SDARMoeForCausalLM"]
    again, _ = load(tmp_path)
    assert (facts(again).block_length, facts(again).family) == (8, "sdar")
    assert torch.equal(logits(again), logits(model))
    tensors = weights_of(tmp_path)
    del tensors["model.layers.1.mlp.experts.2.up_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    refuses(tmp_path, "4 experts in 2 layers: missing keys", "layers.1.mlp.experts.2.up_proj")
    for field in ("norm_topk_prob", "num_experts", "num_experts_per_tok"):
        fields = {k: v for k, v in saved.items() if k != field}
        (tmp_path / "config.json").write_text(json.dumps(fields))
        refuses(tmp_path, f"says no {field}")


@one_of_each
def test_a_checkpoint_of_the_trainer_is_taken_up(name, tmp_path):
    """It is under the original names."""
    model, _ = opened(name)
    before = logits(model)
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.5)
    load_original(model, tmp_path)
    assert torch.equal(logits(model), before)
    tensors = weights_of(tmp_path)
    save_file({**tensors, "more": torch.ones(1)}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"resume_from_checkpoint=.* does not fit.*'more'"):
        load_original(model, tmp_path)


# -- which loader


@every_folder
def test_causal_models_and_these_each_have_one_loader(name, tmp_path):
    with pytest.raises(ValueError, match=r"use softar\.diffusion\.load"):
        softar.load(FOLDERS / name)
    opened(name)[0].save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"use softar\.diffusion\.load"):
        softar.load(tmp_path)


@pytest.mark.parametrize("arch", ["qwen2", "qwen3", "llama", "gemma3"])
def test_a_causal_folder_is_sent_to_softar_load(arch, tmp_path):
    model_of(arch).save_pretrained(tmp_path)
    refuses(tmp_path, "use softar.load")
    # by its type alone
    fields = {k: v for k, v in fields_of(tmp_path).items() if k != "architectures"}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    refuses(tmp_path, "use softar.load")


@pytest.mark.parametrize(
    "fields",
    [
        dict(model_type="nemotron_diffusion", architectures=["NemotronForCausalLM"]),
        dict(model_type="sdar2", architectures=["SDAR2ForCausalLM"]),
        dict(model_type="diffusion_gemma2", architectures=["DiffusionGemma2ForCausalLM"]),
    ],
    ids=str,
)
def test_what_no_loader_opens_is_sent_to_and_fro_by_none(fields, tmp_path):
    """softar.load says that it fills masks; then softar.diffusion.load must not send it back."""
    folder = edited("sdar_b4", tmp_path / "a", **fields)
    with pytest.raises(ValueError) as caught:
        load(folder)
    assert "use softar.load" not in str(caught.value)
    assert f"model_type={fields['model_type']!r}" in str(caught.value)


def test_a_folder_that_says_no_more_than_its_base_is_opened_by_its_kind(tmp_path):
    folder = tmp_path / "a"
    shutil.copytree(FOLDERS / "opendcoder", folder)
    (folder / "generation_config.json").unlink()
    refuses(folder, "use softar.load", "kind=, one of ['a2d'")
    model, _ = load(folder, kind="open_dcoder", mask_token_id=MASK)
    assert facts(model) == facts(opened("opendcoder")[0])
    assert torch.equal(logits(model), logits(opened("opendcoder")[0]))
    a2d, _ = load(folder, kind="a2d", mask_token_id=MASK, block_length=8)
    told = facts(a2d)
    assert (told.shift, told.block_length, told.family) == (0, 8, "a2d")
    a2d.save_pretrained(tmp_path / "b")
    assert facts(load(tmp_path / "b")[0]) == facts(a2d)
    assert fields_of(tmp_path / "b")["architectures"] == ["A2DQwen2LMHeadModel"]
    model.config.mask_token_id = None
    model.save_pretrained(tmp_path / "c")
    refuses(tmp_path / "c", "is_causal=False", "say kind=")


def test_what_was_said_of_an_adapters_base_is_said_again(tmp_path):
    """Of the folder, and of weights that are drawn; also where the adapter is trained on."""
    said = [("a2d_qwen3", dict(kind="a2d", block_length=8, shift=1)), (None, dict(seed=3))]
    for number, (folder, how) in enumerate(said):
        folder = "mnns-diffusion-tiny" if folder is None else FOLDERS / folder
        base, _ = load(folder, **how)
        wanted, told = base.get_input_embeddings().weight.detach().clone(), facts(base)
        model = with_lora(base)
        for place in (tmp_path / f"{number}", tmp_path / f"{number}-again"):
            prepare_trained("X", model)
            model.save_pretrained(place)
            model, _ = load(place)
            assert facts(model) == told
            assert torch.equal(model.get_input_embeddings().weight, wanted)


def test_what_the_folder_does_not_say_the_caller_does(tmp_path):
    model, _ = opened("a2d_qwen3", block_length=8, shift=1)
    told = facts(model)
    assert (told.shift, told.block_length, told.family) == (1, 8, "a2d")
    named = edited("a2d_qwen3", tmp_path / "a", block_size=8)
    assert facts(opened("a2d_qwen3", named)[0]).block_length == 8
    model, _ = opened("llada2_moe", block_length=16, eos_token_id=TURN_END)
    assert facts(model).block_length == 16 and facts(model).eos_id == TURN_END
    # what it says may be said once more
    same = dict(mask_token_id=MASK, block_length=4, shift=0, kind="sdar", eos_token_id=EOS)
    assert facts(opened("sdar_b4", **same)[0]) == facts(opened("sdar_b4")[0])


# -- tokenizers

SPECIALS = ["<|endoftext|>", "<|im_end|>", "<|role_end|>", "<|mask|>", "<|MASK|>", "|<MASK>|"]
SPECIALS += ["[MASK]"]


def tokenizer_of(size, mask_at=None, mask_token=None, **named):
    """`size` words, of which the last are special; one of them is the mask where it says so."""
    vocab = [f"w{i}" for i in range(size)]
    vocab[1], vocab[2], vocab[3] = SPECIALS[:3]
    if mask_at is not None:
        vocab[mask_at] = mask_token
    specials = [word for word in vocab if word in SPECIALS]
    return words(vocab, specials, eos_token=SPECIALS[0], pad_token=SPECIALS[0], **named)


@pytest.mark.parametrize(
    ("name", "token"),
    [
        ("sdar_b4", "<|MASK|>"),
        ("fastv2_tied", "|<MASK>|"),
        ("llada2_moe", "<|mask|>"),
        ("a2d_qwen3", "<|mask|>"),
        ("opendcoder", "[MASK]"),
    ],
)
def test_the_tokenizer_knows_the_mask(name, token, tmp_path):
    """Its file names the mask token as the family spells it, or not at all; then what the caller
    had to say is known."""
    shutil.copytree(FOLDERS / name, tmp_path / "a")
    for file in ("tokenizer_config.json", "added_tokens.json"):
        (tmp_path / "a" / file).unlink(missing_ok=True)
    tokenizer_of(310, MASK, token).save_pretrained(tmp_path / "a")
    model, tokenizer = load(tmp_path / "a")
    assert facts(model).mask_id == tokenizer.mask_token_id == MASK
    assert (tokenizer.mask_token, tokenizer.padding_side) == (token, "left")
    assert tokenizer(token)["input_ids"] == [MASK]
    assert 2 in facts(model).end_ids and 3 in facts(model).end_ids  # the ends of a turn
    tokenizer.save_pretrained(tmp_path / "b")
    model.save_pretrained(tmp_path / "b")
    again, tokenizer = load(tmp_path / "b")
    assert facts(again) == facts(model) and tokenizer.mask_token_id == MASK


@pytest.mark.parametrize(("name", "token"), [("a2d_qwen2", "<|mask|>"), ("opendcoder", "[MASK]")])
def test_a_mask_token_that_is_registered_when_loaded(name, token, tmp_path):
    """The next id behind the tokenizer's own, as dllm and Open-dLLM do it."""
    shutil.copytree(FOLDERS / name, tmp_path / "a")
    (tmp_path / "a" / "tokenizer_config.json").unlink(missing_ok=True)
    tokenizer_of(MASK).save_pretrained(tmp_path / "a")
    model, tokenizer = load(tmp_path / "a")
    assert (
        (tokenizer.mask_token, tokenizer.mask_token_id)
        == (token, MASK)
        == (token, facts(model).mask_id)
    )
    if name == "a2d_qwen2":
        tokenizer_of(320).save_pretrained(tmp_path / "a")
        refuses(tmp_path / "a", "mask_token_id=320 is no id in the vocabulary of 320")


@pytest.mark.parametrize("name", ["fastv2_tied", "llada2_moe", "sdar_b4"])
def test_the_released_mask_id_is_not_taken_for_a_word(name, tmp_path, monkeypatch):
    """Of a tokenizer that has another token there."""
    monkeypatch.setattr(
        FAMILIES[fields_of(FOLDERS / name)["model_type"]].config, "usual_mask_id", 9
    )
    folder = edited(name, tmp_path / "a", drop=["mask_token_id"])
    for file in ("tokenizer_config.json", "added_tokens.json"):
        (folder / file).unlink(missing_ok=True)
    tokenizer_of(310).save_pretrained(folder)
    refuses(folder, "mask_token_id=9 of the released models is 'w9' to its tokenizer")
    assert facts(load(folder, mask_token_id=MASK)[0]).mask_id == MASK


@pytest.mark.parametrize(("name", "token"), [("a2d_qwen2", "<|mask|>"), ("opendcoder", "[MASK]")])
def test_the_tokenizer_of_an_adapter(name, token, tmp_path):
    """It gets the mask token as the base's does, and may not name another."""
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    shutil.copytree(FOLDERS / name, base)
    (base / "tokenizer_config.json").unlink(missing_ok=True)
    tokenizer_of(MASK).save_pretrained(base)
    with_lora(load(base)[0]).save_pretrained(adapter)
    tokenizer_of(MASK).save_pretrained(adapter)
    model, tokenizer = load(adapter)
    assert (
        (tokenizer.mask_token, tokenizer.mask_token_id) == (token, MASK) == (token, facts(model)[0])
    )
    another = tokenizer_of(310, 305, token)
    another.mask_token = token
    another.save_pretrained(adapter)
    refuses(adapter, "300 by the model's configuration, 305 by the tokenizer")


def test_chats(tmp_path):
    qwen3 = (
        "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"
        "{% if enable_thinking is defined and enable_thinking is false %}<think></think>{% endif %}"
    )
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}]
    for name, template, wanted in (
        ("a2d_qwen3", qwen3, "<|im_start|>s<|im_end|><|im_start|>q<|im_end|><think></think>"),
        ("sdar_b4", qwen3, "<|im_start|>s<|im_end|><|im_start|>q<|im_end|>"),
        (
            "llada2_moe",
            None,
            "<role>SYSTEM</role>s<|role_end|><role>HUMAN</role>q<|role_end|><role>ASSISTANT</role>",
        ),
    ):
        folder = tmp_path / name
        shutil.copytree(FOLDERS / name, folder)
        tokenizer_of(310, chat_template=template).save_pretrained(folder)
        for _ in range(2):  # saved and opened again it says the same
            _, tokenizer = opened(name, folder, mask_token_id=MASK)
            chat = dict(tokenize=False, add_generation_prompt=True)
            assert tokenizer.apply_chat_template(messages, **chat) == wanted
            tokenizer.save_pretrained(folder)
        if template is not None:
            thinks = tokenizer.apply_chat_template(messages, enable_thinking=True, **chat)
            assert "<think>" not in thinks


# -- bad input


def without(part):
    return lambda weights: {k: v for k, v in weights.items() if part not in k}


def more(weights):
    ninth = {k.replace("experts.7", "experts.8"): v.clone() for k, v in weights.items()}
    return ninth | weights


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (without("2.mlp.experts.3.gate"), "8 experts in 2 layers: missing keys"),
        (without("2.mlp.experts.3."), "2.mlp.experts.3.down_proj.weight"),
        (without(".mlp.experts.7."), "6 in all"),
        (without(".mlp.experts."), "missing keys"),
        (more, "8 experts in 2 layers: unexpected keys"),
        # of eight, the numbers of which do not go from 0 to 7
        (lambda w: {k.replace("experts.3.", "experts.8."): v for k, v in w.items()}, "experts.3."),
        (without("1.attention.query_key_value"), "missing keys"),
        (without("expert_bias"), "missing keys"),
    ],
)
def test_missing_experts_are_named(change, says, tmp_path):
    folder = edited("llada2_moe", tmp_path / "a", change)
    refuses(folder, says, mask_token_id=MASK)
    # an index from before, which transformers does not look at
    where = dict.fromkeys(weights_of(FOLDERS / "llada2_moe"), "old.safetensors")
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": where})
    )
    refuses(folder, says, mask_token_id=MASK)
    # the file has another name, or there is an index that promises more than its file holds
    file = folder / "model.safetensors"
    shutil.copy(file, folder / "model.fp16.safetensors")
    refuses(folder, says, mask_token_id=MASK, variant="fp16")
    file.rename(folder / "old.safetensors")
    refuses(folder, says, mask_token_id=MASK)


@pytest.mark.parametrize(
    ("name", "fields", "said", "says"),
    [
        ("sdar_b4", dict(block_size=0), {}, "block_length=0 must be a whole number"),
        ("sdar_b4", dict(block_size="four"), {}, "block_length='four' must be a whole number"),
        ("sdar_b4", dict(block_size=True), {}, "block_length=True must be a whole number"),
        (
            "sdar_b4",
            dict(block_length=8),
            {},
            "8 by block_length of its config.json, 4 by block_size",
        ),
        (
            "sdar_b4",
            {},
            dict(block_length=8),
            "8 by the argument, 4 by block_size of its config.json",
        ),
        ("fastv2_tied", {}, dict(block_length=8), "8 by the argument, 32 by bd_size"),
        ("opendcoder", {}, dict(block_length=8), "open_dcoder reads the whole canvas"),
        ("a2d_qwen3", {}, dict(block_length=-1), "block_length=-1 must be"),
        (
            "sdar_b4",
            dict(mask_token_id=320),
            {},
            "mask_token_id=320 is no id in the vocabulary of 320",
        ),
        ("sdar_b4", dict(mask_token_id="300"), {}, "mask_token_id='300' is no id"),
        ("llada2_moe", {}, {}, "mask_token_id=156895 is no id in the vocabulary of 320"),
        ("llada2_moe", {}, dict(mask_token_id=-1), "mask_token_id=-1 is no id"),
        (
            "fastv2_tied",
            {},
            dict(mask_token_id=3),
            "3 by the argument, 300 by its added_tokens.json",
        ),
        ("a2d_qwen3", {}, dict(mask_token_id=3), "300 by its tokenizer_config.json"),
        ("opendcoder", {}, dict(mask_token_id=3), "300 by its generation_config.json"),
        ("sdar_b4", {}, dict(eos_token_id=5), "5 by the argument, 301 by eos_token_id"),
        ("llada2_moe", {}, dict(mask_token_id=300, eos_token_id=400), "eos_token_id=400 is no id"),
        ("fastv2_tied", {}, dict(shift=0), "1 by the family fast_dllm_v2"),
        ("sdar_b4", {}, dict(shift=1), "0 by the family sdar"),
        ("a2d_qwen3", {}, dict(shift=2), "shift=2 must be 0, or 1"),
        ("a2d_qwen3", {}, dict(kind="sdar"), "model_type='a2d-qwen3', and kind='sdar' is one of"),
        ("a2d_qwen3", {}, dict(kind="nix"), "kind='nix' is unknown"),
        ("sdar_b4", dict(use_sliding_window=True), {}, "use_sliding_window=True is not supported"),
        ("sdar_b4", dict(layer_types=["full_attention", "sliding_attention"]), {}, "layer_types=["),
        ("a2d_llama", dict(layer_types="sliding_attention"), {}, "layer_types='sliding_attention'"),
        ("opendcoder", dict(block_length=8), {}, "open_dcoder reads the whole canvas"),
        ("opendcoder", dict(block_size=8), {}, "open_dcoder reads the whole canvas"),
        (
            "a2d_llama",
            dict(bd_size=8, block_size=4),
            {},
            "4 by block_size of its config.json, 8 by",
        ),
        ("sdar_b4", dict(eos_token_id=[EOS, 320]), {}, "eos_token_id=320 is no id"),
        (
            "sdar_b4",
            dict(eos_token_id=[EOS, MASK]),
            {},
            "mask_token_id=300 is an end token as well",
        ),
        ("llada2_moe", dict(pad_token_id=MASK), dict(mask_token_id=MASK), "300 is an end token"),
        (
            "sdar_b4",
            dict(rope_parameters=dict(rope_theta=5.0)),
            {},
            "1000000 by rope_theta of its config.json, 5.0 by rope_theta of the rope_parameters",
        ),
        (
            "llada2_moe",
            dict(n_routed_experts=4),
            {},
            "4 by n_routed_experts of its config.json, 8 by num_experts",
        ),
        ("fastv2_tied", {}, dict(shift=True), "shift=True must be a whole number or None"),
        ("sdar_b4", {}, dict(mask_token_id=True), "mask_token_id=True must be a whole number"),
        ("llada2_moe", {}, dict(eos_token_id=[EOS]), "eos_token_id=[301] must be a whole number"),
        ("sdar_b4", {}, dict(kind=5), "kind=5 must be text"),
        # a field that transformers would change, past all that is checked here
        ("sdar_b4", {}, dict(block_size=8), "takes no keyword 'block_size'"),
        ("fastv2_gqa", {}, dict(hidden_act="gelu"), "takes no keyword 'hidden_act'"),
        ("sdar_b4", {}, dict(config={}), "config={} is not to be changed"),
        ("sdar_b4", {}, dict(gguf_file="x.gguf"), "use softar.load"),
        ("fastv2_gqa", dict(hidden_act="gelu"), {}, "hidden_act='gelu' is not supported"),
        ("llada2_moe", dict(n_group=3), {}, "num_experts=8 in n_group=3 groups"),
        ("llada2_moe", dict(n_group=0), {}, "num_experts=8 in n_group=0 groups"),
        ("llada2_moe", dict(topk_group=0), {}, "topk_group=0 are kept"),
        ("llada2_moe", dict(num_experts_per_tok=5), {}, "num_experts_per_tok=5 is more than the 4"),
        # of one expert the original leaves the weight as it is
        ("llada2_moe", dict(num_experts_per_tok=1), {}, "num_experts_per_tok=1 must be 2 or more"),
        *(
            ("llada2_moe", {field: value}, {}, f"{field}={value!r} is not supported")
            for field, value in dict(
                use_bias=True,
                use_qkv_bias=True,
                use_qk_norm=False,
                score_function="softmax",
                norm_head=True,
                norm_softmax=True,
                norm_topk_prob=False,
                use_rmsnorm=False,
                moe_router_enable_expert_bias=False,
                use_sliding_window=True,
                using_split_qkv_in_self_attention=True,
                num_nextn_predict_layers=1,
            ).items()
        ),
    ],
)
def test_bad_input_is_one_line(name, fields, said, says, tmp_path):
    folder = edited(name, tmp_path / "a", **fields)
    with pytest.raises(ValueError) as caught:
        load(folder, **said)
    assert says in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "field"),
    [
        *(("llada2_moe", field) for field in ("num_experts", "n_group", "vocab_size")),
        *((name, "rope_theta") for name in ("llada2_moe", "sdar_b4", "a2d_llama", "opendcoder")),
        *((name, "rms_norm_eps") for name in ("llada2_moe", "fastv2_gqa", "a2d_qwen3")),
    ],
)
def test_sizes_that_config_json_lacks_are_not_made_up(name, field, tmp_path):
    refuses(edited(name, tmp_path / "a", drop=[field]), f"says no {field}")


@pytest.mark.parametrize("name", ["llada2_moe", "sdar_b4", "a2d_llama"])
def test_a_rotation_under_its_new_name(name, tmp_path):
    """As transformers 5 writes it. Saved again there is one name of it, the original."""
    fields = fields_of(FOLDERS / name)
    named = {k: fields[k] for k in ("rope_theta", "partial_rotary_factor") if k in fields}
    rotation = named | {"rope_type": "default"}
    folder = edited(name, tmp_path / "a", drop=[*named, "rope_scaling"], rope_parameters=rotation)
    model, _ = opened(name, folder)
    assert torch.equal(logits(model), logits(opened(name)[0]))
    model.save_pretrained(tmp_path / "b")
    saved = fields_of(tmp_path / "b")
    assert {k: saved[k] for k in named} == named and "rope_parameters" not in saved


@pytest.mark.parametrize("name", ["sdar_b4", "a2d_qwen3", "opendcoder"])
def test_a_family_is_never_causal(name, tmp_path):
    """Whatever the folder of its base said."""
    model, _ = opened(name, edited(name, tmp_path / "a", is_causal=True))
    with torch.no_grad():
        assert torch.equal(model(ids()).logits, opened(name)[0](ids()).logits)


def test_a_head_of_its_own_where_it_is_to_be_the_embedding(tmp_path):
    """The original code would take the embedding, transformers takes the head."""

    def with_head(weights):
        return weights | {"lm_head.weight": weights["model.embed_tokens.weight"] + 1}

    folder = edited("sdar_tied", tmp_path / "a", with_head)
    refuses(folder, "tie_word_embeddings", "correct the one or the other")


@pytest.mark.parametrize("named", [5000, "x", [EOS, 320]])
def test_end_tokens_of_generation_config(named, tmp_path):
    folder = edited("sdar_b4", tmp_path / "a")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": named}))
    refuses(folder, "is no id in the vocabulary of 320")


def test_statements_where_nothing_is_to_be_said(tmp_path):
    with pytest.raises(ValueError, match="embedded and known"):
        load("mnns-diffusion-tiny", mask_token_id=3)


def test_each_original_folder_is_known_before_it_is_opened():
    """Open-dCoder's is a plain Qwen2 folder but for its generation_config.json."""
    folders = [*(Path(__file__).parent / "golden-block" / "checkpoints").iterdir()]
    assert len(folders) > 10
    assert {describe(str(folder)).kind for folder in folders} == {"diffusion"}
