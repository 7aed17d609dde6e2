"""Masked-diffusion models from folders in their published layouts: what is loaded, saved, run in
parts, refused."""

import json
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertLMHeadModel,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    ModernBertConfig,
    ModernBertForMaskedLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    RobertaConfig,
    RobertaForMaskedLM,
)

import softar
from softar.diffusion.models import MODELS, load
from softar.diffusion.net import Facts, facts, parts
from softar.diffusion.reader import WindowCache

VOCAB, LENGTH = 64, 12
BOS, EOS, MASK, HEAD, HEAD_END, EOT = 58, 59, 60, 61, 62, 63
SIZES = dict(
    vocab_size=VOCAB,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    eos_token_id=EOS,
    pad_token_id=EOS,
    initializer_range=0.3,
)
LLADA_LEAVES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "q_proj",
    "self_attn.k_proj": "k_proj",
    "self_attn.v_proj": "v_proj",
    "self_attn.o_proj": "attn_out",
    "post_attention_layernorm": "ff_norm",
    "mlp.gate_proj": "ff_proj",
    "mlp.up_proj": "up_proj",
    "mlp.down_proj": "ff_out",
}
LLADA_TOP = {
    "model.embed_tokens.weight": "model.transformer.wte.weight",
    "model.norm.weight": "model.transformer.ln_f.weight",
    "lm_head.weight": "model.transformer.ff_out.weight",
}


def stock(kind="llada", seed=0, dtype=torch.float32, **changes):
    """A random Llama or Qwen2 whose norms and biases matter too."""
    theta = {
        "rope_parameters": {"rope_type": "default", "rope_theta": 5e5 if kind == "llada" else 1e6}
    }
    sizes = SIZES | {"tie_word_embeddings": False, "rms_norm_eps": 1e-5} | theta | changes
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = (
            LlamaForCausalLM(LlamaConfig(**sizes))
            if kind == "llada"
            else Qwen2ForCausalLM(Qwen2Config(**sizes))
        )
        for name, p in model.named_parameters():
            if "norm" in name or "bias" in name:
                p.data.normal_(1.0, 0.3)
    return model.to(dtype).eval()


def llada_name(name):
    if name in LLADA_TOP:
        return LLADA_TOP[name]
    layer, leaf = name.removeprefix("model.layers.").removesuffix(".weight").split(".", 1)
    return f"model.transformer.blocks.{layer}.{LLADA_LEAVES[leaf]}.weight"


def published(model, kind):
    """Parameters and configuration as the hub's folder has them."""
    c, code = model.config, f"{kind.lower()}.Model"
    tensors = {k: v.clone() for k, v in model.state_dict().items()}
    if c.tie_word_embeddings:
        del tensors["lm_head.weight"]
    shared = dict(
        model_type=kind,
        auto_map={"AutoConfig": f"configuration_{code}", "AutoModel": f"modeling_{code}"},
        vocab_size=c.vocab_size,
        mask_token_id=MASK,
        eos_token_id=EOS,
        pad_token_id=EOS,
        rms_norm_eps=c.rms_norm_eps,
        rope_theta=c.rope_parameters["rope_theta"],
        attention_dropout=0.0,
        transformers_version="4.46.2",
    )
    if kind == "Dream":
        return tensors, shared | dict(
            architectures=["DreamModel"],
            bos_token_id=EOS,
            hidden_act="silu",
            hidden_size=c.hidden_size,
            initializer_range=0.02,
            intermediate_size=c.intermediate_size,
            max_position_embeddings=c.max_position_embeddings,
            max_window_layers=c.num_hidden_layers,
            num_attention_heads=c.num_attention_heads,
            num_hidden_layers=c.num_hidden_layers,
            num_key_value_heads=c.num_key_value_heads,
            rope_scaling=None,
            sliding_window=None,
            tie_word_embeddings=c.tie_word_embeddings,
            use_cache=True,
            use_sliding_window=False,
        )
    return {llada_name(k): v for k, v in tensors.items()}, shared | dict(
        activation_type="silu",
        alibi=False,
        alibi_bias_max=8.0,
        architectures=["LLaDAModelLM"],
        attention_layer_norm=False,
        attention_layer_norm_with_affine=True,
        bias_for_layer_norm=False,
        block_group_size=1,
        block_type="llama",
        d_model=c.hidden_size,
        embedding_dropout=0.0,
        embedding_size=c.vocab_size,
        flash_attention=False,
        include_bias=False,
        include_qkv_bias=False,
        init_cutoff_factor=None,
        init_device="meta",
        init_fn="mitchell",
        init_std=0.02,
        input_emb_norm=False,
        layer_norm_type="rms",
        layer_norm_with_affine=True,
        max_sequence_length=c.max_position_embeddings,
        mlp_hidden_size=c.intermediate_size,
        mlp_ratio=4,
        multi_query_attention=None,
        n_heads=c.num_attention_heads,
        n_kv_heads=c.num_key_value_heads,
        n_layers=c.num_hidden_layers,
        precision="amp_bf16",
        residual_dropout=0.0,
        rope=True,
        rope_full_precision=True,
        scale_logits=False,
        use_cache=False,
        weight_tying=c.tie_word_embeddings,
    )


