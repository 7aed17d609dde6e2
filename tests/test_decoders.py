"""Decoders by name: each equals what it stands for, its costs add up, and what is wrong is named in
one line."""

import copy
import dataclasses
import json
import math
import random
import re
import time
import warnings
from collections import Counter

import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import END, EOS, PAD, VOCAB, counted, edited_logits, model_of, tokenizer_of, with_lora
from transformers import BertConfig, BertForMaskedLM

import softar
from softar import Kind, SoftConfig
from softar.decoders.answer import Decoded
from softar.decoders.beam import BeamDecoder, BeamOptions
from softar.decoders.card import Card, describe
from softar.decoders.registry import FAMILIES, decoders_of, find, make_decoder, parse_spec
from softar.decoders.soft import DECODERS, SelfConsistency, SoftDecoder, elect, soft_config
from softar.decoders.votes import commonest, last_match, reader
from softar.defaults import default_of
from softar.diffusion import SOFTENERS as DIFFUSION
from softar.diffusion import DenoiseConfig, denoise
from softar.diffusion import load as load_diffusion
from softar.diffusion.decoders import DiffusionDecoder, denoise_config
from softar.diffusion.evaluate import evaluate as fill
from softar.draws import generators
from softar.evals.compare import compare
from softar.evaluate import encode, evaluate, prompt_of
from softar.models import folder_of
from softar.specs import format_options
from softar.tasks import load_task
from softar.vllm.completions import Completion, token_ids
from softar.vllm.request import parse as parse_request

N = 10  # new tokens
PROMPTS = ["<bos> w11 w12 w13 w14", "<bos> w21", "<bos> w31 w32"]
ROWS = load_task("mnns").test.select(range(3))
MNNS = list(ROWS["prompt"])
MODELS = {"autoregressive": "mnns-soft-tiny", "diffusion": "mnns-diffusion-tiny"}
NAMES = [(family, name) for family in MODELS for name in decoders_of(family)]


@pytest.fixture(scope="module")
def tiny():
    return model_of(), tokenizer_of()


@pytest.fixture(scope="module")
def filler():
    return load_diffusion("mnns-diffusion-tiny")


def answers(decoded):
    """What of a decode doesn't depend on the clock."""
    return [(d.text, d.tokens) for d in decoded]


def unpadded(row):
    """A completion up to its end token."""
    row = row.tolist()
    return tuple(row[: row.index(EOS) + 1] if EOS in row else row)


# -- specs


@pytest.mark.parametrize(
    "spec, model, name, options",
    [
        ("soft", None, "soft", {}),
        ("soft:", None, "soft", {}),
        ("owner/m=soft", "owner/m", "soft", {}),
        ("./a=b:c=gumbel:tau=0.5,top_k=3", "./a=b:c", "gumbel", {"tau": 0.5, "top_k": 3}),
        ("http://127.0.0.1:8000=vllm-greedy", "http://127.0.0.1:8000", "vllm-greedy", {}),
        ("soft=soft:budget=3", "soft", "soft", {"budget": 3}),
        ("gumbel:think_start=soft", None, "gumbel", {"think_start": "soft"}),
        (
            'gumbel:banned=[1,2],mixer_args={"tau": {"a": [1, 2]}},top_k=null',
            None,
            "gumbel",
            {"banned": [1, 2], "mixer_args": {"tau": {"a": [1, 2]}}, "top_k": None},
        ),
        (
            "hard:early_stop=True, cache=None,ban_eos=false",
            None,
            "hard",
            {"early_stop": True, "cache": None, "ban_eos": False},
        ),
        (
            'soft:think_end="a,b=c",think_start=x=y',
            None,
            "soft",
            {"think_end": "a,b=c", "think_start": "x=y"},
        ),
        ('soft:think_end="</think>"', None, "soft", {"think_end": "</think>"}),
        ("soft:think_end=</think>,budget=2", None, "soft", {"think_end": "</think>", "budget": 2}),
        ("beam:early_stopping=never", None, "beam", {"early_stopping": "never"}),
    ],
)
def test_a_spec_is_read(spec, model, name, options):
    assert parse_spec(spec) == (model, name, options)


TEXTS = st.text(max_size=8) | st.sampled_from(
    ["a,b", '"', "[1", "None", "true", "1e3", "x=y:z", " a ", "NaN", "{}"]
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXTS,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=5,
)
KEYS = st.from_regex(r"[a-z_]{1,8}", fullmatch=True)


@settings(deadline=None, max_examples=150)
@given(
    st.sampled_from([n for _, n in NAMES]),
    st.dictionaries(KEYS, VALUES, max_size=4),
    st.none() | st.from_regex(r"[a-zA-Z0-9_./:=-]{1,12}", fullmatch=True),
)
def test_a_spec_comes_back(name, options, model):
    spec = f"{name}:{format_options(options)}" if options else name
    if model is not None:
        spec = f"{model}={spec}"
        if any(f"={n}:" in spec[: len(model) + 1] or spec.startswith(f"{n}:") for _, n in NAMES):
            return  # the model's own name reads as a decoder
    assert parse_spec(spec) == (model, name, options)


def test_each_name_is_in_one_family():
    names = Counter(name for family in FAMILIES for name in decoders_of(family))
    assert set(names.values()) == {1} and {"vllm-greedy", "beam", "slerp", "discrete"} <= set(names)
    assert set(softar.MIXERS) - {"hard"} <= set(DECODERS)
    assert find("beam") == ("autoregressive", DECODERS["beam"]) and find("slerp")[0] == "diffusion"
    assert find("nothing") is None


# -- what a spec makes


@pytest.mark.parametrize("family, name", NAMES)
def test_every_name_decodes(family, name):
    decoder = make_decoder(f"{MODELS[family]}={name}", max_new_tokens=5)
    assert decoder.name.startswith(f"{MODELS[family]}={name}")
    expected = {"decoder": name, "model": MODELS[family], "family": family}
    assert decoder.columns.items() >= expected.items()
    found = decoder.decode(MNNS)
    assert len(found) == 3 and decoder.decode([]) == []
    for row in found:
        assert re.fullmatch(r"(S-?\d+ ?)+", row.text) and 1 <= len(row.tokens) <= 5
        assert (
            0 not in row.tokens and row.token_forwards >= row.num_forwards >= 1 and row.seconds > 0
        )
        assert isinstance(row.num_forwards, float) and row.trace is None
        assert (row.entropy is not None) == (name != "beam")


