"""Denoise held-out rows and score the answers: the accuracy of a model under one way of
decoding."""

import dataclasses
from collections.abc import Callable
from itertools import takewhile

import torch
from datasets import Dataset

from softar.evaluate import Chat, encode, evaluating, prompt_of, tally, template_of
from softar.sft.data import check_pickable

from .config import DenoiseConfig
from .loop import DenoiseOutput, denoise, first_end
from .losses import log_likelihood
from .net import Facts, facts


# Wide because each is a choice of its own, and callers say few of them.
def evaluate(
    model,
    tokenizer,
    rows: Dataset,
    score: Callable[..., float],
    config: DenoiseConfig,
    *,
    gen_length: int | None = None,
    batch_size: int = 500,
    seed: int = 0,
    template: dict | None = None,
    with_ids: bool = False,
) -> dict:
    """Accuracy and cost of answering `rows`, by completions up to their first end token, behind which
    no token counts as generated.

    Args:
        rows: column `template`, a text whose masks are to be filled and whose whole is the answer;
            or `prompt`, text or chat messages, which `gen_length` masks follow (None: as many as
            the longest completion of the rows has; 0: none, it is filled as a template).
        score: of an answer, score(text, row); with_ids: score(text, row, ids).
        config: its gen_length does not count.
        template: keywords of the chat template, for all rows. None: what the columns `tools` and
            `chat_template_kwargs` of each say.

    Raises:
        ValueError: for rows that do not say how many masks there are, with gen_length=None.

    Returns:
        As `softar.evaluate.evaluate`: accuracy, n, nfe, token_forwards, seconds, tokens_per_s.
    """
    column = "template" if "template" in rows.column_names else "prompt"
    if fills := column == "template" or gen_length == 0:
        gen_length = 0
    elif gen_length is None and len(rows):
        gen_length = most_slots(rows, tokenizer)
    config = config if gen_length is None else dataclasses.replace(config, gen_length=gen_length)
    rng = torch.Generator().manual_seed(seed)
    end_ids = facts(model).end_ids if config.end_ids is None else config.end_ids

    def answer(batch: list[dict]) -> tuple[list[tuple], DenoiseOutput, int]:
        prompts = [prompt_of(row, column) for row in batch]
        if template is not None:
            prompts = [p if isinstance(p, str) else Chat(p, template) for p in prompts]
        inputs = encode(tokenizer, prompts).to(model.device)
        mask = inputs["attention_mask"]
        out = denoise(model, inputs["input_ids"], mask, config=config, rng=rng)
        begins = (mask == 0).sum(1).tolist() if fills else [out.prompt_length] * len(batch)
        rows_of_ids, made = [], 0
        for row, begin in enumerate(begins):
            ids = out.sequences[row, begin:].tolist()
            end = len(ids) if fills else first_end(ids, end_ids)
            rows_of_ids.append(ids[:end])
            made += int((out.committed_at[row, : begin + end + 1] >= 0).sum())
        texts = tokenizer.batch_decode(rows_of_ids, skip_special_tokens=True)
        return [*zip(texts, rows_of_ids, strict=True)], out, made

    def judge(answer: tuple[str, list[int]], row: dict) -> float:
        return score(answer[0], row, *answer[1:] if with_ids else ())

    return tally(model, rows, judge, answer, batch_size)


def nll_bound(model, tokenizer, rows: Dataset, *, samples: int = 128, seed: int = 0) -> float:
    """An upper bound of -log p(completion | prompt), mean nats per token over `rows`, by Monte
    Carlo (losses.py).

    Args:
        rows: columns `prompt` and `completion`, text; the end token that training puts behind a
            completion counts.
        samples: draws of masks for each row.

    Raises:
        ValueError: for rows without these columns or with chat messages, and for a uniform-state
            model.
    """
    if not has_texts(rows):
        raise ValueError(
            f"a likelihood needs columns prompt and completion of text; the rows have {rows.column_names}"
        )
    rng, total, tokens = torch.Generator().manual_seed(seed), 0.0, 0
    with evaluating(model), torch.no_grad():
        for row in rows:
            prompt = tokenizer(row["prompt"])["input_ids"]
            answer = [*unended(row["completion"], tokenizer), tokenizer.eos_token_id]
            ids = torch.tensor(prompt + answer, device=model.device)
            asked = torch.arange(len(ids), device=model.device) >= len(prompt)
            total -= log_likelihood(model, ids, asked, samples=samples, rng=rng)
            tokens += len(answer)
    return total / tokens