def write(folder, model, kind="llada", shards=1, drop=(), **fields):
    """A folder in the published layout; `fields` go into config.json, `drop` leaves it. Remote code
    would stop us."""
    folder.mkdir(exist_ok=True)
    tensors, config = published(model, kind)
    config = {k: v for k, v in (config | fields).items() if k not in drop}
    (folder / "config.json").write_text(json.dumps(config))
    for file in ("configuration", "modeling", "tokenization"):
        (folder / f"{file}_{kind.lower()}.py").write_text("raise SystemExit('remote code ran')")
    if kind == "Dream":  # which names no mask token
        names = dict(_from_model_config=True, bos_token_id=EOS, eos_token_id=EOS, pad_token_id=EOS)
        (folder / "generation_config.json").write_text(json.dumps(names))
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    where = {
        k: f"model-{1 + i % shards:05}-of-{shards:05}.safetensors" for i, k in enumerate(tensors)
    }
    for file in set(where.values()):
        save_file(
            {k: tensors[k] for k in where if where[k] == file},
            folder / file,
            metadata={"format": "pt"},
        )
    index = {
        "metadata": {"total_size": sum(t.nbytes for t in tensors.values())},
        "weight_map": where,
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def ids(rows=2, length=LENGTH, seed=1):
    draw = torch.Generator().manual_seed(seed)
    x = torch.randint(0, BOS, (rows, length), generator=draw)
    return torch.where(torch.rand(x.shape, generator=draw) < 0.4, MASK, x)


@torch.no_grad()
def logits(model, x, mask=None, **kwargs):
    return model(x, attention_mask=mask, **kwargs).logits


@torch.no_grad()
def by_parts(model, x, mask=None, positions=None, cache=None, lo=0, hi=None):
    """Logits [B, T, V] of the window [lo, hi), by the model's parts."""
    p = parts(model)
    return p.head(p.body(p.embedding(x[:, lo:hi]), mask, positions, cache))


def padded(x, lengths):
    """The last n positions of each row are real. -> attention_mask, position_ids."""
    mask = (torch.arange(x.shape[1]) >= x.shape[1] - torch.tensor(lengths)[:, None]).long()
    return mask, (mask.cumsum(-1) - 1).clamp(min=0)


KINDS = ("llada", "Dream")
VARIANTS = {
    "plain": {"num_key_value_heads": 4},
    "grouped": {"num_key_value_heads": 2},
    "tied": {"tie_word_embeddings": True},
}
every_kind = pytest.mark.parametrize("kind", KINDS)
every_variant = pytest.mark.parametrize("variant", VARIANTS)


# LLaDA and Dream are Llama and Qwen2, read bidirectionally


@every_kind
@every_variant
def test_logits_are_the_stock_models(kind, variant, tmp_path):
    reference = stock(kind, **VARIANTS[variant])
    model, tokenizer = load(write(tmp_path, reference, kind))
    assert tokenizer is None and not model.training and model.device.type == "cpu"
    assert model.config.num_key_value_heads == reference.config.num_key_value_heads
    x = ids()
    expected = logits(reference, x, is_causal=False)
    for got in (logits(model, x), logits(model, x, use_cache=False), by_parts(model, x)):
        assert torch.equal(got, expected)
    assert not torch.allclose(logits(reference, x), expected)  # causal


@every_kind
def test_padding_is_not_seen(kind, tmp_path):
    reference = stock(kind)
    model, _ = load(write(tmp_path, reference, kind))
    x = ids(3)
    lengths = (LENGTH, 7, 4)
    mask, positions = padded(x, lengths)
    expected = logits(reference, x, mask, is_causal=False)
    assert torch.equal(logits(model, x, mask), expected) and expected.isfinite().all()
    for got in (expected, by_parts(model, x, mask), by_parts(model, x, mask, positions)):
        for row, n in enumerate(lengths):
            torch.testing.assert_close(
                got[row, -n:], logits(model, x[row : row + 1, -n:])[0], atol=1e-5, rtol=1e-4
            )


@every_kind
@every_variant
def test_saving_gives_back_the_published_layout(kind, variant, tmp_path):
    write(tmp_path / "a", stock(kind, **VARIANTS[variant]), kind)
    model, _ = load(tmp_path / "a")
    model.save_pretrained(tmp_path / "b")
    before, after = (load_file(tmp_path / folder / "model.safetensors") for folder in "ab")
    assert before.keys() == after.keys()
    assert all(
        torch.equal(before[k], after[k]) and before[k].dtype == after[k].dtype for k in before
    )
    old, new = (json.loads((tmp_path / folder / "config.json").read_text()) for folder in "ab")
    for field in old.keys() - {
        "architectures",
        "auto_map",
        "transformers_version",
        "_from_model_config",
    }:
        assert new.get(field) == old[field], field
    assert (
        kind == "Dream"
        or not {"hidden_size", "num_hidden_layers", "tie_word_embeddings"} & new.keys()
    )
    x = ids()
    assert torch.equal(logits(load(tmp_path / "b")[0], x), logits(model, x))
    model.save_pretrained(tmp_path / "c", max_shard_size="20KB")
    where = json.loads((tmp_path / "c" / "model.safetensors.index.json").read_text())["weight_map"]
    assert where.keys() == before.keys() and len(set(where.values())) > 1
    assert torch.equal(logits(load(tmp_path / "c")[0], x), logits(model, x))


@every_kind
def test_shards(kind, tmp_path):
    reference = stock(kind)
    model, _ = load(write(tmp_path, reference, kind, shards=3))
    assert torch.equal(logits(model, ids()), logits(reference, ids(), is_causal=False))


@every_kind
@pytest.mark.parametrize("fast", [True, False])
def test_half_precision_is_kept_where_the_cpu_computes_it(kind, fast, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cpu._is_avx512_bf16_supported", lambda: fast)
    model = load(write(tmp_path, stock(kind, dtype=torch.bfloat16), kind))[0]
    assert model.dtype == (torch.bfloat16 if fast else torch.float32)


@every_kind
def test_dtype(kind, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cpu._is_avx512_bf16_supported", lambda: True)
    half = write(
        tmp_path / "half", stock(kind, dtype=torch.bfloat16), kind
    )  # config.json names no dtype, as LLaDA-8B's
    named = write(
        tmp_path / "named", stock(kind, dtype=torch.bfloat16), kind, torch_dtype="bfloat16"
    )
    full = write(tmp_path / "full", stock(kind), kind, torch_dtype="float32")
    assert (
        load(half)[0].dtype == load(named)[0].dtype == torch.bfloat16
        and load(full)[0].dtype == torch.float32
    )
    as_stored = load(full, dtype="bfloat16")[0]
    assert as_stored.dtype == torch.bfloat16
    assert torch.equal(logits(as_stored, ids()), logits(load(half)[0], ids()))
    assert load(half, dtype=torch.float32)[0].dtype == torch.float32
    assert load(half, torch_dtype="float32")[0].dtype == torch.float32
    assert load("mnns-diffusion-tiny", torch_dtype="bfloat16")[0].dtype == torch.bfloat16
    assert load("mnns-diffusion-tiny", seed=1, torch_dtype="bfloat16")[0].dtype == torch.bfloat16


# The cache of a canvas


def mixed(old, new, lo, hi):
    return torch.cat([old[:, :lo], new[:, lo:hi], old[:, hi:]], 1)


@every_kind
def test_window_of_an_unchanged_canvas_is_the_full_forward(kind, tmp_path):
    model, _ = load(write(tmp_path, stock(kind), kind))
    x = ids()
    mask, positions = padded(x, (LENGTH, 8))
    for m, p in (
        (None, None),
        (None, torch.arange(LENGTH).expand(2, -1)),
        (mask, None),
        (mask, positions),
    ):
        cache, real = (
            WindowCache(),
            mask > 0 if m is not None else torch.ones(2, LENGTH, dtype=torch.bool),
        )
        full = by_parts(model, x, m, p, cache)
        assert torch.equal(full, by_parts(model, x, m, p))
        for lo, hi in ((5, LENGTH), (5, 9), (5, 6), (0, LENGTH), (LENGTH - 1, LENGTH)):
            cache.window = lo, hi
            got = by_parts(model, x, m, None if p is None else p[:, lo:hi], cache, lo, hi)
            torch.testing.assert_close(
                got[real[:, lo:hi]], full[:, lo:hi][real[:, lo:hi]], atol=1e-5, rtol=1e-4
            )


@every_kind
def test_window_mixes_stale_and_fresh_keys(kind, tmp_path):
    """In one layer keys and values depend on nothing but their own token, so stale ones are those
    of old tokens."""
    model, _ = load(write(tmp_path, stock(kind, num_hidden_layers=1), kind))
    old, new, newer = ids(seed=2), ids(seed=3), ids(seed=4)
    mask, _ = padded(old, (LENGTH, 10))
    cache = WindowCache()
    by_parts(model, old, mask, cache=cache)
    seen = old
    for x, lo, hi in ((new, 4, LENGTH), (newer, 4, 8), (new, 6, 10)):
        cache.window = lo, hi
        got = by_parts(model, x, mask, cache=cache, lo=lo, hi=hi)
        seen = mixed(seen, x, lo, hi)
        torch.testing.assert_close(got, by_parts(model, seen, mask)[:, lo:hi], atol=1e-5, rtol=1e-4)
        # the others are stale
        assert not torch.allclose(got, by_parts(model, x, mask)[:, lo:hi], atol=1e-2)
    cache.window = None
    # fresh again
    assert torch.equal(by_parts(model, newer, mask, cache=cache), by_parts(model, newer, mask))
    cache.window = 3, 9
    assert torch.allclose(
        by_parts(model, newer, mask, None, cache, 3, 9),
        by_parts(model, newer, mask)[:, 3:9],
        atol=1e-5,
    )


# Tokenizers and facts


def words(vocab, specials, **named):
    """One word, one token, in the order of ids; specials stand in the text as themselves."""
    core = Tokenizer(WordLevel({w: i for i, w in enumerate(vocab)}, unk_token=vocab[0]))
    core.pre_tokenizer = WhitespaceSplit()
    core.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in specials])
    return PreTrainedTokenizerFast(tokenizer_object=core, **named)


LLADA_SPECIALS = (
    "<|startoftext|>",
    "<|endoftext|>",
    "<|mdm_mask|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
)


def llada_tokenizer(**changes):
    """As published: no mask token; Base has no template either."""
    vocab = [f"w{i}" for i in range(BOS)] + list(LLADA_SPECIALS)
    return words(
        vocab, LLADA_SPECIALS, bos_token="<|startoftext|>", eos_token="<|endoftext|>", **changes
    )


def dream_tokenizer(folder):
    """As published: vocab.json, merges.txt, and a class of its own in tokenizer_config.json."""
    specials = ["<|endoftext|>", "<|mask|>", "<|im_start|>", "<|beginoftext|>", "<|im_end|>"]
    pieces = [chr(c) for c in range(ord("a"), ord("z") + 1)] + ["Ġ", "ab"]
    pieces += [chr(c) for c in range(0x100, 0x100 + EOS - len(pieces))]
    (folder / "vocab.json").write_text(json.dumps({w: i for i, w in enumerate(pieces)}))
    (folder / "merges.txt").write_text("#version: 0.2\na b\n")
    added = {
        str(i): dict(
            content=t, lstrip=False, normalized=False, rstrip=False, single_word=False, special=True
        )
        for i, t in enumerate(specials, EOS)
    }
    template = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    settings = dict(
        add_bos_token=False,
        add_prefix_space=False,
        added_tokens_decoder=added,
        additional_special_tokens=["<|beginoftext|>", "<|mask|>"],
        auto_map={"AutoTokenizer": ["tokenization_dream.DreamTokenizer", None]},
        bos_token="<|beginoftext|>",
        chat_template=template,
        eos_token="<|endoftext|>",
        mask_token="<|mask|>",
        pad_token="<|endoftext|>",
        tokenizer_class="DreamTokenizer",
        unk_token=None,
    )
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def hard_masks(*first, family):
    """The facts of a model that reads whole canvases with hard masks and says no more."""
    names = ("mask_id", "eos_id", "end_ids", "shift", "vocab_size")
    told = dict(zip(names, first, strict=True), family=family)
    return Facts(**dict.fromkeys(Facts._fields) | told)


@pytest.mark.parametrize(("kind", "shift"), [("llada", 0), ("Dream", 1)])
def test_facts_without_a_tokenizer(kind, shift, tmp_path):
    model, _ = load(write(tmp_path, stock(kind), kind))
    assert facts(model) == hard_masks(MASK, EOS, (EOS,), shift, VOCAB, family=kind.lower())


def test_llada_with_its_tokenizer(tmp_path):
    llada_tokenizer().save_pretrained(write(tmp_path, stock()))
    model, tokenizer = load(tmp_path)
    assert facts(model) == hard_masks(MASK, EOS, (EOS, EOT), 0, VOCAB, family="llada")
    assert (tokenizer.mask_token, tokenizer.mask_token_id) == ("<|mdm_mask|>", MASK)
    assert (tokenizer.padding_side, tokenizer.pad_token_id) == ("left", EOS)
    chat = [{"role": "user", "content": " Hi\n"}]
    head = "<|start_header_id|>{}<|end_header_id|>\n\n"
    expected = "<|startoftext|>" + head.format("user") + "Hi<|eot_id|>" + head.format("assistant")
    assert (
        tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) == expected
    )
    two = [*chat, {"role": "assistant", "content": "Yes"}]
    done = expected + "Yes<|eot_id|>"
    assert tokenizer.apply_chat_template(two, tokenize=False) == done
    # all of it survives saving
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "saved")
    again, tokenizer = load(tmp_path / "saved")
    assert facts(again) == facts(model) and tokenizer.mask_token_id == MASK
    assert tokenizer.apply_chat_template(two, tokenize=False) == done


