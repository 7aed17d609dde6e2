"""Soft decoding inside vLLM, beside softar.generate: engines in a script of their own, a real
server on loopback.

This file is also that script: `python tests/test_vllm_soft.py FOLDER` writes what vLLM made of the
cases to FOLDER/out.json. There the engine runs in the script's process, so that its insides can be
looked at; the server has the usual processes.
"""

import dataclasses
import itertools
import json
import logging
import math
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
import tiny
import torch
from tiny import BOS, END, EOS, THINK, VOCAB
from transformers import AutoModelForCausalLM, GemmaConfig, LlamaConfig, Qwen3Config

import softar
import softar.vllm.server
from softar.decoders.card import describe
from softar.decoders.options import Common
from softar.decoders.soft import DECODERS as LOOP
from softar.evaluate import encode
from softar.show.trace import from_json
from softar.thought import Kind, Record
from softar.vllm.client import ServerDecoder
from softar.vllm.completions import Completion, answer_starts, ends_unseen
from softar.vllm.decoders import DECODERS
from softar.vllm.http import teach
from softar.vllm.plugin import register
from softar.vllm.record import from_json as steps_of
from softar.vllm.record import record_of, to_record
from softar.vllm.request import check_engine
from softar.vllm.rows import CHUNK, Rows

ARCHS = {"llama": LlamaConfig, "qwen3": Qwen3Config, "gemma": GemmaConfig}
ENGINE = dict(
    dtype="float32",
    enforce_eager=True,
    enable_prompt_embeds=True,
    seed=0,
    max_model_len=128,
    max_num_seqs=8,
)
# Chunks of prompts, a cache of prefixes, and blocks for three or so of eight requests
TIGHT = dict(
    max_num_batched_tokens=32, block_size=32, num_gpu_blocks_override=10, enable_prefix_caching=True
)
SOFT = [  # fields, does it draw
    (dict(think_end=END, budget=6), False),
    (dict(), False),
    (dict(think_start="<think>", think_end="</think>", budget=9), False),
    (dict(cold_stop_entropy=2.7, cold_stop_steps=2, think_end=[END], budget=30), False),
    (dict(alpha=0.7, budget=5), False),
    (dict(rescale="l2", top_k=30, min_p=0.05, keep=5), False),
    (dict(temperature=0.6, top_p=0.9, banned=[7, 8], think_end="w5 w6 w7", budget=11), False),
    (dict(mixer="gumbel", temperature=0.8, top_k=20, top_p=0.95, budget=12, think_end=END), True),
    (
        dict(
            mixer="k-samples",
            mixer_args={"k": 4, "weighting": "probability"},
            budget=10,
            think_end=END,
        ),
        True,
    ),
    (dict(mixer="k-samples", alpha=0.5, top_k=None), True),
    (dict(mixer="mixture-of-inputs", mixer_args={"beta": 0.5}, top_k=8, budget=8), True),
    (dict(mixer="dirichlet", mixer_args={"gamma": 3.0}, think_end=[5, 6], budget=7), True),
    (dict(mixer="hard", mixer_args={"sample": True}, top_k=4, budget=8), True),
    (dict(temperature=0.0, budget=4, think_end=END), False),
]
BAD = [  # soft, other settings, what the one line says
    ({"foo": 1}, {}, "unknown fields ['foo']; known are mixer, mixer_args"),
    ("{", {}, "'{' is not JSON"),
    ("[" * 100_000, {}, "is not JSON"),
    ([1], {}, "[1] must be an object"),
    (7, {}, "7 must be an object"),
    ({"mixer": "nope"}, {}, "mixer='nope' is unknown"),
    ({"mixer": 3}, {}, "mixer=3 must be text"),
    ({"mixer_args": {"tau": 1}}, {}, "does not take"),
    ({"mixer": "gumbel", "mixer_args": {"tau": "x"}}, {}, "does not take"),
    ({"mixer": "gumbel", "mixer_args": {"tau": 0}}, {}, "tau=0 must be > 0"),
    ({"mixer": "k-samples", "mixer_args": {"k": 10**9}}, {}, "k=1000000000 must be at most 256"),
    ('{"mixer": "mixture-of-inputs", "mixer_args": {"beta": 1%s}}' % ("0" * 400), {}, "soft: "),
    ({"mixer": "k-samples", "mixer_args": {"k": 2.5}}, {}, "soft: "),
    ({"mixer": "k-samples", "mixer_args": {"k": [3]}}, {}, "soft: "),
    ({"top_k": "ten"}, {}, "top_k='ten' must be a whole number or null"),
    ({"top_k": True}, {}, "top_k=True must be a whole number"),
    ({"top_k": 500}, {}, "top_k=500 must lie in 1..64"),
    ({"top_k": VOCAB, "record": True}, {}, "set top_k or keep to at most 63"),
    ({"top_k": None, "mixer": "gumbel"}, {}, "set top_k or keep to at most 256"),
    ('{"temperature": 1%s}' % ("0" * 400), {}, "temperature=1000"),
    ({"temperature": float("nan")}, {}, "temperature=nan must be >= 0"),
    ({"temperature": -1}, {}, "temperature=-1 must be >= 0"),
    ({"budget": 2**40}, {}, "must be less than"),
    ({"alpha": 2}, {}, "alpha=2 must lie in [0, 1]"),
    ({"banned": [VOCAB]}, {}, "banned=(64,) must be ids below 64"),
    ({"banned": ["a"]}, {}, "banned=['a'] must be a list of token ids"),
    ({"think_end": VOCAB}, {}, "think_end=(64,) must be token ids below 64"),
    ({"think_end": "w9 " * 65}, {}, "think_end has 65 tokens, more than 64"),
    ({"think_start": 3}, {}, "needs a think_end"),
    ({"rescale": "up"}, {}, "rescale='up' is unknown"),
    ({"record": 1}, {}, "record=1 must be true or false"),
    ({"max_new_tokens": 3}, {}, "unknown fields ['max_new_tokens']"),
    ({}, {"extra_args": {"softar": {}}}, "softar is no argument of a request"),
    ({}, {"logprobs": 2}, "not together with logprobs (of a thought ask for the record"),
    ({}, {"prompt_logprobs": 1}, "not together with prompt_logprobs"),
    ({}, {"repetition_penalty": 1.1}, "not together with penalties"),
    ({}, {"logit_bias": {5: 1.0}}, "not together with logit_bias"),
    ({}, {"bad_words": ["w5"]}, "not together with bad_words"),
    ({}, {"min_tokens": 2}, "not together with min_tokens"),
    ({}, {"allowed_token_ids": [5]}, "not together with allowed_token_ids"),
]
SETTINGS = dict(  # of an engine in a script
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_CPU_CI_ENV="1",
    VLLM_NO_USAGE_STATS="1",
    HF_HUB_OFFLINE="1",
    TORCHDYNAMO_DISABLE="1",
    OMP_NUM_THREADS="1",
)
HERE = dict(VLLM_ENABLE_V1_MULTIPROCESSING="0")  # in the script's own process
PARALLEL = dict(
    pipeline_parallel_size=1, prefill_context_parallel_size=1, enable_batch_sharded_sampling=False
)
MODEL = dict(
    enable_prompt_embeds=True,
    is_encoder_decoder=False,
    logits_processors=None,
    return_sampling_mask=False,
)
DRAWN = dict(mixer="gumbel", budget=8, think_end=END)


