"""Whatever is given for an option or an argument works, or is refused in a line that names it."""

import dataclasses
import functools
import math
import re

import numpy as np
import pytest
import torch
from tiny import END, THINK, model_of, seeded, tokenizer_of
from transformers import GenerationConfig, HfArgumentParser
from trl import GRPOConfig, SFTConfig

import softar
from softar import SoftConfig, SoftSFTConfig
from softar.checks import fits, kinds_of
from softar.diffusion import DenoiseConfig, denoise
from softar.diffusion import load as load_diffusion
from softar.diffusion.sft_config import DiffusionSFTConfig
from softar.rl import SoftGRPOConfig, SoftPPOConfig, SoftRLOOConfig


def nothing(*args, **kwargs):
    return None


def several():
    yield 1


VALUES = [
    None,
    *(True, False, 0, 1, -1, 2, 0.5, 2.5, math.nan, math.inf, -math.inf, 10**30, -(10**30), 1e308),
    *("", "x", b"x", (), (1, 2), (1.5,), [], [1], ["x"], [True], [[1]], {}, {"x": 1}, {1: [2]}),
    *({"tau": "x"}, {"eta": "x"}, {"eta": math.nan}, {1}, range(3), object(), nothing, several()),
    *(torch.tensor(3), torch.tensor([1]), np.int64(3), np.float32(0.5)),
]
PROMPT = torch.tensor([[1, 11, 12]])
TAGS = dict(think_start=THINK, think_end=END, budget=1, cold_stop_entropy=0.1)
NETS = {}


def nets():
    if not NETS:
        NETS[softar.generate] = model_of()
        NETS[denoise] = load_diffusion("mnns-diffusion-tiny", seed=0)[0]
    return NETS


def decode(loop, config, **fields):
    more = {"tokenizer": tokenizer_of()} if loop is softar.generate else {}
    loop(nets()[loop], PROMPT, config=config, rng=seeded(), **more, **fields)


def options(kind, base=None):
    """Names of the fields that are the user's, without those of a base that is not softar's."""
    others = () if base is None else [field.name for field in dataclasses.fields(base)]
    return [f.name for f in dataclasses.fields(kind) if f.repr and f.name not in others]


def works_or_is_named(name, value, run):
    """A dict of knobs may be refused in the name of the method that does not take them, a number in
    that of its schedule."""
    names = f"{name}|{name.removesuffix('_args')}=|'{name.replace('_', '-')}'"
    try:
        run()
    except FloatingPointError:  # a number at the end of its range
        assert abs(value) > 1e300
    except (ValueError, TypeError) as error:
        line = str(error)
        assert re.search(names, line) and "\n" not in line and len(line) < 400, (value, line)


DECODED = [
    (SoftConfig, softar.generate, dict(max_new_tokens=2, answer_temperature=1.0, top_p=0.9) | TAGS),
    (SoftConfig, softar.generate, dict(max_new_tokens=2, mixer="gumbel")),
    (DenoiseConfig, denoise, dict(gen_length=4, block_length=2, temperature=1.0)),
    (DenoiseConfig, denoise, dict(gen_length=4, steps=4, remask="cap")),
]


@pytest.mark.parametrize("value", VALUES, ids=lambda value: f"{value!r:.20}")
def test_a_field_of_a_decode(value):
    for kind, loop, base in DECODED:
        for name in options(kind):
            make = functools.partial(kind, **base | {name: value})
            works_or_is_named(name, value, make)
            config = kind(**base)
            works_or_is_named(name, value, functools.partial(decode, loop, config, **{name: value}))


TRAINED = [
    (SoftSFTConfig, SFTConfig, {}),
    (DiffusionSFTConfig, SFTConfig, {}),
    (SoftGRPOConfig, GRPOConfig, {}),
    (SoftRLOOConfig, GRPOConfig, {}),
    (SoftPPOConfig, GRPOConfig, {}),
]


@pytest.mark.parametrize(("kind", "base", "settings"), TRAINED)
def test_a_field_of_a_training(kind, base, settings, tmp_path):
    draft = kind(str(tmp_path), **settings)
    HfArgumentParser(kind)  # writes into the fields
    kinds = kinds_of(kind)
    for name in options(kind, base):
        for value in VALUES:
            if fits(value, kinds[name]):  # the others have tests of their own
                continue
            with pytest.raises(ValueError, match=name) as error:
                kind(str(tmp_path), **settings | {name: value})
            assert "\n" not in str(error.value) and len(str(error.value)) < 400
    assert draft == kind(str(tmp_path), **settings)


