"""The caches of transformers under the loop: the same tokens and records whichever holds the keys
and values, and by name what is refused.

Nets are float64: there rounding, which differs from cache to cache, is nowhere near what tells two
tokens apart, so that tokens are equal over any number of steps that feed back what they read.
"""

import copy
from contextlib import nullcontext

import pytest
import torch
from tiny import (
    BOS,
    END,
    EOS,
    PROMPTS,
    THINK,
    Forced,
    counted,
    edited_logits,
    left_padded,
    model_of,
    seeded,
    tokenizer_of,
    with_lora,
)
from torch.testing import assert_close
from transformers import CompileConfig, LlamaModel, StaticCache, TextStreamer
from transformers.generation.configuration_utils import (
    ALL_CACHE_IMPLEMENTATIONS,
    DEPRECATED_STATIC_CACHE_IMPLEMENTATIONS,
)

import softar
from softar import Kind, SoftConfig
from softar.step import GIVEN_UP

IDS, MASK = left_padded(PROMPTS)
N = 12  # new tokens
WAYS = {
    "hard": dict(mixer="hard", top_k=None),
    "soft": dict(mixer="soft", top_k=5),
    "k-samples": dict(mixer="k-samples", top_k=None),
    "budget": dict(mixer="gumbel", top_k=5, budget=4, answer_temperature=0.7),
    "tags": dict(mixer="soft", think_start=BOS, think_end=(41,), top_k=5),
    "switching": dict(switch="block", switch_dwell=2, top_k=5),
    "hidden": dict(mixer="hidden", budget=5),
}


def net(arch="llama", **changes):
    return model_of(arch, dtype=torch.float64, **changes)


@pytest.fixture(scope="module")
def llama():
    return net()


def decode(model, way="soft", rows=(IDS, MASK), **how):
    """A generator for each row, so that any may look ahead."""
    rng = [seeded(i) for i in range(len(rows[0]))]
    config = SoftConfig(**{"max_new_tokens": N} | WAYS[way])
    return softar.generate(model, *rows, config=config, **{"rng": rng} | how)


def assert_same(one, other):
    """Tokens, records and costs of two decodes."""
    assert torch.equal(one.sequences, other.sequences)
    assert torch.equal(one.answer_start, other.answer_start)
    for name, a, b in zip(one.record._fields, one.record, other.record, strict=True):
        if a.is_floating_point():
            assert_close(a, b, rtol=0, atol=1e-4, equal_nan=True)
        else:
            assert torch.equal(a, b), name
    costs = [(o.num_forwards, o.token_forwards, o.prompt_length) for o in (one, other)]
    assert costs[0] == costs[1]
    for a, b, atol in ((one.vectors, other.vectors, 1e-2), (one.perturbed, other.perturbed, 1e-4)):
        assert (a is None) == (b is None)
        if a is not None:
            assert_close(a, b, rtol=0, atol=atol)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("arch", ["llama", "gemma3"])
def test_a_static_cache_changes_nothing(arch, way):
    """Of ragged rows, some of which end early; in Gemma 3 a layer's window slides."""
    model = net(arch)
    plain = decode(model, way)
    assert plain.completions.unique().numel() > 4
    assert_same(decode(model, way, cache_implementation="static"), plain)


def test_a_static_cache_changes_little_in_float32():
    """One step, after the prompt and the first mixture: a step that is fed back would grow it."""
    model = model_of("llama")
    ways = [None, "static"]
    one, other = (decode(model, max_new_tokens=2, cache_implementation=name) for name in ways)
    assert_close(one.record.entropy, other.record.entropy, rtol=0, atol=1e-4)


def test_the_setting_of_generate_and_of_the_model_is_the_same(llama, monkeypatch):
    """And a larger max_cache_len, an empty cache of the caller's, and the prompt read in parts."""
    plain, size = decode(llama), IDS.shape[1] + N - 1
    settings = copy.deepcopy(llama.generation_config)
    settings.update(cache_implementation="static", max_cache_len=size + 9)
    assert_same(decode(llama, generation_config=settings), plain)
    settings.prefill_chunk_size = 2
    assert torch.equal(decode(llama, generation_config=settings).sequences, plain.sequences)
    monkeypatch.setattr(llama.generation_config, "cache_implementation", "static")
    assert_same(decode(llama), plain)
    monkeypatch.undo()
    cache = StaticCache(llama.config, max_cache_len=size)
    assert torch.equal(plugged(llama, past_key_values=cache), plain.sequences)


def plugged(model, **settings):
    return model.generate(
        IDS,
        attention_mask=MASK,
        custom_generate=softar.soft_decode,
        soft_config=SoftConfig(**WAYS["soft"]),
        **{"max_new_tokens": N} | settings,
    )


def refused(model, told, **how):
    with counted(model) as calls, pytest.raises(ValueError) as caught:
        decode(model, **how)
    assert told in str(caught.value) and "\n" not in str(caught.value) and not calls