def test_names_and_columns_tell_settings():
    one = make_decoder("hard:steps=2,cache=prefix", model="mnns-diffusion-tiny", max_new_tokens=4)
    assert (
        one.name == "hard steps=2 cache=prefix" and one.columns["setting"] == "steps=2 cache=prefix"
    )
    assert (
        one.columns["training"] == "soft-mask"
        and one.config.gen_length == 4
        and one.config.soften == "hard"
    )
    assert make_decoder("beam", model="mnns-tiny", max_new_tokens=4).name == "beam num_beams=4"
    three = make_decoder("mnns-tiny=self-consistency:votes=3,of=gumbel,tau=2", max_new_tokens=4)
    assert three.columns["setting"] == "votes=3 of=gumbel tau=2" and three.votes == 3
    assert three.decoder.config.mixer_args == {"tau": 2}
    assert three.name == "mnns-tiny=self-consistency votes=3 of=gumbel tau=2"
    assert (
        make_decoder("self-consistency", model="mnns-tiny", max_new_tokens=4).columns["setting"]
        == "votes=8"
    )


def test_a_spec_overrides_the_arguments():
    decoder = make_decoder(
        "mnns-tiny=sampled:max_new_tokens=2,seed=5", model="nothing", max_new_tokens=9
    )
    same = make_decoder("sampled", model="mnns-tiny", max_new_tokens=2, seed=5)
    assert decoder.config.max_new_tokens == 2
    assert (decoder.name, decoder.columns["seed"]) == ("mnns-tiny=sampled seed=5", 5)
    assert decoder.model is same.model, "a model is opened once"
    assert answers(decoder.decode(MNNS * 9)) == answers(same.decode(MNNS * 9))
    assert (
        make_decoder("sampled:dtype=float64", model="mnns-tiny", max_new_tokens=2).model.dtype
        == torch.float64
    )


def test_options_become_the_configuration():
    def made(name, **options):
        return soft_config(default_of(SoftConfig()), name, options)

    assert made("gumbel", tau=0.3, top_k=4, think_end=[5, 6]) == SoftConfig(
        mixer="gumbel", mixer_args={"tau": 0.3}, top_k=4, think_end=(5, 6)
    )
    assert made("k-samples", mixer_args={"k": 2, "weighting": "uniform"}, k=5).mixer_args == {
        "k": 5,
        "weighting": "uniform",
    }
    assert made("discrete", budget=2) == SoftConfig(mixer="hard", budget=2)
    assert made("sampled", top_k=None) == SoftConfig(
        mixer="hard", mixer_args={"sample": True}, top_k=None
    )
    assert made("soft", softness=0.5).softness == 0.5
    with pytest.warns(FutureWarning, match="alpha=0.5 is called softness now"):
        assert made("soft", alpha=0.5) == made("soft", softness=0.5)
    with pytest.warns(FutureWarning, match="soft: alpha=0.5 is called softness now"):
        assert parse_request({"alpha": 0.5}) == {"softness": 0.5}
    assert denoise_config(
        "soft-token", {"k": 2, "threshold": 0.9, "gen_length": 8, "soften_args": {"bias": 1}}
    ) == (
        DenoiseConfig(
            gen_length=8, threshold=0.9, soften="soft-token", soften_args={"k": 2, "bias": 1}
        )
    )
    # The names of both: the field's
    assert denoise_config("soft-mask", {"temperature": 0.5}).temperature == 0.5