def model_of(arch):
    """A tiny random model with heads that vLLM has kernels for. Weights as wide as those of tiny.py
    would make soft decoding chaotic: within 20 steps float32 and float64 would part."""
    sizes = {**tiny.SIZES, "head_dim": 32, "tie_word_embeddings": False, "initializer_range": 0.2}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = ARCHS[arch](vocab_size=VOCAB, **sizes)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def save_models(place):
    for arch in ARCHS:
        model_of(arch).save_pretrained(place / arch)
        tiny.tokenizer_of().save_pretrained(place / arch)


# Numbers of drawn requests that do not survive `tiny.perturbed` on all three nets, for seeds 0 to 4:
# their tokens part, or a mixture moves by more than 1e-3. With other kernels they may differ too
FRAGILE = frozenset(
    [3, 5, 11, 13, 20, 27, 30, 41, 60, 77, 85, 99, 134, 140, 157, 183, 186, 189, 196]
)


def cases(number):
    """Requests of random lengths and parameters: (prompt, index in SOFT or None, seed, max_tokens,
    record). None is FRAGILE."""
    draw = random.Random(5)
    words = [THINK, END, *range(5, VOCAB)]
    requests = []
    for i in itertools.count():
        prompt = [BOS, *draw.choices(words, k=draw.choice([1, 2, 5, 9, 17, 40, 63]))]
        soft = draw.choice([*range(len(SOFT)), None, None])
        length = draw.choice([1, 2, 5, 11, 18, 30, 45])
        request = (prompt, soft, 100 + i, length, draw.random() < 0.4)
        if i not in FRAGILE:
            requests.append(request)
        if len(requests) == number:
            return requests


def ask(prompt, soft, seed, max_tokens, record, **more):
    from vllm import SamplingParams

    fields, draws = (None, False) if soft is None else SOFT[soft]
    args = None if soft is None else {"soft": {**fields, "record": record}}
    seed = seed if draws else None
    settings = {**dict(temperature=0, max_tokens=max_tokens, seed=seed, extra_args=args), **more}
    return {"prompt_token_ids": prompt}, SamplingParams(**settings)


# --- the script ---


def main(place):
    out = {"version": another_version(), "http": over_http()}
    from vllm import LLM, SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    started = time.perf_counter()
    for arch in ARCHS:
        llm = LLM(str(place / arch), **ENGINE, **(TIGHT if arch == "llama" else {}))
        out[arch] = answers(llm, cases(200 if arch == "llama" else 40))
        if arch == "llama":
            out["discrete"] = answers(llm, [case for case in cases(200) if case[1] is None])
            out |= inside(llm)
            out["bad"] = [[refused(llm, soft, more), after(llm)] for soft, more, _ in BAD]
            out["cached"] = cached(llm)
            out["traced"] = traced(llm, place)
            beside = ask([BOS, 9], None, 0, 9, False, logprob_token_ids=[5])
            outs = llm.generate(
                *map(list, zip(ask([BOS, 11, 12, 13], 0, 0, 9, True), beside)), use_tqdm=False
            )
            out["narrow"] = [
                record_of(outs[0].outputs[0]),
                [sorted(step) for step in outs[1].outputs[0].logprobs],
            ]
            out["structured"] = refused(
                llm, {}, {"structured_outputs": StructuredOutputsParams(choice=["w5"])}
            )
            params = SamplingParams(
                temperature=1.0, seed=3, n=3, max_tokens=20, extra_args={"soft": DRAWN}
            )
            (answer,) = llm.generate([{"prompt_token_ids": [BOS, 9]}], params, use_tqdm=False)
            out["n"] = [list(o.token_ids) for o in answer.outputs]
            for key, more in dict(
                stop={"stop": ["w59 w9"]}, stop_ids={"stop_token_ids": [42]}
            ).items():
                (answer,) = llm.generate(
                    *zip(ask([BOS, 11, 12, 13], 1, 0, 40, False, **more)), use_tqdm=False
                )
                out[key] = [list(answer.outputs[0].token_ids), answer.outputs[0].stop_reason]
            fresh = SamplingParams(temperature=0, max_tokens=20, extra_args={"soft": DRAWN})
            twice = llm.generate([{"prompt_token_ids": [BOS, 9]}] * 2, fresh, use_tqdm=False)
            out["unseeded"] = [list(answer.outputs[0].token_ids) for answer in twice]
            # those that ended leave with the next step
            answers(llm, [([BOS, 9], None, 0, 1, False)])
            out["rows"] = len(runner(llm).softar.rows) + len(runner(llm).softar.groups)
        del llm
    out["seconds"] = time.perf_counter() - started
    (place / "out.json").write_text(json.dumps(out))