@pytest.mark.parametrize("room", [1, IDS.shape[1], IDS.shape[1] + N - 2])
def test_a_cache_that_is_too_short_is_refused(llama, room):
    cache = StaticCache(llama.config, max_cache_len=room)
    with (
        counted(llama) as calls,
        pytest.raises(ValueError, match=f"has room for {room} positions, too few for 16"),
    ):
        plugged(llama, past_key_values=cache)
    assert not calls


NAMES = sorted({*ALL_CACHE_IMPLEMENTATIONS, "paged", "nonsense"})


@pytest.mark.parametrize("name", NAMES)
def test_every_cache_is_taken_or_refused_by_name(llama, name):
    """On a CPU nothing is moved to the host, and what quantises is not installed."""
    remedies = {
        **dict.fromkeys(
            [*DEPRECATED_STATIC_CACHE_IMPLEMENTATIONS, "paged", "nonsense"], "choose one of"
        ),
        **dict.fromkeys(["offloaded", "offloaded_static"], "give 'dynamic' or 'static'"),
        "quantized": "install optimum-quanto",
    }
    if name not in remedies:
        for model in (llama, with_lora(net())):
            assert_same(decode(model, cache_implementation=name), decode(model))
        return
    refused(llama, f"cache_implementation={name!r}", cache_implementation=name)
    refused(llama, remedies[name], cache_implementation=name)


def test_an_old_name_in_the_models_own_file_is_as_transformers_takes_it():
    model = net("gemma3")
    plain = decode(model)
    for name in ("hybrid", "sliding_window"):
        model.generation_config.cache_implementation = name
        assert_same(decode(model), plain)


def test_a_model_with_a_cache_of_its_own_takes_no_other():
    from test_architectures import build

    rwkv, rows = build("rwkv"), (IDS[:1], MASK[:1])
    refused(
        rwkv, "RwkvForCausalLM has a cache of its own", rows=rows, cache_implementation="static"
    )


