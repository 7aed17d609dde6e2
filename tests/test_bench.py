"""recipes/bench.py: what a decoder costs, from the least seconds of its steps."""

import inspect
import re
import sys
from itertools import accumulate
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import softar
from softar.recipes import bench, bench_decode, bench_rows

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


def test_each_reading_waits_for_the_gpu(monkeypatch):
    seen = []
    monkeypatch.setattr(bench_decode, "synchronise", lambda: seen.append("wait"))
    model = LlamaForCausalLM(LlamaConfig(**TINY)).eval()
    steps = bench_decode.Steps(model, lambda: seen.append("read") or 0.0)
    steps.watch("it", lambda: model(torch.tensor([[1, 2, 3]])))()
    assert seen == ["wait", "read"] * 2


@pytest.mark.parametrize(
    "words, says",
    [
        ("decode --decoders swithcing", "swithcing"),
        ("beams --decoders swithcing", "swithcing"),
        ("decode --beside hrad", "hrad"),
        (
            "sft --decoders hard",
            "--decoders does nothing for sft: it is of decode and beams, leave",
        ),
        ("memory --model nonsense", "--model does nothing for memory"),
        ("memory --batch 32", "--batch does nothing for memory"),
        ("decode --length 9", "--length does nothing for decode: it is of sft, leave it out"),
        ("agreement --repeats 3", "--repeats does nothing for agreement"),
        ("rows --num_beams 3", "--num_beams does nothing for rows"),
        ("decode --model mnns-sfot-tiny", "model='mnns-sfot-tiny' is not there, did you mean"),
        ("agreement", "agreement needs --model_path"),
        ("agreement --model_path nowhere", "model='nowhere' is not there"),
        ("decode --new_tokens 2", "new_tokens=2 must be at least 3"),
        ("beams --repeats 0", "repeats=0 must be at least 1"),
        ("decode --batch 8 0", "batch=0 must be at least 1"),
        ("decode --cpu_time", "--cpu_time: a GPU"),
    ],
)
def test_wrong_options_are_named_before_a_model_is_loaded(words, says, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench", *words.split()])
    monkeypatch.setattr(softar, "load", lambda *_, **__: pytest.fail("a model was loaded"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(SystemExit) as end:
        bench.main()
    err = capsys.readouterr().err
    assert end.value.code == 2 and says in err and len(err.splitlines()) == 1


def test_each_bench_reads_the_options_that_it_is_said_to():
    """Every option is of one at least, and no bench is told of an option that it does not hear."""
    read = {name: {*words.split()} for name, words in bench.READS.items()}
    assert [*read] == [*bench.BENCHES]
    parts = {
        "decode": [bench_decode.compared, bench_decode.chosen],
        "rows": [bench_rows.measured, bench_rows.run],
    }
    parts["beams"] = parts["decode"]
    for name, measure in bench.BENCHES.items():
        source = "".join(map(inspect.getsource, [measure, *parts.get(name, [])]))
        source = source.replace("clock_of(args)", "args.cpu_time")
        assert {*re.findall(r"\bargs\.(\w+)", source)} - {"bench"} == read[name], name


@pytest.mark.parametrize("record", [False, True])
def test_steps_of_rows_inside_vllm_are_timed_one_by_one(record, monkeypatch):
    monkeypatch.setattr(bench_rows, "V", 30)
    clock = iter(range(1000))  # a second from one reading to the next
    monkeypatch.setattr(bench_rows, "clock_of", lambda args: lambda: next(clock))
    found = bench_rows.measured(3, record, SimpleNamespace(repeats=2, new_tokens=4))
    assert (found["step_ms"], found["feed_ms"]) == (1000, 1000) and next(clock) == 2 * 4 * 3
