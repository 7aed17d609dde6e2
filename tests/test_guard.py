"""What decoding refuses before the first forward, each in one line, and that nothing asked of generate
is dropped without a word."""

import inspect

import numpy as np
import pytest
import torch
from tiny import BOS, PROMPTS, counted, left_padded, model_of, with_lora
from torch import nn
from transformers import (
    BatchEncoding,
    BertConfig,
    BertForMaskedLM,
    BertModel,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    GenerationConfig,
    GenerationMixin,
    GPT2Config,
    GPT2LMHeadModel,
    GPTJConfig,
    GPTJForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    RobertaConfig,
    RobertaForCausalLM,
)

import softar
from softar import SoftConfig
from softar.guard import ALONE, NOT_FOLLOWED
from softar.models import room_of
from softar.placement import evaluating

IDS, MASK = left_padded(PROMPTS)
SHORT = SoftConfig(max_new_tokens=3)
# Settings of generate that act in the loop, or say who wrote the file
ACT = set(
    "max_length max_new_tokens min_length min_new_tokens max_time stop_strings do_sample use_cache "
    "cache_implementation compile_config cache_config max_cache_len repetition_penalty encoder_repetition_penalty "
    "no_repeat_ngram_size bad_words_ids renormalize_logits forced_bos_token_id forced_eos_token_id "
    "exponential_decay_length_penalty suppress_tokens begin_suppress_tokens "
    "sequence_bias token_healing watermarking_config num_return_sequences return_dict_in_generate "
    "pad_token_id bos_token_id eos_token_id encoder_no_repeat_ngram_size disable_compile "
    "prefill_chunk_size transformers_version".split()
)
WISHES = {  # where 2 is no value
    "constraints": [1],
    "force_words_ids": [[1]],
    "early_stopping": True,
    "dola_layers": "low",
    "low_memory": True,
    "use_mtp": True,
    "is_assistant": True,
    "remove_invalid_values": True,
    "speculation_type": "x",
    "num_assistant_tokens_schedule": "heuristic",
    "continuous_batching_config": {"a": 1},
    **dict.fromkeys(
        "temperature top_p min_p top_h typical_p epsilon_cutoff eta_cutoff".split(), 0.3
    ),
    **dict.fromkeys([name for name in NOT_FOLLOWED if name.startswith("output_")], True),
}


@pytest.fixture(scope="module")
def llama():
    return model_of("llama")


def refused(model, *args, told, **kwargs):
    with counted(model) as calls, pytest.raises((ValueError, TypeError)) as caught:
        softar.generate(model, *args, **kwargs)
    assert told in str(caught.value) and "\n" not in str(caught.value) and not calls


def test_every_setting_of_generate_acts_or_is_refused():
    names = {name for name in vars(GenerationConfig()) if not name.startswith("_")}
    assert names == ACT | {*NOT_FOLLOWED}
    assert not ACT & {*NOT_FOLLOWED} and {*ALONE} <= ACT


@pytest.mark.parametrize("name", sorted({*NOT_FOLLOWED, *ALONE}))
def test_a_setting_that_is_not_followed_is_refused_by_name(llama, name):
    settings = GenerationConfig(pad_token_id=0, eos_token_id=2)
    setattr(settings, name, WISHES.get(name, 3))
    refused(llama, IDS, MASK, told=f"{name}=", config=SHORT, generation_config=settings)


@pytest.mark.parametrize(
    "asked",
    [
        dict(num_beams=3),
        dict(prompt_lookup_num_tokens=2),
        dict(penalty_alpha=0.5, top_k=4),
        dict(output_scores=True),
        dict(output_attentions=True),
        dict(output_hidden_states=True),
        dict(do_sample=True, temperature=0.3),
        dict(assistant_model=model_of("llama")),
    ],
)
def test_plugged_into_generate_it_drops_nothing(llama, asked):
    with (
        counted(llama) as calls,
        pytest.raises(ValueError, match=r"not followed|trust_remote_code"),
    ):
        llama.generate(
            IDS, attention_mask=MASK, custom_generate=softar.soft_decode, max_new_tokens=3, **asked
        )
    assert not calls


def test_beams_of_the_models_own_file_are_no_wish():
    """Plugged into generate they are refused: the rows are multiplied by then."""
    model, plain = model_of("llama"), softar.generate(model_of("llama"), IDS, MASK, config=SHORT)
    model.generation_config.update(num_beams=3, length_penalty=2.0, early_stopping=True)
    out = softar.generate(model, IDS, MASK, config=SHORT)
    assert torch.equal(out.sequences, plain.sequences)
    how = dict(custom_generate=softar.soft_decode, soft_config=SHORT, max_new_tokens=3)
    with pytest.raises(ValueError, match="num_beams=3 of the model: give num_beams=1"):
        model.generate(IDS, attention_mask=MASK, **how)
    alone = model.generate(IDS, attention_mask=MASK, num_beams=1, **how)
    assert torch.equal(alone, plain.sequences)


