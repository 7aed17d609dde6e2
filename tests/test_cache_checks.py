"""What a cache does not allow, said by each who decodes before the work starts; and whose a cache
and a compiled call are."""

import copy
import functools
import inspect

import pytest
import torch
from test_architectures import build
from test_caches import IDS, MASK, assert_same, compiled, decode, net, plugged, refused
from test_rl_trainers import config, trainer
from tiny import EOS, Forced, counted, model_of, seeded, tokenizer_of, with_lora
from transformers import (
    CompileConfig,
    DynamicCache,
    GenerationConfig,
    LlamaForCausalLM,
    LogitsProcessorList,
    StaticCache,
)
from transformers.generation.configuration_utils import (
    DEPRECATED_STATIC_CACHE_IMPLEMENTATIONS,
    STATIC_CACHE_IMPLEMENTATIONS,
)

import softar
from softar import SoftConfig
from softar.caches import NEVER_STATIC
from softar.decoders.beam import BeamDecoder, BeamOptions
from softar.decoders.beam_collapse import BeamCollapse, beam_collapse
from softar.decoders.search import SearchDecoder
from softar.decoders.soft import CacheOptions, SoftDecoder
from softar.decoders.soft_beam import SoftBeam, soft_beam
from softar.looks import EVERY, every_of
from softar.models.reading import cache_in, cache_name, check_reads_mixtures

CONFIG = SoftConfig(max_new_tokens=6, budget=3)


@pytest.fixture(scope="module")
def llama():
    return net()


# -- a cache of the caller's


@pytest.mark.parametrize("kind", [DynamicCache, StaticCache])
def test_a_cache_of_the_callers_holds_the_steps_and_no_more(llama, kind):
    """Rows end together before the length, where a late look would have gone on."""
    ends = LogitsProcessorList([Forced(IDS.shape[1], [[None, None, EOS]] * 3)])

    def cache():
        return kind(llama.config, max_cache_len=40) if kind is StaticCache else kind()

    own = cache()
    out = plugged(llama, past_key_values=own, logits_processor=ends)
    assert out.shape[1] == IDS.shape[1] + 3 and own.get_seq_length() == out.shape[1] - 1
    with counted(llama) as calls, pytest.raises(ValueError, match="a cache of the caller's"):
        plugged(llama, past_key_values=cache(), logits_processor=ends, look_every=2)
    assert not calls


@pytest.mark.parametrize("kind", [DynamicCache, StaticCache])
def test_what_the_callers_cache_holds_is_not_counted_again(llama, kind):
    own = kind(llama.config, max_cache_len=40) if kind is StaticCache else kind()
    how = dict(past_key_values=own, return_dict_in_generate=True, eos_token_id=None)
    ids, mask = IDS, MASK
    for _ in range(3):
        with counted(llama) as calls:
            out = llama.generate(
                ids,
                attention_mask=mask,
                custom_generate=softar.soft_decode,
                soft_config=CONFIG,
                max_new_tokens=4,
                **how,
            )
        assert out.num_forwards == len(calls) == 4
        assert out.token_forwards == sum(rows * columns for rows, columns in calls)
        said = torch.full((len(ids), 2), 9)  # of a user
        ids = torch.cat([ids, out.completions, said], 1)
        mask = torch.cat([mask, torch.ones_like(out.completions), torch.ones_like(said)], 1)
    with counted(llama) as calls, pytest.raises(ValueError, match=r"holds 20 .* prompt has 5"):
        plugged(llama, past_key_values=own)
    assert not calls


def test_a_prompt_read_in_chunks_wants_an_empty_cache(llama):
    """transformers read the whole prompt once more, behind what the cache held."""
    own, ids = DynamicCache(), torch.cat([IDS, torch.full((len(IDS), 6), 9)], 1)
    mask = torch.cat([MASK, torch.ones_like(ids[:, IDS.shape[1] :])], 1)

    def turn(ids, mask):
        return llama.generate(
            ids,
            attention_mask=mask,
            custom_generate=softar.soft_decode,
            soft_config=CONFIG,
            past_key_values=own,
            max_new_tokens=4,
            prefill_chunk_size=2,
            return_dict_in_generate=True,
        )

    with counted(llama) as calls:
        out = turn(IDS, MASK)
    assert out.num_forwards == len(calls)
    assert out.token_forwards == sum(rows * columns for rows, columns in calls)
    with (
        counted(llama) as calls,
        pytest.raises(ValueError, match=r"prefill_chunk_size=2 .*holds 8"),
    ):
        turn(ids, mask)
    assert not calls


