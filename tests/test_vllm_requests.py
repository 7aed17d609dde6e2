"""Requests on their way into vLLM, without an engine: what is refused, and how shortly."""

import asyncio
import json
import sys
import warnings
from types import SimpleNamespace

import pytest
import tiny
import torch

from softar.config import SoftConfig
from softar.decoders.card import describe
from softar.decoders.options import Common
from softar.mixers import Mixed
from softar.models import word_tokenizer
from softar.vllm.client import Connection
from softar.vllm.completions import Sampling
from softar.vllm.decoders import DECODERS
from softar.vllm.engine import VLLMDecoder
from softar.vllm.export import check_served
from softar.vllm.finite import check_embeds, count_broken, update_from_output, zero_blocks
from softar.vllm.http import generate
from softar.vllm.plugin import process_inputs, tokenize_prompt
from softar.vllm.request import FIELDS, LIMIT
from softar.vllm.switches import Switches, thinks

PARALLEL = dict(
    pipeline_parallel_size=1, prefill_context_parallel_size=1, enable_batch_sharded_sampling=False
)


def flat(dist, *, rng=None):
    return Mixed(dist, dist.ids[..., 0], None)


NONE = """structured_outputs logprobs logprob_token_ids prompt_logprobs prompt_logprob_token_ids
    logit_bias allowed_token_ids bad_words thinking_token_budget trace_decode_token_ids"""
PARAMS = (
    dict.fromkeys(NONE.split())
    | dict(presence_penalty=0, frequency_penalty=0, repetition_penalty=1, min_tokens=0)
    | dict(max_tokens=16, ignore_eos=False)
)


def config_of(embeds=True, **switches):
    """vLLM's configuration, as far as requests are checked by it."""
    model = SimpleNamespace(
        enable_prompt_embeds=embeds,
        is_encoder_decoder=False,
        logits_processors=None,
        return_sampling_mask=False,
        hf_text_config=SimpleNamespace(),
        get_vocab_size=lambda: tiny.VOCAB,
        get_hidden_size=lambda: 8,
        dtype=torch.float32,
    )
    return SimpleNamespace(
        model_config=model,
        additional_config={"softar": switches} if switches else {},
        speculative_config=None,
        kv_transfer_config=None,
        parallel_config=SimpleNamespace(**PARALLEL),
    )


@pytest.fixture(autouse=True)
def _no_vllm(monkeypatch):
    """Its imports take longer than all of these tests, for the sake of one class."""
    errors = SimpleNamespace(VLLMValidationError=type("Error", (Exception,), {}))
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(exceptions=errors))
    monkeypatch.setitem(sys.modules, "vllm.exceptions", errors)


@pytest.mark.parametrize("trace", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        dict(softness=0.5),
        dict(banned=[3]),
        dict(keep=88),
        dict(softness=0.5, keep=88),
        dict(mixer="hybrid"),
        dict(mixer="hybrid", candidates=5),
        dict(mixer="mixture-of-inputs"),
        dict(mixer="gumbel", candidates=5),
        dict(mixer="k-samples", k=5),
        dict(switch="block", switch_dwell=1, think_end="S0"),
        dict(switch="block", switch_dwell=1, think_end="S0 S1", switch_budget=2, switch_final="S0"),
    ],
    ids=str,
)
def test_an_engine_takes_the_width_that_it_is_given(options, trace):
    """Where a decoder itself says how much of a small vocabulary is mixed, as much as goes; a mixture
    that is narrow without is left alone."""
    card, common = describe("mnns-soft-tiny"), Common(8, trace=trace)
    made = DECODERS["vllm-soft"](card, common, url="http://x", top_k=None, **options)
    config, n = config_of(soft=True), len(made.tokenizer)
    config.model_config.get_vocab_size = lambda: n
    asked = SoftConfig(
        **send(made.soft, config=config, tokenizer=made.tokenizer)["softar"]["config"]
    )
    room = n - 1 if made.soft["record"] else LIMIT
    narrow = options.get("candidates", options.get("k")) is not None
    assert asked.top_k is None if narrow else asked.width == min(room, asked.changed(top_k=n).width)


