"""Decode held-out rows and score the answers: the accuracy of a model under one way of decoding."""

import json
import math
from collections.abc import Callable
from itertools import compress, count

import torch
from datasets import Dataset
from transformers import BatchEncoding

from .checks import shorten
from .config import TAGS, SoftConfig
from .decode import SoftOutput, generate
from .draws import generators
from .placement import evaluating
from .tags import Answers
from .texts import mapped

MOST = 1e100  # a score; the squares of larger ones have no sum


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
    """Accuracy and cost of answering `rows` (column `prompt`: text or chat messages, whose template
    hears the columns `tools` and `chat_template_kwargs`, as in TRL's SFT). What a row draws depends on
    the seed and its number alone, not on the size of a batch.

    Returns:
        accuracy: mean score in [0, 1]; n: rows; nfe: forward passes per answer, to its own last
        token whatever the batch; token_forwards: positions computed per answer; seconds: decoding
        alone; tokens_per_s: generated tokens, padding not counted.
    """
    numbers, shared = count(), torch.Generator().manual_seed(seed)

    def answer(batch: list[dict]) -> tuple[list[str], SoftOutput, int]:
        own = generators([next(numbers) for _ in batch], seed) if config.draws else shared
        prompts = [prompt_of(row) for row in batch]
        inputs = encode(tokenizer, prompts, config.prompt_prefix).to(model.device)
        out = generate(
            model,
            inputs["input_ids"],
            inputs["attention_mask"],
            config=config.changed(prompt_prefix=None),  # the ids have it
            rng=own,
            tokenizer=tokenizer,
        )
        return answer_texts(out, tokenizer), out, int(out.num_tokens.sum())

    return tally(model, rows, score, answer, batch_size)


def answer_texts(out: SoftOutput, tokenizer) -> list[str]:
    """Of each row of what `softar.generate` returns the text behind the thought, special tokens
    stripped; with what a token holds of it beside the end of the tag, which `out.answers` has not."""
    return [tokenizer.decode(ids, skip_special_tokens=True) for ids in answer_ids(out, tokenizer)]


def answer_ids(out: SoftOutput, tokenizer, *, space: bool = True) -> list[list[int]]:
    """Of each row tokens whose text is the answer: those of `out.answers`, and before them such as
    spell what stands beside the end of the tag. space: see softar.tags.Answers."""
    moves = None if out.config is None else out.config.moves[1]
    answer, P = Answers(moves, tokenizer, space=space), out.prompt_length
    starts = out.answer_start
    thought = torch.arange(out.record.kind.shape[1], device=starts.device) < starts[:, None]
    said = (thought | out.record.is_token).tolist()  # no pad tokens of latent steps in an answer
    rows = zip(out.sequences.tolist(), said, starts.tolist(), strict=True)
    return [answer(ids[:P], [*compress(ids[P:], own)], start) for ids, own, start in rows]


def tally(
    model, rows: Dataset, score: Callable[[str, dict], float], answer: Callable, batch_size: int
) -> dict:
    """The accuracy and cost of `answer`, batch by batch, with the model in eval mode meanwhile.

    answer: rows of a batch -> their texts, the decoder's output (row_forwards, token_forwards,
    seconds), and the number of tokens it generated.
    """
    if len(rows) == 0:
        raise ValueError("no rows to evaluate")
    points, forwards, positions, tokens, seconds = [], 0, 0, 0, 0.0
    with evaluating(model):
        for begin in range(0, len(rows), batch_size):
            batch = [rows[i] for i in range(begin, min(begin + batch_size, len(rows)))]
            texts, out, made = answer(batch)
            points += [
                check_score(score(text, row)) for text, row in zip(texts, batch, strict=True)
            ]
            forwards += int(out.row_forwards.sum())
            positions += out.token_forwards
            tokens += made
            seconds += out.seconds
    n = len(rows)
    return {
        "accuracy": sum(points) / n,
        "n": n,
        "nfe": forwards / n,
        "token_forwards": positions / n,
        "seconds": seconds,
        "tokens_per_s": tokens / seconds,
    }


def check_score(score) -> float:
    """What a scorer gives, as a number. Raises ValueError for one that has no mean with others."""
    try:
        value = math.nan if isinstance(score, (str, bytes)) else float(score)
    except (TypeError, ValueError, OverflowError):
        value = math.nan
    if not abs(value) <= MOST:
        raise ValueError(
            f"the score {score!r:.80} is not a finite number: give 1 for right, 0 for wrong, or another up "
            f"to {MOST:g}"
        )
    return value


