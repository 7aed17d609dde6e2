"""Soft decoding by vLLM's server on loopback: answers, streams, refusals, and the decoders that
ask it, beside softar.generate."""

import asyncio
import base64
import io
import json
import os
import random

import httpx
import pytest
import tiny
import torch
from engine_script import (
    DRAWN,
    FORKING,
    KINDS,
    SOFT,
    TO_TRACE,
    TRACED,
    expected,
    model_of,
    same,
    same_trace,
    save_models,
)
from fuzz.chaos import Chaos
from tiny import BOS, THINK

import softar
import softar.vllm.server
from softar.decoders.card import describe
from softar.decoders.options import Common
from softar.decoders.soft import DECODERS as LOOP
from softar.evaluate import encode
from softar.thought import Kind
from softar.vllm.client import ServerDecoder
from softar.vllm.decoders import DECODERS
from softar.vllm.record import from_json, to_record

KEY = "not for everybody"
TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
ASKED = dict(headers={"Authorization": f"Bearer {KEY}"}, timeout=60, trust_env=False)


@pytest.fixture(autouse=True)
def _key(monkeypatch):
    monkeypatch.setenv("VLLM_API_KEY", KEY)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("soft")
    save_models(folder)
    return folder


@pytest.fixture(scope="module")
def server(folder):
    more = ["--chat-template", TEMPLATE]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(os.environ, "PYTHONPATH", FORKING["PYTHONPATH"])
        with softar.vllm.server.serve(
            folder / "llama",
            max_model_len=128,
            soft=True,
            max_soft=48,
            mixers=["own_mixer:flat"],
            api_key=KEY,
            extra=more,
        ) as running:
            patch.undo()
            yield running


@pytest.fixture(scope="module")
def model():
    return model_of("llama")


def body_of(server, **body):
    body = {
        "model": server.model,
        "temperature": 0,
        "max_tokens": 12,
        "return_token_ids": True,
        **body,
    }
    if "soft" in body:
        body["vllm_xargs"] = {"soft": json.dumps(body.pop("soft"))}
    return body


def post(server, path="completions", **body):
    return httpx.post(f"{server.url}/v1/{path}", json=body_of(server, **body), **ASKED)


def chunks(server, path="completions", **body):
    """The choices of a stream, one per chunk."""
    said = post(server, path, stream=True, **body).text
    bodies = [json.loads(line[6:]) for line in said.splitlines() if line.startswith("data: {")]
    return [choice for body in bodies for choice in body["choices"]]


def joined(choices, index=0):
    """The record of a stream, and its tokens."""
    own = [c for c in choices if c["index"] == index]
    assert all(("soft" in c) == ("token_ids" in c) for c in own)
    parts = [c["soft"] for c in own if "soft" in c]
    assert all(p["token"] == c["token_ids"] for p, c in zip(parts, (c for c in own if "soft" in c)))
    return {name: [x for part in parts for x in part[name]] for name in parts[0]}


def reads(soft):
    """A choice's field, as `same` takes it."""
    record = to_record(from_json(soft))
    assert record.ids.shape[:2] == (1, len(soft["token"]))
    return zip(
        *(column[0].tolist() for column in (record.token, record.ids, record.weights)),
        *(column[0].tolist() for column in (record.kind, record.logp, record.entropy)),
    )


@pytest.mark.slow
def test_the_server_thinks_softly_too(server, model):
    wanted = [([BOS, 11, 12, 13], soft, 7, 12, True) for soft in [None, *range(len(SOFT))]]
    turns = [([BOS, 11, THINK], soft, 8, 40, True) for soft in range(len(SOFT), len(KINDS))]
    loops = expected(model, [*wanted, *turns])
    switched = torch.cat([record.kind for _, record in loops[len(wanted) :]])
    assert all((switched == kind).sum() > 5 for kind in (Kind.SOFT, Kind.HARD, Kind.FORCED))
    for (prompt, soft, seed, length, _), (tokens, record) in zip([*wanted, *turns], loops):
        fields, draws = ({}, False) if soft is None else KINDS[soft]
        asked = {"prompt": prompt, "seed": seed if draws else None, "max_tokens": length}
        if soft is None:
            choice = post(server, **asked).json()["choices"][0]
            assert choice["token_ids"] == tokens and "soft" not in choice
            continue
        (choice,) = post(server, **asked, soft={**fields, "record": True}).json()["choices"]
        assert (
            choice["token_ids"] == choice["soft"]["token"] == tokens and choice["logprobs"] is None
        )
        same(reads(choice["soft"]), record)
    (choice,) = post(server, **asked, soft=fields).json()["choices"]
    assert choice["token_ids"] == tokens and "soft" not in choice


