"""What a decoder is and what it answers."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from ..show.trace import Canvas, Trace


@dataclass(frozen=True)
class Decoded:
    """One answer and what it cost."""

    # what the scorer reads: the answer, special tokens stripped; of a template the whole sequence
    text: str
    # ids of the completion that is returned, padding and steps that no token stands for left out;
    # None where a server keeps them
    tokens: tuple[int, ...] | None
    # NFE: forwards this row took part in; n votes or n beams count n times; None where not known
    num_forwards: float | None
    # positions computed for this row: its share of the batch's, padding included; None as above
    token_forwards: float | None
    seconds: float  # this row's share of the batch's decoding time; the sum over rows is wall time
    entropy: float | None = None  # mean nats over the row's steps; None where not known
    trace: Trace | Canvas | None = None  # only where the decoder was made to keep it
    soft_steps: int | None = None  # that fed back a mixture or a vector; None where not known
    num_tokens: int | None = None  # of the completion; None: as many as `tokens`, else not known

    def __post_init__(self):
        if self.num_tokens is None and self.tokens is not None:
            object.__setattr__(self, "num_tokens", len(self.tokens))


def known_sum(values: Iterable[float | None]) -> float | None:
    """None where one is not known."""
    values = [*values]
    return None if None in values else sum(values)


class Unfinished(ValueError):
    """A decoder that failed in the middle: `done` holds what it finished, {index of the prompt:
    Decoded}."""

    def __init__(self, message: str, done: dict[int, Decoded] | None = None):
        super().__init__(message)
        self.done = done or {}


@runtime_checkable
class Decoder(Protocol):
    def decode(self, prompts: list) -> list[Decoded]:
        """Prompts, text or chat messages, to as many answers in their order."""
        ...


@dataclass(frozen=True)
class FunctionDecoder:
    """A function prompts -> answers as a decoder."""

    decode: Callable[[list], list[Decoded]]


def as_decoder(value, name: str) -> Decoder:
    """A decoder as it is, a function made one. name: of the argument, for the error."""
    if isinstance(value, type) or not (isinstance(value, Decoder) or callable(value)):
        raise ValueError(
            f"{name}={value!r} decodes nothing: give decode(prompts) -> [softar.Decoded], a function or a method"
        )
    return value if isinstance(value, Decoder) else FunctionDecoder(value)


@runtime_checkable
class NamedDecoder(Decoder, Protocol):
    """One that says what it is, as all of softar's do."""

    name: str  # label, unique in a comparison: "soft-mask steps=8"
    # goes into its row: decoder (registry name), model, setting ("steps=8"), family, maybe training
    columns: dict