@pytest.mark.parametrize("wrapped", [model_of, lambda: with_lora(model_of())])
def test_a_model_that_torch_compile_wraps_decodes(wrapped):
    model = wrapped()
    out = softar.generate(torch.compile(model, backend="eager"), IDS, MASK, config=SHORT)
    assert torch.equal(out.sequences, softar.generate(model, IDS, MASK, config=SHORT).sequences)


def test_plugged_into_generate_it_streams_and_the_configurations_length_counts(llama):
    class Heard:
        puts, ended = [], False

        def put(self, value):
            self.puts.append(value.tolist())

        def end(self):
            self.ended = True

    heard, config = Heard(), SoftConfig(max_new_tokens=5)
    how = dict(custom_generate=softar.soft_decode, soft_config=config, eos_token_id=None)
    out = llama.generate(IDS[:1], streamer=heard, **how)
    assert out.shape == (1, IDS.shape[1] + 5) and heard.ended
    assert heard.puts == [IDS[:1].tolist(), *[[token] for token in out[0, -5:].tolist()]]
    assert llama.generate(IDS[:1], max_new_tokens=2, **how).shape == (1, IDS.shape[1] + 2)


def test_plugged_in_by_a_function_of_ones_own_it_drops_nothing_either(llama):
    def mine(*args, **kwargs):
        return softar.soft_decode(*args, soft_config=SoftConfig(max_new_tokens=5), **kwargs)

    class Heard(list):
        put, end = list.append, lambda self: None

    heard, how = Heard(), dict(custom_generate=mine, eos_token_id=None)
    out = llama.generate(IDS[:1], streamer=heard, **how)
    assert out.shape == (1, IDS.shape[1] + 5) and len(heard) == 6
    with pytest.raises(ValueError, match="assistant_model= is not followed"):
        llama.generate(IDS[:1], assistant_model=llama, **how)


def test_the_call_of_another_model_around_it_says_nothing(llama):
    """As from a logits processor of an assisted generate."""
    inner = []

    def process(ids, scores):
        inner.append(softar.generate(llama, ids[:1], torch.ones_like(ids[:1]), max_new_tokens=2))
        return scores

    outer, how = model_of("llama"), dict(max_new_tokens=2, do_sample=False)
    outer.generate(IDS[:1], assistant_model=model_of("llama"), logits_processor=[process], **how)
    assert inner and all(out.completions.shape[1] <= 2 for out in inner)


def test_generate_has_the_arguments_that_are_read_of_its_call():
    """They are read of its frame: a release that renames one has to be seen here."""
    names = inspect.unwrap(GenerationMixin.generate).__code__.co_varnames
    assert {"streamer", "assistant_model", "synced_gpus", "has_default_max_length"} <= {*names}


@pytest.mark.parametrize(
    "ids, told",
    [
        (BatchEncoding({"input_ids": IDS}), "write softar.generate(model, **inputs)"),
        ({"input_ids": IDS}, "write softar.generate(model, **inputs)"),
        ("hello", "input_ids='hello' of type str"),
        (IDS.tolist(), "of type list: give a tensor of ids [B, P]"),
        (None, "input_ids=None of type NoneType"),
        (np.array([[1, 2]]), "of type ndarray"),
        (IDS.to(torch.uint8), "torch.uint8: need [B, P] integers"),
        (IDS.bool(), "torch.bool: need [B, P] integers"),
        (torch.tensor([[BOS, 64]]), "input_ids holds the id 64, and the model's vocabulary has 64"),
        (torch.tensor([[-1, 5]]), "input_ids holds the id -1"),
    ],
)
def test_prompts_that_are_none(llama, ids, told):
    refused(llama, ids, told=told, config=SHORT)


def test_padding_without_a_mask_is_no_text(llama):
    """Ids that begin, or end, with a pad token which no text holds: they would be read as such."""
    for ids, rows in ((IDS, [1, 2]), (IDS[1:], [0, 1]), (IDS.flip(1), [1, 2])):
        told = f"rows {rows} of input_ids begin or end with the pad token 0, and without attention_mask"
        refused(llama, ids, told=told, config=SHORT)
    refused(with_lora(model_of()), IDS, told="begin or end with the pad token 0", config=SHORT)
    assert softar.generate(llama, IDS, torch.ones_like(IDS), config=SHORT)  # where it is meant


@pytest.mark.parametrize("also, id", [("bos_token_id", BOS), ("eos_token_id", [2, BOS])])
def test_a_pad_token_that_texts_hold_is_warned_of_where_rows_differ(also, id, recwarn):
    """As GPT-2's, which is its bos and eos: every prompt may begin with one of it."""
    model = model_of(**dict(pad_token_id=BOS, bos_token_id=None) | {also: id})
    for ids in ([[BOS, 5, 6], [BOS, 7, 8]], [[BOS, BOS, 5]], [[5, BOS, 6], [5, 7, 8]]):
        softar.generate(model, torch.tensor(ids), config=SHORT)
    assert not [w for w in recwarn if "pad token" in str(w.message)]
    with pytest.warns(UserWarning, match=r"rows \[0, 1\] .* pad token 1, .*where it is padding"):
        softar.generate(model, torch.tensor([[BOS, BOS, 5], [BOS, 6, 7]]), config=SHORT)


