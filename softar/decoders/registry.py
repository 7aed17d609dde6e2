"""Decoders by name: `make_decoder("mnns-soft-tiny=gumbel:tau=0.5,top_k=10", max_new_tokens=6)`.

A family is a module with a table DECODERS of factories, loaded when one of its names is asked for:
this module imports none of them.
"""

import dataclasses
import re
from collections.abc import Callable
from importlib import import_module

from ..checks import did_you_mean
from .answer import Decoder
from .options import check_options, parse_options

# Each has DECODERS: name -> factory(model, *, max_new_tokens, seed, trace, dtype, device,
# **options) -> Decoder
FAMILIES = {
    "autoregressive": "softar.decoders.soft",
    "diffusion": "softar.diffusion.decoders",
    "vllm": "softar.vllm.decoders",
}


@dataclasses.dataclass
class Common:
    """What every factory takes."""

    max_new_tokens: int
    seed: int
    trace: bool
    dtype: str
    device: str | None


def make_decoder(
    spec: str,
    *,
    model: str | None = None,
    max_new_tokens: int,
    seed: int = 0,
    trace: bool = False,
    dtype: str = "auto",
    device: str | None = None,
) -> Decoder:
    """The decoder of a spec, `[MODEL=]NAME[:key=value,key=value]`.

    Args:
        spec: NAME is in the DECODERS of a family; the options are fields of its configuration
            (SoftConfig, DenoiseConfig, Sampling) and knobs of its mixer or softener. Options named
            as the arguments below go before these. A model in the spec becomes part of the
            decoder's name.
        model: where the spec names none. Opened once for all decoders of a family.
        max_new_tokens: length of the completion; of diffusion the masks appended, 0 to fill
            templates.
        seed: of what the decoder draws; it keeps its generator, so that a second call draws other
            numbers.
        trace: keep what each answer was made of, in Decoded.trace.
        dtype, device: as for softar.load.

    Raises:
        ValueError: naming what is unknown or does not fit.
    """
    own, name, options = parse_spec(spec)
    if own is None and model is None:
        raise ValueError(f"{spec!r} names no model: write MODEL={spec}, or pass model=")
    common = dict(max_new_tokens=max_new_tokens, seed=seed, trace=trace, dtype=dtype, device=device)
    named = {key: options.pop(key) for key in common if key in options}
    common = check_options(Common, name, common | named)
    decoder = find(name)[1](own or model, **common, **options)
    if own is not None:
        decoder.name = f"{own}={decoder.name}"
    return decoder


def parse_spec(spec: str) -> tuple[str | None, str, dict]:
    """`[MODEL=]NAME[:key=value,key=value]` -> model, name, options. A value is JSON where it is,
    else text up to the next comma; text with commas is a JSON string. A model may hold ":" and "=":
    the first NAME that is known counts.

    Raises:
        ValueError: for a name that no family knows (the message lists them), or options that cannot
            be read.
    """
    starts = [-1, *(m.start() for m in re.finditer("=", spec))]
    for at in starts:
        name, _, options = spec[at + 1 :].partition(":")
        if find(name.strip()) is None:
            continue
        if at == 0:
            raise ValueError(f"{spec!r} begins with '=': write MODEL={spec[1:]}")
        return (spec[:at] if at > 0 else None), name.strip(), parse_options(options)
    asked = spec.partition(":")[0].rpartition("=")[2].strip()
    names = [name for family in FAMILIES for name in decoders_of(family)]
    raise ValueError(
        f"decoder {asked!r} is unknown{did_you_mean(asked, names)}: choose one of {names}"
    )


def decoders_of(family: str) -> dict[str, Callable[..., Decoder]]:
    return import_module(FAMILIES[family]).DECODERS


def find(name: str) -> tuple[str, Callable[..., Decoder]] | None:
    """Family and factory of a decoder's name; None where no family knows it."""
    for family in FAMILIES:
        if name in (known := decoders_of(family)):
            return family, known[name]
    return None