def test_a_models_own_configuration_is_the_default(tmp_path):
    softar.load("mnns-tiny")[0].save_pretrained(tmp_path)
    softar.load("mnns-tiny")[1].save_pretrained(tmp_path)
    own = SoftConfig(
        mixer="gumbel", mixer_args={"tau": 0.7}, softness=0.5, temperature=0.6, budget=2, top_k=None
    )
    own.save(tmp_path)
    model, card = str(tmp_path), describe(str(tmp_path))
    assert card == Card(model, tmp_path, "autoregressive", own)
    default = default_of(own)
    assert soft_config(default, "gumbel", {}) == own
    tokens = default_of(dataclasses.replace(own, mixer_args={}, softness=0.0))
    soft = dataclasses.replace(own, mixer_args={}, softness=1.0)
    assert soft_config(tokens, "gumbel", {}) == soft
    assert soft_config(
        default, "gumbel", {"budget": 1, "tau": 2.0, "softness": 0.5}
    ) == dataclasses.replace(own, budget=1, mixer_args={"tau": 2.0})
    # knobs of another mixer are not its own
    assert soft_config(default, "dirichlet", {}).mixer_args == {}
    assert soft_config(default, "discrete", {}) == dataclasses.replace(
        own, mixer="hard", mixer_args={}, softness=1.0
    )
    decoder = make_decoder("beam:num_beams=2", model=model, max_new_tokens=6)
    assert decoder.thought.budget == 2 and decoder.settings.max_new_tokens == 6
    shipped = describe("mnns-soft-tiny")
    assert shipped.config == SoftConfig.load(folder_of("mnns-soft-tiny"))
    assert soft_config(default_of(shipped.config), "soft", {}) == shipped.config
    (tmp_path / "soft_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"its soft_config.json cannot be read"):
        make_decoder("soft", model=model, max_new_tokens=6)


# -- each is what it stands for


def plain_generate(model, tokenizer, **how):
    inputs = encode(tokenizer, PROMPTS)
    with counted(model) as calls:
        out = model.generate(**inputs, max_new_tokens=N, do_sample=False, **how)
    return [unpadded(row) for row in out[:, inputs["input_ids"].shape[1] :]], calls


@pytest.mark.parametrize("arch", ["llama", "qwen3", "gemma3"])
def test_discrete_is_greedy(arch):
    model, tokenizer = model_of(arch), tokenizer_of()
    expected, calls = plain_generate(model, tokenizer)
    decoder = SoftDecoder(model, tokenizer, SoftConfig(mixer="hard", max_new_tokens=N))
    assert decoder.name == "discrete"
    found = decoder.decode(PROMPTS)
    assert [d.tokens for d in found] == expected
    assert [d.text for d in found] == [
        tokenizer.decode(t, skip_special_tokens=True) for t in expected
    ]
    assert [d.num_forwards for d in found] == [len(d.tokens) for d in found]
    assert max(d.num_forwards for d in found) == len(calls)  # the row that the batch waited for
    assert sum(d.token_forwards for d in found) == pytest.approx(
        sum(rows * columns for rows, columns in calls)
    )


@pytest.mark.parametrize(
    "how",
    [
        dict(num_beams=2),
        dict(num_beams=4, length_penalty=3.0),
        dict(num_beams=3, early_stopping=True),
        dict(num_beams=3, length_penalty=-4.0),
        dict(num_beams=3, early_stopping="never", length_penalty=-4.0),
    ],
)
def test_beam_is_transformers_beam_search(how, tiny, recwarn):
    model, tokenizer = tiny
    with edited_logits(
        model,
        lambda step, logits: logits + 3 * torch.nn.functional.one_hot(torch.tensor(EOS), VOCAB),
    ):
        expected, calls = plain_generate(model, tokenizer, **how)
        recwarn.clear()
        found = BeamDecoder(model, tokenizer, BeamOptions(N, **how)).decode(PROMPTS)
    assert not recwarn
    assert [d.tokens for d in found] == expected
    assert {d.num_forwards for d in found} == {len(calls) * how["num_beams"]}
    assert sum(d.token_forwards for d in found) == pytest.approx(
        sum(rows * columns for rows, columns in calls)
    )
    assert calls[0][0] == 3 * how["num_beams"]


def test_beam_options_matter(tiny):
    """Else the test above would hold for a decoder that drops them."""
    with edited_logits(tiny[0], lambda step, logits: logits + 3 * (torch.arange(VOCAB) == EOS)):
        found = {
            tuple(
                d.tokens for d in BeamDecoder(*tiny, BeamOptions(N, beams, penalty)).decode(PROMPTS)
            )
            for beams, penalty in [(2, 1.0), (4, 3.0), (3, -4.0)]
        }
    assert len(found) == 3


def test_beam_ignores_the_sampling_of_the_model(tiny):
    model = model_of()
    expected = BeamDecoder(*tiny, BeamOptions(N, 3)).decode(PROMPTS)
    model.generation_config.update(
        do_sample=True, temperature=3.0, top_k=2, max_length=7, num_return_sequences=2
    )
    before = model.generation_config.to_dict()
    assert answers(BeamDecoder(model, tiny[1], BeamOptions(N, 3)).decode(PROMPTS)) == answers(
        expected
    )
    assert model.generation_config.to_dict() == before


def scripted(model, words):
    """Whatever the prompt, these tokens come, one a step, and then the last."""
    words = [*words, *words[-1:] * 30]
    return edited_logits(
        model, lambda step, logits: 50.0 * (torch.arange(VOCAB) == words[step]).expand_as(logits)
    )


@pytest.mark.parametrize(
    "where, answer",
    [
        (dict(), "w10 w11 </think> w12 w13"),
        (dict(budget=3), "w12 w13"),
        (dict(think_end="</think>"), "w12 w13"),
        (dict(think_end=63), ""),  # never ended
        (dict(think_end=(11, END)), "w12 w13"),
        # the prompt opens no thought
        (dict(think_start="<think>", think_end="</think>"), "w10 w11 </think> w12 w13"),
    ],
)
def test_where_the_answer_begins(where, answer, tiny):
    """Beam search counts a thought as softar.generate does."""
    model, tokenizer = tiny
    words = [10, 11, END, 12, 13, EOS]
    with scripted(model, words):
        soft = SoftDecoder(model, tokenizer, SoftConfig(mixer="hard", **where)).decode(
            ["<bos> w20"]
        )[0]
    with scripted(model, words):
        beam = BeamDecoder(model, tokenizer, BeamOptions(20, 2, **where)).decode(["<bos> w20"])[0]
    assert soft.text == beam.text == answer
    assert soft.tokens == beam.tokens == tuple(words)


@pytest.mark.parametrize(
    "where",
    [
        dict(think_end="</think>"),
        dict(think_start="<think>", think_end="</think>"),
        dict(think_start=(3, 9), think_end=(11, END)),
        dict(think_end="</think>", hide_thought=False),
        dict(budget=2),
        dict(budget=2, hide_thought=False),
    ],
    ids=str,
)
def test_beams_answer_what_greedy_decoding_does(where, tiny):
    """Whatever prompts and texts open and close: the one candidate is the same, and its text."""
    model, tokenizer = tiny
    discrete = SoftDecoder(model, tokenizer, SoftConfig(mixer="hard", max_new_tokens=5, **where))
    beam = BeamDecoder(model, tokenizer, BeamOptions(5, 2, **where))
    r = random.Random(0)
    for _ in range(25):
        words = [r.choice([3, 9, 11, END, 12, EOS]) for _ in range(5)]
        prompts = [
            " ".join(["<bos>", *r.choices(["<think>", "w9", "w11", "</think>"], k=r.randint(0, 3))])
            for _ in range(3)
        ]
        answers = []
        for decoder in (discrete, beam):
            with scripted(model, words), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of prompts that open no thought
                answers.append([(a.text, a.tokens) for a in decoder.decode(prompts)])
        assert answers[0] == answers[1], (words, prompts)


@pytest.mark.parametrize(
    "own, asked, text",
    [
        (dict(budget=2, hide_thought=False), "", "w10 w11 w12 w13"),
        (dict(budget=2, hide_thought=False), ":hide_thought=true", "w12 w13"),
        (dict(budget=2), "", "w12 w13"),
        (dict(budget=2), ":hide_thought=false", "w10 w11 w12 w13"),
        (dict(cold_stop_entropy=0.5, hide_thought=False), "", "w10 w11 w12 w13"),
        (dict(mixer="hidden", budget=3, token_budget=2, hide_thought=False), "", "w10 w11 w12 w13"),
    ],
    ids=str,
)
def test_beams_hide_the_thoughts_that_the_model_says(own, asked, text, tmp_path):
    model_of("llama").save_pretrained(tmp_path)
    tokenizer_of().save_pretrained(tmp_path)
    SoftConfig(max_new_tokens=9, **own).save(tmp_path)
    for name in ("beam", "discrete"):
        decoder = make_decoder(name + asked, model=str(tmp_path), device="cpu")
        with scripted(decoder.model, [10, 11, 12, 13, EOS]):
            assert decoder.decode(["<bos> w20"])[0].text == text


def test_an_opened_thought_hides_the_answer_until_it_ends(tiny):
    model, tokenizer = tiny
    where = dict(think_start="<think>", think_end="</think>")
    for prompt, words, answer in [
        ("<bos> <think>", [10, 11, EOS], ""),
        ("<bos> <think> w9 </think>", [10, 11, EOS], "w10 w11"),
        ("<bos>", [3, 10, END, 11, END, 12, EOS], "w11 </think> w12"),  # 3 is <think>
    ]:
        with scripted(model, words):
            beam = BeamDecoder(model, tokenizer, BeamOptions(9, 2, **where))
            assert beam.decode([prompt])[0].text == answer
        with scripted(model, words):
            hard = SoftConfig(mixer="hard", max_new_tokens=9, **where)
            assert SoftDecoder(model, tokenizer, hard).decode([prompt])[0].text == answer


@pytest.mark.parametrize("mixer", [m for m in softar.MIXERS if m != "hard"])
def test_soft_decoders_are_generate(mixer, tiny):
    model, tokenizer = tiny
    config = SoftConfig(mixer=mixer, budget=4, think_end="</think>", max_new_tokens=N)
    inputs = encode(tokenizer, PROMPTS)
    rng = torch.Generator().manual_seed(3)
    out = softar.generate(model, **inputs, config=config, rng=rng, tokenizer=tokenizer)
    found = SoftDecoder(model, tokenizer, config, seed=3).decode(PROMPTS)
    for row, (decoded, ids) in enumerate(zip(found, out.answers, strict=True)):
        real = out.record.kind[row] != Kind.PAD
        said = real & (out.record.kind[row] != Kind.LATENT)
        assert decoded.tokens == tuple(out.completions[row][said].tolist())
        assert decoded.text == tokenizer.decode(ids, skip_special_tokens=True)
        assert decoded.entropy == pytest.approx(
            float(out.record.entropy[row][real].mean()), abs=1e-5
        )
        assert decoded.num_forwards == int(real.sum()) <= out.num_forwards
        assert decoded.token_forwards == pytest.approx(out.token_forwards / 3)


def test_the_entropy_leaves_padding_out(tiny):
    """Three rows that end after 2, 3 and 8 steps, each step with the entropy of four equal
    tokens."""
    model, tokenizer = tiny

    def edit(step, logits):
        logits = torch.full_like(logits, -torch.inf)
        logits[:, 20:24] = 0.0
        for row, end in enumerate([1, 2, 7]):
            if step == end:
                logits[row, EOS] = 0.01
        return logits

    with edited_logits(model, edit):
        found = SoftDecoder(model, tokenizer, SoftConfig(mixer="hard")).decode(PROMPTS)
    assert [len(d.tokens) for d in found] == [2, 3, 8] and all(PAD not in d.tokens for d in found)
    assert [d.entropy for d in found] == pytest.approx(
        [
            (torch.tensor(4.0).log() * (n - 1) + torch.tensor(5.0).log()).item() / n
            for n in (2, 3, 8)
        ],
        abs=1e-3,
    )


def test_the_sum_of_the_evaluation_is_that_of_the_decoder():
    task = load_task("mnns")
    rows = task.test.select(range(40))
    decoder = make_decoder("mnns-soft-tiny=soft", max_new_tokens=6)
    found = evaluate(decoder.model, decoder.tokenizer, rows, task.score, decoder.config)
    decoded = decoder.decode(rows["prompt"])
    assert (
        found["accuracy"]
        == sum(task.score(d.text, row) for d, row in zip(decoded, rows)) / 40
        > 0.9
    )
    assert found["nfe"] == decoded[0].num_forwards
    assert found["token_forwards"] * 40 == pytest.approx(sum(d.token_forwards for d in decoded))


@pytest.mark.parametrize("mixer", softar.MIXERS)
def test_tokens_of_an_evaluation_are_those_that_decoders_return(mixer, tiny):
    """A step that reads a vector makes none."""
    model, tokenizer = tiny
    config = SoftConfig(mixer=mixer, budget=3, max_new_tokens=N)
    rows = Dataset.from_list([dict(prompt=prompt) for prompt in PROMPTS])
    found = evaluate(model, tokenizer, rows, lambda text, row: 1.0, config)
    decoder = SoftDecoder(model, tokenizer, config)
    decoder.rng = generators(range(len(PROMPTS)), 0)
    decoded = decoder.decode(PROMPTS)
    made = sum(len(d.tokens) for d in decoded)
    assert round(found["tokens_per_s"] * found["seconds"]) == made
    steps = sum(d.num_forwards for d in decoded)
    assert made == steps - (3 * len(PROMPTS) if mixer == "hidden" else 0)


@pytest.mark.parametrize("mixer", ["gumbel", "dirichlet", "hard"])
def test_the_draws_of_an_evaluation_are_each_rows_own(mixer, tiny):
    """Whatever the batch; rows of one prompt draw apart."""
    knobs = dict(mixer_args={"sample": True}) if mixer == "hard" else {}
    config = SoftConfig(mixer=mixer, budget=3, max_new_tokens=N, answer_temperature=1.0, **knobs)
    rows, found = Dataset.from_list([dict(prompt=prompt) for prompt in PROMPTS * 2]), []
    for n in (1, 2, 6):
        evaluate(*tiny, rows, lambda text, row: found.append(text) or 1.0, config, batch_size=n)
    assert found[:6] == found[6:12] == found[12:] and found[:3] != found[3:6]


def test_the_forwards_of_an_evaluation_are_each_rows_own():
    """Whatever the batch, in which a row waits for the longest."""
    rows = load_task("mnns").test.select(range(12))
    model, tokenizer = model_of(), tokenizer_of()
    ends = Dataset.from_list([{"prompt": f"<bos> w{5 + i}"} for i in range(12)])
    config = SoftConfig(mixer="hard", max_new_tokens=9)
    model.lm_head.weight.data[EOS] *= 4  # so that rows end early, and not together
    of_masks, words = load_diffusion("mnns-diffusion-tiny")
    how = dict(config=DenoiseConfig(threshold=0.9), gen_length=5)
    for batches in (
        [evaluate(model, tokenizer, ends, lambda *_: 1, config, batch_size=n) for n in (1, 5, 12)],
        [fill(of_masks, words, rows, lambda *_: 1, batch_size=n, **how) for n in (1, 5, 12)],
    ):
        alone, *others = [found["nfe"] for found in batches]
        assert others == pytest.approx([alone] * 2) and alone < batches[0]["token_forwards"]


@pytest.mark.parametrize("behind", [1, 4])
def test_the_text_of_a_prompt_with_holes_is_the_whole(filler, behind):
    """Beside others in a batch, of which it is what stands behind them."""
    decoder = DiffusionDecoder(*filler, DenoiseConfig(gen_length=behind, steps=2, soften="hard"))
    prompts = ["<bos> D4 D8 D1 <mask>", "<bos> D4 ->", "D1 <mask> D3 D3 D2 ->"]
    for prompt, answer in zip(prompts, decoder.decode(prompts), strict=True):
        words, given = answer.text.split(), prompt.removeprefix("<bos> ").split()
        holes = given.count("<mask>")
        assert len(words) <= behind + (len(given) if holes else 0)
        assert len(answer.tokens) <= behind + holes
        if holes:
            assert all(g in (w, "<mask>") for w, g in zip(words, given, strict=False)), words


def test_a_text_with_holes_holds_no_padding(filler):
    """Of a pad token that is a word, too, which tokenizers do not skip as a special one."""
    model, tokenizer = filler[0], copy.deepcopy(filler[1])
    tokenizer.pad_token = "S9"
    assert tokenizer.decode(tokenizer.pad_token_id, skip_special_tokens=True) == "S9"
    decoder = DiffusionDecoder(model, tokenizer, DenoiseConfig(gen_length=0, soften="hard"))
    first, _ = decoder.decode(["<bos> D4 <mask> <eos>", "<bos> D1 <mask> D3 D3 D2 -> <eos>"])
    assert first.text.startswith("D4 ")


@pytest.mark.parametrize("name", ["discrete", "soft", "beam", *DIFFUSION])
def test_a_row_of_a_batch_is_the_row_alone(name, tiny, filler):
    if name in DIFFUSION:
        config = DenoiseConfig(gen_length=6, steps=3, soften=name)
        decoder, prompts = DiffusionDecoder(*filler, config), [*MNNS, "<bos> D1 D2 ->"]
    elif name == "beam":
        decoder, prompts = BeamDecoder(*tiny, BeamOptions(N, 3)), PROMPTS
    else:  # in a net as wide as the others' mixtures amplify rounding until tokens part
        decoder = SoftDecoder(
            model_of(initializer_range=0.2),
            tokenizer_of(),
            SoftConfig(mixer="hard" if name == "discrete" else "soft", max_new_tokens=N),
        )
        prompts = PROMPTS
    together, alone = decoder.decode(prompts), [decoder.decode([prompt])[0] for prompt in prompts]
    assert len(set(answers(together))) == len(prompts)
    assert answers(together) == answers(alone)
    for one, other in zip(together, alone, strict=True):
        assert one.entropy == (
            None if other.entropy is None else pytest.approx(other.entropy, abs=1e-4)
        )


def test_seconds_are_those_of_the_call(tiny):
    for decoder in (
        SoftDecoder(*tiny, SoftConfig(max_new_tokens=40)),
        BeamDecoder(*tiny, BeamOptions(40, 2)),
    ):
        started = time.perf_counter()
        found = decoder.decode(PROMPTS)
        whole = time.perf_counter() - started
        assert len({d.seconds for d in found}) == 1
        assert 0.8 * whole < sum(d.seconds for d in found) <= whole


# -- votes


def vote(text, n):
    return Decoded(text, (n,), 2.0, 10.0 + n, 0.5, entropy=float(n))


def test_the_commonest_answer_wins_at_the_cost_of_all():
    votes = [vote("a", 1), vote(" b", 2), vote("c", 3), vote("b\n", 4)]
    winner, share = elect(votes, lambda text: text.strip())
    assert winner == Decoded(" b", (2,), 8.0, 50.0, 2.0, entropy=2.5) and share == 0.5
    assert elect(votes, lambda text: text)[0].text == "a"  # all different: the first seen
    assert elect([vote("x", 1), vote("y", 2), vote("y", 3), vote("x", 4)], str)[0].tokens == (1,)
    assert elect([Decoded("x", (), 1, 1, 1)] * 2, str)[0].entropy is None


class Told:
    """A decoder that gives these texts in turn."""

    name, columns = "told", {"decoder": "told", "model": "m", "setting": "s", "family": "f"}

    def __init__(self, texts):
        self.texts, self.batches = iter(texts), []

    def decode(self, prompts):
        self.batches.append(list(prompts))
        return [vote(next(self.texts), n) for n in range(len(prompts))]


def test_votes_of_a_prompt_are_of_one_batch():
    decoder = Told(["so 1", "2", " so  1", "3", "3", "x 3"])
    found = SelfConsistency(decoder, 3)
    assert found.name == "self-consistency votes=3"
    assert found.columns == {
        "decoder": "self-consistency",
        "model": "m",
        "setting": "votes=3",
        "family": "f",
    }
    assert [d.text for d in found.decode(["p", "q"])] == ["so 1", "3"]
    assert decoder.batches == [["p", "p", "p", "q", "q", "q"]]
    assert found.agreement == pytest.approx([2 / 3, 2 / 3])
    pattern = SelfConsistency(
        Told(["3 or 4", "3 or 5", "so 4.", "none", "7", "none"]), 3, last_match(r"\d")
    )
    assert [d.text for d in pattern.decode(["p", "q"])] == ["3 or 4", "none"] and pattern.agreement[
        0
    ] == 2 / 3


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from(["", "a", "b", "c"]), min_size=1, max_size=9))
def test_the_commonest_answer_wins_and_an_empty_one_never_over_another(ballots):
    first, share = commonest(ballots)
    best = ballots[first]
    most = max(Counter(filter(None, ballots)).values(), default=len(ballots))
    assert ballots.index(best) == first and ballots.count(best) == most
    assert share == most / len(ballots) and (best or not any(ballots))
    before = [ballots.index(text) for text in {*ballots} if text and ballots.count(text) == most]
    assert not best or first == min(before)