def test_what_needs_each_step_gets_it_on_an_accelerator():
    gpu = torch.device("cuda")
    assert (
        every_of(None, gpu, "a cache of the caller's") == 1 and every_of(None, gpu, None) == EVERY
    )


# -- a cache that the model's own file names


def own_cache(model, name):
    model.generation_config.cache_implementation = name
    return model


SEARCHES = {
    "beam": lambda model: BeamDecoder(model, tokenizer_of(), BeamOptions(4)),
    "soft-beam": lambda model: SearchDecoder(model, tokenizer_of(), CONFIG, SoftBeam(3)),
    "beam-collapse": lambda model: SearchDecoder(model, tokenizer_of(), CONFIG, BeamCollapse(3)),
    "soft_beam": lambda model: soft_beam(model, IDS, MASK, CONFIG, SoftBeam(3)),
    "beam_collapse": lambda model: beam_collapse(model, IDS, MASK, CONFIG, BeamCollapse(3)),
}


@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize(
    "kind, name, told",
    [
        ("gpt_neo", "static", "GPTNeoForCausalLM is not decoded rightly"),
        ("llama4_text", "hybrid", "Llama4ForCausalLM is not decoded rightly"),
        ("llama", "offloaded", "where LlamaForCausalLM is already"),
    ],
)
def test_a_search_refuses_it_too(search, kind, name, told):
    model = own_cache(build(kind), name)
    with counted(model) as calls, pytest.raises(ValueError, match=told):
        SEARCHES[search](model)
    assert not calls


@pytest.mark.parametrize("search", ["soft_beam", "beam_collapse"])
def test_a_search_compiles_nothing(search, monkeypatch):
    """Read in parts, where transformers would."""
    model = own_cache(net(num_hidden_layers=1), "static")
    plain = SEARCHES[search](model)[0].sequences
    how = model.generation_config.compile_config = CompileConfig()
    how._compile_all_devices, model.generation_config.prefill_chunk_size = True, 2
    monkeypatch.setattr(model, "get_compiled_call", None)
    assert torch.equal(SEARCHES[search](model)[0].sequences, plain)


@pytest.mark.parametrize("name", DEPRECATED_STATIC_CACHE_IMPLEMENTATIONS)
@pytest.mark.parametrize("kind", sorted({*NEVER_STATIC} - {"llama4"}))
def test_old_names_are_static_caches(kind, name):
    refused(
        own_cache(build(kind), name), "is not decoded rightly with it", rows=(IDS[:1], MASK[:1])
    )


