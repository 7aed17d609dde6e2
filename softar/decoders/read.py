"""From what softar.generate, or a search, returns to answers."""

import time
from dataclasses import replace

from transformers import BatchEncoding

from ..decode import SoftOutput
from ..evaluate import answer_texts
from ..show.trace import Trace, thought
from ..thought import Kind
from .answer import Decoded


def read_out(
    out: SoftOutput,
    tokenizer,
    inputs: BatchEncoding,
    *,
    started: float,
    forwards: list[float] | None = None,
    title: str | None = None,
) -> list[Decoded]:
    """An answer for each row.

    started: perf_counter() when the decode began; making a trace does not count. forwards: of each
    row; None: as many as it has steps, and those that read the prompt. title: of traces, None for no
    traces.
    """
    texts = answer_texts(out, tokenizer)
    is_step = out.record.kind != Kind.PAD  # [B, T]; padding stands at the end
    tokens = [
        tuple(ids[own].tolist())
        for ids, own in zip(out.completions, out.record.is_token, strict=True)
    ]
    entropy = (out.record.entropy.masked_fill(~is_step, 0.0).sum(1) / is_step.sum(1)).tolist()
    is_soft = (out.record.kind == Kind.SOFT) | (out.record.kind == Kind.LATENT)
    soft_steps = is_soft.sum(1).tolist()
    seconds = (time.perf_counter() - started) / len(texts)
    if forwards is None:
        forwards = out.row_forwards.float().tolist()
    return [
        Decoded(
            text=texts[row],
            tokens=tokens[row],
            num_forwards=forwards[row],
            token_forwards=out.token_forwards / len(texts),
            seconds=seconds,
            entropy=entropy[row],
            soft_steps=soft_steps[row],
            trace=None if title is None else _trace(out, tokenizer, inputs, row, title),
        )
        for row in range(len(texts))
    ]


def _trace(out: SoftOutput, tokenizer, inputs: BatchEncoding, row: int, title: str) -> Trace:
    prompt = inputs["input_ids"][row][inputs["attention_mask"][row].bool()]
    trace = thought(out, tokenizer, row, title=title)
    return replace(trace, prompt=tokenizer.decode(prompt))