def send(soft=None, embeds=None, config=None, tokenizer=None, **more):
    """What process_inputs makes of a request: its extra_args. more: of SamplingParams."""
    config = config or config_of()
    processor = SimpleNamespace(vllm_config=config, tokenizer=tokenizer or tiny.tokenizer_of())
    params = PARAMS | more | {"extra_args": None if soft is None else {"soft": soft}}
    params = SimpleNamespace(**params)

    def method(self, request_id, prompt, params, *args, **kwargs):
        return SimpleNamespace(prompt_embeds=embeds, mm_features=None, sampling_params=params)

    return process_inputs(method, processor, "0", None, params).sampling_params.extra_args


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 1e39])
def test_embeddings_that_are_not_finite_are_refused(value):
    embeds = torch.zeros(5, 8, dtype=torch.float64)
    send(embeds=embeds)
    embeds[4, 7] = value
    with pytest.raises(ValueError, match=r"must be finite in torch\.float32"):
        send(embeds=embeds)


@pytest.mark.parametrize(
    "embeds", [torch.zeros(5, 7), torch.zeros(2, 5, 8), torch.zeros(5, 8).int(), torch.zeros(8)]
)
def test_embeddings_of_another_shape_are_refused(embeds):
    with pytest.raises(ValueError, match=r"must be numbers of shape \(tokens, 8\)"):
        check_embeds(embeds, config_of().model_config)


def test_who_thinks_takes_no_embeddings():
    with pytest.raises(ValueError, match="not with prompt_embeds"):
        send({}, embeds=torch.zeros(5, 8))
    with pytest.raises(ValueError, match=r"not in this engine; .* softar serve --soft"):
        send({}, config=config_of(embeds=False))
    assert send({"budget": 3}, config=config_of(embeds=False, soft=True))["softar"]
    assert thinks(config_of()) and not thinks(config_of(embeds=False))


@pytest.mark.parametrize("soft", [{"budget": 100}, {"switch": "block", "switch_dwell": 100}])
def test_no_length_but_its_own_is_said_to_be_short(soft):
    """The engine and its worker, and the decoder that asks them."""
    with warnings.catch_warnings(action="error"):
        SoftConfig(**send(soft, max_tokens=512)["softar"]["config"])
        assert Sampling("soft", 512, soft=soft).thinking.max_new_tokens == 512
    with pytest.warns(UserWarning, match=r"=100 is not below max_new_tokens=50\b"):
        send(soft, max_tokens=50)
    one, other = (send({"budget": 9}, max_tokens=n)["softar"] for n in (20, 30))
    assert one == other  # they step together


LONG = {  # of each type that a field may have
    str: "x" * 1_000_000,
    dict: {"tau": "x" * 1_000_000},
    int: int("1" * 4000),
    float: 1e300,
    list: [5] * 300_000,
    bool: True,
}
VALUES = [
    (name, value)
    for name, kinds in FIELDS.items()
    for value in (*LONG.values(), {"x" * 1_000_000: 1}, {"tau": [[1] * 9] * 9999}, ["é" * 10**6])
]


@pytest.mark.parametrize("as_text", [False, True])
def test_no_refusal_is_long_whatever_a_field_holds(as_text):
    bodies = [{name: value} for name, value in VALUES]
    bodies += [{"x" * 1_000_000: 1}, {f"x{i}": i for i in range(100_000)}, "x" * 1_000_000]
    said = []
    for body in bodies:
        try:
            asked = json.dumps(body) if as_text and not isinstance(body, str) else body
        except ValueError:  # Python writes no number so long
            continue
        try:
            send(asked)
        except ValueError as error:
            said.append(str(error))
    assert len(said) > 0.7 * len(bodies)
    assert all(text.startswith("soft: ") and len(text) <= 390 for text in said), max(said, key=len)
    assert not any("\n" in text for text in said)


