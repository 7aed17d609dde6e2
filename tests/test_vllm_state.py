"""Soft decoding in vLLM's second model runner, beside softar.generate.

vLLM has this runner on CPU too, where its Triton kernels want a compiler that is in no package.
Triton's interpreter runs the same kernels, slowly. This file is also the script with the engine:
`python tests/test_vllm_state.py FOLDER`.
"""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import warm
from engine_script import (
    ARCHS,
    BAD,
    DRAWN,
    ENGINE,
    HERE,
    LONG,
    TIGHT,
    after,
    answers,
    ask,
    cached,
    cases,
    ends_alone,
    expected,
    inside,
    model_of,
    refused,
    run_script,
    runner,
    same,
    save_models,
    spoiled,
)
from tiny import BOS

import softar

pytestmark = pytest.mark.rest

NUMBER = {"llama": 60, "qwen3": 12, "gemma": 12}


def main(folder):
    from triton.backends import backends

    # what vLLM asks of the compiler
    backends["cpu"] = SimpleNamespace(driver=SimpleNamespace(is_active=lambda: True))
    from vllm import LLM

    out = {}
    for arch in ARCHS:
        llm = LLM(str(folder / arch), **ENGINE, **(TIGHT if arch == "llama" else {}))
        if arch == "llama":
            out |= before_any_soft_request(llm)
            addresses = watched(runner(llm).model_state)
        out[arch] = answers(llm, cases(NUMBER[arch]))
        if arch == "llama":
            out |= tricks(llm)
        del llm
    out["addresses"] = sorted(addresses)
    (folder / "out.json").write_text(json.dumps(out))


def before_any_soft_request(llm):
    state, sampler = runner(llm).model_state, runner(llm).sampler
    kind = [type(state).__name__, type(state).__base__.__name__, type(sampler).__name__]
    discrete = answers(llm, [case for case in cases(NUMBER["llama"]) if case[1] is None])
    return {"kind": kind, "discrete": discrete, "idle": state.softar is None}


def tricks(llm):
    from vllm import SamplingParams

    out = {**inside(llm), "cached": cached(llm), "spoiled": spoiled(llm)}
    few = [BAD[0], BAD[33]]
    out["bad"] = [[refused(llm, soft, more), after(llm), says] for soft, more, says in few]
    beside = ask([BOS, 9], None, 0, 9, False, logprobs=2)
    outs = llm.generate(
        *map(list, zip(ask([BOS, 11, 12, 13], 0, 0, 9, True), beside)), use_tqdm=False
    )
    out["logprobs"] = [len(step) for step in outs[1].outputs[0].logprobs]
    params = SamplingParams(temperature=1.0, seed=3, n=3, max_tokens=8, extra_args={"soft": DRAWN})
    (answer,) = llm.generate([{"prompt_token_ids": [BOS, 9]}], params, use_tqdm=False)
    out["n"] = [list(o.token_ids) for o in answer.outputs]
    # those that ended leave with the next step
    answers(llm, [([BOS, 9], None, 0, 1, False)])
    state = runner(llm).model_state.softar
    out["rows"] = len(state.rows) + len(state.groups)
    return out


def watched(state):
    """Where the model reads its inputs, from now on, and where it would in a CUDA graph."""
    addresses, plain = set(), state.prepare_inputs_embeds

    def prepare(*args):
        embeds = plain(*args)
        addresses.add((embeds.data_ptr(), state.dummy_inputs_embeds(1).data_ptr()))
        return embeds

    state.prepare_inputs_embeds = prepare
    return addresses


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("second")
    save_models(folder)
    kernels = dict(TRITON_INTERPRET="1", VLLM_USE_V2_MODEL_RUNNER="1")
    return run_script(__file__, folder, warm.cold, **HERE, **kernels)


@pytest.fixture(scope="module")
def models():
    return {arch: model_of(arch) for arch in ARCHS}


@pytest.mark.parametrize("arch", ARCHS)
def test_requests_of_all_kinds_equal_the_loop(made, models, arch):
    requests = cases(NUMBER[arch])
    for request, (tokens, steps), (loops, record) in zip(
        requests, made[arch], expected(models[arch], requests), strict=True
    ):
        assert tokens == loops, request
        if steps is not None:
            same(steps, record)


def test_it_is_the_second_runner_by_its_hook(made):
    assert made["kind"] == ["SoftModelState", "DefaultModelState", "SoftSampler"] and made["idle"]
    ((read, captured),) = made["addresses"]  # one address, step after step
    assert read == captured


def test_discrete_requests_do_not_notice_soft_ones(made):
    wanted = cases(NUMBER["llama"])
    beside = [row for row, case in zip(made["llama"], wanted) if case[1] is None]
    assert made["discrete"] == beside and len(beside) > 5
    assert min(made["logprobs"]) >= 2


def test_thrown_out_of_the_cache_a_request_reads_its_mixtures_again(made, models):
    wanted = [tuple(case) for case in made["requests"]]
    assert sum(n > 0 for n in made["preempted"]) > 8
    own = {
        str(i): tokens for i, (tokens, _) in enumerate(expected(models["llama"], wanted)) if i != 3
    }
    assert made["steps"] == own
    assert made["rows"] == 0


def test_soft_positions_are_never_taken_for_hard_ones(made, models):
    for said, tokens, _ in made["cached"]:
        ((own, _),) = expected(models["llama"], [(LONG + said, None, 0, 9, False)])
        assert tokens == own
    assert [count for *_, count in made["cached"]] == [0, 64, 32, 64, 64, 64]


def test_numbers_that_are_not_finite_end_their_request_alone(made, models):
    ends_alone(made["spoiled"], models["llama"])


def test_draws_and_refusals_are_those_of_the_first_runner(made, models):
    config = softar.SoftConfig(**DRAWN, max_new_tokens=8)
    for i, tokens in enumerate(made["n"]):
        rng = [torch.Generator().manual_seed(3 + i)]
        own = softar.generate(models["llama"], torch.tensor([[BOS, 9]]), config=config, rng=rng)
        assert tokens == own.completions[0].tolist()[: len(tokens)]
    for said, works, says in made["bad"]:
        assert says in said and works


if __name__ == "__main__":
    main(Path(sys.argv[1]))