def another_version():
    """What the plug-in says in a vLLM that it does not know, and whether it leaves that alone."""
    import vllm
    from vllm.v1.engine.input_processor import InputProcessor

    said, logger = [], logging.getLogger("vllm.softar")
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logger.addHandler(handler)
    before, vllm.__version__ = vllm.__version__, "0.33.1"
    try:
        register()
    finally:
        vllm.__version__ = before
        logger.removeHandler(handler)
    return said, "softar" in vars(InputProcessor.process_inputs)


def runner(llm):
    return llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner


def answers(llm, wanted):
    outs = llm.generate(*map(list, zip(*(ask(*case) for case in wanted))), use_tqdm=False)
    found = []
    for out, (_, soft, _, _, record) in zip(outs, wanted):
        read = record_of(out.outputs[0]) if soft is not None and record else None
        found.append([list(out.outputs[0].token_ids), read])
    return found


def inside(llm):
    """Requests step by step: thrown out of the cache, all of them at once, and one that is
    aborted."""
    from vllm.v1.core.sched.scheduler import Scheduler

    preempted, whole = [], Scheduler._preempt_request
    Scheduler._preempt_request = lambda self, request, *args, **kw: (
        preempted.append(request.num_output_tokens),
        whole(self, request, *args, **kw),
    )
    engine = llm.llm_engine
    wanted = [case for case in cases(200) if case[1] is not None and case[3] > 20][:8]
    for i, case in enumerate(wanted):
        engine.add_request(str(i), *ask(*case))
    found, steps = {}, 0
    while engine.has_unfinished_requests():
        for out in engine.step():
            if out.finished:
                found[out.request_id] = list(out.outputs[0].token_ids)
        steps += 1
        if steps in (12, 25):
            assert engine.reset_prefix_cache(reset_running_requests=True)
        if steps == 14:
            engine.abort_request(["3"])
    Scheduler._preempt_request = whole
    return {"steps": found, "preempted": preempted, "wanted": wanted}


LONG = [BOS, *range(5, 40)]


def cached(llm):
    """A soft request, then discrete ones whose prompt is all that it said, twice; what was found in
    the cache."""
    read = []
    for soft, prompt in ((1, LONG), (5, LONG), (None, LONG)):
        ((tokens, _),) = answers(llm, [(prompt, soft, 0, 60, False)])
        for _ in range(2):
            case = ({"prompt_token_ids": LONG + tokens[:50]}, ask([], None, 0, 9, False)[1])
            (out,) = llm.generate(*map(list, zip(case)), use_tqdm=False)
            read.append([tokens[:50], list(out.outputs[0].token_ids), out.num_cached_tokens])
    return read


def refused(llm, soft, more):
    from vllm import SamplingParams

    params = SamplingParams(
        **{**dict(temperature=0, max_tokens=4, extra_args={"soft": soft}), **more}
    )
    try:
        llm.generate([{"prompt_token_ids": [BOS, 9]}], params, use_tqdm=False)
    except ValueError as error:
        return str(error)


def after(llm):
    """Does the engine still work?"""
    return (
        llm.llm_engine.engine_core.engine_core is not None
        and not llm.llm_engine.has_unfinished_requests()
    )


STEPS = [  # token, log-probability, kind, entropy, mixture
    (7, math.nan, Kind.SOFT, 1.5, {7: 0.6, 8: 0.3, 9: 0.1}),
    (4, math.nan, Kind.FORCED, 0.5, {4: 1.0}),
    (9, -0.25, Kind.HARD, 0.25, {9: 1.0}),
]
FIELD = {
    "token": [7, 4, 9],
    "kind": ["soft", "forced", "hard"],
    "entropy": [1.5, 0.5, 0.25],
    "logp": [None, None, -0.25],
    "ids": [[7, 8, 9], [4], [9]],
    "weights": [[0.6, 0.3, 0.1], [1.0], [1.0]],
}
RECORD = {"soft": json.dumps({"record": True})}


