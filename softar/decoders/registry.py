"""Decoders by name: `make_decoder("mnns-soft-tiny=gumbel:tau=0.5,top_k=10", max_new_tokens=6)`.

A family is a module with a table DECODERS of factories, loaded when one of its names is asked for:
this module imports none of them.
"""

import functools
import re
from collections.abc import Callable
from importlib import import_module
from typing import NamedTuple

from ..checks import did_you_mean
from ..config import SoftConfig
from ..defaults import PLAIN_LENGTH
from ..mixers import MIXERS
from ..names import CODE, HINT, is_code, lookup, note_named, registered
from ..specs import parse_options
from .answer import Decoder
from .card import Card, describe, with_config
from .options import Common
from .own import GROUP, OWN, make_own

# Each has DECODERS: name -> factory(card, common, **options) -> Decoder; those of a kind of model
# also own_decoder(card, dtype, device, options) -> the name in DECODERS that the model is decoded by
# where nobody says how. And registered(name) -> the factory of a method that was added to its tables
FAMILIES = {
    "autoregressive": "softar.decoders.soft",
    "diffusion": "softar.diffusion.decoders",
    "vllm": "softar.vllm.decoders",
    "openai": "softar.decoders.openai",
}
ALONE = (OWN, "openai")  # whose decoders need not be told a model
LENGTHS = ("max_new_tokens", "gen_length")  # an option by two names: the second is diffusion's
# masks behind a prompt, of models made for so many
MASKS = {"mnns-diffusion-tiny": 5, "latin-block-tiny": 25}


class Spec(NamedTuple):
    """A decoder as it is asked for: `[MODEL=]DECODER[:key=value,key=value]`."""

    model: str | None
    decoder: str
    options: dict

    @property
    def family(self) -> str:
        """Of the decoder, a key of FAMILIES."""
        return find(self.decoder)[0]

    @property
    def prefix(self) -> str:
        """What the decoder's name begins with, where several models are compared."""
        return "" if self.model is None else f"{self.model}="


# Wide because each is what every decoder of a comparison shares
def make_decoder(
    spec: str,
    *,
    model: str | None = None,
    max_new_tokens: int | None = None,
    seed: int = 0,
    trace: bool = False,
    dtype: str = "auto",
    device: str | None = None,
    stop: tuple[str, ...] = (),
    extract: Callable[[str], str] | None = None,
) -> Decoder:
    """The decoder of a spec, `[MODEL=]NAME[:key=value,key=value]`.

    Args:
        spec: NAME is in the DECODERS of a family; the options are fields of its configuration
            (SoftConfig, DenoiseConfig, Sampling) and knobs of its mixer or softener. Options named
            as the arguments below override these. A model in the spec becomes part of the
            decoder's name.
        model: where the spec names none. Opened once for all decoders of a family.
        max_new_tokens: length of the completion; of diffusion the masks appended, 0 to fill
            templates. None: the model's default (default_length).
        seed: of what the decoder draws; it keeps its generator, so that a second call draws other
            numbers.
        trace: record each answer's steps, in Decoded.trace.
        dtype, device: as for softar.load.
        stop: strings at which an answer of softar's own autoregressive decoders ends early.
        extract: text -> what of it is the answer, "" for none; a Task's own. Decoders that vote,
            self-consistency and vllm-self-consistency, vote on it where no pattern= is given; None:
            on the whole text.

    Raises:
        ValueError: naming what is unknown or does not fit.
    """
    asked = parse_spec(spec)
    if asked.model is None and model is None and asked.family not in ALONE:
        raise ValueError(f"{spec!r} names no model: write MODEL={spec}, or pass model=")
    card = card_of(asked, model)
    length = default_length(card, asked.family) if max_new_tokens is None else max_new_tokens
    stops = tuple(stop)
    common = Common(length, seed, trace, dtype, device, stops, asked.prefix, extract)
    return build(asked.decoder, card, common, asked.options)


def default_length(card: Card, family: str) -> int | None:
    """Tokens that a decoder generates where nobody says how many: as many as the model's
    soft_config.json or think tags say (softar.defaults), which an autoregressive decoder finds out
    itself: None."""
    if family == "autoregressive":
        return None
    if family == "diffusion":
        return MASKS.get(card.name, PLAIN_LENGTH)
    if card.config is not None:
        return card.config.max_new_tokens
    return import_module(FAMILIES[family]).tagged_length(card) if family == "vllm" else PLAIN_LENGTH