@pytest.mark.parametrize(
    "soft, says",
    [
        ({"mixer": "m" * 1001}, "field 'mixer' has 1010 characters, and at most 1000 are read"),
        ({"banned": [5] * 20_000}, "field 'banned' has 60008 characters, and at most 32768"),
        ({"mixer": "gumbell"}, r"did you mean 'gumbel'\?: choose one of \[[^]]*\] \(the server's"),
        ({"mixer": "os:system"}, "mixer='os:system' is unknown here"),
        (
            {"mixer": "k-samples", "mixer_args": {"k": 99}, "top_k": 5, "record": True},
            "mixture of 99 tokens is too wide: set k to at most 63",
        ),
        ({"mixer": "hidden", "budget": 3}, "mixer='hidden' asks for hidden states, which vLLM"),
        ({"mixer_args": {"gate": "/etc/passwd"}}, "gate"),
        ({"mixer": "hybrid", "mixer_args": {"gate": "/etc/passwd"}}, "a gate, a file, which vLLM"),
        ({"think_end": "</think>"}, r"think_end='</think>' cannot be read by the tokenizer \("),
    ],
)
def test_what_is_wrong_is_said(soft, says):
    with pytest.raises(ValueError, match=says):
        send(soft, tokenizer=word_tokenizer(["<pad>", "<bos>", "<eos>", "word"]))
    assert send({"banned": [5] * 9000})["softar"]["config"]["banned"] == (5,) * 9000


def test_what_is_broken_is_counted_by_row():
    logits = torch.zeros(6, 9)
    logits[1, 3], logits[2, 8], logits[4] = torch.nan, torch.inf, -torch.inf
    logits[5, 1:] = -torch.inf  # as filters leave it
    assert count_broken(None, logits).tolist() == [0, 1, 1, 0, 1, 0]


def test_blocks_are_set_to_zero_in_every_layer_and_nothing_else_is():
    plain, split = torch.ones(4, 2, 3), torch.ones(8, 5)  # 2 kernel blocks each
    states = [torch.ones(4, 7), torch.ones(4, 1)]
    layers = {str(i): SimpleNamespace(kv_cache=c) for i, c in enumerate([plain, split, states])}
    runner = SimpleNamespace(
        kv_cache_config=SimpleNamespace(num_blocks=4),
        compilation_config=SimpleNamespace(
            static_forward_context=layers
            | {"bare": SimpleNamespace(), "empty": SimpleNamespace(kv_cache=torch.tensor([]))}
        ),
    )
    zero_blocks(runner, SimpleNamespace())
    assert all(part.all() for part in (plain, split, *states))
    zero_blocks(runner, SimpleNamespace(softar_blocks=(2,)))
    for part, rows in ((plain, [2]), (split, [4, 5]), (states[0], [2]), (states[1], [2])):
        is_zero = (part == 0).flatten(1)
        assert is_zero[rows].all() and is_zero.sum() == is_zero[rows].numel()


def test_an_engine_that_does_not_think_ends_nothing():
    scheduler = SimpleNamespace(vllm_config=config_of(embeds=False), requests={"a": 1})
    out = SimpleNamespace(num_nans_in_logits={"a": 3})
    assert update_from_output(lambda *args: args[1:], scheduler, "scheduled", out) == (
        "scheduled",
        out,
    )


def test_soft_answers_count_while_they_are_under_way():
    """However they end: read to the end, left early, cancelled or failed."""
    engine = SimpleNamespace(vllm_config=config_of(soft=True, max_soft=3), softar_count=0)
    errors = sys.modules["vllm.exceptions"]
    errors.GracefulHTTPError = type("Refused", (Exception,), {})

    async def method(self, prompt, params):
        for step in range(3):
            await asyncio.sleep(0)
            if prompt == "fails" and step == 1:
                raise RuntimeError
            yield step

    def ask(prompt, n=1, soft="{}"):
        params = SimpleNamespace(n=n, extra_args=soft and {"soft": soft})
        return generate(method, engine, prompt, sampling_params=params)

    async def main():
        first, second = ask("a"), ask("b", n=2)
        assert [await anext(first), await anext(second), engine.softar_count] == [0, 0, 3]
        with pytest.raises(errors.GracefulHTTPError, match=r"3 answers .* at most 3"):
            await anext(ask("c"))
        assert [step async for step in ask("d", n=9, soft=None)] == [0, 1, 2]
        await second.aclose()
        assert engine.softar_count == 1 and [step async for step in first] == [1, 2]
        with pytest.raises(RuntimeError):
            [step async for step in ask("fails", n=3)]
        task = asyncio.create_task(anext(ask("e")))
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await asyncio.sleep(0.01)
        return engine.softar_count

    assert asyncio.run(main()) == 0