def test_a_template_of_its_own_stays(tmp_path):
    own = llada_tokenizer()
    own.chat_template = "{{ messages[0]['content'] }}"
    own.save_pretrained(write(tmp_path, stock()))
    assert load(tmp_path)[1].chat_template == own.chat_template


def test_dream_with_its_tokenizer(tmp_path):
    """Its class is remote code; Qwen2's reads the same files."""
    dream_tokenizer(write(tmp_path, stock("Dream"), "Dream"))
    model, tokenizer = load(tmp_path)
    assert facts(model) == hard_masks(MASK, EOS, (EOS, EOT), 1, VOCAB, family="dream")
    assert (tokenizer.mask_token_id, tokenizer.pad_token_id, tokenizer.padding_side) == (
        MASK,
        EOS,
        "left",
    )
    assert tokenizer("ab c<|mask|><|im_end|>")["input_ids"] == [27, 26, 2, MASK, EOT]
    assert tokenizer.decode([27, 26, 2]) == "ab c"
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False)
    assert chat == "<|im_start|>user\na<|im_end|>\n"
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "saved")
    again, tokenizer = load(tmp_path / "saved")
    assert facts(again) == facts(model) and tokenizer("ab<|mask|>")["input_ids"] == [27, MASK]


@every_kind
def test_several_ends(kind, tmp_path):
    """A configuration, or Dream's generation_config.json, may name several."""
    write(tmp_path, stock(kind), kind, eos_token_id=[EOS, 7])
    if kind == "Dream":
        dream_tokenizer(tmp_path)
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [EOS, 8]}))
    else:
        llada_tokenizer().save_pretrained(tmp_path)
    found = facts(load(tmp_path)[0])
    assert found.eos_id == EOS and {EOS, 7, EOT} <= set(found.end_ids) <= {EOS, 7, 8, EOT}
    assert len(found.end_ids) == len(set(found.end_ids))