def over_http():
    """What the server makes of answers, with the plug-in and without; no engine is needed for
    that."""
    import asyncio

    from vllm.entrypoints.openai.chat_completion import serving as chats
    from vllm.entrypoints.openai.completion import serving as completions
    from vllm.logprobs import FlatLogprobs
    from vllm.outputs import CompletionOutput, RequestOutput
    from vllm.sampling_params import RequestOutputKind
    from vllm.v1.engine.output_processor import RequestOutputCollector

    kinds = {"text": completions.OpenAIServingCompletion, "chat": chats.OpenAIServingChat}
    completions.time = chats.time = SimpleNamespace(time=lambda: 0)

    def flat(steps):
        found = FlatLogprobs()
        for token, logp, kind, entropy, mixture in steps:
            logs = [logp, entropy, *map(math.log, mixture.values())]
            found.append_fast(
                [token, token, *mixture], logs, [int(kind)] * len(logs), [""] * len(logs)
            )
        return found

    def output(steps, record, index=0, finished=True):
        kept, end = flat(steps) if record else None, "length" if finished else None
        text, tokens = "".join(f" w{step[0]}" for step in steps), [step[0] for step in steps]
        part = CompletionOutput(index, text, tokens, None, kept, finish_reason=end)
        return RequestOutput("r", "w1", [1], None, [part], finished)

    def lagging(record):
        """Two parts that were joined because nobody had fetched the first."""
        queue = RequestOutputCollector(RequestOutputKind.DELTA, "r")
        for steps in (STEPS[:1], STEPS[1:]):
            queue.put(output(steps, record))
        return queue.get_nowait()

    ended = []  # what an engine's stream said last: the request is over for it too

    async def stream(items):
        try:
            for item in items:
                yield item
        finally:
            ended.append(item)

    async def first(answer):
        """A client that goes away after the first chunk."""
        await anext(answer)
        await answer.aclose()
        await asyncio.sleep(0.1)
        return list(ended)

    def request(kind, **more):
        if kind == "text":
            return completions.CompletionRequest(model="m", prompt=[1], max_tokens=3, **more)
        return chats.ChatCompletionRequest(
            model="m", messages=[{"role": "user", "content": "w1"}], **more
        )

    def ask(kind, streams, parts, read=None, **more):
        self = object.__new__(kinds[kind])
        flags = (
            "auto_tools",
            "log_outputs",
            "force_include_usage",
            "prompt_tokens_details",
            "per_request_metrics",
        )
        no = (
            *(f"enable_{name}" for name in flags),
            "return_tokens_as_token_ids",
            "_include_reasoning_tokens_details",
        )
        none = dict.fromkeys(("parser_cls", "system_fingerprint", "request_logger"))
        self.__dict__ |= (
            dict.fromkeys(no, False) | none | {"response_role": "assistant"} | more.pop("own", {})
        )
        asked, meta = request(kind, **more), SimpleNamespace(final_usage_info=None)
        if kind == "text" and streams:
            answer = self.completion_stream_generator(
                asked, [None], stream((0, part) for part in parts), "r", 0, "m", 1, None, meta
            )
        elif kind == "text":
            answer = self.request_output_to_completion_response(
                parts, asked, "r", 0, "m", None, meta
            )
        elif streams:
            answer = self.chat_completion_stream_generator(
                asked, stream(parts), "r", "m", [], "tokenizer", meta
            )
        else:
            answer = self.chat_completion_full_generator(
                asked, stream(parts), "r", "m", [], "tokenizer", meta
            )

        async def whole(answer):
            if streams:
                return [chunk async for chunk in answer]
            return (answer if kind == "text" else await answer).model_dump_json()

        ended.clear()
        return asyncio.run((read or whole)(answer))

    parts = [output([step], True, finished=step is STEPS[-1]) for step in STEPS]
    plain = [output([step], False, finished=step is STEPS[-1]) for step in STEPS]

    def unasked():
        """What does not ask for a record, in both forms, whole and as a stream."""
        found = []
        for kind in kinds:
            for more in ({}, {"vllm_xargs": {"soft": "{}"}}, {"vllm_xargs": {"session_id": "a"}}):
                for streams in (False, True):
                    given = plain if streams else [output(STEPS, False)]
                    found.append(ask(kind, streams, given, n=1, **more))
        return found

    names = ("request_output_to_completion_response", "chat_completion_full_generator")
    before, said = unasked(), []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logging.getLogger("vllm.softar").addHandler(handler)
    lost = chats.OpenAIServingChat.chat_completion_full_generator
    del chats.OpenAIServingChat.chat_completion_full_generator
    teach()  # in a vLLM that has other names
    chats.OpenAIServingChat.chat_completion_full_generator = lost
    left = ["softar" in vars(getattr(cls, name)) for cls, name in zip(kinds.values(), names)]
    teach()
    teach()
    logging.getLogger("vllm.softar").removeHandler(handler)
    asks = dict(vllm_xargs=RECORD)
    late = SimpleNamespace(
        parse_delta=lambda delta_token_ids, **_: (
            chats.DeltaMessage() if 9 in delta_token_ids else None
        )
    )
    own = dict(parser_cls=object, _make_parser=lambda *_: late)

    def refused(kind, **more):
        try:
            ask(kind, kind == "chat", [output(STEPS, True)], **asks, **more)
        except ValueError as error:
            return str(error)

    return {
        "said": said,
        "left": left,
        "unasked": [before, unasked()],
        "whole": [json.loads(ask(kind, False, [output(STEPS, True)], **asks)) for kind in kinds],
        "streams": [ask(kind, True, parts, **asks) for kind in kinds],
        "lagging": [ask(kind, True, [lagging(True)], **asks) for kind in kinds],
        # the parser is not ready for the first two
        "withheld": ask("chat", True, parts, own=own, **asks),
        "left early": [len(ask(kind, True, parts, read=first, **asks)) for kind in kinds],
        "refused": [
            refused("text", use_beam_search=True),
            refused("chat", include_reasoning=False),
        ],
    }


