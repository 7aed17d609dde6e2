"""Decode held-out rows and score the answers: the accuracy of a model under one way of decoding."""

from collections.abc import Callable

import torch
from datasets import Dataset

from .config import SoftConfig
from .decode import SoftOutput, generate


def evaluate(
    model,
    tokenizer,
    rows: Dataset,
    score: Callable[[str, dict], float],
    config: SoftConfig,
    *,
    batch_size: int = 512,
    seed: int = 0,
) -> dict:
    """Accuracy and cost of answering `rows` (column `prompt`: text or chat messages).

    Returns:
        accuracy: mean score in [0, 1]; n: rows; nfe: forward passes per answer; token_forwards: positions computed
        per answer; seconds: decoding alone; tokens_per_s: generated tokens, padding not counted.
    """
    rng = torch.Generator().manual_seed(seed)

    def answer(batch: list[dict]) -> tuple[list[str], SoftOutput, int]:
        inputs = encode(tokenizer, [row["prompt"] for row in batch]).to(model.device)
        out = generate(
            model, inputs["input_ids"], inputs["attention_mask"], config=config, rng=rng, tokenizer=tokenizer
        )
        texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in out.answers]
        return texts, out, int((out.record.kind != 0).sum())

    return tally(model, rows, score, answer, batch_size)


def tally(model, rows: Dataset, score: Callable[[str, dict], float], answer: Callable, batch_size: int) -> dict:
    """The accuracy and cost of `answer`, batch by batch, with the model in eval mode meanwhile.

    answer: rows of a batch -> their texts, the decoder's output (num_forwards, token_forwards, seconds), and the number
    of tokens it generated.
    """
    if len(rows) == 0:
        raise ValueError("no rows to evaluate")
    training = model.training
    model.eval()
    points, forwards, positions, tokens, seconds = [], 0, 0, 0, 0.0
    for begin in range(0, len(rows), batch_size):
        batch = [rows[i] for i in range(begin, min(begin + batch_size, len(rows)))]
        texts, out, made = answer(batch)
        points += [score(text, row) for text, row in zip(texts, batch, strict=True)]
        forwards += out.num_forwards * len(batch)
        positions += out.token_forwards
        tokens += made
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


def encode(tokenizer, prompts: list):
    """Prompts, text or chat messages, to a left-padded batch."""
    if not isinstance(prompts[0], str):
        prompts = [tokenizer.apply_chat_template(p, tokenize=False, add_generation_prompt=True) for p in prompts]
        return tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False)
    return tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