THOUGHTS = ["Let me see, 17. So 3", "17? No: 4", "I say 4", "Perhaps 17, but 4", "17 it is not: 3"]


@pytest.mark.parametrize("option, wins", [("", THOUGHTS[1]), (",pattern=1.", THOUGHTS[0])])
def test_votes_are_on_what_the_task_reads(tmp_path, option, wins):
    """However the thoughts before it differ; a pattern of the user's comes first."""
    (tmp_path / "rows.jsonl").write_text('{"prompt": "p", "answer": "4"}')
    extract = load_task(f"{tmp_path}/rows.jsonl:score=number").extract
    spec = f"mnns-tiny=self-consistency:votes=5{option}"
    decoder = make_decoder(spec, max_new_tokens=4, extract=extract)
    votes = [vote(text, 1) for text in THOUGHTS]
    assert elect(votes, decoder.normalise)[0].text == wins
    whole = make_decoder("mnns-tiny=self-consistency:votes=5", max_new_tokens=4)
    assert elect(votes, whole.normalise)[1] == 1 / 5
    vllm = make_decoder(
        f"mnns-tiny=vllm-self-consistency:votes=5{option}", max_new_tokens=4, extract=extract
    )
    completions = [Completion(text, (), None) for text in THOUGHTS]
    (row,) = vllm.rows(["p"], [[1]], [completions], 0.0)
    assert row.text == wins