TRACED = [  # options of vllm-soft, and of the decoder `soft`
    {"budget": 4},
    {"think_end": END, "budget": 6, "alpha": 0.7},
    {"top_k": 5, "min_p": 0.1, "temperature": 0.8},
    {"cold_stop_entropy": 2.7, "cold_stop_steps": 1},
    {"think_start": "<think>", "think_end": "</think>"},
]
TO_TRACE = ["<bos> w11 w12", "<bos> w20 w21 w22 <think> w9"]


def traced(llm, place):
    """Rows of vllm-soft in an engine that runs already."""
    found = []
    for options in TRACED:
        decoder = DECODERS["vllm-soft"](
            describe(str(place / "llama")), Common(12, trace=True), **options
        )
        decoder._engine = SimpleNamespace(llm=llm, tokenizer=tiny.tokenizer_of(), max_model_len=128)
        found.append(
            [dataclasses.asdict(row) for row in [*decoder.decode(TO_TRACE), *decoder.decode([])]]
        )
    return found


# --- the tests ---


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("soft")
    save_models(place)
    return place


@pytest.fixture(scope="module")
def script(place):
    with subprocess.Popen(
        [sys.executable, __file__, str(place)],
        env={**os.environ, **SETTINGS, **HERE},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    ) as process:
        yield process
        process.kill()


@pytest.fixture(scope="module")
def made(script, place):
    said, _ = script.communicate(timeout=300)
    assert script.returncode == 0, said.decode()[-4000:]
    return json.loads((place / "out.json").read_text())


@pytest.fixture(scope="module")
def models():
    return {arch: model_of(arch) for arch in ARCHS}


def expected(model, wanted):
    """Per case the tokens of softar.generate and, of soft ones, its record [steps of (ids, weights,
    kind, h)]."""
    found = [None] * len(wanted)
    for soft in {case[1] for case in wanted}:
        rows = [i for i, case in enumerate(wanted) if case[1] == soft]
        fields = {"mixer": "hard"} if soft is None else SOFT[soft][0]
        fields = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
        config = softar.SoftConfig(**fields, max_new_tokens=max(wanted[i][3] for i in rows))
        ids, mask = tiny.left_padded([wanted[i][0] for i in rows])
        rng = [torch.Generator().manual_seed(wanted[i][2]) for i in rows]
        out = softar.generate(
            model, ids, mask, config=config, rng=rng, tokenizer=tiny.tokenizer_of()
        )
        for row, i in enumerate(rows):
            kept = (out.record.kind[row] != Kind.PAD)[: wanted[i][3]]
            tokens = out.completions[row][: wanted[i][3]][kept].tolist()
            found[i] = tokens, type(out.record)(*(x[row, : len(tokens)] for x in out.record))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHS)
def test_requests_of_all_kinds_in_one_engine_equal_the_loop(made, models, arch):
    wanted = cases(200 if arch == "llama" else 40)
    wrong = []
    for case, (tokens, read), (own, record) in zip(
        wanted, made[arch], expected(models[arch], wanted), strict=True
    ):
        if tokens != own:
            wrong.append((case, tokens, own))
        elif read is not None:
            same(read, record)
    assert wrong == []


@pytest.mark.slow
def test_a_record_beside_others_log_probabilities(made, models):
    read, others = made["narrow"]
    ((tokens, record),) = expected(models["llama"], [([BOS, 11, 12, 13], 0, 0, 9, True)])
    assert [step[0] for step in read] == tokens and len(others) == 9
    same(read, record)
    assert all(5 in step and len(step) <= 2 for step in others)


def same(read, record):
    """A record from vLLM and one from the loop."""
    for step, (token, ids, weights, kind, logp, entropy) in enumerate(read):
        assert token == record.token[step] and kind == record.kind[step]
        assert entropy == pytest.approx(float(record.entropy[step]), abs=1e-3)
        assert (
            logp == pytest.approx(float(record.logp[step]), abs=1e-3, nan_ok=True)
            or kind == Kind.HARD
        )
        got = torch.zeros(VOCAB).index_add(0, torch.tensor(ids), torch.tensor(weights))
        own = torch.zeros(VOCAB).index_add(0, record.ids[step], record.weights[step])
        torch.testing.assert_close(got, own, atol=1e-4, rtol=1e-3)


@pytest.mark.slow
def test_discrete_requests_do_not_notice_soft_ones(made):
    beside = [row for row, case in zip(made["llama"], cases(200)) if case[1] is None]
    assert made["discrete"] == beside and len(beside) > 10


@pytest.mark.slow
def test_thrown_out_of_the_cache_a_request_reads_its_mixtures_again(made, models):
    wanted = [tuple(case) for case in made["wanted"]]
    assert sum(n > 0 for n in made["preempted"]) > 8
    own = {
        str(i): tokens for i, (tokens, _) in enumerate(expected(models["llama"], wanted)) if i != 3
    }
    assert made["steps"] == own


@pytest.mark.slow
def test_soft_positions_are_never_taken_for_hard_ones(made, models):
    for said, tokens, _ in made["cached"]:
        ((own, _),) = expected(models["llama"], [(LONG + said, None, 0, 9, False)])
        assert tokens == own
    # Of 36 + 50 positions two blocks of 32 are whole. Only what discrete requests computed is found
    assert [count for *_, count in made["cached"]] == [0, 64, 32, 64, 64, 64]
    assert len({tuple(said) for said, *_ in made["cached"]}) == 3


@pytest.mark.slow
def test_what_ends_a_request(made, models):
    ((tokens, _),) = expected(models["llama"], [([BOS, 11, 12, 13], 1, 0, 40, False)])
    assert made["stop_ids"] == [tokens[: tokens.index(42) + 1], 42]
    assert tokens[12:14] == [59, 9] and made["stop"] == [tokens[:14], "w59 w9"]
    assert made["rows"] == 0