# BERT-like


BERT_SIZES = dict(
    vocab_size=40,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=40,
    initializer_range=0.3,
)
BERTS = {
    "bert": lambda: BertForMaskedLM(BertConfig(**BERT_SIZES, pad_token_id=0)),
    "roberta": lambda: RobertaForMaskedLM(
        RobertaConfig(
            **BERT_SIZES, pad_token_id=1, bos_token_id=0, eos_token_id=2, type_vocab_size=1
        )
    ),
    "modernbert": lambda: ModernBertForMaskedLM(
        ModernBertConfig(
            **BERT_SIZES,
            pad_token_id=0,
            bos_token_id=2,
            eos_token_id=3,
            cls_token_id=2,
            sep_token_id=3,
            global_attn_every_n_layers=2,
            local_attention=6,
        )
    ),
}
BERT_SPECIALS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
ROBERTA_SPECIALS = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]


def write_bert(folder, arch, tokenizer=True):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = BERTS[arch]().eval()
    model.save_pretrained(folder)
    if not tokenizer:
        return model
    specials = ROBERTA_SPECIALS if arch == "roberta" else BERT_SPECIALS
    vocab = specials + [f"w{i}" for i in range(len(specials), 40)]
    if arch == "roberta":
        names = dict(
            bos_token="<s>", pad_token="<pad>", eos_token="</s>", sep_token="</s>", cls_token="<s>"
        )
        made = words(vocab, specials, unk_token="<unk>", mask_token="<mask>", **names)
    else:
        names = dict(pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]")
        made = words(vocab, specials, unk_token="[UNK]", mask_token="[MASK]", **names)
    first, last = (specials.index(s) for s in (made.cls_token, made.sep_token))
    made.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{made.cls_token} $A {made.sep_token}",
        special_tokens=[(made.cls_token, first), (made.sep_token, last)],
    )
    made.save_pretrained(folder)
    return model