def test_a_text_that_the_task_cannot_read_is_no_vote():
    texts = ["none", "no", "none", "x 3"]
    assert (
        elect([vote(t, 1) for t in texts], reader(None, lambda t: str(int(t[-1]))))[0].text == "x 3"
    )
    assert reader(None, str.strip)(" a  b ") == "a b"


def test_self_consistency_counts_all_votes(tiny):
    model, tokenizer = tiny
    config = SoftConfig(mixer="hard", mixer_args={"sample": True}, max_new_tokens=2, top_k=3)
    each = SoftDecoder(model, tokenizer, config, seed=7).decode(
        [p for p in PROMPTS for _ in range(6)]
    )
    with counted(model) as calls:
        decoder = SelfConsistency(SoftDecoder(model, tokenizer, config, seed=7), 6)
        found = decoder.decode(PROMPTS)
    assert len(calls) == 2 and calls[0][0] == 18
    assert sum(d.token_forwards for d in found) == pytest.approx(
        sum(rows * columns for rows, columns in calls)
    )
    assert [d.num_forwards for d in found] == [12.0] * 3
    for row, share, group in zip(
        found, decoder.agreement, [each[:6], each[6:12], each[12:]], strict=True
    ):
        counts = Counter(d.text for d in group)
        assert counts[row.text] == max(counts.values()) == round(share * 6) and row.seconds > 0