@pytest.mark.slow
def test_each_of_n_outputs_has_its_own_draws(made, models):
    config = softar.SoftConfig(**DRAWN, max_new_tokens=8)
    for i, tokens in enumerate(made["n"]):
        rng = [torch.Generator().manual_seed(3 + i)]
        own = softar.generate(models["llama"], torch.tensor([[BOS, 9]]), config=config, rng=rng)
        assert tokens[:8] == own.completions[0].tolist()[: len(tokens)]
    assert made["unseeded"][0] != made["unseeded"][1]


@pytest.mark.slow
def test_bad_requests_say_so_in_one_line(made):
    assert len(made["bad"]) == len(BAD)
    for (soft, more, says), (said, works) in zip(BAD, made["bad"]):
        assert said is not None and says in said, (str(soft)[:80], more, said)
        assert "\n" not in said and len(said) < 400 and works

    assert "not together with structured output" in made["structured"]


@pytest.mark.slow
def test_an_unknown_version_of_vllm_is_left_alone(made):
    (said,), patched = made["version"]
    assert "0.33.1 is not among the versions it knows: 0.32.*" in said and not patched


@pytest.mark.parametrize(
    "change, says",
    [
        (dict(speculative_config=1), "not in an engine with speculative decoding"),
        (dict(kv_transfer_config=1), "KV cache"),
        (
            dict(parallel_config=SimpleNamespace(**{**PARALLEL, "pipeline_parallel_size": 2})),
            "pipeline parallelism",
        ),
        (
            dict(
                parallel_config=SimpleNamespace(**{**PARALLEL, "prefill_context_parallel_size": 2})
            ),
            "prefills split",
        ),
        (
            dict(
                parallel_config=SimpleNamespace(
                    **{**PARALLEL, "enable_batch_sharded_sampling": True}
                )
            ),
            "batch-sharded",
        ),
        (
            dict(model_config=SimpleNamespace(**{**MODEL, "enable_prompt_embeds": False})),
            "--enable-prompt-embeds",
        ),
        (
            dict(model_config=SimpleNamespace(**{**MODEL, "logits_processors": ["a.B"]})),
            "logits processors",
        ),
        (
            dict(model_config=SimpleNamespace(**{**MODEL, "return_sampling_mask": True})),
            "sampling masks",
        ),
        (dict(watermark_config=1), "watermarks"),
    ],
)
def test_engines_that_cannot_are_named(change, says):
    fits = dict(
        speculative_config=None,
        kv_transfer_config=None,
        parallel_config=SimpleNamespace(**PARALLEL),
        model_config=SimpleNamespace(**MODEL),
    )
    check_engine(SimpleNamespace(**fits))
    with pytest.raises(ValueError, match=says):
        check_engine(SimpleNamespace(**{**fits, **change}))


TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"


@pytest.fixture(scope="module")
def server(place, script):
    with softar.vllm.server.serve(
        place / "llama", max_model_len=128, soft=True, extra=["--chat-template", TEMPLATE]
    ) as running:
        yield running


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
    return httpx.post(
        f"{server.url}/v1/{path}", json=body_of(server, **body), timeout=60, trust_env=False
    )


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
    record = to_record(steps_of(soft))
    assert record.ids.shape[:2] == (1, len(soft["token"]))
    return zip(
        *(column[0].tolist() for column in (record.token, record.ids, record.weights)),
        *(column[0].tolist() for column in (record.kind, record.logp, record.entropy)),
    )


@pytest.mark.slow
def test_the_server_thinks_softly_too(server, models):
    prompt = [BOS, 11, 12, 13]
    wanted = [(prompt, soft, 7, 12, True) for soft in [None, *range(len(SOFT))]]
    for (_, soft, *_), (tokens, record) in zip(wanted, expected(models["llama"], wanted)):
        fields, draws = ({}, False) if soft is None else SOFT[soft]
        asked = {"prompt": prompt, "seed": 7 if draws else None}
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
def test_chat_and_streams_bring_the_record_too(server, models):
    soft, chat = {**SOFT[0][0], "record": True}, [{"role": "user", "content": "<bos> w11 w12 w13"}]
    ((tokens, record),) = expected(models["llama"], [([BOS, 11, 12, 13], 0, 0, 12, True)])
    (choice,) = post(server, "chat/completions", messages=chat, soft=soft).json()["choices"]
    assert choice["token_ids"] == tokens
    same(reads(choice["soft"]), record)
    for path, prompt in (
        ("completions", {"prompt": [BOS, 11, 12, 13]}),
        ("chat/completions", {"messages": chat}),
    ):
        found = chunks(server, path, **prompt, soft=soft)
        assert len(found) >= 12 and joined(found) == choice["soft"]
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
        base_url=f"{server.url}/v1", api_key="-", http_client=DefaultHttpxClient(trust_env=False)
    ) as client:
        soft = {"top_k": 10, "budget": 3, "record": True}
        answer = client.completions.create(
            model=server.model,
            prompt="<bos> w11 w12",
            max_tokens=6,
            temperature=0,
            extra_body={"vllm_xargs": {"soft": json.dumps(soft)}},
        )
    read = answer.choices[0].soft
    assert (
        read["kind"] == ["soft"] * 3 + ["hard"] * 3
        and [len(w) for w in read["weights"]] == [10] * 3 + [1] * 3
    )
    assert all(sum(weights) == pytest.approx(1, abs=1e-5) for weights in read["weights"])
    assert to_record(steps_of(read)).weights.shape == (1, 6, 10)


