"""Fields of a configuration as keywords beside it, and signatures that say so."""

import dataclasses
import inspect
import subprocess
import sys

import pytest
import torch
from transformers import PreTrainedModel

import softar
import softar.vllm
from softar.cli import commands
from softar.defaults import own_config
from softar.diffusion import DenoiseConfig, denoise
from softar.diffusion import load as load_diffusion

PROMPT = "<bos> D4 D8 D1 D3 ->"


@pytest.fixture(scope="module", params=["generate", "denoise"])
def loop(request):
    """A loop, what it needs, its configuration, settings that matter and others over them."""
    if request.param == "generate":
        model, tokenizer = softar.load("mnns-soft-tiny")
        few = dict(mixer="hard", max_new_tokens=3)
        more = dict(mixer="k-samples", mixer_args={"k": 2}, max_new_tokens=5)
        return softar.generate, (model, tokenizer), softar.SoftConfig, few, more
    model, tokenizer = load_diffusion("mnns-diffusion-tiny")
    few = dict(gen_length=3, steps=3)
    more = dict(gen_length=4, steps=2, soften="soft-token", soften_args={"k": 3})
    return denoise, (model, tokenizer), DenoiseConfig, few, more


def run(loop, inputs, **kwargs):
    return loop[0](loop[1][0], **inputs, rng=torch.Generator().manual_seed(0), **kwargs)


def test_keywords_are_fields_and_override_the_configuration(loop):
    _, (_, tokenizer), Config, few, more = loop
    inputs = tokenizer([PROMPT], return_tensors="pt")
    inputs.pop("token_type_ids", None)
    # where there is no configuration they override the model's own
    default = own.changed if (own := own_config(loop[1][0].name_or_path)) else Config
    for base, config in (
        ({}, default(**few | more)),
        ({"config": Config(**few)}, Config(**few | more)),
    ):
        expected = run(loop, inputs, config=config)
        out = run(loop, inputs, **base, **(more if base else few | more))
        assert torch.equal(out.sequences, expected.sequences)
        assert out.num_forwards == expected.num_forwards
    plain = run(loop, inputs, config=default(**few))
    assert torch.equal(run(loop, inputs, **few).sequences, plain.sequences)
    assert plain.sequences.shape != expected.sequences.shape


def test_a_wrong_keyword_is_named(loop):
    function, (_, tokenizer), Config, few, more = loop
    inputs = tokenizer([PROMPT], return_tensors="pt")
    name = next(iter(more))
    for kwargs, error, match in (
        ({f"{name}s": 1}, TypeError, rf"'{name}s', did you mean '{name}'.*{Config.__name__}"),
        ({"callbak": 1}, TypeError, "'callbak', did you mean 'callback'"),
        ({"do_sample": True}, TypeError, rf"{function.__name__}\(\) got .* 'do_sample'"),
        ({"temperature": -1.0}, ValueError, "temperature"),
    ):
        with pytest.raises(error, match=match):
            run(loop, inputs, **few, **kwargs)


def test_token_types_of_one_segment_are_dropped(loop):
    _, (_, tokenizer), _, few, _ = loop
    inputs = dict(tokenizer([PROMPT], return_tensors="pt"))
    types = torch.zeros_like(inputs["input_ids"])
    plain = run(loop, inputs, **few)
    out = run(loop, inputs | {"token_type_ids": types}, **few)
    assert torch.equal(out.sequences, plain.sequences)
    types[0, -1] = 1
    with pytest.raises(ValueError, match="token_type_ids holds a second segment"):
        run(loop, inputs | {"token_type_ids": types}, **few)


def test_signatures_name_every_field_once(loop):
    function, _, Config, _, _ = loop
    parameters = inspect.signature(function).parameters
    fields = {field.name for field in dataclasses.fields(Config)}
    assert fields <= parameters.keys() and "kwargs" not in parameters
    assert all(parameters[name].kind is inspect.Parameter.KEYWORD_ONLY for name in fields)
    # what is a field is not an argument of the loop: neither would hide the other
    code = inspect.unwrap(function).__code__
    assert not fields & {*code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]}


@pytest.mark.parametrize("load", [softar.load, load_diffusion])
def test_load_names_what_from_pretrained_takes(load):
    parameters = inspect.signature(load).parameters
    theirs = inspect.signature(PreTrainedModel.from_pretrained).parameters
    assert {"revision", "token", "cache_dir", "local_files_only"} <= parameters.keys() & theirs
    assert not {"use_safetensors", "weights_only"} & parameters.keys()  # which raise
    assert parameters["revision"].default == theirs["revision"].default
    assert parameters["dtype"].default == "auto" and "kwargs" in parameters


def test_weights_are_taken_as_stored_unless_asked_for(tmp_path):
    model, tokenizer = softar.load("mnns-tiny", dtype="float64")
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path)
    for asked, dtype in (({}, torch.float64), ({"dtype": "float32"}, torch.float32)):
        for name in ("soft", "discrete", "beam"):
            decoder = softar.make_decoder(name, model=str(tmp_path), max_new_tokens=2, **asked)
            assert decoder.model.dtype == dtype
    for function in (
        softar.make_decoder,
        softar.vllm.serve,
        softar.vllm.VLLMDecoder,
        commands.generate,
        commands.fill,
        commands.compare,
        commands.trace,
    ):
        assert inspect.signature(function).parameters["dtype"].default == "auto"


def test_softar_alone_imports_no_fastcore():
    code = "import sys, softar; dir(softar); assert not any('fastcore' in m for m in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
