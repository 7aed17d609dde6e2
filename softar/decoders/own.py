"""A decoder of your own by name: "module:function", or one of the entry points softar.decoders.

The function is called `function(model, *, max_new_tokens, seed, **options)`, the model's name or
None and what stands behind the colon of the spec, and returns a function `decode(prompts) ->
list[softar.Decoded]`, or an object with such a method.
"""

from collections.abc import Callable

from ..specs import format_options
from .answer import Decoded, Decoder, NamedDecoder, as_decoder
from .card import Card
from .options import Common

OWN = "own"  # family
GROUP = "softar.decoders"  # of entry points


class Named:
    """A decoder of yours with what tables say of it."""

    tokenizer = None  # its prompts are text as it stands

    def __init__(self, decoder: Decoder, *, name: str, columns: dict):
        self.decode, self.name, self.columns = decoder.decode, name, columns


def make_own(
    name: str, function: Callable, card: Card, common: Common, /, **options
) -> NamedDecoder:
    """Raises ValueError where the function gives no decoder, or does not take the options."""
    if not callable(function):
        raise ValueError(f"decoder {name!r} is a {type(function).__name__}, and no function")
    asked = dict(max_new_tokens=common.max_new_tokens, seed=common.seed)
    try:
        decoder = function(card.name or None, **asked, **options)
    except TypeError as error:
        raise ValueError(
            f"decoder {name!r} cannot be made ({error}): it is called function(model, *, "
            "max_new_tokens, seed, **options)"
        ) from error
    if isinstance(decoder, NamedDecoder):
        return decoder
    labels = common.labels(name, card.name, format_options(options, " "))
    labels["columns"] |= {"family": OWN, "model": card.name or None}
    try:
        return Named(as_decoder(decoder, name), **labels)
    except ValueError as error:
        raise ValueError(
            f"decoder {name!r} gave a {type(decoder).__name__}, which has no decode(prompts) -> "
            f"list[{Decoded.__name__}], and is no such function"
        ) from error
