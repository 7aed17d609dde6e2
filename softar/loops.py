"""`model.generate` of transformers with a loop of softar's in the place of its own."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    StoppingCriteriaList,
    StopStringCriteria,
)

from .checks import shorten
from .models.kind import plain
from .models.origin import origin_of


def run_loop(
    model,
    loop: Callable,
    input_ids: Tensor,
    attention_mask: Tensor,
    settings: GenerationConfig,
    *,
    tokenizer=None,
    processors: Sequence[Callable] = (),
    stops: Sequence[Callable] = (),
):
    """What the loop returns. A text of the settings' `stop_strings`, or else of the model's own, ends
    a row: transformers looks for them with a tokenizer, which it keeps from such a loop.

    Args:
        settings: changed. tokenizer: None is the one that `softar.load` opened with the model.
        processors, stops: logits_processor and stopping_criteria, as transformers calls them.

    Raises:
        ValueError: for stop strings that nothing can look for.
    """
    own, stops = plain(model).generation_config, StoppingCriteriaList(stops)
    for strings in (settings.stop_strings, own.stop_strings):
        if strings is not None:
            stops.append(stop_at(strings, tokenizer or origin_of(model).tokenizer))
            break
    settings.stop_strings = None
    with _without_stop_strings(own):  # with which generate fills the settings
        return model.generate(
            input_ids=input_ids,
            attention_mask=attention_mask,
            generation_config=settings,
            logits_processor=LogitsProcessorList(processors),
            stopping_criteria=stops,
            custom_generate=loop,
        )


def stop_at(strings: str | list[str], tokenizer) -> StopStringCriteria:
    """transformers' own criterion. Raises ValueError where it cannot look for the strings."""
    if tokenizer is None:
        raise ValueError(f"stop_strings={strings!r} are text: pass tokenizer=")
    try:
        return StopStringCriteria(tokenizer, strings)
    except Exception as error:  # tokenizers raises no class of its own
        raise ValueError(
            f"stop_strings={strings!r}: transformers cannot look for them with a "
            f"{type(tokenizer).__name__} ({shorten(str(error), 100)}): set "
            "model.generation_config.stop_strings=None; a decoder's stop= needs no such tokenizer"
        ) from error


@contextmanager
def _without_stop_strings(settings: GenerationConfig) -> Iterator[None]:
    strings, settings.stop_strings = settings.stop_strings, None
    try:
        yield
    finally:
        settings.stop_strings = strings