@pytest.mark.parametrize("arch", BERTS)
def test_masked_language_models_load_through_the_same_door(arch, tmp_path):
    reference = write_bert(tmp_path, arch)
    model, tokenizer = load(tmp_path)
    assert type(model) is type(reference) and not model.training
    eos = {"bert": 3, "roberta": 2, "modernbert": 3}[arch]
    assert facts(model) == hard_masks(4, eos, (eos,), 0, 40, family="masked_lm")
    assert tokenizer.padding_side == "left" and tokenizer.mask_token_id == 4
    batch = tokenizer(
        ["w5 w6 w7 w8 w9 w10", f"w11 {tokenizer.mask_token} w13"], padding=True, return_tensors="pt"
    )
    x, mask = batch["input_ids"], batch["attention_mask"]
    assert mask[:, 0].tolist() == [1, 0] and x[0, -1] == eos
    expected = logits(reference, x[:1])
    assert torch.equal(logits(model, x[:1]), expected)
    for positions in (None, torch.arange(x.shape[1])[None]):
        assert torch.equal(by_parts(model, x[:1], positions=positions), expected)
        torch.testing.assert_close(by_parts(model, x[:1], mask[:1], positions), expected)


@pytest.mark.parametrize("arch", BERTS)
def test_masked_language_models_padded_on_the_left(arch, tmp_path):
    """Where positions are learnt, they count from the first real token, and RoBERTa's from its pad
    token's index."""
    write_bert(tmp_path, arch)
    model, _ = load(tmp_path)
    x = ids(3).remainder(35) + 5
    lengths = (LENGTH, 7, 4)
    got = by_parts(model, x, *padded(x, lengths))
    for row, n in enumerate(lengths):
        torch.testing.assert_close(
            got[row, -n:], logits(model, x[row : row + 1, -n:])[0], atol=1e-5, rtol=1e-4
        )


def test_masked_language_model_without_a_mask_token(tmp_path):
    write_bert(tmp_path, "bert", tokenizer=False)
    model, tokenizer = load(tmp_path)
    assert tokenizer is None
    with pytest.raises(ValueError, match=r"BertForMaskedLM names no mask token.*mask_token_id"):
        facts(model)
    model.config.mask_token_id = 4
    assert facts(model).mask_id == 4


# PEFT


def with_lora(model, **changes):
    settings = dict(
        r=2, init_lora_weights=False, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"
    )
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return get_peft_model(model, LoraConfig(**settings | changes)).eval()


