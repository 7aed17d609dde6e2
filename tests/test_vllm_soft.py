"""Soft decoding inside vLLM's first model runner, beside softar.generate.

This file is also the script with the engines: `python tests/test_vllm_soft.py FOLDER` writes what
vLLM made of the cases to FOLDER/out.json. There the engine runs in the script's process, so that
its insides can be looked at.
"""

import dataclasses
import json
import logging
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
from engine_script import (
    ARCHS,
    BAD,
    DRAWN,
    ENGINE,
    HERE,
    LONG,
    SOFT,
    TIGHT,
    TO_TRACE,
    TRACED,
    after,
    answers,
    ask,
    cached,
    cases,
    ends_alone,
    expected,
    inside,
    mixture_of,
    model_of,
    refused,
    run_script,
    runner,
    same,
    same_trace,
    save_models,
    spoiled,
    switching,
)
from http_script import FIELD, over_http
from tiny import BOS
from transformers import Gemma3nTextConfig, LlamaConfig

import softar
from softar.decoders.card import describe
from softar.decoders.options import Common
from softar.decoders.soft import DECODERS as LOOP
from softar.show.trace import from_json
from softar.thought import Kind, Record
from softar.vllm.completions import Completion, ends_unseen, followed
from softar.vllm.decoders import DECODERS
from softar.vllm.plugin import register
from softar.vllm.record import record_of
from softar.vllm.request import check_engine

NUMBER = {"llama": 200, "qwen3": 40, "gemma": 40}
PARALLEL = dict(
    pipeline_parallel_size=1, prefill_context_parallel_size=1, enable_batch_sharded_sampling=False
)
MODEL = dict(
    enable_prompt_embeds=True,
    is_encoder_decoder=False,
    logits_processors=None,
    return_sampling_mask=False,
    hf_text_config=LlamaConfig(),
)


# --- the script ---


def main(folder):
    out = {"version": another_version(), "http": over_http()}
    from vllm import LLM

    started = time.perf_counter()
    for arch in ARCHS:
        llm = LLM(str(folder / arch), **ENGINE, **(TIGHT if arch == "llama" else {}))
        out[arch] = answers(llm, cases(NUMBER[arch]))
        if arch == "llama":
            discrete = [case for case in cases(NUMBER[arch]) if case[1] is None]
            out["switching"] = answers(llm, switching())
            out |= {"discrete": answers(llm, discrete), **inside(llm), **tricks(llm)}
            out["bad"] = [[refused(llm, soft, more), after(llm)] for soft, more, _ in BAD]
            out |= {"cached": cached(llm), "spoiled": spoiled(llm)}
            out["traced"] = traced(llm, folder)
            # those that ended leave with the next step
            answers(llm, [([BOS, 9], None, 0, 1, False)])
            out["rows"] = len(runner(llm).softar.rows) + len(runner(llm).softar.groups)
        del llm
    out["seconds"] = time.perf_counter() - started
    (folder / "out.json").write_text(json.dumps(out))


def tricks(llm):
    """Requests with what a vLLM request may carry beside: other log-probabilities, stops, n,
    structure."""
    from vllm import SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    out = {}
    beside = ask([BOS, 9], None, 0, 9, False, logprob_token_ids=[5])
    outs = llm.generate(
        *map(list, zip(ask([BOS, 11, 12, 13], 0, 0, 9, True), beside)), use_tqdm=False
    )
    out["narrow"] = [
        record_of(outs[0].outputs[0]),
        [sorted(step) for step in outs[1].outputs[0].logprobs],
    ]
    choice = {"structured_outputs": StructuredOutputsParams(choice=["w5"])}
    out["structured"] = refused(llm, {}, choice)
    params = SamplingParams(temperature=1.0, seed=3, n=3, max_tokens=20, extra_args={"soft": DRAWN})
    (answer,) = llm.generate([{"prompt_token_ids": [BOS, 9]}], params, use_tqdm=False)
    out["n"] = [list(o.token_ids) for o in answer.outputs]
    for key, more in dict(stop={"stop": ["w59 w9"]}, stop_ids={"stop_token_ids": [42]}).items():
        (answer,) = llm.generate(
            *zip(ask([BOS, 11, 12, 13], 1, 0, 40, False, **more)), use_tqdm=False
        )
        out[key] = [list(answer.outputs[0].token_ids), answer.outputs[0].stop_reason]
    fresh = SamplingParams(temperature=0, max_tokens=20, extra_args={"soft": DRAWN})
    twice = llm.generate([{"prompt_token_ids": [BOS, 9]}] * 2, fresh, use_tqdm=False)
    out["unseeded"] = [list(answer.outputs[0].token_ids) for answer in twice]
    return out


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


def traced(llm, folder):
    """Rows of vllm-soft in an engine that runs already."""
    rows = []
    for options in TRACED:
        decoder = DECODERS["vllm-soft"](
            describe(str(folder / "llama")), Common(12, trace=True), **options
        )
        decoder._engine = SimpleNamespace(llm=llm, tokenizer=tiny.tokenizer_of(), max_model_len=128)
        rows.append(
            [dataclasses.asdict(row) for row in [*decoder.decode(TO_TRACE), *decoder.decode([])]]
        )
    return rows