def test_mixers_of_ones_own_are_those_that_the_server_was_started_with():
    own = f"{__name__}:flat"
    config = config_of(soft=True, mixers=[own])
    assert send({"mixer": own}, config=config)["softar"]["config"]["mixer"] == own
    with pytest.raises(ValueError, match="is unknown here"):
        send({"mixer": f"{__name__}:send"}, config=config)
    assert VLLMDecoder("m", mode="soft", soft={"mixer": own}).key[2] == (("mixers", (own,)),)
    assert Switches(soft=True, mixers=[own]).entry == {"softar": {"soft": True, "mixers": (own,)}}


def test_the_limit_is_checked_before_a_server_starts():
    with pytest.raises(ValueError, match="max_soft=3 needs soft=True"):
        Switches(max_soft=3)
    with pytest.raises(ValueError, match="max_soft=0 must be at least 1"):
        Switches(soft=True, max_soft=0)
    assert Switches().arguments == []
    assert Switches(soft=True, max_soft=3).arguments[1] == '{"soft": true, "max_soft": 3}'


@pytest.mark.parametrize(
    "name, says",
    [
        (
            "mnns-diffusion-tiny",
            "is a masked-diffusion model, and vLLM serves none: .* `softar fill",
        ),
        ("mnns-sfot-tiny", "the hub does not give it .*, did you mean 'mnns-soft-tiny'"),
        ("nobody/nothing", "is no folder and not in the hub's cache, .* reached or one of"),
    ],
)
def test_what_cannot_be_served_is_said_at_once(name, says):
    with pytest.raises(ValueError, match=says):
        check_served(name)
    check_served("mnns-soft-tiny")


def test_what_is_in_the_cache_is_served_without_a_question(monkeypatch, tmp_path):
    snapshot = tmp_path / "models--owner--name" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text('{"model_type": "llama"}')  # says no architecture
    refs = tmp_path / "models--owner--name" / "refs"
    refs.mkdir()
    (refs / "main").write_text("0" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("softar.vllm.export.HfApi", lambda: pytest.fail("the hub was asked"))
    check_served("owner/name")


@pytest.mark.parametrize("given, sent", [(None, "Bearer e"), ("k", "Bearer k"), ("", None)])
def test_a_decoder_sends_the_key(monkeypatch, given, sent):
    monkeypatch.setenv("VLLM_API_KEY", "e")
    client = Connection(api_key=given).client("http://127.0.0.1:1")
    assert client.headers.get("Authorization") == sent
    # what is for this machine goes nowhere else, unless it is asked for
    away = Connection(api_key=given).client("https://example.org/v1")
    assert away.headers.get("Authorization") == (sent if given else None)
    for url in ("https://example.org", "http://localhost:1"):
        named = Connection(api_key="env").client(url)
        assert named.headers.get("Authorization") == "Bearer e"
    monkeypatch.delenv("VLLM_API_KEY")
    with pytest.raises(ValueError, match="api_key='env': VLLM_API_KEY is not in the environment"):
        Connection(api_key="env").client("https://example.org")
    assert "Authorization" not in Connection().client("http://127.0.0.1:1").headers


def test_words_outside_a_closed_vocabulary_are_the_clients_mistake():
    """500 otherwise; what else fails in there is none of the client's."""
    closed = word_tokenizer(["<pad>", "<bos>", "<eos>", "a"])

    def method(self, prompt, params):
        return closed(prompt["prompt"])["input_ids"]

    assert tokenize_prompt(method, None, {"prompt": "a a"}, None) == [3, 3]
    refused = sys.modules["vllm.exceptions"].VLLMValidationError
    with pytest.raises(refused, match=r"tokenizer cannot read the prompt: .*vocabulary"):
        tokenize_prompt(method, None, {"prompt": "a hello"}, None)
    with pytest.raises(KeyError):
        tokenize_prompt(method, None, {}, None)