@every_kind
def test_adapters_take_part(kind, tmp_path):
    model, _ = load(write(tmp_path, stock(kind), kind))
    x, known, bare = ids(), facts(model), logits(model, ids())
    wrapped = with_lora(model)
    assert facts(wrapped) == known
    adapted = by_parts(wrapped, x)
    assert torch.equal(adapted, logits(wrapped, x)) and not torch.allclose(adapted, bare, atol=1e-3)
    with wrapped.disable_adapter():
        assert torch.equal(by_parts(wrapped, x), bare)


@pytest.mark.parametrize("own_tokenizer", [False, True])
@every_kind
def test_adapter_folder_loads_base_and_adapter(kind, own_tokenizer, tmp_path):
    base, adapter = write(tmp_path / "base", stock(kind), kind), tmp_path / "adapter"
    dream_tokenizer(base) if kind == "Dream" else llada_tokenizer().save_pretrained(base)
    model, tokenizer = load(base)
    wrapped = with_lora(model)
    wrapped.save_pretrained(adapter)
    if own_tokenizer:
        tokenizer.chat_template = "mine"
        tokenizer.save_pretrained(adapter)
    again, tokenizer = load(adapter)
    assert type(again).__name__ == "PeftModelForCausalLM" and not again.training
    assert torch.equal(by_parts(again, ids()), by_parts(wrapped, ids()))
    told = (MASK, EOS, (EOS, EOT), KINDS.index(kind), VOCAB, None, None, None, kind.lower(), None)
    assert facts(again) == facts(wrapped) == told
    assert (tokenizer.mask_token_id, tokenizer.padding_side) == (MASK, "left")
    assert (tokenizer.chat_template == "mine") == own_tokenizer
    assert load(adapter, dtype="bfloat16")[0].dtype == torch.bfloat16


@pytest.mark.parametrize("arch", ["llada", "Dream", "bert", "roberta"])
@pytest.mark.parametrize("saved", [True, False], ids=["modules to save", "saved for its size"])
def test_an_adapter_over_a_grown_vocabulary_is_the_same_again(arch, saved, tmp_path):
    folder, is_bert = tmp_path / "base", arch in BERTS
    if is_bert:
        write_bert(folder, arch)
    else:
        write(folder, stock(arch), arch)
        llada_tokenizer().save_pretrained(folder) if arch == "llada" else dream_tokenizer(folder)
    model, tokenizer = load(folder)
    tokenizer.add_tokens(["<think>", "</think>"])
    grown = max(model.config.vocab_size, len(tokenizer)) + 1
    model.resize_token_embeddings(grown, mean_resizing=False)
    tables = ["word_embeddings"] if is_bert else ["embed_tokens", "lm_head"]
    inside = ["query", "value"] if is_bert else ["q_proj", "v_proj"]
    config = LoraConfig(r=2, target_modules=inside, modules_to_save=tables if saved else None)
    wrapped = get_peft_model(model, config).eval()
    with torch.no_grad():
        for p in (p for p in wrapped.parameters() if p.requires_grad):
            p += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0))
    wrapped.save_pretrained(tmp_path / "adapter")
    tokenizer.save_pretrained(tmp_path / "adapter")
    again, _ = load(tmp_path / "adapter")
    assert facts(again).vocab_size == grown
    x = torch.tensor([[5, 6, grown - 1, 7, facts(again).mask_id]])
    assert torch.equal(by_parts(again, x), by_parts(wrapped, x))


def test_adapter_with_the_published_names(tmp_path):
    """As trained on LLaDA's own code: every parameter takes its place, or the folder is refused."""
    base, adapter = write(tmp_path / "base", stock()), tmp_path / "adapter"
    wrapped = with_lora(load(base)[0])
    wrapped.save_pretrained(adapter)
    prefix, tensors = "base_model.model.", {}
    for name, tensor in load_file(adapter / "adapter_model.safetensors").items():
        leaf, lora = name.removeprefix(prefix).split(".lora_")
        tensors[prefix + llada_name(f"{leaf}.weight").removesuffix("weight") + f"lora_{lora}"] = (
            tensor
        )
    assert f"{prefix}model.transformer.blocks.1.q_proj.lora_B.weight" in tensors
    save_file(tensors, adapter / "adapter_model.safetensors")
    assert torch.equal(by_parts(load(adapter)[0], ids()), by_parts(wrapped, ids()))
    more = {f"{prefix}model.transformer.blocks.1.attn_out.lora_A.weight": torch.zeros(2, 32)}
    edit(adapter / "adapter_model.safetensors", lambda t: t.update(more))
    refuses(adapter, "layers.1.self_attn.o_proj.lora_A")


def test_bad_adapter_folders_are_named(tmp_path):
    base, adapter = write(tmp_path / "base", stock()), tmp_path / "adapter"
    with_lora(load(base)[0]).save_pretrained(adapter)
    shutil.rmtree(base)
    with pytest.raises(ValueError, match=r"adapter.*base"):
        load(adapter)
    settings = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(
        json.dumps(settings | {"base_model_name_or_path": None})
    )
    with pytest.raises(ValueError, match="does not name a base model"):
        load(adapter)
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    with pytest.raises(ValueError, match=r"pickled, adapter_model\.bin"):
        load(adapter)