# --- the tests ---


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("soft")
    save_models(folder)
    return folder


@pytest.fixture(scope="module")
def made(folder):
    return run_script(__file__, folder, **HERE)


@pytest.fixture(scope="module")
def models():
    return {arch: model_of(arch) for arch in ARCHS}


@pytest.fixture(scope="module")
def loop(models):
    return {arch: expected(models[arch], cases(NUMBER[arch])) for arch in ARCHS}


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHS)
def test_requests_of_all_kinds_in_one_engine_equal_the_loop(made, loop, arch):
    wrong = []
    for case, (tokens, steps), (loops, record) in zip(
        cases(NUMBER[arch]), made[arch], loop[arch], strict=True
    ):
        if tokens != loops:
            wrong.append((case, tokens, loops))
        elif steps is not None:
            same(steps, record)
    assert wrong == []


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHS)
def test_these_requests_are_the_same_on_other_kernels(models, loop, arch):
    """What makes comparisons of tokens and mixtures safe: weights that are wrong by 1e-5 of
    themselves, a hundred times what other kernels make, move no token and no mixture by 1e-3."""
    others = expected(tiny.perturbed(models[arch]), cases(NUMBER[arch]))
    for i, ((tokens, record), (ours, own)) in enumerate(zip(others, loop[arch], strict=True)):
        assert tokens == ours, i
        for ids, weights, *step in zip(record.ids, record.weights, own.ids, own.weights):
            assert (mixture_of(ids, weights) - mixture_of(*step)).abs().max() < 1e-3, i


@pytest.mark.slow
def test_thoughts_switch_in_the_engine_as_in_the_loop(made, models):
    wanted = expected(models["llama"], switching())
    kinds = torch.cat([record.kind for _, record in wanted])
    assert all((kinds == kind).sum() > 20 for kind in (Kind.SOFT, Kind.HARD, Kind.FORCED))
    for (tokens, steps), (loops, record) in zip(made["switching"], wanted, strict=True):
        assert tokens == loops
        if steps is not None:
            same(steps, record)


@pytest.mark.slow
def test_thoughts_that_switch_are_the_same_on_other_kernels(models):
    others = expected(tiny.perturbed(models["llama"]), switching())
    for (tokens, record), (ours, own) in zip(others, expected(models["llama"], switching())):
        assert tokens == ours and torch.equal(record.kind, own.kind)


@pytest.mark.slow
def test_a_record_beside_others_log_probabilities(made, models):
    read, others = made["narrow"]
    ((tokens, record),) = expected(models["llama"], [([BOS, 11, 12, 13], 0, 0, 9, True)])
    assert [step[0] for step in read] == tokens and len(others) == 9
    same(read, record)
    assert all(5 in step and len(step) <= 2 for step in others)


@pytest.mark.slow
def test_discrete_requests_do_not_notice_soft_ones(made):
    beside = [row for row, case in zip(made["llama"], cases(200)) if case[1] is None]
    assert made["discrete"] == beside and len(beside) > 10


@pytest.mark.slow
def test_thrown_out_of_the_cache_a_request_reads_its_mixtures_again(made, models):
    wanted = [tuple(case) for case in made["requests"]]
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
def test_numbers_that_are_not_finite_end_their_request_alone(made, models):
    ends_alone(made["spoiled"], models["llama"])


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
        (
            dict(model_config=SimpleNamespace(**MODEL | {"hf_text_config": Gemma3nTextConfig()})),
            "reads tokens in every layer",
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
        additional_config={},
    )
    check_engine(SimpleNamespace(**fits))
    with pytest.raises(ValueError, match=says):
        check_engine(SimpleNamespace(**{**fits, **change}))


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
    beams, hidden, outside, elsewhere = (
        "use_beam_search",
        "=false",
        "vllm_xargs",
        "completions alone",
    )
    about = [beams] * 2 + [hidden] + [outside] * 2 + [elsewhere] * 3
    for said, name in zip(found["refused"], about, strict=True):
        assert name in said and "\n" not in said


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
                followed(config, [case[0] for case in rows], found).answer_start.tolist()
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
    assert followed(softar.SoftConfig(**soft), [[BOS, 9]], [found]).answer_start.tolist() == [4]


@pytest.mark.slow
def test_traces_are_those_of_the_loop(made, folder):
    for options, rows in zip(TRACED, made["traced"], strict=True):
        loop = LOOP["soft"](describe(str(folder / "llama")), Common(12, trace=True), **options)
        for row, other in zip(loop.decode(TO_TRACE), rows, strict=True):
            assert other["text"] == row.text and other["tokens"] == list(row.tokens)
            assert other["entropy"] == pytest.approx(row.entropy, abs=1e-3)
            same_trace(from_json(json.dumps(other["trace"])), row.trace)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