def test_virtual_tokens_have_no_room():
    from peft import PromptTuningConfig, get_peft_model

    tuned = get_peft_model(net(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    refused(
        tuned.double(),
        "virtual tokens of PROMPT_TUNING",
        rows=(IDS[:1, :2], MASK[:1, :2]),
        cache_implementation="static",
    )


# -- how often the host looks


@pytest.mark.parametrize("way", [way for way in WAYS if way != "hidden"])
def test_nothing_depends_on_how_often_the_host_looks(llama, way):
    """Some rows end early, and then all together, so that the last look is late."""
    ends = Forced(IDS.shape[1], [[None] * step + [EOS] for step in (3, 0, 9)])
    for how in ({}, dict(logits_processor=[ends])):
        each, *others = (decode(llama, way, look_every=n, **how) for n in (1, 2, 7))
        assert how == {} or each.record.kind.shape[1] <= 10
        for other in others:
            assert_same(other, each)
            assert other.record.ids.shape == each.record.ids.shape


def test_a_thought_that_begins_and_ends_between_two_looks_is_thought(llama):
    config = SoftConfig(
        mixer="gumbel", top_k=5, think_start=THINK, think_end=END, max_new_tokens=20
    )
    free = [None, None]
    script = [
        [*free, THINK, *free, END],
        [7, 8],
        [*free, 9, *free, THINK, *free, *free, END, *free, EOS],
    ]
    outs = []
    for n in (1, 2, 7, 20):
        how = dict(logits_processor=[Forced(IDS.shape[1], script)], look_every=n)
        outs.append(
            softar.generate(
                llama, IDS, MASK, config=config, rng=[seeded(i) for i in range(3)], **how
            )
        )
        assert_same(outs[-1], outs[0])
    assert (outs[0].record.kind == Kind.SOFT).any(1)[[0, 2]].all()


def test_a_look_that_comes_late_names_the_step(llama):
    def broken(step, logits):
        return (
            logits * torch.where(torch.arange(3) == 1, torch.nan, 1.0)[:, None]
            if step == 2
            else logits
        )

    for n in (1, 7):
        with (
            edited_logits(llama, broken),
            pytest.raises(FloatingPointError, match=r"at step 2, rows \[1\]"),
        ):
            decode(llama, look_every=n)


@pytest.mark.parametrize(
    "how, told",
    [
        (dict(callback=print), "callback="),
        (dict(streamer=TextStreamer(tokenizer_of())), "a streamer"),
        (dict(way="hidden"), "mixer='hidden'"),
        (dict(way="k-samples", rng=None), "a generator that rows share"),
        (dict(way="budget", rng=seeded()), "a generator that rows share"),
        (dict(stopping_criteria=[lambda ids, scores: ids[:, -1] == 1]), "function"),
        (dict(look_every=0), "look_every=0 must be at least 1"),
    ],
)
def test_what_needs_each_step_is_named(llama, how, told):
    refused(llama, told, **{"look_every": 2} | how)


def test_without_draws_a_shared_generator_needs_nothing(llama):
    assert_same(decode(llama, rng=seeded(), look_every=3), decode(llama))


# -- compiled; by a backend that makes no code, so that no compiler has to be there


@pytest.fixture
def graphs():
    """The graphs that are compiled meanwhile."""
    torch._dynamo.reset()
    yield []
    torch._dynamo.reset()
    GIVEN_UP.clear()


def compiled(model, way, backend, **how):
    settings = copy.deepcopy(model.generation_config)
    settings.update(
        cache_implementation="static",
        compile_config=CompileConfig(fullgraph=True, mode="default", backend=backend),
    )
    return decode(model, way, generation_config=settings, **how)


def test_one_compiled_graph_decodes_as_the_model_does(graphs, way="budget"):
    """Thought, answer and a second decode of another prompt: the shapes of a step never change.
    Around the forward are two: while somebody thinks, and afterwards."""

    def note(graph, inputs):
        graphs.append(graph)
        return graph.forward

    model = net(num_hidden_layers=1)
    shorter = dict(rows=(IDS[:, 1:], MASK[:, 1:]), max_new_tokens=6)
    for how in ({}, shorter):
        assert_same(compiled(model, way, note, **how), decode(model, way, **how))
    assert len(graphs) == 3


def test_a_model_that_does_not_compile_is_named_once_and_decodes(graphs, recwarn):
    def fails(graph, inputs):
        graphs.append(graph)
        raise RuntimeError("no compiler")

    model = net(num_hidden_layers=1)
    plain = decode(model, "budget")
    for _ in range(2):
        assert_same(compiled(model, "budget", fails), plain)
    told = [str(w.message) for w in recwarn if "does not compile" in str(w.message)]
    assert len(told) == len(graphs) == 2
    for message, what in zip(told, ("the step around the forward", "LlamaForCausalLM")):
        assert message.startswith(f"{what} does not compile (")
    broken, forward = net(num_hidden_layers=1), LlamaModel.forward
    broken.model.forward = lambda **inputs: (
        torch._dynamo.graph_break(),
        forward(broken.model, **inputs),
    )[1]
    with pytest.warns(UserWarning, match="LlamaForCausalLM does not compile"):
        assert_same(compiled(broken, "budget", "eager"), plain)
    many, rows = net(num_hidden_layers=1), (IDS[:1], MASK[:1])
    with (
        torch._dynamo.config.patch(recompile_limit=1),
        pytest.warns(UserWarning, match="more shapes"),
    ):
        compiled(many, "budget", "eager", max_new_tokens=2)
        assert_same(compiled(many, "budget", "eager", rows=rows), decode(many, "budget", rows=rows))


def test_compiling_needs_a_cache_of_one_size(llama):
    refused(llama, "give cache_implementation='static'", compile=True)
    settings = copy.deepcopy(llama.generation_config)
    settings.compile_config = CompileConfig()
    refused(llama, "give cache_implementation='static'", generation_config=settings)


# -- by those who decode


def test_decoders_pass_it_on(monkeypatch):
    """The spec's option, a vote's too, reaches `softar.generate`; other decoders take none."""
    from softar.decoders import soft

    told, inner = [], soft.generate

    def generate(*args, **kwargs):
        told.append((kwargs["cache_implementation"], kwargs["compile"]))
        return inner(*args, **kwargs | {"compile": False})

    monkeypatch.setattr(soft, "generate", generate)
    how = dict(model="mnns-soft-tiny", max_new_tokens=4)
    for spec in ("soft:", "discrete:", "self-consistency:votes=2,"):
        decoder = softar.make_decoder(f"{spec}cache_implementation=static,compile=true", **how)
        assert (
            decoder.decode(["<bos> D4 D8 D1 D3 ->"])
            and "cache_implementation=static" in decoder.name
        )
    assert told == [("static", True)] * 3
    for spec, says in (
        ("soft:cache_implementation=statik", "did you mean 'static'"),
        ("soft:compile=true", "needs a cache of one size: give cache_implementation='static'"),
        ("beam:cache_implementation=static", "takes no 'cache_implementation'"),
        (
            "mnns-diffusion-tiny=denoise:cache_implementation=static",
            "takes no 'cache_implementation'",
        ),
    ):
        with pytest.raises(ValueError, match=says):
            softar.make_decoder(spec, **how)


def test_rollouts_of_rl_take_it(llama, monkeypatch):
    from types import SimpleNamespace

    from softar import split
    from softar.rl import rollout

    told = {}
    monkeypatch.setattr(rollout, "generate", lambda *args, **kwargs: told.update(kwargs))
    monkeypatch.setattr(
        split, "unwrap_model_for_generation", lambda model, *_, **__: nullcontext(model)
    )
    args = SimpleNamespace(
        cache_implementation="static", compile_rollout=True, gradient_checkpointing_kwargs=None
    )
    trainer = SimpleNamespace(
        model=llama,
        model_wrapped=llama,
        accelerator=None,
        args=args,
        decoding=None,
        eos_token_ids=[EOS],
        _tokenizer=SimpleNamespace(pad_token_id=0),
    )
    rollout.decode_by_loop(trainer, IDS, MASK, [])
    assert (told["cache_implementation"], told["compile"]) == ("static", True)