@pytest.mark.slow
def test_chat_and_streams_bring_the_record_too(server, model):
    soft, chat = {**SOFT[0][0], "record": True}, [{"role": "user", "content": "<bos> w11 w12 w13"}]
    ((tokens, record),) = expected(model, [([BOS, 11, 12, 13], 0, 0, 12, True)])
    (choice,) = post(server, "chat/completions", messages=chat, soft=soft).json()["choices"]
    assert choice["token_ids"] == tokens
    same(reads(choice["soft"]), record)
    for path, prompt in (
        ("completions", {"prompt": [BOS, 11, 12, 13]}),
        ("chat/completions", {"messages": chat}),
    ):
        found = chunks(server, path, **prompt, soft=soft)
        assert len(found) > 1 and joined(found) == choice["soft"]
        hidden = chunks(server, path, **prompt, soft=soft, return_token_ids=False)
        assert {
            name: [x for c in hidden for x in c.get("soft", {}).get(name, [])]
            for name in choice["soft"]
        } == choice["soft"]
        assert not any("soft" in c for c in chunks(server, path, **prompt, soft=SOFT[0][0]))
    # Several prompts, several draws of each
    asked = dict(
        prompt=[[BOS, 11], [BOS, 21, 22]],
        n=2,
        temperature=1,
        seed=3,
        soft={**DRAWN, "record": True},
    )
    whole = post(server, **asked).json()["choices"]
    found = chunks(server, **asked)
    assert [c["index"] for c in whole] == [0, 1, 2, 3] and len(
        {tuple(c["token_ids"]) for c in whole}
    ) == 4
    for choice in whole:
        assert (
            choice["soft"]["token"] == choice["token_ids"]
            and joined(found, choice["index"]) == choice["soft"]
        )


@pytest.mark.slow
def test_the_client_of_the_readme(server):
    from openai import DefaultHttpxClient, OpenAI

    with OpenAI(
        base_url=f"{server.url}/v1", api_key=KEY, http_client=DefaultHttpxClient(trust_env=False)
    ) as client:
        soft = {"top_k": 10, "budget": 3, "record": True}
        answer = client.completions.create(
            model=server.model,
            prompt="<bos> w11 w12",
            max_tokens=6,
            temperature=0,
            extra_body={"vllm_xargs": {"soft": soft}},
        )
    read = answer.choices[0].soft
    assert (
        read["kind"] == ["soft"] * 3 + ["hard"] * 3
        and [len(w) for w in read["weights"]] == [10] * 3 + [1] * 3
    )
    assert all(sum(weights) == pytest.approx(1, abs=1e-5) for weights in read["weights"])
    assert to_record(from_json(read)).weights.shape == (1, 6, 10)


@pytest.mark.slow
def test_traces_are_those_of_the_loop(server, folder):
    card, common = describe(str(folder / "llama")), Common(12, trace=True)
    for options in TRACED:
        loop = LOOP["soft"](card, common, **options).decode(TO_TRACE)
        online = DECODERS["vllm-soft"](card, common, url=server.url, **options).decode(TO_TRACE)
        for row, other in zip(loop, online, strict=True):
            assert other.text == row.text and list(other.tokens) == list(row.tokens)
            assert other.entropy == pytest.approx(row.entropy, abs=1e-3)
            same_trace(other.trace, row.trace)
    numbers = ServerDecoder(
        server.url, max_new_tokens=5, mode="soft", soft={"top_k": 3}, trace=True
    )
    (row,) = numbers.decode(["<bos> w11 w12"])
    assert row.trace.prompt == "1 11 12" and [step.token for step in row.trace.steps] == list(
        map(str, row.tokens)
    )
    assert {step.kind for step in row.trace.steps} == {"soft"} and len(
        row.trace.steps[0].mixture
    ) == 3