# Bad input


def refuses(name, *says, **knobs):
    with pytest.raises(ValueError) as caught:
        load(name, **knobs)
    text = str(caught.value)
    assert f"model={str(name)!r}" in text and "give a folder" in text
    for part in says:
        assert part in text, text
    assert caught.value.__cause__ is not None


@pytest.mark.parametrize("name", ["./nope", "/nope/nope", "no/such-model", "a/b/c", "", "llada"])
def test_unknown_names_are_named(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refuses(name, local_files_only=True)


def test_folders_without_a_model_are_named(tmp_path):
    refuses(tmp_path, "config.json")
    (tmp_path / "config.json").write_text("{broken")
    refuses(tmp_path, "config.json")
    (tmp_path / "config.json").write_text("{}")
    refuses(tmp_path, "model_type=None")


@pytest.mark.parametrize("kind", ["llada_moe", "nemotron_diffusion", "dream", "other"])
def test_other_kinds_are_refused(kind, tmp_path):
    refuses(write(tmp_path, stock(), model_type=kind), f"model_type={kind!r}", "llada", "Dream")


def test_other_architectures_of_transformers_are_refused(tmp_path):
    stock().save_pretrained(tmp_path)
    refuses(tmp_path, "model_type='llama'", "not a masked-diffusion model")
    (tmp_path / "config.json").write_text(
        '{"model_type": "bart", "d_model": 8, "encoder_layers": 1}'
    )
    refuses(tmp_path, "model_type='bart'")


LLADA_FIELDS = dict(
    activation_type="swiglu",
    alibi=True,
    attention_layer_norm=True,
    bias_for_layer_norm=True,
    block_group_size=2,
    block_type="sequential",
    embedding_size=128,
    include_bias=True,
    include_qkv_bias=True,
    input_emb_norm=True,
    layer_norm_type="low_precision",
    multi_query_attention=True,
    rope=False,
    scale_logits=True,
)


@pytest.mark.parametrize("field", LLADA_FIELDS)
def test_llada_of_another_architecture_is_refused(field, tmp_path):
    refuses(
        write(tmp_path, stock(), **{field: LLADA_FIELDS[field]}), f"{field}={LLADA_FIELDS[field]!r}"
    )


@pytest.mark.parametrize(
    ("field", "value"), [("use_sliding_window", True), ("hidden_act", "gelu"), ("use_mrope", True)]
)
def test_dream_of_another_architecture_is_refused(field, value, tmp_path):
    refuses(write(tmp_path, stock("Dream"), "Dream", **{field: value}), f"{field}={value!r}")


@every_kind
def test_what_a_whole_canvas_has_no_use_for(kind, tmp_path):
    refuses(write(tmp_path / "a", stock(kind), kind, block_length=8), "reads the whole canvas")
    # as a model of blocks says it that has Dream's model_type
    refuses(write(tmp_path / "a", stock(kind), kind, block_size=32), "block_length=32: ")
    layers = dict(layer_types=["sliding_attention", "full_attention"])
    refuses(write(tmp_path / "b", stock(kind), kind, **layers), "layer_types=['sliding_attention'")
    refuses(write(tmp_path / "c", stock(kind), kind, drop=["rope_theta"]), "says no rope_theta")
    if kind == "llada":
        folder = write(tmp_path / "d", stock(), hidden_size=64)
        refuses(folder, "64 by hidden_size of its config.json, 32 by d_model")


def test_a_masked_language_model_whose_files_disagree(tmp_path):
    write_bert(tmp_path, "bert")
    fields = json.loads((tmp_path / "config.json").read_text())
    # which is no field of its
    (tmp_path / "config.json").write_text(json.dumps(fields | {"block_length": 8}))
    assert facts(load(tmp_path)[0]).block_length is None
    (tmp_path / "config.json").write_text(json.dumps(fields | {"mask_token_id": 7}))
    refuses(tmp_path, "7 by the model's configuration, 4 by the tokenizer")


def edit(path, change):
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


EDITS = {
    "missing": (lambda t, k: t.pop(k), "missing keys"),
    "unexpected": (
        lambda t, k: t.update({k.replace("weight", "bias"): torch.zeros(3)}),
        "unexpected keys",
    ),
    "misshapen": (lambda t, k: t.update({k: t[k][:-1].clone()}), "mismatched keys"),
}


@pytest.mark.parametrize("what", EDITS)
@every_kind
def test_incomplete_weights_are_named(kind, what, tmp_path):
    write(tmp_path, stock(kind), kind)
    path = tmp_path / "model.safetensors"
    key = next(k for k in load_file(path) if "1" in k and ("ff_proj" in k or "gate_proj" in k))
    change, says = EDITS[what]
    edit(path, lambda tensors: change(tensors, key))
    refuses(tmp_path, says)


def test_headless_masked_language_model_is_refused(tmp_path):
    """transformers would draw a head at random."""
    BertModel(BertConfig(**BERT_SIZES)).save_pretrained(tmp_path)
    refuses(tmp_path, "missing keys", "cls.predictions")


@every_kind
def test_unreadable_weights_are_named(kind, tmp_path):
    write(tmp_path, stock(kind), kind, shards=3)
    shard = tmp_path / "model-00002-of-00003.safetensors"
    whole = shard.read_bytes()
    for part in (whole[: len(whole) // 2], whole[:4], b"", b"not tensors at all"):
        shard.write_bytes(part)
        refuses(tmp_path)
    shard.unlink()
    refuses(tmp_path, shard.name)


@every_kind
def test_pickled_weights_are_not_read(kind, tmp_path):
    write(tmp_path, stock(kind), kind)
    torch.save(load_file(tmp_path / "model.safetensors"), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    refuses(tmp_path, "pickled, pytorch_model.bin: save the model as safetensors")


def test_mistyped_fields_are_named(tmp_path):
    refuses(write(tmp_path / "a", stock(), n_layers="two"), "two")
    refuses(write(tmp_path / "b", stock("Dream"), "Dream", hidden_size="big"), "big")


@every_kind
def test_mask_tokens_that_are_none_are_named(kind, tmp_path):
    for i, mask_id in enumerate((VOCAB, -1)):
        folder = write(tmp_path / str(i), stock(kind), kind, mask_token_id=mask_id)
        refuses(folder, f"mask_token_id={mask_id} ", f"{VOCAB}")
    model, _ = load(write(tmp_path / "none", stock(kind), kind, drop=["mask_token_id"]))
    with pytest.raises(ValueError, match=r"names no mask token.*model\.config\.mask_token_id"):
        facts(model)
    with pytest.raises(ValueError, match="names no mask token"):
        facts(stock())


def test_mask_token_outside_the_tokenizer(tmp_path):
    """An embedding is often longer than its tokenizer."""
    llada_tokenizer().save_pretrained(
        write(tmp_path, stock(vocab_size=VOCAB + 8), mask_token_id=VOCAB + 3)
    )
    model, tokenizer = load(tmp_path)
    assert facts(model).mask_id == VOCAB + 3 and tokenizer.mask_token is None


def test_bad_knobs_are_named(tmp_path):
    write(tmp_path, stock())
    for knobs, match in (
        ({"dtype": "float31"}, "float31"),
        ({"device": "gpu"}, "'gpu'"),
        ({"seed": 3}, "seed=3 draws the weights of"),
        ({"device": "cpu", "device_map": "auto"}, "device_map"),
    ):
        with pytest.raises(ValueError, match=match):
            load(tmp_path, **knobs)
        with pytest.raises(ValueError, match="dtype"):
            load("mnns-diffusion-tiny", dtype="float32", torch_dtype="bfloat16")
    for name in (tmp_path, "mnns-diffusion-tiny"):
        for keyword in ("trust_remote_code", "use_safetensors", "output_loading_info"):
            with pytest.raises(ValueError, match=f"{keyword}=True is not to be changed"):
                load(name, **{keyword: True})
        with pytest.raises((TypeError, ValueError), match="misspelt"):
            load(name, misspelt=1)


def test_models_of_the_other_kind_are_told_where_to_go(tmp_path):
    named = [*MODELS]
    named += [write(tmp_path / kind, stock(kind), kind) for kind in KINDS]
    for arch in BERTS:
        write_bert(tmp_path / arch, arch)
        named.append(tmp_path / arch)
    for name in named:
        with pytest.raises(ValueError, match=r"use softar\.diffusion\.load"):
            softar.load(name)
    stock().save_pretrained(tmp_path / "llama")
    BertLMHeadModel(BertConfig(**BERT_SIZES, is_decoder=True)).save_pretrained(tmp_path / "head")
    for name in ["mnns-tiny", "smollm2-135m", "x.gguf", tmp_path / "llama", tmp_path / "head"]:
        with pytest.raises(ValueError, match=r"use softar\.load"):
            load(name)
    # an adapter's base, a hub id in the cache
    for kind, open_it, other in (("llada", softar.load, "diffusion.load"), ("llama", load, "load")):
        (tmp_path / f"{kind}-lora").mkdir()
        adapter = {"peft_type": "LORA", "base_model_name_or_path": str(tmp_path / kind)}
        (tmp_path / f"{kind}-lora" / "adapter_config.json").write_text(json.dumps(adapter))
        (tmp_path / f"{kind}-lora" / "adapter_model.safetensors").touch()
        repo, commit = tmp_path / f"models--tests--{kind}", "0" * 40
        (repo / "refs").mkdir(parents=True)
        (repo / "refs" / "main").write_text(commit)
        shutil.copytree(tmp_path / kind, repo / "snapshots" / commit)
        for name in (tmp_path / f"{kind}-lora", f"tests/{kind}"):
            with pytest.raises(ValueError, match=rf"use softar\.{other}"):
                open_it(name, cache_dir=tmp_path, local_files_only=True)


def test_a_model_made_here_is_saved_under_the_original_names(tmp_path):
    model, tokenizer = load("mnns-diffusion-tiny")
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert all(name.startswith("model.transformer.") for name in saved) and len(saved) == 2 * 9 + 3
    again, _ = load(tmp_path)
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