@pytest.mark.parametrize(
    "asked, told",
    [
        (dict(attention_mask=MASK.tolist()), "attention_mask="),
        (dict(rng=3), "rng=3 must be a torch.Generator"),
        (dict(config="soft"), "config='soft' must be a SoftConfig"),
        (
            dict(config={"tempature": 1}),
            "config has no field 'tempature', did you mean 'temperature'",
        ),
        (dict(config=None, tempature=1), "unexpected keyword argument 'tempature'"),
        (
            dict(generation_config=GenerationConfig(stop_strings=["x"])),
            "stop_strings=['x'] are text: pass tokenizer=",
        ),
    ],
)
def test_arguments_that_do_not_fit(llama, asked, told):
    refused(llama, IDS, told=told, **{"config": SHORT, "attention_mask": MASK} | asked)


def test_a_dict_is_a_configuration(llama):
    out = softar.generate(llama, IDS, MASK, config={"budget": 1, "max_new_tokens": 3})
    assert out.config == SoftConfig(budget=1, max_new_tokens=3) and out.why == "as configured"


def tiny_bert(kind):
    sizes = dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    return kind(BertConfig(vocab_size=64, **sizes))


@pytest.mark.parametrize(
    "model, told",
    [
        (nn.Linear(2, 2), "model is a Linear: give a causal LM"),
        (tiny_bert(BertModel), "BertModel cannot generate"),
        (tiny_bert(BertForMaskedLM), "softar.diffusion.denoise"),
    ],
)
def test_models_that_are_no_causal_lm(model, told):
    refused(model, IDS, told=told, config=SHORT)
    with pytest.raises(ValueError, match="model is a str"):
        softar.generate("smollm2-135m", IDS)


SIZES = dict(vocab_size=64, pad_token_id=0, bos_token_id=1, eos_token_id=None)
TABLES = {  # of 16 positions
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(n_positions=16, n_embd=8, n_layer=1, n_head=2, **SIZES)
    ),
    "opt": lambda: OPTForCausalLM(
        OPTConfig(
            max_position_embeddings=16,
            hidden_size=8,
            ffn_dim=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            word_embed_proj_dim=8,
            **SIZES,
        )
    ),
    "gptj": lambda: GPTJForCausalLM(
        GPTJConfig(n_positions=16, n_embd=8, n_layer=1, n_head=2, rotary_dim=4, **SIZES)
    ),
}


@pytest.mark.parametrize("arch", TABLES)
def test_no_decode_beyond_the_models_positions(arch):
    model = TABLES[arch]().eval()
    ids, mask = left_padded(PROMPTS)  # the longest has 5
    out = softar.generate(model, ids, mask, config=SoftConfig(max_new_tokens=12))
    assert out.completions.shape == (3, 12) and room_of(model) == 16  # the last token is not read
    told = "has 16 positions, too few for 5 of the prompt and 13 new tokens: give max_new_tokens=12"
    refused(model, ids, mask, told=told, config=SoftConfig(max_new_tokens=13))
    refused(model, torch.ones(1, 17).long(), told="shorten the prompt", config=SHORT)


def test_without_a_table_of_positions_there_is_no_end(llama):
    assert room_of(llama) is None and room_of(llama, trained=True) == 256
    assert room_of(with_lora(model_of()), trained=True) == 256


def test_room_is_the_texts_own():
    """Neither the positions of a picture count, nor the rows that RoBERTa keeps for its padding."""
    sizes = dict(hidden_size=8, num_attention_heads=1, num_hidden_layers=1, intermediate_size=8)
    text = dict(vocab_size=64, head_dim=8, max_position_embeddings=40, num_key_value_heads=1)
    config = Gemma3Config(text_config=sizes | text, vision_config=sizes | dict(image_size=28))
    seeing = Gemma3ForConditionalGeneration(config)
    assert any("position" in name for name, _ in seeing.named_parameters())
    assert room_of(seeing) is None and room_of(seeing, trained=True) == 40
    roberta = RobertaConfig(vocab_size=64, max_position_embeddings=20, is_decoder=True, **sizes)
    assert room_of(RobertaForCausalLM(roberta)) == 18


def test_decoding_is_without_dropout_and_leaves_each_module_in_its_mode():
    model = model_of("llama", attention_dropout=0.5).train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    a, b = (softar.generate(model, IDS, MASK, config=SHORT).record for _ in range(2))
    assert torch.equal(a.weights, b.weights)
    assert [module.training for module in model.modules()] == modes
    with pytest.raises(RuntimeError), evaluating(model):
        assert not any(module.training for module in model.modules())
        raise RuntimeError
    assert [module.training for module in model.modules()] == modes


def test_an_output_is_shown_in_a_line_or_two(llama):
    shown = repr(softar.generate(llama, IDS, MASK, config=SoftConfig(budget=1, max_new_tokens=3)))
    assert "tensor" not in shown and "3 SOFT" in shown and "as configured" in shown
    assert len(shown) < 800
