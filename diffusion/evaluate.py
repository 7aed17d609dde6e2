"""Denoise held-out rows and score the answers: the accuracy of a model under one way of decoding."""

import dataclasses
from collections.abc import Callable

import torch
from datasets import Dataset

from softar.evaluate import encode, tally

from .config import DenoiseConfig
from .loop import DenoiseOutput, denoise


def evaluate(
    model,
    tokenizer,
    rows: Dataset,
    score: Callable[[str, dict], float],
    config: DenoiseConfig,
    *,
    gen_length: int | None = None,
    batch_size: int = 500,
    seed: int = 0,
) -> dict:
    """Accuracy and cost of answering `rows`.

    Args:
        rows: column `template`, a text whose masks are to be filled and whose whole is the answer; or `prompt`, text or
            chat messages, which `gen_length` masks follow (None: as many as the completion of the first row has).
        config: its gen_length does not count.

    Returns:
        As `softar.evaluate.evaluate`: accuracy, n, nfe, token_forwards, seconds, tokens_per_s.
    """
    fills = "template" in rows.column_names
    if fills:
        gen_length = 0
    elif gen_length is None and len(rows):
        gen_length = len(tokenizer(rows[0]["completion"], add_special_tokens=False)["input_ids"]) + 1
    config = config if gen_length is None else dataclasses.replace(config, gen_length=gen_length)
    rng = torch.Generator().manual_seed(seed)

    def answer(batch: list[dict]) -> tuple[list[str], DenoiseOutput, int]:
        inputs = encode(tokenizer, [row["template" if fills else "prompt"] for row in batch]).to(model.device)
        out = denoise(model, inputs["input_ids"], inputs["attention_mask"], config=config, rng=rng)
        texts = tokenizer.batch_decode(out.sequences if fills else out.completions, skip_special_tokens=True)
        return texts, out, int((out.committed_at >= 0).sum())

    return tally(model, rows, score, answer, batch_size)
