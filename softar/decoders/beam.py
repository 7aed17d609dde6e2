"""Beam search, the discrete baseline that looks furthest: transformers' own, as a decoder for
`softar.compare`."""

import copy
import time
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from ..config import SoftConfig
from ..evaluate import evaluating, read_prompts, resolve
from ..models import plain
from ..show.trace import Step, Trace, Words
from .answer import Decoded
from .kinds import check_model, columns_of

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


class BeamDecoder:
    """Beam search by transformers' own `model.generate`: the likeliest completion of those that the
    beams find.

    NFE and positions count every beam. Hypotheses are compared by log-probability / length **
    length_penalty.

    Args:
        config: says where the answer begins (think_start, think_end, budget), and nothing else.
        early_stopping: as in transformers: False, True or "never".
        Others as for SoftDecoder. A trace knows the tokens, and no entropy.
    """

    def __init__(
        self,
        model,
        tokenizer,
        num_beams: int,
        max_new_tokens: int,
        *,
        length_penalty: float = 1.0,
        early_stopping: bool | str = False,
        config: SoftConfig | None = None,
        name=None,
        trace=False,
        columns=None,
    ):
        check_model(model, "autoregressive", name or "beam")
        for option, value, least in (
            ("num_beams", num_beams, 2),
            ("max_new_tokens", max_new_tokens, 1),
        ):
            if value < least:
                why = "; decoder 'discrete' is greedy" if option == "num_beams" else ""
                raise ValueError(f"{option}={value} must be at least {least}{why}")
        if early_stopping not in (True, False, "never"):
            raise ValueError(
                f"early_stopping={early_stopping!r} is unknown: give true, false or 'never'"
            )
        self.model, self.tokenizer, self.num_beams, self.trace = model, tokenizer, num_beams, trace
        self.thought = resolve(config or SoftConfig(), tokenizer)
        self.settings = copy.deepcopy(plain(model).generation_config)
        self.settings.update(
            **NEUTRAL,
            num_beams=num_beams,
            max_new_tokens=max_new_tokens,
            length_penalty=length_penalty,
            early_stopping=early_stopping,
        )
        self.columns = columns_of("beam", model, "autoregressive", f"num_beams={num_beams}") | (
            columns or {}
        )
        self.name = name or f"beam {self.columns['setting']}"

    def decode(self, prompts: list) -> list[Decoded]:
        if not prompts:
            return []
        started = time.perf_counter()
        inputs = read_prompts(self.tokenizer, prompts).to(self.model.device)
        with evaluating(self.model), counted(self.model) as shapes:
            sequences = self.model.generate(
                input_ids=inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                generation_config=self.settings,
                tokenizer=self.tokenizer,
            ).tolist()
        width = inputs["input_ids"].shape[1]
        tokens = [self._unpadded(row[width:]) for row in sequences]
        given = [
            ids[mask.bool()].tolist()
            for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"])
        ]
        texts = [
            self.tokenizer.decode(row[self._answer_start(prompt, row) :], skip_special_tokens=True)
            for prompt, row in zip(given, tokens, strict=True)
        ]
        positions = sum(rows * columns for rows, columns in shapes) / len(prompts)
        seconds = (time.perf_counter() - started) / len(prompts)
        forwards = float(len(shapes) * self.num_beams)
        return [
            Decoded(text, tuple(row), forwards, positions, seconds, None, self._trace(prompt, row))
            for text, row, prompt in zip(texts, tokens, given, strict=True)
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

    def _answer_start(self, prompt: list[int], row: list[int]) -> int:
        """Tokens of a completion before its answer, as `softar.generate` counts them where nothing
        is forced."""
        c = self.thought
        if c.think_end is None:
            return min(c.budget or 0, len(row))
        if c.think_start is not None and _last(prompt, c.think_start) <= _last(prompt, c.think_end):
            if _last(row, c.think_start) < 0:
                return 0  # it never thought
        ends = [end for end in range(1, len(row) + 1) if _last(row[:end], c.think_end) == end]
        return ends[0] if ends else len(row)

    def _trace(self, prompt: list[int], row: list[int]) -> Trace | None:
        if not self.trace:
            return None
        words = Words(self.tokenizer)
        steps = [Step("hard", words[token], None, [(words[token], 1.0)]) for token in row]
        start = self._answer_start(prompt, row)
        return Trace(self.tokenizer.decode(prompt), steps, title=self.name, answer_start=start)


@contextmanager
def counted(model: nn.Module) -> Iterator[list[tuple[int, int]]]:
    """Collects the shape [rows, columns] of each forward's input."""
    shapes = []

    def note(module, args, kwargs):
        ids = (
            kwargs["input_ids"] if kwargs.get("inputs_embeds") is None else kwargs["inputs_embeds"]
        )
        shapes.append(tuple(ids.shape[:2]))

    handle = plain(model).register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield shapes
    finally:
        handle.remove()


def _last(row: list[int], pattern: tuple[int, ...]) -> int:
    """Where the last occurrence of the pattern ends; -1 for none."""
    pattern = list(pattern)
    ends = range(len(row), len(pattern) - 1, -1)
    return next((end for end in ends if row[end - len(pattern) : end] == pattern), -1)
