"""The step around the forward, compiled: what it decodes, when it compiles again, and when not at
all. The forward itself runs as it is here; with it compiled, too: tests/test_caches.py."""

import copy
import shutil

import pytest
import torch
from test_caches import IDS, MASK, N, assert_same, net
from tiny import BOS, END, EOS, WIDTH, Forced, seeded
from torch.testing import assert_close
from transformers import CompileConfig

import softar
from softar import SoftConfig, decode
from softar.feedback import StepTemperature
from softar.step import GIVEN_UP

WAYS = {
    "hard": dict(mixer="hard", top_k=None),
    "filters": dict(top_k=6, top_p=0.9, min_p=0.01, temperature=0.7, softness=0.8, budget=5),
    "tags": dict(think_start=BOS, think_end=(41,), top_k=5, banned=(7,), cold_stop_entropy=3.0),
    "switching": dict(
        switch="block", switch_dwell=2, top_k=5, think_end=(41,), switch_budget=3, switch_final=()
    ),
    "hidden": dict(mixer="hidden", budget=5, rescale="norm"),
    "gumbel": dict(mixer="gumbel", mixer_args={"candidates": 3}, budget=4, answer_temperature=0.7),
    "k-samples": dict(mixer="k-samples", top_k=None),
    "mixture-of-inputs": dict(mixer="mixture-of-inputs", top_k=5, keep=3, budget=4),
    "hybrid": dict(mixer="hybrid", top_k=5, think_end=END),
}


@pytest.fixture(scope="module")
def llama():
    return net(num_hidden_layers=1)


@pytest.fixture
def graphs(monkeypatch):
    """The graphs that are compiled meanwhile, of steps alone."""
    monkeypatch.setattr(decode, "forward_of", lambda model, *_: lambda **how: model(**how))
    torch._dynamo.reset()
    yield []
    torch._dynamo.reset()
    GIVEN_UP.clear()


def run(model, way, backend=None, rows=(IDS, MASK), rng=None, **how):
    settings = copy.deepcopy(model.generation_config)
    if backend is not None:
        settings.update(
            cache_implementation="static", compile_config=CompileConfig(backend=backend)
        )
    rng = [seeded(i) for i in range(len(rows[0]))] if rng is None else rng
    config = SoftConfig(**dict(max_new_tokens=N) | (WAYS[way] if isinstance(way, str) else way))
    return softar.generate(model, *rows, config=config, rng=rng, generation_config=settings, **how)


def noting(graphs):
    def note(graph, inputs):
        graphs.append(graph)
        return graph.forward

    return note


@pytest.fixture
def plain(llama, monkeypatch):
    """A decode without compiling, by way and more."""

    def plainly(way, **how):
        with monkeypatch.context() as patch:
            patch.setattr(decode, "forward_of", lambda model, *_: model)
            return run(llama, way, **how)

    return plainly


@pytest.mark.parametrize("way", WAYS)
def test_a_compiled_step_decodes_as_the_loop_does(llama, graphs, plain, way):
    """And once more, of another prompt and length: nothing is compiled again."""
    note = noting(graphs)
    assert_same(run(llama, way, note), plain(way))
    assert 1 <= (made := len(graphs)) <= 2
    how = dict(rows=(IDS[:, 1:], MASK[:, 1:]), max_new_tokens=N if way == "switching" else 9)
    assert_same(run(llama, way, note, **how), plain(way, **how))
    assert len(graphs) <= max(made, 2)  # the first may have had no answer
    made = len(graphs)
    assert_same(run(llama, way, note), plain(way))
    assert len(graphs) == made


def test_the_callers_generator_ends_where_it_would(llama, graphs, plain):
    one, other = seeded(), seeded()
    assert_same(run(llama, "gumbel", noting(graphs), rng=one), plain("gumbel", rng=other))
    assert graphs and torch.equal(one.get_state(), other.get_state())


def test_processors_and_criteria_stay_outside(llama, graphs, plain):
    """Neither is asked with other ids, and the entropy is of the logits as they were, which a
    processor may write to."""

    def writes(ids, scores):
        scores[:, 5] = 100.0 if ids.shape[1] % 2 else -100.0
        return scores

    ends = Forced(IDS.shape[1], [[None] * step + [EOS] for step in (3, 0, 9)])
    how = dict(logits_processor=[writes, ends], stopping_criteria=[lambda ids, _: ids[:, -1] == 9])
    out = run(llama, "filters", noting(graphs), **how)
    assert_same(out, plain("filters", **how))
    assert graphs and (out.record.token[0, ::2] == 5).any()
    bare = plain("filters", max_new_tokens=1)
    assert_close(out.record.entropy[:, 0], bare.record.entropy[:, 0])


def stranger(dist, *, rng=None):
    return softar.mixers.soft(dist, rng=rng)


@pytest.mark.parametrize(
    "way",
    [
        dict(mixer=stranger),
        dict(mixer="dirichlet", top_k=5),
        dict(step_temperature=StepTemperature(torch.full((WIDTH,), 0.1))),
    ],
)
def test_what_cannot_be_drawn_ahead_or_is_not_ours_runs_as_it_is(
    llama, graphs, plain, way, recwarn
):
    assert_same(run(llama, way, noting(graphs)), plain(way))
    assert not graphs and not [w for w in recwarn if "compile" in str(w.message)]


def test_a_step_that_does_not_compile_is_warned_of_once(llama, graphs, plain, recwarn):
    def fails(graph, inputs):
        graphs.append(graph)
        raise RuntimeError("no compiler")

    for _ in range(2):
        assert_same(run(llama, "filters", fails), plain("filters"))
    (told,) = [str(w.message) for w in recwarn if "does not compile" in str(w.message)]
    assert len(graphs) == 1 and told.startswith("the step around the forward does not compile (")
    assert "no compiler" in told


def test_more_settings_than_are_kept_run_as_they_are(llama, graphs, plain, recwarn):
    note = noting(graphs)
    with torch._dynamo.config.patch(recompile_limit=1):
        for way in ("hard", "filters", "hard"):
            assert_same(run(llama, way, note), plain(way))
    (told,) = [str(w.message) for w in recwarn if "does not compile" in str(w.message)]
    assert "more shapes or settings than torch._dynamo.config.recompile_limit" in told
    assert len(graphs) == 1


@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++"))), reason="no C++ compiler here")
def test_by_torchs_own_compiler(llama, graphs, plain):
    """Rounding is not the loop's, which a step or two of a float64 net does not show in tokens."""
    out, other = run(llama, "hard", "inductor"), plain("hard")
    assert torch.equal(out.sequences, other.sequences)
    assert torch.equal(out.record.kind, other.record.kind)
    assert_close(out.record.entropy, other.record.entropy, rtol=0, atol=1e-4)