# no argument of any loop or loader
WRONG = [True, 2.5, b"x", [1], ["x"], (1.5,), {"x": 1}, object(), range(3), {1}, torch.tensor(3)]
COMMON = "model input_ids attention_mask config rng callback streamer"
LM, MASKS = SoftConfig(max_new_tokens=2), DenoiseConfig(gen_length=2)
ARGUMENTS = [
    (softar.generate, f"{COMMON} tokenizer logits_processor stopping_criteria generation_config"),
    (denoise, COMMON),
    (softar.load, "name dtype device seed"),
    (load_diffusion, "name dtype device seed"),
]


@pytest.mark.parametrize(("function", "names"), ARGUMENTS)
def test_an_argument(function, names):
    if function in nets():
        base = dict(model=nets()[function], input_ids=PROMPT)
        base["config"] = LM if function is softar.generate else MASKS
        wrong = [*WRONG, 7, "x", MASKS if function is softar.generate else LM]
    else:
        base, wrong = {"name": "mnns-tiny"}, WRONG
    for name in names.split():
        for value in [None] if name == "name" else [*wrong, -1] if name == "seed" else wrong:
            with pytest.raises((ValueError, TypeError), match=name) as error:
                function(**base | {name: value})
            assert "\n" not in str(error.value) and len(str(error.value)) < 400


@pytest.mark.parametrize("size", [0, -1, 2.5, "x", True])
def test_a_prompt_is_read_in_pieces_of_at_least_a_token(size):
    settings = GenerationConfig(prefill_chunk_size=size)
    with pytest.raises(ValueError, match=f"prefill_chunk_size={size!r} must be"):
        softar.generate(nets()[softar.generate], PROMPT, config=LM, generation_config=settings)


def test_what_a_configuration_takes_in_other_forms():
    same = DenoiseConfig(gen_length=2, end_ids=(3,))
    assert DenoiseConfig(gen_length=2, end_ids=3) == same == DenoiseConfig(2, end_ids=[3])
    model, called = nets()[denoise], []

    def note(ids, scores):
        called.append(1)
        return scores

    denoise(model, PROMPT, config={"gen_length": 2, "steps": 1}, logits_processor=(note, note))
    assert len(called) == 2
    lists = dict(logits_processor=(note,), stopping_criteria=(nothing_stops,))
    softar.generate(nets()[softar.generate], PROMPT, config=LM, **lists)
    assert len(called) == 4
    with pytest.raises(ValueError, match="config has no field 'gen_lenth', did you mean 'gen_le"):
        denoise(model, PROMPT, config={"gen_lenth": 2})


def nothing_stops(input_ids, scores):
    return torch.zeros(len(input_ids), dtype=torch.bool)


def rule(gives):
    """A schedule whose rule gives this."""

    class Rule:
        def more(self, index, left):
            return left

        def __call__(self, step):
            return gives

    return lambda block, config, draws: Rule()


MASK = torch.ones(1, 5, dtype=torch.bool)
OWN = [
    ("schedule", nothing, "gave a value of type NoneType: give a rule"),
    ("schedule", rule(None), r"gave a value of type NoneType: give \(commit"),
    ("schedule", rule((MASK, MASK[:, 1:])), "gave as drop a tensor of shape .1, 4., torch.bool"),
    ("schedule", rule((None, None)), "gave as commit a value of type NoneType: it is .1, 5. bool"),
    ("schedule", rule((MASK.float(), None)), "gave as commit a tensor of shape .*torch.float32"),
    ("select", nothing, "gave a value of type NoneType: give scores"),
    ("select", lambda belief, token, uniform: token[1:], "gave a tensor of shape"),
    ("soften", nothing, "gave a value of type NoneType: give softar.Soft"),
    ("soften", lambda s: softar.Soft(s.ids, s.ids), "gave ids of shape .*they are .n, K., int64"),
    ("soften", lambda s: softar.Soft(s.ids[:, None], MASK[0]), "gave ids: a tensor .*; weights"),
    ("soften", lambda s: softar.Soft(s.ids[:, None] + 99, s.share[:, None]), "gave the id 1"),
    ("logits_processor", nothing, "must return scores"),
]


@pytest.mark.parametrize(("name", "function", "told"), OWN)
def test_what_a_function_of_ones_own_gives(name, function, told):
    with pytest.raises(ValueError, match=f"{name}=<function .*{told}"):
        denoise(nets()[denoise], PROMPT, gen_length=2, **{name: function})


def test_a_mixer_without_a_signature_is_named():
    with pytest.raises(ValueError, match="mixer=<class 'int'> is no function of Python's"):
        SoftConfig(mixer=int)
