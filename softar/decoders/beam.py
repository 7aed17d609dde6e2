"""Beam search, the discrete baseline that looks furthest: transformers' own, as a decoder for
`softar.compare`."""

import copy
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import nn
from transformers import BatchEncoding, StoppingCriteriaList

from ..caches import check_cache
from ..checks import check_least
from ..config import TAGS, Ids, SoftConfig
from ..evaluate import evaluating, read_prompts, resolve
from ..loops import stop_at
from ..models import plain
from ..models.reading import check_virtual_tokens
from ..show.trace import Step, Trace, Words
from ..tags import Answers
from .answer import Decoded
from .card import check_of_kind, columns_of
from .stop import answer_starts, stops_of

# Sampling is off, with neutral values: what is None generate fills from the model's configuration,
# and it warns of what beam search does not use.
NEUTRAL = dict(
    max_length=None,
    min_length=None,
    do_sample=False,
    temperature=1.0,
    top_k=50,
    top_p=1.0,
    min_p=None,
    typical_p=1.0,
    epsilon_cutoff=0.0,
    eta_cutoff=0.0,
    num_return_sequences=1,
    use_cache=True,
    return_dict_in_generate=False,
)
# fields of SoftConfig that say where the answer begins
SHARED = ("max_new_tokens", *TAGS, "budget", "prompt_prefix", "hide_thought")


@dataclass(frozen=True)
class BeamOptions:
    """How beam search goes, and where its answer begins."""

    max_new_tokens: int
    num_beams: int = 4
    length_penalty: float = 1.0  # hypotheses are compared by log-probability / length ** this
    early_stopping: bool | str = False  # as in transformers; "never" is the text
    # As in SoftConfig
    think_start: Ids = None
    think_end: Ids = None
    budget: int | None = None
    prompt_prefix: str | None = None
    hide_thought: bool = True

    def __post_init__(self):
        if self.num_beams < 2:
            raise ValueError(
                f"num_beams={self.num_beams} must be at least 2; decoder 'discrete' is greedy"
            )
        check_least(self, max_new_tokens=1)
        if self.early_stopping not in (True, False, "never"):
            raise ValueError(
                f"early_stopping={self.early_stopping!r} is unknown: give true, false or 'never'"
            )


class BeamDecoder:
    """Beam search by transformers' own `model.generate`: the likeliest completion of those that the
    beams find.

    NFE and positions count every beam.

    Args: as for SoftDecoder. A trace knows the tokens, and no entropy.
    """

    def __init__(
        self,
        model,
        tokenizer,
        options: BeamOptions,
        *,
        name=None,
        trace=False,
        columns=None,
        stop: tuple[str, ...] = (),
    ):
        check_of_kind(model, "autoregressive", name or "beam")
        check_virtual_tokens(model)
        self.model, self.tokenizer, self.trace = model, tokenizer, trace
        self.num_beams, self.stop = options.num_beams, [*stop]
        self.thought = resolve(
            SoftConfig(**{name: getattr(options, name) for name in SHARED}), tokenizer
        )
        self.settings = copy.deepcopy(plain(model).generation_config)
        self.settings.update(
            **NEUTRAL,
            num_beams=options.num_beams,
            max_new_tokens=options.max_new_tokens,
            length_penalty=options.length_penalty,
            early_stopping=options.early_stopping,
        )
        check_cache(model, self.settings)
        if self.settings.stop_strings is not None:
            stop_at(self.settings.stop_strings, tokenizer)
        setting = f"num_beams={options.num_beams}"
        self.columns = columns_of("beam", model, "autoregressive", setting) | (columns or {})
        self.name = name or f"beam {self.columns['setting']}"

    def read(self, prompts: list) -> BatchEncoding:
        """input_ids and attention_mask [B, P] of the prompts."""
        return read_prompts(self.tokenizer, prompts, self.thought.prompt_prefix)

    def decode(self, prompts: list) -> list[Decoded]:
        if not prompts:
            return []
        started = time.perf_counter()
        inputs = self.read(prompts).to(self.model.device)
        width = inputs["input_ids"].shape[1]
        stops = stops_of(self.tokenizer, self.stop, width, self.thought)
        with evaluating(self.model), counted(self.model) as shapes:
            sequences = self.model.generate(
                input_ids=inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                generation_config=self.settings,
                stopping_criteria=StoppingCriteriaList(stops),
                tokenizer=self.tokenizer,
            )
        rows = [self._unpadded(row) for row in sequences[:, width:].tolist()]
        starts = answer_starts(self.thought, sequences, width)
        starts = [min(start, len(row)) for start, row in zip(starts, rows, strict=True)]
        answer = Answers(self.thought.moves[1], self.tokenizer)
        texts = [
            self.tokenizer.decode(answer(prompt, row, start), skip_special_tokens=True)
            for prompt, row, start in zip(inputs["input_ids"].tolist(), rows, starts, strict=True)
        ]
        seconds = (time.perf_counter() - started) / len(prompts)
        return [
            Decoded(
                text=texts[i],
                tokens=tuple(rows[i]),
                num_forwards=float(len(shapes) * self.num_beams),
                token_forwards=sum(n * columns for n, columns in shapes) / len(prompts),
                seconds=seconds,
                trace=self._trace(inputs, i, rows[i], starts[i]) if self.trace else None,
            )
            for i in range(len(prompts))
        ]

    def _unpadded(self, row: list[int]) -> list[int]:
        """A completion up to its end token, that included; or without the padding that a stop
        string left."""
        ends = self.settings.eos_token_id
        ends = {ends} if isinstance(ends, int) else set(ends or ())
        for i, token in enumerate(row):
            if token in ends:
                return row[: i + 1]
        while row and row[-1] == self.settings.pad_token_id:
            row = row[:-1]
        return row

    def _trace(self, inputs: BatchEncoding, i: int, row: list[int], start: int) -> Trace:
        words = Words(self.tokenizer)
        steps = [Step("hard", words[token], None, [(words[token], 1.0)]) for token in row]
        prompt = inputs["input_ids"][i][inputs["attention_mask"][i].bool()]
        return Trace(self.tokenizer.decode(prompt), steps, title=self.name, answer_start=start)


@contextmanager
def counted(model: nn.Module) -> Iterator[list[tuple[int, int]]]:
    """Collects the shape [rows, columns] of each forward's input."""
    shapes = []

    def note(module, args, kwargs):
        embeds = kwargs.get("inputs_embeds")
        shapes.append(tuple((kwargs["input_ids"] if embeds is None else embeds).shape[:2]))

    handle = plain(model).register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield shapes
    finally:
        handle.remove()