@pytest.mark.slow
def test_the_decoder_for_comparisons_is_the_loops(server, folder):
    prompts = [
        " ".join(map(tiny.tokenizer_of().convert_ids_to_tokens, ids))
        for ids in ([BOS, 11, 12], [BOS, 20, 21, 22])
    ]
    # in place of what this model's tokenizer, which has think tags, would make the default
    neutral = "temperature=1,top_p=None,think_start=None,think_end=None"
    for options in ("top_k=10,budget=4", "mixer=gumbel,tau=0.4,top_k=6,budget=5"):
        theirs = softar.make_decoder(
            f"{folder / 'llama'}=vllm-soft:url={server.url},{options},{neutral}",
            max_new_tokens=12,
            seed=3,
        )
        found = theirs.decode(prompts)
        config = dict(max_new_tokens=12, top_k=10, budget=4)
        if "gumbel" in options:
            config |= dict(mixer="gumbel", mixer_args={"tau": 0.4}, top_k=6, budget=5)
        inputs = encode(tiny.tokenizer_of(), prompts)
        draws = random.Random(3)
        rng = [torch.Generator().manual_seed(draws.randrange(2**31)) for _ in prompts]
        out = softar.generate(
            model_of("llama"), **inputs, config=softar.SoftConfig(**config), rng=rng
        )
        for row, answer in enumerate(found):
            kept = out.completions[row][out.record.kind[row] != softar.Kind.PAD]
            assert list(answer.tokens) == kept.tolist(), options
            assert answer.num_forwards == len(kept) and theirs.columns["decoder"] == "vllm-soft"
    with pytest.raises(ValueError, match="tempratur"):
        softar.make_decoder(
            f"{folder / 'llama'}=vllm-soft:url={server.url},tempratur=1", max_new_tokens=12
        )


def in_base64(tensor):
    file = io.BytesIO()
    torch.save(tensor, file)
    return base64.b64encode(file.getvalue()).decode()


@pytest.mark.slow
def test_nobody_spoils_the_answers_of_others(server, model):
    asked = [dict(prompt=[BOS, 11, 12, 13]), dict(prompt=[BOS, 11, 12], soft={"budget": 3})]

    def said():
        return [post(server, **body).json()["choices"][0]["token_ids"] for body in asked]

    before = said()
    for value in (0.1, torch.nan, torch.inf):
        embeds = in_base64(torch.full((100, model.config.hidden_size), value))
        part = {"type": "prompt_embeds", "data": embeds}
        for path, body in (
            ("completions", {"prompt_embeds": embeds}),
            ("completions", {"prompt_embeds": [embeds, embeds], "prompt": [BOS, 11]}),
            ("chat/completions", {"messages": [{"role": "user", "content": [part]}]}),
        ):
            answer = post(server, path, **body)
            assert answer.status_code == 400 and len(answer.text) < 400, answer.text
            assert "--enable-prompt-embeds" in answer.json()["error"]["message"]
    assert said() == before


@pytest.mark.slow
def test_a_mixer_of_ones_own_is_the_function(server, model, monkeypatch):
    monkeypatch.syspath_prepend(FORKING["PYTHONPATH"].split(os.pathsep)[0])
    fields = dict(mixer="own_mixer:flat", mixer_args={"power": 0.25}, top_k=4)
    prompt = [BOS, 11, 12, 13]
    (choice,) = post(server, prompt=prompt, soft=fields).json()["choices"]
    config = softar.SoftConfig(**fields, max_new_tokens=12)
    own = softar.generate(model, torch.tensor([prompt]), config=config)
    assert choice["token_ids"] == own.completions[0].tolist()
    assert post(server, prompt=prompt, soft={"mixer": "os:system"}).status_code == 400