def test_what_is_drawn(tiny):
    config = SoftConfig(mixer="gumbel", temperature=2.0, max_new_tokens=N)

    def decoder(seed):
        return SoftDecoder(*tiny, config, seed=seed)

    one = decoder(0)
    first, second = answers(one.decode(PROMPTS)), answers(one.decode(PROMPTS))
    assert first != second and first == answers(decoder(0).decode(PROMPTS)) != answers(
        decoder(1).decode(PROMPTS)
    )
    hot = DenoiseConfig(gen_length=8, temperature=2.0)
    model, tokenizer = load_diffusion("mnns-diffusion-tiny")
    one, other = (DiffusionDecoder(model, tokenizer, hot, seed=1) for _ in range(2))
    first = answers(one.decode(MNNS))
    assert first == answers(other.decode(MNNS)) != answers(one.decode(MNNS))
    for c, draws in [
        (SoftConfig(mixer="hard"), False),
        (SoftConfig(), False),
        (SoftConfig(mixer="hard", budget=1), False),
        (SoftConfig(budget=1, answer_temperature=1.0), True),
        (SoftConfig(temperature=0.0), False),
        (SoftConfig(mixer="hard", mixer_args={"sample": True}), True),
    ]:
        assert SoftDecoder(*tiny, c).draws == draws, c


# -- diffusion


@pytest.mark.parametrize("soften", DIFFUSION)
def test_diffusion_decoders_are_denoise(soften, filler):
    model, tokenizer = filler
    config = DenoiseConfig(gen_length=6, steps=3, soften=soften, temperature=0.5)
    prompts = [*MNNS, "<bos> D1 <mask> ->"]
    out = denoise(
        model, **encode(tokenizer, prompts), config=config, rng=torch.Generator().manual_seed(2)
    )
    found = DiffusionDecoder(model, tokenizer, config, seed=2).decode(prompts)
    width = out.prompt_length
    for row, (decoded, ids) in enumerate(zip(found, out.sequences.tolist(), strict=True)):
        end = ids.index(2, width) if 2 in ids[width:] else len(ids)
        begin = 0 if row == 3 else width
        assert decoded.text == tokenizer.decode(ids[begin:end], skip_special_tokens=True)
        inside = [ids[width - 2]] if row == 3 else []  # the mask in the prompt
        assert decoded.tokens == tuple(inside + ids[width : end + 1])
        assert decoded.num_forwards == out.row_forwards[row] <= out.num_forwards
        assert 0 < decoded.entropy < math.log(model.config.vocab_size)
    assert sum(d.token_forwards for d in found) == pytest.approx(out.token_forwards)


def test_what_stands_behind_an_end_token_is_no_answer(filler):
    model, tokenizer = filler
    head = model.lm_head

    def fixed(module, args, output):
        """Columns of a canvas of 11, in their order: S0 S1 <eos> S2 S3."""
        words = [tokenizer.convert_tokens_to_ids(w) for w in ("S0", "S1", "<eos>", "S2", "S3")]
        return output * 0 + 50.0 * torch.nn.functional.one_hot(
            torch.tensor(words[-len(output) :]), output.shape[-1]
        )

    handle = head.register_forward_hook(fixed)
    try:
        decoder = DiffusionDecoder(
            model, tokenizer, DenoiseConfig(gen_length=5, steps=1, soften="hard")
        )
        (row,) = decoder.decode(MNNS[:1])
        assert row.text == "S0 S1" and row.tokens[-1] == 2 and len(row.tokens) == 3
        without = DenoiseConfig(gen_length=5, steps=1, soften="hard", end_ids=())
        (row,) = DiffusionDecoder(model, tokenizer, without).decode(MNNS[:1])
        assert row.text == "S0 S1 S2 S3" and len(row.tokens) == 5
    finally:
        handle.remove()


def test_templates_are_filled(filler):
    template = "<bos> D1 D2 D3 D4 -> S1 <mask> <mask> S2"
    decoder = make_decoder("soft-mask", model="mnns-diffusion-tiny", max_new_tokens=0)
    found = decoder.decode([template, "<bos> D1 D2 <mask>"])
    assert found[0].text.startswith("D1 D2 D3 D4 -> S1") and found[0].text.endswith("S2")
    assert len(found[0].tokens) == 2 and len(found[1].tokens) == 1 and "mask" not in found[0].text
    with pytest.raises(
        ValueError, match=r"prompt 1 holds no <mask> .*max_new_tokens >= 1, or templates"
    ):
        decoder.decode([template, "<bos> D1"])


# -- what goes in


def test_chats_are_read_by_the_template(tiny, filler):
    template = "{{ bos_token }}{% for m in messages %} {{ m['content'] }}{% endfor %}"
    chats = [[{"role": "user", "content": p.removeprefix("<bos> ")}] for p in PROMPTS]
    model, tokenizer = tiny[0], tokenizer_of()
    tokenizer.chat_template = template
    for make in (
        lambda: SoftDecoder(model, tokenizer, SoftConfig()),
        lambda: BeamDecoder(model, tokenizer, BeamOptions(N, 2)),
    ):
        assert answers(make().decode(chats)) == answers(make().decode(PROMPTS))


def test_templates_hear_what_the_columns_of_a_row_say(tiny):
    """As they do in training, in every way of answering rows."""
    template = "{{ bos_token }}{% for t in tools or [] %} {{ t.name }}{% endfor %}{% if more %} {{ more }}{% endif %}"
    model, tokenizer = tiny[0], tokenizer_of()
    tokenizer.chat_template = template + "{% for m in messages %} {{ m['content'] }}{% endfor %}"
    tools = [{"name": "D4"}, {"name": "D8"}]
    said = [
        {"tools": tools, "chat_template_kwargs": {"more": "D3"}},
        {"tools": json.dumps(tools), "chat_template_kwargs": None},
        {"tools": None, "chat_template_kwargs": {"more": "D1"}},
        {},
    ]
    heard = ["D4 D8 D3 ", "D4 D8 ", "D1 ", ""]
    rows = [{"prompt": [{"role": "user", "content": "D5"}]} | columns for columns in said]
    texts = [{"prompt": f"<bos> {more}D5"} for more in heard]
    decoders = [
        SoftDecoder(model, tokenizer, SoftConfig(max_new_tokens=N)),
        BeamDecoder(model, tokenizer, BeamOptions(N, 2)),
    ]
    for decoder in decoders:
        found = [
            [
                answer.text
                for answer in compare({"a": decoder}, some, lambda *_: 1.0).passes["a"][0].answers
            ]
            for some in (rows, texts)
        ]
        assert found[0] == found[1] and len({*found[0]}) > 1
    for row, text in zip(rows, texts, strict=True):
        assert token_ids(tokenizer, prompt_of(row)) == token_ids(tokenizer, text["prompt"])