@pytest.mark.slow
def test_answers_that_ask_for_no_record_stay_as_they_are(made):
    before, after = made["http"]["unasked"]
    assert before == after and len(before) == 12
    assert "w9" in str(before[-1]) and "soft" not in str(before)


@pytest.mark.slow
def test_records_of_every_form_of_answer(made):
    found = made["http"]
    assert [answer["choices"][0]["soft"] for answer in found["whole"]] == [FIELD, FIELD]
    steps = [{name: [values[i]] for name, values in FIELD.items()} for i in range(3)]
    for kind, wanted, said in (
        ("streams", steps, 2),
        ("lagging", [FIELD], 2),
        ("withheld", [FIELD], 1),
    ):
        streams = [found[kind]] if kind == "withheld" else found[kind]
        assert len(streams) == said
        for chunks in streams:
            choices = [
                json.loads(chunk[6:])["choices"][0]
                for chunk in chunks
                if chunk.startswith("data: {")
            ]
            assert [c["soft"] for c in choices if "soft" in c] == wanted, kind
            assert choices[-1]["finish_reason"] == "length" and chunks[-1] == "data: [DONE]\n\n"
            assert all("soft" not in c for c in choices if c.get("delta", {}).get("role"))
    assert found["left early"] == [1, 1], "the engine hears of it"
    for said, about in zip(found["refused"], ("use_beam_search", "include_reasoning=false")):
        assert about in said and "\n" not in said


@pytest.mark.slow
def test_a_server_of_other_names_starts_and_says_so(made):
    (said,), left = made["http"]["said"], made["http"]["left"]
    assert (
        said.startswith("softar: no records over HTTP") and "chat_completion_full_generator" in said
    )
    assert left == [False, False], "all or nothing"