def has_texts(rows: Dataset) -> bool:
    """Are there rows of a prompt and a completion, both text?"""
    columns = ("prompt", "completion")
    return (
        {*columns} <= {*rows.column_names}
        and len(rows) > 0
        and all(isinstance(rows[0][name], str) for name in columns)
    )


def steps_for(known: Facts, rows: Dataset, tokenizer, steps: int) -> int:
    """So many steps, or as many more as `evaluate` needs: one for each block of a block-causal
    model, as many for each canvas of DiffusionGemma."""
    if known.block_length is None or not len(rows):
        return steps
    if known.mask_id is None:
        canvases = -(-most_slots(rows, tokenizer) // known.block_length)
        return -(-steps // canvases) * canvases
    slots = None if "template" in rows.column_names else most_slots(rows, tokenizer)
    return max(steps, *(most_blocks(row, tokenizer, known.block_length, slots) for row in rows))


def most_blocks(row: dict, tokenizer, length: int, slots: int | None = None) -> int:
    """Blocks that may have masks of a row, wherever the first one begins. slots: its masks, where it
    has no template."""
    if "template" not in row:
        slots = span = slots_of_row(row, tokenizer) if slots is None else slots
    elif masks := masks_of(row, tokenizer):
        slots, span = len(masks), masks[-1] - masks[0] + 1
    else:
        return 0
    return min(slots, (span - 2) // length + 2)


def most_slots(rows: Dataset, tokenizer) -> int:
    """Slots in which each of the rows can be answered as it was written."""
    return max(slots_of_row(row, tokenizer) for row in rows)


def slots_of_row(row: dict, tokenizer) -> int:
    """Its masks, or those that take the place of its completion, text or the rest of a chat. Raises
    ValueError for a row without either."""
    if "template" in row:
        return len(masks_of(row, tokenizer))
    if not says_slots(row):
        raise ValueError(
            f"rows with the columns {[*row]} do not say how many tokens to fill: give gen_length, or rows with a "
            "completion"
        )
    answer = row["completion"]
    if isinstance(answer, str):
        return len(unended(answer, tokenizer)) + 1
    told = template_of(row)
    whole = tokenizer.apply_chat_template(row["prompt"] + answer, tokenize=False, **told)
    ids = tokenizer(whole, add_special_tokens=False)["input_ids"]
    asked = encode(tokenizer, [prompt_of(row)])["input_ids"][0].tolist()
    # the completion begins where they differ, as in TRL's rows
    same = takewhile(lambda pair: pair[0] == pair[1], zip(ids, asked, strict=False))
    return max(1, len(ids) - len([*same]))


def unended(completion: str, tokenizer) -> list[int]:
    """Its tokens without the end token, which a completion may bring along or not."""
    text = completion.removesuffix(tokenizer.eos_token or "")
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def masks_of(row: dict, tokenizer) -> list[int]:
    """Where the masks of its template stand, in tokens. Raises ValueError for a tokenizer without a
    mask token."""
    if tokenizer.mask_token_id is None:
        raise ValueError(
            "a column template holds masks, and the tokenizer has no mask token: leave the column out, or give "
            "the tokenizer that softar.diffusion.load opens"
        )
    ids = encode(tokenizer, [prompt_of(row, "template")])["input_ids"][0]
    return (ids == tokenizer.mask_token_id).nonzero()[:, 0].tolist()


def says_slots(columns) -> bool:
    """Do rows of these columns say how many tokens are to be filled?"""
    return "template" in columns or {"prompt", "completion"} <= {*columns}


def check_decoded(args, rows, score, tokenizer) -> None:
    """Raise ValueError for held-out rows, one data set or several by name, that a DiffusionSFTTrainer
    with this score could not decode."""
    if isinstance(rows, dict):
        for each in rows.values():
            check_decoded(args, each, score, tokenizer)
    elif score is not None and args.eval_decode_rows and rows is not None:
        check_pickable(rows, "eval_dataset with score=")
        if not says_slots(rows.column_names):
            raise ValueError(
                "score= needs columns 'prompt' and 'completion', or 'template', in the held-out rows, not "
                f"{rows.column_names}: give them, or eval_decode_rows=0"
            )
        if "template" in rows.column_names and len(rows):
            masks_of(rows[0], tokenizer)


def check_ends(rows, count: int, tokenizer) -> None:
    """Raise ValueError for held-out templates, of one data set or several by name, without the end
    token behind them that training puts behind its rows: a model that reads in both directions has
    seen no text without it, and may fill such templates much worse than it was trained to.

    Args:
        count: the first rows of each set, which are decoded.
    """
    if isinstance(rows, dict):
        for each in rows.values():
            check_ends(each, count, tokenizer)
    elif "template" in rows.column_names:
        for at, text in enumerate(rows["template"][:count]):
            ids = encode(tokenizer, [text])["input_ids"][0]
            if ids[-1] not in (tokenizer.eos_token_id, tokenizer.mask_token_id):
                raise ValueError(
                    f"template {at} of the held-out rows ends in {tokenizer.decode(ids[-1:])!r}, and the rows that are "
                    f"trained on in {tokenizer.eos_token!r}: write it behind the templates, too"
                )


def with_end(template: str, tokenizer) -> str:
    """A template with the end token behind it, as training's rows have it, where it ends otherwise and
    the tokenizer reads it there."""
    ids = encode(tokenizer, [template])["input_ids"][0].tolist()
    if ids[-1] in (tokenizer.eos_token_id, tokenizer.mask_token_id):
        return template
    for ended in (f"{template} {tokenizer.eos_token}", f"{template}{tokenizer.eos_token}"):
        if tokenizer(ended)["input_ids"] == [*ids, tokenizer.eos_token_id]:
            return ended
    return template


def check_masks(tokenizer, prompts: list, mask_id: int) -> None:
    """Raise ValueError for a prompt without masks, of which gen_length=0 would leave nothing to fill."""
    mask = tokenizer.mask_token
    for at, prompt in enumerate(prompts):
        if mask and isinstance(prompt, str) and mask in prompt:
            continue
        if not (encode(tokenizer, [prompt])["input_ids"] == mask_id).any():
            raise ValueError(
                f"gen_length=0 fills the masks of templates, and prompt {at}, {prompt!r:.80}, has none (token id "
                f"{mask_id}): give it some, or a gen_length"
            )


def check_steps(
    model, tokenizer, prompts: list, config: DenoiseConfig, template: dict | None = None
) -> None:
    """Raise ValueError where a prompt has more blocks with masks than there are steps to share, which
    `denoise` would say in its turn. template: keywords of the chat template."""
    known = facts(model)
    # of a prompt with masks in its text gen_length alone makes blocks, too
    own = config.block_length or config.gen_length
    b = config.sub_block_length or known.block_length or own
    if config.steps is None or not b or known.mask_id is None:
        return
    for at, prompt in enumerate(prompts):
        asked = prompt if isinstance(prompt, str) else Chat(prompt, template or {})
        ids = encode(tokenizer, [asked])["input_ids"]
        masked = torch.nn.functional.pad(ids == known.mask_id, (0, config.gen_length), value=True)
        places = masked[0].nonzero()[:, 0]
        if known.block_length is None or config.grid == "end":  # counted from the end of the prompt
            places = places - (masked.shape[1] if known.block_length is None else ids.shape[1])
        if known.shift:  # the store forward may decide the first place of a block
            places = places[places % (known.block_length or 1) != 0]
        if (blocks := len({*(places // b).tolist()})) > config.steps:
            raise ValueError(
                f"steps={config.steps} cannot be shared by the {blocks} blocks with masks of prompt {at}: give at "
                f"least {blocks}"
            )