def card_of(asked: Spec, model: str | None) -> Card:
    """Of the model of a spec, else of the other one; for the decoders of ALONE there need be none."""
    mixer = asked.options.get("mixer")
    note_named("mixer", mixer)  # before the model's file is read
    # vllm-soft decodes by the file's mixer, and whoever says soft of a model may well mean it
    if mixer is None and asked.decoder not in ("vllm-soft", "soft", "swi"):
        mixer = asked.decoder if asked.decoder in MIXERS else SoftConfig.mixer
    name = asked.model or model
    if name is None:
        return Card("", None, None, None)
    card = describe(name, mixer)
    return with_config(card) if asked.family in ("autoregressive", "vllm") else card


def build(decoder: str, card: Card, common: Common, options: dict) -> Decoder:
    """The decoder of that name on a model that is described already. Options named as fields of
    Common override it."""
    if {*LENGTHS} <= {*options}:
        said = " and ".join(f"{name}={options[name]}" for name in LENGTHS)
        raise ValueError(f"decoder {decoder!r}: {said} say the same: leave one out")
    common = common.overridden(decoder, options)
    others = {key: value for key, value in options.items() if key not in Common.OPTIONS}
    family, make = find(decoder)
    made = make(card, common, **others)
    if "seed" in options and family != OWN:  # tables tell it from the others'
        made.name += f" seed={common.seed}"
        made.columns = made.columns | {"seed": common.seed}
    return made


def own_decoder(card: Card, dtype: str, device: str | None, options: dict) -> str:
    """The decoder of a model where nobody says which. options: that it will be made with."""
    family = import_module(FAMILIES[card.kind or "autoregressive"])
    return family.own_decoder(card, dtype, device, options)


def parse_spec(spec: str) -> Spec:
    """Reads `[MODEL=]NAME[:key=value,key=value]`. A value is JSON where it is, else text up to the
    next comma; text with commas is a JSON string. A model may hold ":" and "=": the first NAME that
    is known counts. NAME may be "module:function" of your own (softar.decoders.own).

    Raises:
        ValueError: for a name that no family knows (the message lists them), or options that cannot
            be read.
    """
    starts = [-1, *(m.start() for m in re.finditer("=", spec))]
    for of_code in (False, True):  # softar's own names come first
        for at in starts:
            name, options = _split(spec[at + 1 :], of_code)
            if name is None or (not of_code and find(name) is None):
                continue
            if at == 0:
                raise ValueError(f"{spec!r} begins with '=': write MODEL={spec[1:]}")
            find(name)  # what cannot be imported is found now
            return Spec(spec[:at] if at > 0 else None, name, parse_options(options))
    asked = spec.partition(":")[0].rpartition("=")[2].strip()
    names = [name for family in FAMILIES for name in decoders_of(family)]
    if asked.lower() == "greedy":
        raise ValueError("decoder 'greedy' is unknown: it is 'discrete', or on vLLM 'vllm-greedy'")
    raise ValueError(
        f"decoder {asked!r} is unknown{did_you_mean(asked, names)}: choose one of {names}{HINT}"
    )


def _split(text: str, of_code: bool) -> tuple[str | None, str]:
    """NAME and its options, of a spec without its model; no name for a text that has none of the
    form asked for."""
    if not of_code:
        name, _, options = text.partition(":")
        return name.strip(), options
    match = re.match(rf"\s*({CODE.pattern})\s*(?::(.*))?$", text, re.DOTALL)
    return (match[1], match[4] or "") if match else (None, "")


def decoders_of(family: str) -> dict[str, Callable[..., Decoder]]:
    return import_module(FAMILIES[family]).DECODERS


def find(name: str) -> tuple[str, Callable[..., Decoder]] | None:
    """Family and factory of a decoder's name; None where no family knows it."""
    for family in FAMILIES:
        if name in (decoders := decoders_of(family)):
            return family, decoders[name]
    for family, module in FAMILIES.items():
        if (factory := import_module(module).registered(name)) is not None:
            return family, factory
    if is_code(name) or name in registered(GROUP):
        return OWN, functools.partial(make_own, name, lookup("decoder", name, {}, GROUP))
    return None
