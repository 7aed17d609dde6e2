"""Denoise held-out rows and score the answers: the accuracy of a model under one way of decoding."""

import dataclasses
from collections.abc import Callable

import torch
from datasets import Dataset

from softar.evaluate import encode

from .config import DenoiseConfig
from .loop import denoise


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
    if len(rows) == 0:
        raise ValueError("no rows to evaluate")
    training = model.training
    model.eval()
    fills = "template" in rows.column_names
    if fills:
        gen_length = 0
    elif gen_length is None:
        gen_length = len(tokenizer(rows[0]["completion"], add_special_tokens=False)["input_ids"]) + 1
    config = dataclasses.replace(config, gen_length=gen_length)
    rng = torch.Generator().manual_seed(seed)
    points, forwards, positions, tokens, seconds = [], 0, 0, 0, 0.0
    for begin in range(0, len(rows), batch_size):
        batch = [rows[i] for i in range(begin, min(begin + batch_size, len(rows)))]
        inputs = encode(tokenizer, [row["template" if fills else "prompt"] for row in batch]).to(model.device)
        out = denoise(model, inputs["input_ids"], inputs["attention_mask"], config=config, rng=rng)
        texts = tokenizer.batch_decode(out.sequences if fills else out.completions, skip_special_tokens=True)
        points += [score(text, row) for text, row in zip(texts, batch, strict=True)]
        forwards += out.num_forwards * len(batch)
        positions += out.token_forwards
        tokens += int((out.committed_at >= 0).sum())
        seconds += out.seconds
    model.train(training)
    n = len(rows)
    return {
        "accuracy": sum(points) / n,
        "n": n,
        "nfe": forwards / n,
        "token_forwards": positions / n,
        "seconds": seconds,
        "tokens_per_s": tokens / seconds,
    }