def test_models_are_in_eval_mode_meanwhile():
    tokenizer = tokenizer_of()
    model = model_of(attention_dropout=0.5)
    expected = answers(SoftDecoder(model, tokenizer, SoftConfig(max_new_tokens=N)).decode(PROMPTS))
    beams = answers(BeamDecoder(model, tokenizer, BeamOptions(N, 2)).decode(PROMPTS))
    model.train()
    assert (
        answers(SoftDecoder(model, tokenizer, SoftConfig(max_new_tokens=N)).decode(PROMPTS))
        == expected
    )
    assert answers(BeamDecoder(model, tokenizer, BeamOptions(N, 2)).decode(PROMPTS)) == beams
    assert model.training
    model.eval()
    SoftDecoder(model, tokenizer, SoftConfig(max_new_tokens=2)).decode(PROMPTS)
    assert not model.training


def test_adapters_decode():
    tokenizer, model = tokenizer_of(), with_lora(model_of())
    plain = BeamDecoder(model_of(), tokenizer, BeamOptions(N, 2)).decode(PROMPTS)
    found = BeamDecoder(model, tokenizer, BeamOptions(N, 2)).decode(PROMPTS)
    assert answers(found) != answers(plain) and found[0].num_forwards == plain[0].num_forwards
    assert SoftDecoder(model, tokenizer, SoftConfig()).decode(PROMPTS)[0].num_forwards > 1


@pytest.mark.parametrize(
    "spec",
    [
        "mnns-soft-tiny=soft",
        "mnns-soft-tiny=beam",
        "mnns-soft-tiny=self-consistency",
        "mnns-diffusion-tiny=soft-mask",
    ],
)
def test_traces(spec):
    decoder = make_decoder(spec, max_new_tokens=5, trace=True)
    for prompt, row in zip(MNNS, decoder.decode(MNNS), strict=True):
        if row.trace.family == "diffusion":
            assert (
                row.trace.title == decoder.name.partition("=")[2] or row.trace.title == decoder.name
            )
            assert len(row.trace.forwards) == row.num_forwards
            continue
        words = [step.token for step in row.trace.steps]
        assert words == [decoder_tokenizer(decoder).decode([t]) for t in row.tokens]
        assert (
            row.trace.answer_start == 3
            and "D" in row.trace.prompt
            and prompt.split()[1] in row.trace.prompt
        )
        kinds = [step.kind for step in row.trace.steps]
        assert kinds[:3] == ["soft" if "=soft" in spec else "hard"] * 3


def test_a_canvas_is_made_outside_the_clock(monkeypatch):
    """Turning what was seen into text takes longer here than to decode, and is no part of the
    seconds."""
    from softar.show.trace import Words

    slept, mixtures = [], Words.mixtures

    def slow(self, *rest):
        slept.append(0.05)
        time.sleep(slept[-1])
        return mixtures(self, *rest)

    monkeypatch.setattr(Words, "mixtures", slow)
    decoder = make_decoder("mnns-diffusion-tiny=soft-mask", max_new_tokens=5, trace=True)
    began = time.perf_counter()
    (found,) = decoder.decode(["<bos> D4 D8 D1 D3 ->"])
    whole = time.perf_counter() - began
    assert len(slept) >= 4 and any(forward.soft for forward in found.trace.forwards)
    assert found.seconds < whole - sum(slept)


def test_a_trace_begins_with_the_prompt_alone(tiny):
    for decoder in (
        SoftDecoder(*tiny, SoftConfig(), trace=True),
        BeamDecoder(*tiny, BeamOptions(N, 2), trace=True),
    ):
        assert [d.trace.prompt for d in decoder.decode(PROMPTS)] == PROMPTS


def test_a_uniform_state_model_says_at_once_what_does_not_go():
    model, tokenizer = load_diffusion("mnns-diffusion-tiny", seed=0)
    assert DiffusionDecoder(model, tokenizer, DenoiseConfig()).columns["training"] == "hard"
    model.config.diffusion_process = {
        "kind": "uniform",
        "eps": 0.001,
        "left_out": [tokenizer.mask_token_id],
    }
    with pytest.raises(ValueError, match="soften='slerp' does not go with a uniform-state model"):
        DiffusionDecoder(model, tokenizer, DenoiseConfig(soften="slerp"))
    decoder = DiffusionDecoder(model, tokenizer, DenoiseConfig(gen_length=4, steps=3))
    assert decoder.columns["training"] == "duo" and decoder.name == "hard"
    assert decoder.decode(MNNS)[0].num_forwards == 3


def decoder_tokenizer(decoder):
    return (decoder.decoder if isinstance(decoder, SelfConsistency) else decoder).tokenizer


# -- what is wrong


