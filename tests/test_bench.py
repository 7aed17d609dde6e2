"""recipes/bench.py: what a decoder costs, from the least seconds of its steps."""

import sys
from itertools import accumulate

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import softar
from softar.recipes import bench, bench_decode

TINY = dict(
    vocab_size=16,
    hidden_size=8,
    intermediate_size=8,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
)
NEW = 6
NOISE = [[5, 9, 5, 8, 9], [7, 5, 6, 5, 9]]  # seconds of a run's forwards, twice: at their least 5


@pytest.mark.parametrize("mixer", ["hard", "soft", "hidden"])
@pytest.mark.parametrize("more", [0, 2])
def test_steps_are_taken_at_their_least(mixer, more):
    """The first of the forwards reads the prompt, which takes 100 seconds here."""
    model = LlamaForCausalLM(LlamaConfig(**TINY)).eval()
    model.generation_config.eos_token_id = None
    config = softar.SoftConfig(mixer=mixer, max_new_tokens=NEW, budget=NEW)
    # from the prompt's start to its end, to the first step's start, to its end, ...
    between = [[0, 100, 1, *(t for step in steps for t in (step, 1 + more))] for steps in NOISE]
    readings = accumulate(t for run in between for t in run[: 2 * NEW])
    steps = bench_decode.Steps(model, lambda: next(readings))

    def run():
        softar.generate(model, torch.tensor([[1, 2, 3]]), config=config)

    watched = steps.watch("it", run)
    watched()
    watched()
    assert bench_decode.least(steps.outside["it"]) == 1 + more
    assert bench_decode.least(steps.whole["it"]) == 5 + 1 + more
    assert [len(repeat) for repeat in steps.whole["it"]] == [NEW - 2] * 2
    assert next(readings, None) is None
    run()  # nothing reads the clock outside


@pytest.mark.parametrize("name", ["decode", "beams"])
def test_an_unknown_decoder_is_named_before_a_model_is_loaded(name, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["bench", name, "--decoders", "swithcing"])
    monkeypatch.setattr(softar, "load", lambda *_, **__: pytest.fail("a model was loaded"))
    with pytest.raises(ValueError, match="swithcing"):
        bench.main()