@pytest.mark.slow
def test_who_may_ask_and_how_much(server):
    prompt, soft = [BOS, 11, 12], {"budget": 3, "record": True}
    as_text = post(server, prompt=prompt, soft=soft).json()["choices"]
    for path, asked in (
        ("completions", {"prompt": prompt}),
        ("chat/completions", {"messages": [{"role": "user", "content": "<bos> w11 w12"}]}),
    ):
        (choice,) = post(server, path, **asked, vllm_xargs={"soft": soft}).json()["choices"]
        assert choice["soft"] == as_text[0]["soft"]
        for bad in (None, True, {"a": {}}, [{}], {"mixer": "x" * 1_000_000}):
            answer = post(server, path, **asked, vllm_xargs={"soft": bad})
            said = answer.json()["error"]["message"]
            assert answer.status_code == 400 and said.startswith("soft: ") and len(said) < 400
    answer = httpx.post(
        f"{server.url}/v1/completions", json=body_of(server, prompt=prompt), trust_env=False
    )
    assert answer.status_code == 401
    crowd = dict(prompt=prompt, n=49, temperature=1, soft={})
    answer = post(server, **crowd)
    assert answer.status_code == 503 and "at most 48 (--max-soft)" in answer.text
    assert '"code":503' in post(server, **crowd, stream=True).text.replace(" ", "")
    assert len(post(server, **{**crowd, "n": 48}).json()["choices"]) == 48


@pytest.mark.slow
def test_a_crowd_that_comes_and_goes_changes_no_answer(server):
    """tests/fuzz/chaos.py has more of them, for longer."""
    prompts = [f"<bos> w{i} w{i + 9}" for i in (11, 17, 23)]
    chaos = Chaos(server.url, server.model, prompts, max_tokens=12, key=KEY)
    kinds = ("answers", "streams", "refused", "streams left")
    for _ in range(12):  # a busy machine answers few in five seconds
        found = asyncio.run(chaos.run(8, 5, server.process.pid))
        if all(found.get(kind) for kind in kinds):
            break
    assert chaos.wrong == [] and found["lost"] == 0 and found["healthy"], found
    assert min(found.get(kind, 0) for kind in kinds) > 0, found
    before, *_, after = found["memory"]
    assert after - before < 200


@pytest.mark.slow
def test_the_server_refuses_and_lives_on(server):
    prompt = [BOS, 11, 12, 13]
    before = post(server, prompt=prompt, soft={}).json()["choices"][0]["token_ids"]
    asked = [
        dict(soft={"foo": 1}),
        dict(soft={"top_k": 5000}),
        dict(vllm_xargs={"soft": "{"}),
        dict(vllm_xargs={"soft": 3}),
        dict(soft={}, logprobs=3),
        dict(soft={"record": True}, logprobs=3),
        dict(soft={"record": True}, use_beam_search=True),
        dict(soft={}, use_beam_search=True),
        dict(soft={}, min_tokens=3),
        dict(soft={}, response_format={"type": "json_object"}),
    ]
    for body in asked:
        answer = post(server, prompt=prompt, **body)
        assert answer.status_code == 400, body
        said = answer.json()["error"]["message"]
        assert "soft" in said and "\n" not in said, said
    body = {
        "model": server.model,
        "prompt": prompt,
        "max_tokens": 100,
        "stream": True,
        "ignore_eos": True,
    }
    # clients that go away while it thinks
    for record in ("{}", '{"record": true}', '{"record": true}'):
        body["vllm_xargs"] = {"soft": record}
        with httpx.stream("POST", f"{server.url}/v1/completions", json=body, **ASKED) as stream:
            assert next(stream.iter_lines()).startswith("data: ")
    assert post(server, prompt=prompt, soft={}).json()["choices"][0]["token_ids"] == before