@pytest.mark.parametrize(
    "spec, message",
    [
        ("sofft", "decoder 'sofft' is unknown, did you mean 'soft'?: choose one of ['discrete', "),
        ("mnns-tiny=greedy", "decoder 'greedy' is unknown: it is 'discrete', or on vLLM"),
        ("mnns-tiny=qqq:tau=1", "decoder 'qqq' is unknown: choose one of ["),
        ("=soft", "'=soft' begins with '='"),
        ("soft", "'soft' names no model: write MODEL=soft, or pass model="),
        ("mnns-tiny=soft:a", "option 'a' has no form key=value"),
        ("mnns-tiny=soft:budget=1,budget=2", "option 'budget' is given twice"),
        ("mnns-tiny=soft:banned=[1,x]", "option 'x]' has no form key=value; text with commas"),
        (
            "mnns-tiny=gumbel:tua=1",
            "decoder 'gumbel' takes no 'tua', did you mean 'tau'?: it takes ['answer_min_p', ",
        ),
        ("mnns-tiny=soft:tau=1", "decoder 'soft' takes no 'tau'"),
        ("mnns-tiny=gumbel:mixer=soft", "decoder 'gumbel' takes no 'mixer'"),
        ("mnns-tiny=soft:mixer=gumbl", "mixer='gumbl' is unknown, did you mean 'gumbel'"),
        ("mnns-tiny=discrete:softness=0.5", "decoder 'discrete' takes no 'softness'"),
        ("mnns-tiny=soft:top_k=2.5", "decoder 'soft': top_k=2.5 must be a whole number or null"),
        ("mnns-tiny=soft:top_k=true", "decoder 'soft': top_k=True must be a whole number or null"),
        ("mnns-tiny=soft:temperature=hot", "decoder 'soft': temperature='hot' must be a number"),
        (
            'mnns-tiny=soft:banned=["x"]',
            "decoder 'soft': banned=('x',) must be a list of whole numbers",
        ),
        ("mnns-tiny=gumbel:mixer_args=1", "decoder 'gumbel': mixer_args=1 must be an object"),
        ("mnns-tiny=gumbel:tau=-1", "tau=-1 must be > 0"),
        ("mnns-tiny=gumbel:tau=x", "mixer='gumbel' does not take {'tau': 'x'}"),
        ("mnns-tiny=soft:max_new_tokens=0", "max_new_tokens=0 must be at least 1"),
        ("mnns-tiny=beam:max_new_tokens=0", "max_new_tokens=0 must be at least 1"),
        (
            "mnns-tiny=beam:num_beams=1",
            "num_beams=1 must be at least 2; decoder 'discrete' is greedy",
        ),
        ("mnns-tiny=beam:tau=1", "decoder 'beam' takes no 'tau'"),
        (
            "mnns-tiny=beam:early_stopping=x",
            "early_stopping='x' is unknown: give true, false or 'never'",
        ),
        ("mnns-tiny=self-consistency:votes=1", "votes=1 must be at least 2"),
        ("mnns-tiny=self-consistency:votes=x", "votes='x' must be a whole number"),
        (
            "mnns-tiny=self-consistency:of=soft",
            "of='soft' is not a decoder that draws: choose one of ['sampled', ",
        ),
        (
            "mnns-tiny=self-consistency:tau=1",
            "self-consistency of 'sampled': decoder 'sampled' takes no 'tau'",
        ),
        (
            "mnns-tiny=self-consistency:temperature=0",
            "mixer_args={'sample': True} does nothing at temperature=0",
        ),
        ("mnns-tiny=self-consistency:pattern=(", "pattern='(' is no regular expression"),
        ("mnns-tiny=soft:think_end=</x>", "think_end='</x>' is not in the tokenizer's vocabulary"),
        ("mnns-tiny=beam:think_end=</x>", "think_end='</x>' is not in the tokenizer's vocabulary"),
        ("mnns-tiny=soft:seed=x", "decoder 'soft': seed='x' must be a whole number"),
        ("mnns-tiny=soft:dtype=int", "dtype='int' is unknown"),
        (
            "mnns-diffusion-tiny=soft",
            "model='mnns-diffusion-tiny' is a masked-diffusion model, and decoder 'soft' needs "
            "an autoregressive model: give another model, or one of its decoders (softar "
            "compare --help lists them)",
        ),
        (
            "mnns-tiny=hard",
            "model='mnns-tiny' is an autoregressive model, and decoder 'hard' needs a masked-diffusion "
            "model: give another model, or one of its decoders (softar compare --help",
        ),
        (
            "mnns-diffusion-tiny=beam",
            "is a masked-diffusion model, and decoder 'beam' needs an autoregressive model",
        ),
        ("mnns-diffusion-tiny=hard:k=3", "decoder 'hard' takes no 'k'"),
        (
            "mnns-diffusion-tiny=soft-token:k=0",
            "soften_args k=0 must be a whole number, at least 1",
        ),
        ("mnns-diffusion-tiny=hard:soften=slerp", "decoder 'hard' takes no 'soften'"),
        (
            "mnns-diffusion-tiny=hard:steps=many",
            "decoder 'hard': steps='many' must be a whole number or null",
        ),
        ("mnns-diffusion-tiny=hard:max_new_tokens=-1", "gen_length=-1 must be at least 0"),
        ("./nowhere=soft", "model='./nowhere' could not be loaded: there is no such folder"),
        ("./nowhere=hard", "model='./nowhere' could not be loaded: there is no such folder"),
        ("no/where/at-all=soft", "model='no/where/at-all' could not be loaded"),
    ],
)
def test_what_is_wrong_is_named_in_one_line(spec, message):
    with pytest.raises(ValueError) as caught:
        make_decoder(spec, max_new_tokens=4)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_prompts_that_cannot_be_read(tiny):
    decoder = SoftDecoder(*softar.load("mnns-tiny"), SoftConfig())
    for prompts, message in [
        ("<bos>", "must be a list, of texts or of chats"),
        (["<bos>", [{"role": "user", "content": "x"}]], "one kind"),
        (["<bos> hello"], "the tokenizer cannot read the prompts"),
        (
            [[{"role": "user", "content": "x"}]],
            "the tokenizer cannot read the prompts: .*chat_template",
        ),
        (["<bos> D1", ""], "rows .1. an empty prompt"),
    ]:
        with pytest.raises(ValueError, match=message) as caught:
            decoder.decode(prompts)
        assert "\n" not in str(caught.value)


def test_models_of_the_other_kind(tiny, filler, tmp_path):
    with pytest.raises(
        ValueError, match="LladaForMaskedDiffusion is a masked-diffusion model, and decoder 'soft'"
    ):
        SoftDecoder(*filler, SoftConfig())
    with pytest.raises(
        ValueError, match="LladaForMaskedDiffusion is a masked-diffusion model, and decoder 'beam'"
    ):
        BeamDecoder(*filler, BeamOptions(4, 2))
    for model in (tiny[0], with_lora(model_of())):
        with pytest.raises(
            ValueError,
            match="LlamaForCausalLM is an autoregressive model, and decoder 'hard' needs",
        ):
            DiffusionDecoder(model, tiny[1], DenoiseConfig())
    with pytest.raises(ValueError, match="votes=1"):
        SelfConsistency(Told([]), 1)
    for folder, model in (
        ("llama", tiny[0]),
        ("llada", filler[0]),
        (
            "bert",
            BertForMaskedLM(
                BertConfig(
                    vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2
                )
            ),
        ),
    ):
        model.save_pretrained(tmp_path / folder)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(
        json.dumps({"base_model_name_or_path": str(tmp_path / "bert")})
    )
    names = ("llama", "llada", "bert", "adapter", "none")
    kinds = {name: describe(str(tmp_path / name)).kind for name in names}
    diffusion, autoregressive = "diffusion", "autoregressive"
    assert kinds == dict(
        llama=autoregressive, llada=diffusion, bert=diffusion, adapter=diffusion, none=None
    )
    assert describe("x/y.gguf").kind == describe("mnns-soft-tiny").kind == autoregressive
    assert describe("latin-diffusion-tiny").kind == diffusion
    assert describe("owner/unknown") == Card("owner/unknown", None, None, None)
    with pytest.raises(
        ValueError, match=r"bert' is a masked-diffusion model, and decoder 'gumbel'"
    ):
        make_decoder("gumbel", model=str(tmp_path / "bert"), max_new_tokens=4)
    with pytest.raises(ValueError, match="holds no tokenizer, so there is no text to decode"):
        make_decoder("hard", model=str(tmp_path / "llada"), max_new_tokens=4)