def test_virtual_tokens_have_no_room_under_an_old_name():
    from peft import PromptTuningConfig, get_peft_model

    tuned = get_peft_model(net(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    own_cache(tuned.get_base_model(), "hybrid")
    refused(tuned.double(), "virtual tokens of PROMPT_TUNING", rows=(IDS[:1, :2], MASK[:1, :2]))


# -- whose a compiled call is


@pytest.mark.parametrize("by", ["softar", "transformers"])
def test_a_copy_of_a_model_that_has_compiled_runs_its_own_weights(monkeypatch, by):
    """Whoever compiled it; and the original keeps what it has. Compiling wraps, and makes no graph."""
    monkeypatch.setattr(
        torch, "compile", lambda f, **_: functools.wraps(f)(lambda *some, **how: f(*some, **how))
    )
    model, way = net(num_hidden_layers=1), "budget"
    if by == "softar":
        compiled(model, way, "eager")
    else:
        model.get_compiled_call(CompileConfig(fullgraph=True, mode="default", backend="eager"))
    call, other = model._compiled_call, copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1 + torch.randn(parameter.shape, generator=seeded(3)) / 2)
    for each in (other, copy.deepcopy(other), model):
        assert_same(compiled(each, way, "eager"), decode(each, way))
    assert not torch.equal(decode(other, way).sequences, decode(model, way).sequences)
    assert by == "transformers" or model._compiled_call is call


def test_a_prompt_is_read_uncompiled_in_parts_too(llama, monkeypatch):
    """As on an accelerator, where transformers compiles the parts."""
    seen = []

    def wrapper(forward, **_):
        is_model = inspect.ismethod(forward)  # else the step around it
        return lambda *a, **how: seen.append(is_model) or forward(*a, **how)

    monkeypatch.setattr(torch, "compile", wrapper)
    model, settings = net(num_hidden_layers=1), copy.deepcopy(llama.generation_config)
    how = CompileConfig()
    how._compile_all_devices = True
    settings.update(cache_implementation="static", compile_config=how, prefill_chunk_size=2)
    out = decode(model, generation_config=settings)
    assert sum(seen) == out.completions.shape[1] - 1


# -- by those who keep a model: when they are made


@pytest.mark.parametrize("name", ["offloaded", "offloaded_static", "quantized"])
def test_what_does_not_work_here_is_said_when_it_is_made(llama, tmp_path, name):
    with pytest.raises(ValueError, match=f"cache_implementation='{name}'"):
        SoftDecoder(llama, tokenizer_of(), CONFIG, cache_implementation=name)
    with pytest.raises(ValueError, match=f"cache_implementation='{name}'"):
        trainer(tmp_path, model=model_of(), cache_implementation=name)


@pytest.mark.parametrize("wrap", [torch.compile, with_lora, lambda model: model])
def test_a_wrapped_model_is_told_by_what_it_wraps(wrap):
    model = own_cache(net(), "static")
    wrapped = wrap(model)
    assert SoftDecoder(wrapped, tokenizer_of(), CONFIG, compile=True)
    own_cache(model, None)
    with pytest.raises(ValueError, match="compile=True needs a cache of one size"):
        SoftDecoder(wrapped, tokenizer_of(), CONFIG, compile=True)


@pytest.mark.parametrize(
    "name", [None, "dynamic", "offloaded", "quantized", *STATIC_CACHE_IMPLEMENTATIONS]
)
def test_one_rule_says_what_compiles(tmp_path, name):
    """Where nothing is named a decoder asks the model, which a rollout does not follow."""
    for make, follows in (
        (lambda: CacheOptions(name, compile=True), True),
        (lambda: config(tmp_path, cache_implementation=name, compile_rollout=True), False),
    ):
        if name in STATIC_CACHE_IMPLEMENTATIONS or (name is None and follows):
            assert make()
        else:
            with pytest.raises(ValueError, match="needs a cache of one size"):
                make()


def test_the_models_own_static_cache_compiles(monkeypatch):
    """By `softar.generate`, beside settings that name none, and by a decoder."""
    made = []
    monkeypatch.setattr(torch, "compile", lambda f, **_: made.append(f) or f)
    model = own_cache(net(num_hidden_layers=1), "static")
    plain = decode(model)
    assert_same(decode(model, compile=True), plain)
    bare = GenerationConfig(eos_token_id=EOS, pad_token_id=0)
    decode(model, compile=True, generation_config=bare)
    assert len([*filter(inspect.ismethod, made)]) == 1  # kept by transformers
    assert SoftDecoder(model, tokenizer_of(), CONFIG, compile=True).decode(["w5 w6"])


class OneName(LlamaForCausalLM):
    """Takes its cache as all models do since transformers 5.24, whichever is installed."""

    def forward(self, input_ids=None, attention_mask=None, inputs_embeds=None, cache=None, **how):
        return super().forward(input_ids, attention_mask, inputs_embeds=inputs_embeds, **how)


def test_a_cache_has_the_name_that_the_forward_gives_it():
    model, cache = OneName(model_of().config), DynamicCache()
    check_reads_mixtures(model)
    assert cache_name(model) == cache_name(with_lora(model)) == "cache"
    assert cache_name(net()) in ("cache", "past_key_values")
    for name in ("cache", "past_key_values", "cache_params"):
        assert cache_in({"input_ids": IDS, name: cache}) is cache
    assert cache_in({"past_key_values": None, "cache_params": cache}) is cache
    assert cache_in({"use_cache": True}) is None