def prefixed(prompt, prefix: str | None):
    """The prompt as a model is to read it whose configuration says prompt_prefix: a text
    behind it, unless it holds it already; a chat as it is, which the template completes."""
    if prefix is None or not isinstance(prompt, str) or prefix in prompt:
        return prompt
    return prefix + prompt


def prefixed_rows(rows, prefix: str | None, kept: str | None = None, num_proc: int | None = None):
    """A data set, several by name, or None, with each `prompt` as a model is to read it whose
    configuration says prompt_prefix. kept: a column for what it was. num_proc: processes for it."""
    if isinstance(rows, dict):
        how = prefix, kept, num_proc
        return type(rows)({name: prefixed_rows(each, *how) for name, each in rows.items()})
    first = None if rows is None or prefix is None else next(iter(rows), None)
    if first is None or not isinstance(first.get("prompt"), str):
        return rows  # in a chat the template puts it there

    def put(row: dict) -> dict:
        prompt = row["prompt"]
        return {"prompt": prefixed(prompt, prefix)} | ({kept: prompt} if kept else {})

    return mapped(rows, put, num_proc)


class Chat(list):
    """Chat messages with what their template is to hear. template: its keywords."""

    def __init__(self, messages: list[dict], template: dict):
        super().__init__(messages)
        self.template = template


def prompt_of(row: dict, column: str = "prompt"):
    """What a row asks: its text, or its chat messages with the keywords of `template_of`."""
    prompt = row[column]
    return Chat(prompt, template_of(row)) if isinstance(prompt, list) else prompt


def chat_text(tokenizer, chat: list[dict]) -> str:
    """Chat messages as the template of the tokenizer writes them, up to the answer's begin."""
    told = getattr(chat, "template", {})
    return tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True, **told)


def template_of(row: dict) -> dict:
    """Keywords of the chat template that the columns of a row say, as TRL's SFT reads them: `tools`, a
    list or its JSON, and `chat_template_kwargs`."""
    tools = row.get("tools")
    tools = json.loads(tools) if isinstance(tools, str) else tools
    return {"tools": tools, **(row.get("chat_template_kwargs") or {})}


def encode(tokenizer, prompts: list, prefix: str | None = None):
    """Prompts, text or chat messages, to a left-padded batch. prefix: a configuration's
    prompt_prefix. Raises ValueError where the chat template leaves the prefix out."""
    prompts = [prefixed(prompt, prefix) for prompt in prompts]
    if not isinstance(prompts[0], str):
        prompts = [chat_text(tokenizer, prompt) for prompt in prompts]
        if prefix is not None and any(prefix not in text for text in prompts):
            raise ValueError(
                f"the chat template does not write prompt_prefix={prefix!r}: take the tokenizer that was saved with "
                "the model, or decode without it, prompt_prefix=None"
            )
        return tokenizer(
            prompts,
            return_tensors="pt",
            padding=True,
            padding_side="left",
            add_special_tokens=False,
        )
    return tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")


def read_prompts(tokenizer, prompts: list, prefix: str | None = None) -> BatchEncoding:
    """Prompts, all text or all chat messages -> input_ids and attention_mask [B, P], padded on the
    left. prefix: a configuration's prompt_prefix.

    Raises:
        ValueError: for a single prompt in place of a list, a mixture of both kinds, and what the
            tokenizer cannot read.
    """
    if isinstance(prompts, str) or len({isinstance(prompt, str) for prompt in prompts}) > 1:
        raise ValueError(f"prompts={prompts!r:.80} must be a list, of texts or of chats: one kind")
    try:
        return encode(tokenizer, list(prompts), prefix)
    except Exception as error:  # tokenizers raises it itself, for a word outside its vocabulary
        raise ValueError(
            f"the tokenizer cannot read the prompts: {shorten(str(error), 200)}"
        ) from error


def resolve(config: SoftConfig, tokenizer) -> SoftConfig:
    """With think_start and think_end as ids. Raises ValueError for texts that the tokenizer does
    not know."""
    for name in TAGS:
        text = getattr(config, name)
        if isinstance(text, str) and not tag_ids(tokenizer, text):
            raise ValueError(
                f"{name}={text!r} is not in the tokenizer's vocabulary, so that no model would write it"
            )
    return config.resolve(tokenizer)


def tag_ids(tokenizer, text: str) -> tuple[int, ...]:
    """The tokens of a tag; none for a text that the tokenizer does not know."""
    try:
        ids = tokenizer.encode(text, add_special_tokens=False)
    except Exception:  # as in read_prompts
        return ()
    return () if None in ids or tokenizer.unk_token_id in ids else tuple(ids)
