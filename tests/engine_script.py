"""Shared by the tests of soft decoding inside vLLM: tiny models, requests of all kinds, what an
engine makes of them and what softar.generate does. vLLM itself is imported where it is used, in the
scripts that the tests start."""

import itertools
import json
import os
import random
from pathlib import Path

import pytest
import tiny
import torch
import warm
from tiny import BOS, END, THINK, VOCAB
from transformers import AutoModelForCausalLM, GemmaConfig, LlamaConfig, Qwen3Config

import softar
from softar.thought import Kind
from softar.vllm.record import record_of

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
    (dict(softness=0.7, budget=5), False),
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
    (dict(mixer="k-samples", softness=0.5, top_k=None), True),
    (dict(mixer="mixture-of-inputs", mixer_args={"beta": 0.5}, top_k=8, budget=8), True),
    (dict(mixer="dirichlet", mixer_args={"gamma": 3.0}, think_end=[5, 6], budget=7), True),
    (dict(mixer="hard", mixer_args={"sample": True}, top_k=4, budget=8), True),
    (dict(temperature=0.0, budget=4, think_end=END), False),
]
TURNS = [  # the same of thoughts that switch
    (dict(switch="block", switch_dwell=1, budget=20), False),
    (
        dict(switch="block", switch_dwell=2, think_start="<think>", think_end="</think>")
        | dict(switch_open=0.4, switch_budget=3, switch_final="w8 w9", switch_answer=4),
        False,
    ),
    (dict(switch=2.9, switch_dwell=0, mixer="gumbel", think_end=END, budget=25), True),
    (
        dict(switch="block", switch_dwell=0, mixer="k-samples", think_end=[5, 6], top_k=None)
        | dict(switch_budget=4, switch_final=[], switch_answer=6),
        True,
    ),
    (dict(switch="block", switch_dwell=3, temperature=0.7, softness=0.8), False),
]
KINDS = SOFT + TURNS
BAD = [  # soft, other settings, what the one line says
    ({"foo": 1}, {}, "unknown fields ['foo']; known are mixer, mixer_args"),
    ("{", {}, "'{' is not JSON"),
    ("[" * 60_000, {}, "is not JSON"),
    ([1], {}, "[1] must be an object"),
    (7, {}, "7 must be an object"),
    ({"mixer": "nope"}, {}, "mixer='nope' is unknown here: choose one of"),
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
    ({"softness": 2}, {}, "softness=2 must lie in [0, 1]"),
    ({"banned": [VOCAB]}, {}, "banned=(64,) must be ids below 64"),
    ({"banned": ["a"]}, {}, "banned=['a'] must be a list of token ids"),
    ({"think_end": VOCAB}, {}, "think_end=(64,) must be token ids below 64"),
    ({"think_end": "w9 " * 65}, {}, "think_end has 65 tokens, more than 64"),
    ({"think_start": 3}, {}, "needs a think_end"),
    ({"rescale": "up"}, {}, "rescale='up' is unknown"),
    ({"switch": "often"}, {}, "switch='often' is unknown: give 'block'"),
    ({"switch": "block", "switch_dwell": -1}, {}, "switch_dwell=-1 must be at least 0"),
    ({"switch": "block", "switch_budget": 2}, {}, "without a think_end, which it puts in"),
    ({"switch_dwell": 2}, {}, "switch_dwell=2 does nothing without a switch"),
    (
        {"switch": "block", "think_end": END, "switch_budget": 2},
        {"ignore_eos": True},
        "not with ignore_eos",
    ),
    (
        {"switch": "block", "think_end": END, "switch_budget": 2, "switch_final": [VOCAB]},
        {},
        "switch_final=(64,) must be token ids below 64",
    ),
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
    ("[" * 100_000, {}, "the object has 100000 characters, and at most 65536 are read"),
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
# Engines and workers as forks of the process that starts them; tests/forking says why. The README's
# blocks have them as vLLM starts them.
FORKING = dict(
    PYTHONPATH=os.pathsep.join(
        filter(None, [str(Path(__file__).with_name("forking")), os.environ.get("PYTHONPATH")])
    )
)
DRAWN = dict(mixer="gumbel", budget=8, think_end=END)
# Numbers of drawn requests that do not survive `tiny.perturbed` on all three nets, for seeds 0 to 4:
# their tokens part, or a mixture moves by more than 1e-3. With other kernels they may differ too
FRAGILE = frozenset(
    [3, 5, 11, 13, 20, 27, 30, 41, 60, 77, 85, 99, 134, 140, 157, 183, 186, 189, 196]
)
LONG = [BOS, *range(5, 40)]
TRACED = [  # options of vllm-soft, and of the decoder `soft`
    {"budget": 4},
    {"think_end": END, "budget": 6, "softness": 0.7},
    {"top_k": 5, "min_p": 0.1, "temperature": 0.8},
    {"cold_stop_entropy": 2.7, "cold_stop_steps": 1},
    {"think_start": "<think>", "think_end": "</think>"},
]
TO_TRACE = ["<bos> w11 w12", "<bos> w20 w21 w22 <think> w9"]


def model_of(arch):
    """A tiny random model with heads that vLLM has kernels for. Weights as wide as those of tiny.py
    would make soft decoding chaotic: within 20 steps float32 and float64 would part."""
    sizes = {**tiny.SIZES, "head_dim": 32, "tie_word_embeddings": False, "initializer_range": 0.2}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = ARCHS[arch](vocab_size=VOCAB, **sizes)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def save_models(folder):
    for arch in ARCHS:
        model_of(arch).save_pretrained(folder / arch)
        tiny.tokenizer_of().save_pretrained(folder / arch)


def run_script(file, folder, run=warm.run, **settings):
    """What the script of a test file, `python FILE FOLDER`, leaves in FOLDER/out.json."""
    done = run(file, [folder], os.environ | SETTINGS | settings)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return json.loads((folder / "out.json").read_text())


def cases(number):
    """Requests of random lengths and parameters: (prompt, index in KINDS or None, seed, max_tokens,
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


def switching():
    """Requests whose thoughts switch, of one length: over it their tags fade."""
    draw = random.Random(8)
    words, rows = [THINK, END, *range(5, VOCAB)], []
    for i in range(4 * len(TURNS)):
        prompt = [BOS, *draw.choices(words, k=draw.choice([1, 5, 17, 30])), THINK]
        rows.append((prompt, len(SOFT) + i % len(TURNS), 500 + i, 40, i % 3 == 0))
    return rows


def ask(prompt, soft, seed, max_tokens, record, **more):
    from vllm import SamplingParams

    fields, draws = (None, False) if soft is None else KINDS[soft]
    args = None if soft is None else {"soft": {**fields, "record": record}}
    seed = seed if draws else None
    settings = {**dict(temperature=0, max_tokens=max_tokens, seed=seed, extra_args=args), **more}
    return {"prompt_token_ids": prompt}, SamplingParams(**settings)


def runner(llm):
    return llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner


def answers(llm, requests):
    """Per request its tokens and, of a soft one that asked for it, its record."""
    outs = llm.generate(*map(list, zip(*(ask(*request) for request in requests))), use_tqdm=False)
    rows = []
    for out, (_, soft, _, _, record) in zip(outs, requests):
        steps = record_of(out.outputs[0]) if soft is not None and record else None
        rows.append([list(out.outputs[0].token_ids), steps])
    return rows


def inside(llm):
    """Requests step by step: thrown out of the cache, all of them at once, and one that is
    aborted."""
    from vllm.v1.core.sched.scheduler import Scheduler

    preempted, plain = [], Scheduler._preempt_request
    Scheduler._preempt_request = lambda self, request, *args, **kw: (
        preempted.append(request.num_output_tokens),
        plain(self, request, *args, **kw),
    )
    engine = llm.llm_engine
    requests = [case for case in cases(200) if case[1] is not None and case[3] > 20][:8]
    requests += switching()[:4]
    for i, request in enumerate(requests):
        engine.add_request(str(i), *ask(*request))
    ended, steps = {}, 0
    while engine.has_unfinished_requests():
        for out in engine.step():
            if out.finished:
                ended[out.request_id] = list(out.outputs[0].token_ids)
        steps += 1
        if steps in (12, 25):
            assert engine.reset_prefix_cache(reset_running_requests=True)
        if steps == 14:
            engine.abort_request(["3"])
    Scheduler._preempt_request = plain
    return {"steps": ended, "preempted": preempted, "requests": requests}


def cached(llm):
    """A soft request, then discrete ones whose prompt is all that it said, twice: (its tokens,
    theirs, how many positions came out of the cache)."""
    rows = []
    for soft, prompt in ((1, LONG), (5, LONG), (None, LONG)):
        ((tokens, _),) = answers(llm, [(prompt, soft, 0, 50, False)])
        for _ in range(2):
            case = ({"prompt_token_ids": LONG + tokens}, ask([], None, 0, 9, False)[1])
            (out,) = llm.generate(*map(list, zip(case)), use_tqdm=False)
            rows.append([tokens, list(out.outputs[0].token_ids), out.num_cached_tokens])
    return rows


def spoiled(llm):
    """Requests that read a token whose embedding is NaN, beside others, which must not notice: how
    they ended, what the others were answered before, meanwhile and after, and their own answer once
    the embedding is whole."""
    from vllm import SamplingParams

    word = VOCAB - 1
    row = runner(llm).get_model().model.embed_tokens.weight.data[word]
    others = [case for case in cases(200) if case[1] is None and case[3] < 20][:12]
    before = answers(llm, others)
    others = [case for case, (tokens, _) in zip(others, before) if word not in (*case[0], *tokens)]
    before, whole = answers(llm, others), row.clone()
    ills = [[*LONG, *LONG, word, 9], [BOS, word]]
    wide = dict(top_k=None, keep=None, mixer="k-samples", mixer_args={"k": 64})
    fields = [None, {"top_k": 64}, wide, {**wide, "mixer": "gumbel", "mixer_args": {}, "keep": 64}]
    asked = [(prompt, soft) for prompt in ills for soft in fields]
    asked += [([BOS, 9], {"top_k": 64})]  # which reads it in a mixture
    params = [
        SamplingParams(
            temperature=0,
            max_tokens=12,
            seed=1,
            extra_args=None if soft is None else {"soft": soft},
        )
        for _, soft in asked
    ]
    beside = [ask(*case) for case in others]
    prompts = [{"prompt_token_ids": prompt} for prompt, _ in asked]
    row.fill_(torch.nan)
    outs = llm.generate(
        prompts + [prompt for prompt, _ in beside], params + [p for _, p in beside], use_tqdm=False
    )
    row.copy_(whole)
    later, n = answers(llm, others), len(asked)
    layers = runner(llm).compilation_config.static_forward_context.values()
    (again,) = llm.generate(prompts[:1], params[:1], use_tqdm=False)
    return {
        "ends": [[o.outputs[0].finish_reason, len(o.outputs[0].token_ids)] for o in outs[:n]],
        "others": [before, [[list(o.outputs[0].token_ids), None] for o in outs[n:]], later],
        "again": [ills[0], list(again.outputs[0].token_ids), again.num_cached_tokens],
        "finite": all(bool(layer.kv_cache.isfinite().all()) for layer in layers),
    }


def ends_alone(made, model):
    """What `spoiled` must have found."""
    *alone, mixed = made["ends"]
    assert alone == [["error", 0]] * 8 and mixed == ["error", 1]
    before, meanwhile, later = made["others"]
    assert len(before) > 5 and meanwhile == before and later == before
    prompt, tokens, num_cached = made["again"]
    ((own, _),) = expected(model, [(prompt, None, 0, 12, False)])
    assert tokens == own and num_cached == 0 and made["finite"]


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


def expected(model, requests):
    """Per request the tokens of softar.generate and its record."""
    rows = [None] * len(requests)
    for soft in {request[1] for request in requests}:
        group = [i for i, request in enumerate(requests) if request[1] == soft]
        fields = {"mixer": "hard"} if soft is None else KINDS[soft][0]
        fields = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
        config = softar.SoftConfig(**fields, max_new_tokens=max(requests[i][3] for i in group))
        ids, mask = tiny.left_padded([requests[i][0] for i in group])
        rng = [torch.Generator().manual_seed(requests[i][2]) for i in group]
        out = softar.generate(
            model, ids, mask, config=config, rng=rng, tokenizer=tiny.tokenizer_of()
        )
        for row, i in enumerate(group):
            real = (out.record.kind[row] != Kind.PAD)[: requests[i][3]]
            tokens = out.completions[row][: requests[i][3]][real].tolist()
            rows[i] = tokens, type(out.record)(*(x[row, : len(tokens)] for x in out.record))
    return rows


def mixture_of(ids, weights):
    return torch.zeros(VOCAB).index_add(0, torch.as_tensor(ids), torch.as_tensor(weights).float())


def same(steps, record):
    """A record from vLLM and one from the loop."""
    for step, (token, ids, weights, kind, logp, entropy) in enumerate(steps):
        assert token == record.token[step] and kind == record.kind[step]
        assert entropy == pytest.approx(float(record.entropy[step]), abs=1e-3)
        assert (
            logp == pytest.approx(float(record.logp[step]), abs=1e-3, nan_ok=True)
            or kind == Kind.HARD
        )
        mixture = mixture_of(record.ids[step], record.weights[step])
        torch.testing.assert_close(mixture_of(ids, weights), mixture, atol=1e-4, rtol=1e-3)


def same_trace(trace, loop):
    assert (trace.prompt, trace.answer_start) == (loop.prompt, loop.answer_start)
    for step, other in zip(trace.steps, loop.steps, strict=True):
        assert (step.kind, step.token, step.others) == (other.kind, other.token, other.others)
        assert step.entropy == pytest.approx(other.entropy, abs=1e-3)
        assert step.rest == pytest.approx(other.rest, abs=1e-3)
        assert dict(step.mixture) == pytest.approx(dict(other.mixture), abs=1e-3)