def test_where_an_answer_begins(models):
    wanted = [case for case in cases(200) if case[1] is not None]
    tokenizer, starts = tiny.tokenizer_of(), set()
    for soft, (fields, _) in enumerate(SOFT):
        config = softar.SoftConfig(
            **{k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
        )
        rows = [case for case in wanted if case[1] == soft]
        ids, mask = tiny.left_padded([case[0] for case in rows])
        config = dataclasses.replace(config, max_new_tokens=40).resolve(tokenizer)
        out = softar.generate(
            models["llama"], ids, mask, config=config, rng=torch.Generator().manual_seed(0)
        )
        kept = [out.record.kind[row] != Kind.PAD for row in range(len(rows))]
        found = [Completion("", tuple(t[k].tolist()), None) for t, k in zip(out.completions, kept)]
        if config.cold_stop_entropy is not None:
            assert config.think_end is not None  # or records would be needed
        if config.think_end is not None or config.budget is not None:
            assert (
                answer_starts(config, [case[0] for case in rows], found)
                == out.answer_start.tolist()
            ), fields
            starts |= {*out.answer_start.tolist()}
    assert len(starts) > 8


def test_where_an_answer_begins_when_a_cold_stop_comes_just_before_the_budget():
    soft = dict(think_end=(7, 8), budget=3, cold_stop_entropy=0.5, cold_stop_steps=1)
    assert ends_unseen(soft) and not ends_unseen({**soft, "budget": None})
    # so 7 is put in, and would be at the next step too
    entropy = torch.tensor([[2.0, 2.0, 0.1, 2.0, 2.0, 2.0]])
    tokens = torch.tensor([[3, 3, 7, 8, 6, 9]])
    nothing = torch.zeros(1, 6)
    record = Record(
        tokens[..., None], torch.ones(1, 6, 1), tokens, nothing.to(torch.int8), nothing, entropy
    )
    found = Completion("", tuple(tokens[0].tolist()), None, record)
    assert answer_starts(softar.SoftConfig(**soft), [[BOS, 9]], [found]) == [4]


@pytest.mark.slow
def test_traces_are_those_of_the_loop(made, server, place):
    name = str(place / "llama")
    for options, offline in zip(TRACED, made["traced"], strict=True):
        card, common = describe(name), Common(12, trace=True)
        loop = LOOP["soft"](card, common, **options)
        online = DECODERS["vllm-soft"](card, common, url=server.url, **options)
        here = [row | {"trace": from_json(json.dumps(row["trace"]))} for row in offline]
        online = [dataclasses.asdict(row) | {"trace": row.trace} for row in online.decode(TO_TRACE)]
        assert len(here) == len(online) == 2
        for row, *theirs in zip(loop.decode(TO_TRACE), here, online):
            for other in theirs:
                assert other["text"] == row.text and list(other["tokens"]) == list(row.tokens)
                assert other["entropy"] == pytest.approx(row.entropy, abs=1e-3)
                alike(other["trace"], row.trace)
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


def alike(trace, own):
    assert (trace.prompt, trace.answer_start, len(trace.steps)) == (
        own.prompt,
        own.answer_start,
        len(own.steps),
    )
    for step, ours in zip(trace.steps, own.steps):
        assert (step.kind, step.token, step.others) == (ours.kind, ours.token, ours.others)
        assert step.entropy == pytest.approx(ours.entropy, abs=1e-3)
        assert step.rest == pytest.approx(ours.rest, abs=1e-3)
        assert dict(step.mixture) == pytest.approx(dict(ours.mixture), abs=1e-3)


@pytest.mark.slow
def test_the_decoder_for_comparisons_is_the_loops(server, place):
    prompts = [
        " ".join(map(tiny.tokenizer_of().convert_ids_to_tokens, ids))
        for ids in ([BOS, 11, 12], [BOS, 20, 21, 22])
    ]
    for options in ("top_k=10,budget=4", "mixer=gumbel,tau=0.4,top_k=6,budget=5"):
        theirs = softar.make_decoder(
            f"{place / 'llama'}=vllm-soft:url={server.url},{options}", max_new_tokens=12, seed=3
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
            f"{place / 'llama'}=vllm-soft:url={server.url},tempratur=1", max_new_tokens=12
        )


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
        with httpx.stream(
            "POST", f"{server.url}/v1/completions", json=body, timeout=60, trust_env=False
        ) as stream:
            assert next(stream.iter_lines()).startswith("data: ")
    assert post(server, prompt=prompt, soft={}).json()["choices"][0]["token_ids"] == before


# --- the rows by themselves ---


class Engine:
    """A recurrent toy in vLLM's place, which schedules as it likes: some requests, some of their
    positions."""

    def __init__(self, seed, unruly):
        torch.manual_seed(0)
        self.table, self.inner, self.out = (
            torch.randn(VOCAB, 8),
            torch.randn(8, 8) * 0.3,
            torch.randn(VOCAB, 8),
        )
        self.rows = Rows(lambda ids: self.table[ids], torch.device("cpu"), 0)
        self.draw, self.unruly, self.state, self.tokens, self.done = (
            random.Random(seed),
            unruly,
            {},
            {},
            {},
        )

    def add(self, name, prompt, fields, seed):
        fields = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
        config = softar.SoftConfig(**fields).resolve(tiny.tokenizer_of())
        self.rows.add(name, config, prompt, seed, (EOS,), False)
        self.tokens[name], self.done[name], self.state[name] = list(prompt), 0, torch.zeros(8)

    def forget(self, name):
        """As when it is thrown out of the cache."""
        self.done[name], self.state[name] = 0, torch.zeros(8)

    def step(self):
        names, draw = list(self.tokens), self.draw
        if self.unruly:
            names = draw.sample(names, draw.randint(1, len(names)))
            for name in names:
                prompt = len(self.rows.rows[name].prompt)
                if draw.random() < 0.05:
                    self.forget(name)
                # sampled for nothing
                if draw.random() < 0.05 and len(self.tokens[name]) - prompt > 3:
                    del self.tokens[name][-draw.randint(1, 2) :]
                    self.forget(name)
        left = [len(self.tokens[name]) - self.done[name] for name in names]
        counts = [draw.randint(1, n) if self.unruly and draw.random() < 0.5 else n for n in left]
        computed = [self.done[name] for name in names]
        ids = [self.tokens[name][c : c + n] for name, c, n in zip(names, computed, counts)]
        embeds = self.table[torch.tensor([i for part in ids for i in part])].clone()
        self.rows.feed(embeds, names, computed, counts)
        for name, part, count in zip(names, embeds.split(counts), counts):
            for x in part:
                self.state[name] = torch.tanh(self.inner @ self.state[name] + x)
            self.done[name] += count
        logits = torch.stack([self.out @ self.state[name] for name in names])
        ends = [self.done[name] for name in names]
        skipped = [self.done[name] < len(self.tokens[name]) for name in names]
        turns = self.rows.think(logits, names, ends, skipped)
        sampled = logits.argmax(-1, keepdim=True).int()
        self.rows.choose(turns, sampled)
        for name, skip, token in zip(names, skipped, sampled[:, 0].tolist()):
            if not skip:
                self.tokens[name].append(token)


@pytest.mark.parametrize("seed", range(4))
def test_however_they_are_scheduled_rows_do_the_same(seed):
    draw = random.Random(seed)
    wanted = [
        (
            f"r{i}",
            [BOS, *draw.choices(range(3, VOCAB), k=draw.randint(1, 7))],
            *draw.choice(SOFT),
            i,
        )
        for i in range(9)
    ]
    lengths = {name: draw.choice([5, 20, 60]) for name, *_ in wanted}
    lengths["r0"] = 2 * CHUNK + 30
    together = Engine(seed, unruly=True)
    waiting, found = list(wanted), {}
    while len(found) < len(wanted):
        if waiting and draw.random() < 0.3:
            name, prompt, fields, draws, own = waiting.pop()
            together.add(name, prompt, fields, own if draws else None)
        if together.tokens:
            together.step()
        for name in list(together.tokens):
            new = together.tokens[name][len(together.rows.rows[name].prompt) :]
            if len(new) >= lengths[name]:
                found[name] = new
                together.rows.drop([name])
                del together.tokens[name]
    assert not together.rows.rows and not together.rows.groups
    for name, prompt, fields, draws, own in wanted:
        alone = Engine(0, unruly=False)
        alone.add(name, prompt, fields, own if draws else None)
        while len(alone.tokens[name]) < len(prompt) + lengths[name]:
            alone.step()
        assert found[name] == alone.tokens[name][len(prompt) :], (name, fields)


def test_mixtures_gathered_a_few_rows_at_a_time_are_the_same(monkeypatch):
    made = []
    for piece in (4096, 20):  # of three mixtures of ten tokens: all, two and one
        monkeypatch.setattr("softar.vllm.rows.PIECE", piece)
        engine = Engine(0, unruly=False)
        for i in range(3):
            engine.add(f"r{i}", [BOS, 9 + i], dict(top_k=10), None)
        for _ in range(12):
            engine.step()
        made.append(engine.tokens)
    assert made[0] == made[1] and len({tuple(t[2:]) for t in made[0].values()}) == 3


if __name__ == "__main__":
    main(Path(sys.argv[1]))
