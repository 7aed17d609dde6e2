"""What soft SFT reads: which tokens of a row are thought, and rows with several traces.

Shapes: B batch, T positions, M traces per row.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from trl import pack_dataset
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from ..config import TAGS
from ..evaluate import tag_ids, template_of
from ..soft import Soft
from ..tags import Moves, blanks, matches, moves_of_ids, moves_of_text, single
from ..texts import is_list


def thought_mask(
    input_ids: Tensor,
    labels: Tensor,
    *,
    start: Moves = (),
    end: Moves = (),
    steps: int | None = None,
    space: tuple[int, ...] = (),
) -> Tensor:
    """Which positions are thought, and so read mixtures: those at which a decode by the same tags
    (softar.thought) reads them when it says what the row says. input_ids, labels: [B, T], -100 off
    the completion; all before its first token is prompt -> [B, T] bool.

    With `steps` the completion's first so many tokens. With `end` (how a tag is spelled, from
    `softar.tags`) those before its first occurrence; without one there the whole completion; none
    where the prompt ends with it, but for `space` (tokens of white space). With `start`, too, only
    what an occurrence of it, in prompt or completion, has opened; without one nothing. With none of
    them the whole completion. A tag of several tokens ends the thought with its last: until then
    nothing tells that it is one.
    """
    inside = labels != -100
    if steps is not None:
        return inside & (inside.cumsum(1) <= steps)
    before = inside.cumsum(1) == 0
    said = input_ids.where(before | inside, -1)
    opens, closes = (_whole(moves, said) for moves in (start, end))
    spaces = torch.tensor(space, dtype=said.dtype).to(said.device, non_blocking=True)
    blank = torch.isin(said, spaces)
    opened, closed, last = (_last(marks & before) for marks in (opens, closes, ~blank))
    shut = (closed > opened) & (last <= closed)
    opens, closes = opens & inside, closes & inside
    thinks = opens.cumsum(1) > opens.long()
    thinks = thinks | (opened > closed)[:, None] if start else torch.ones_like(inside)
    over = (closes & thinks).cumsum(1) > 0
    return inside & thinks & ~over & ~shut[:, None]


def thought_of(input_ids: list[int], labels: list[int], span: dict) -> list[bool]:
    """thought_mask of one row. span: what tells the thought, as that takes it."""
    return thought_mask(torch.tensor([input_ids]), torch.tensor([labels]), **span)[0].tolist()


def _whole(moves: Moves, ids: Tensor) -> Tensor:
    """Where in ids [B, T] a tag is whole, [B, T] bool; of one token, as most models have them,
    without leaving the device."""
    if (token := single(moves)) is not None:
        return ids == token
    whole = torch.zeros(ids.shape, dtype=torch.bool)
    if moves:
        for found, row in zip(whole, ids.tolist(), strict=True):
            found[matches(moves, row)] = True
    return whole.to(ids.device)


def _last(marks: Tensor) -> Tensor:
    """The last column of marks [B, T] bool, -1 without any -> [B] int64."""
    columns = torch.arange(marks.shape[1], device=marks.device)
    return columns.where(marks, -1).amax(1)


def longest_completion(labels: Tensor) -> int:
    """Positions from the one that predicts the first label of the batch to the end; all without
    labels. labels: [B, T], -100 off the completions."""
    T, at = labels.shape[1], (labels != -100).any(0).nonzero()[:, 0]
    return T if len(at) == 0 else T - max(0, int(at[0]) - 1)


def spelled(tokenizer, text: str | None) -> Moves:
    """How a tag is spelled in rows of this tokenizer. Raises ValueError for a text that it does not
    know."""
    if text is None:
        return ()
    ids = tag_ids(tokenizer, text)
    if not ids:
        raise ValueError(
            f"the tokenizer has no tokens for {text!r}: name a text that the data really contains"
        )
    return moves_of_text(tokenizer, text) or moves_of_ids(ids)


def span_of(args, tokenizer) -> dict[str, Any]:
    """What tells the thought in rows of this tokenizer by a SoftSFTConfig, as thought_mask takes it."""
    start, end = (spelled(tokenizer, getattr(args, name)) for name in TAGS)
    space = blanks(tokenizer) if end else ()
    return dict(start=start, end=end, steps=args.think_steps, space=space)


def has_turns(dataset) -> bool:
    """Are rows whole chats, which do not say what of them is prompt?"""
    columns = [] if isinstance(dataset, dict) else dataset.column_names or []
    return "prompt" not in columns and bool({"messages", "conversations"} & {*columns})


def check_thoughts(rows, args, tokenizer, span: dict, data: str) -> None:
    """Raise ValueError for tokenised rows of a Dataset, or of several by name, in which thoughts are not
    where a SoftSFTConfig says, or of whole chats in more than one place. span: as thought_mask takes
    it; data: their name, "train_dataset" where the tags must stand, too. Streams are seen only once."""
    if isinstance(rows, dict):
        for key, each in rows.items():
            check_thoughts(each, args, tokenizer, span, f"{data}[{key!r}]")
    if not isinstance(rows, Dataset):
        return
    for name in TAGS:
        if (text := getattr(args, name)) is not None:
            check_tag(rows, name, text, args.targets, tokenizer, data)
    cuts = args.is_soft and args.truncation_mode == "keep_end"
    for number, row in enumerate(rows if cuts else ()):
        if len(row["input_ids"]) == args.max_length and _lacks_begin(row, args, span):
            raise ValueError(
                f"row {number} of {data} lacks the beginning of its thought, cut to max_length={args.max_length} by "
                "truncation_mode='keep_end': raise max_length, or leave truncation_mode at 'keep_start'"
            )
    has_several = args.is_soft and (has_turns(rows) or args.assistant_only_loss)
    for number, row in enumerate(rows if has_several else ()):
        if why := _ambiguous(row, args, span):
            raise ValueError(
                f"row {number} of {data} is a chat {why}: give rows of prompt and completion, one for each answer"
            )


def _lacks_begin(row: dict[str, Any], args, span: dict) -> bool:
    """Has a row that was cut from its beginning lost what opens its thought, or is counted from?"""
    labels = row.get("labels", row["input_ids"])
    if args.think_start is None:  # a whole text may be as long as max_length, uncut
        return args.think_steps is not None and "prompt" in row and labels[0] != -100
    return bool(matches(span["end"], labels)) and not matches(span["start"], row["input_ids"])


def _ambiguous(row: dict[str, Any], args, span: dict) -> str | None:
    """Why thought_mask would not find the thoughts of a chat; None where it does."""
    labels = row.get("labels", row["input_ids"])
    learnt = [label != -100 for label in labels]
    answers = sum(now and not before for now, before in zip(learnt, [False, *learnt], strict=False))
    starts, ends = (len(matches(span[tag], labels)) for tag in ("start", "end"))
    if ends > 1 and not (args.assistant_only_loss and answers == 1):
        return f"with think_end={args.think_end!r} {ends} times, of which the first alone ends a thought"
    if args.think_start is not None and not matches(span["start"], row["input_ids"]):
        why = f"with think_end={args.think_end!r} and no think_start={args.think_start!r} before it"
        return why if ends else None
    is_bounded = args.think_steps is not None or (args.think_end is not None and not starts)
    if is_bounded and answers > 1:
        return f"of {answers} answers, and the thought of the first alone is found"
    return None


def check_tag(dataset: Dataset, name: str, text: str, targets: str, tokenizer, data: str) -> None:
    """Raise ValueError for a tag that stands nowhere in the tokenised training rows, and for a row in
    which the tokenizer merges it with its neighbours beyond recognition: whole completions would be
    thought, and nothing would say so. A row may lack it, and held-out rows may be answers alone.
    "think_start" may stand in a prompt too."""
    moves, in_prompts, stands = spelled(tokenizer, text), name == "think_start", False
    for number, row in enumerate(dataset):
        for tokens in _texts(row, targets, in_prompts):
            if matches(moves, tokens):
                stands = True
            elif text in tokenizer.decode([token for token in tokens if token >= 0]):
                raise ValueError(
                    f"row {number} of {data} holds {name}={text!r}, but the tokenizer merges it with its neighbours, "
                    f"so its tokens {[*tag_ids(tokenizer, text)]} are not there: put a space or a line break around "
                    "it, or add it as a special token"
                )
    if not stands and data == "train_dataset":
        where = "prompt or completion" if in_prompts else "completion"
        raise ValueError(
            f"{name}={text!r}, tokens {[*tag_ids(tokenizer, text)]}, stands in no {where} of the training data (cut to "
            "max_length): name a text that does, or give think_steps instead"
        )


def _texts(row: dict[str, Any], targets: str, in_prompts: bool) -> list[list[int]]:
    """What a row can be trained on; without the prompts as labels."""
    labels = row.get("labels", row["input_ids"])
    if targets != "traces" or "trace_ids" not in row:  # held-out rows have none
        return [row["input_ids"] if in_prompts else labels]
    begin = (
        0
        if in_prompts
        else next((i for i, label in enumerate(labels) if label != -100), len(labels))
    )
    return [trace[begin:] for trace in row["trace_ids"]]


@dataclass
class SoftCollator(DataCollatorForLanguageModeling):
    """Pads on the right. Rows with `trace_ids` also give [B, M, T] of them, M the most of a row;
    the mask of the rows that have fewer is 0 there."""

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Tensor]:
        ids = [e["input_ids"] for e in examples]
        labels = [e.get("labels", e["input_ids"]) for e in examples]
        traces = [e["trace_ids"] for e in examples] if "trace_ids" in examples[0] else []
        M = max(map(len, traces), default=0)
        flat = [row[m] if m < len(row) else [] for row in traces for m in range(M)]
        longest = max(map(len, ids + flat))
        longest += -longest % (self.pad_to_multiple_of or 1)
        input_ids, mask = _pad(ids, longest, self.pad_token_id)
        batch = {
            "input_ids": input_ids,
            "labels": _pad(labels, longest, -100)[0],
            "attention_mask": mask,
        }
        if traces:
            trace_ids, trace_mask = _pad(flat, longest, self.pad_token_id)
            shape = (len(traces), M, longest)
            batch |= {"trace_ids": trace_ids.view(shape), "trace_mask": trace_mask.view(shape)}
        return batch


@dataclass
class PackedCollator(SoftCollator):
    """Rows of `packed` also give `thought` [B, T] bool, and `position_ids` [B, T], which are 0 where
    an example begins and all over the padding."""

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Tensor]:
        batch = super().torch_call(examples)
        if "seq_lengths" not in examples[0]:
            return batch
        T = batch["input_ids"].shape[1]
        positions = [[i for n in e["seq_lengths"] for i in range(n)] for e in examples]
        thought = _pad([e["thought"] for e in examples], T, 0)[0].bool()
        return batch | {"position_ids": _pad(positions, T, 0)[0], "thought": thought}


def packed(dataset: Dataset, length: int, span: dict, num_proc: int | None = None) -> Dataset:
    """Tokenised examples in rows of up to `length` tokens, each in the row that it fits best, the
    longest first; `seq_lengths` says where they end, `thought` what of them is thought. What stands
    before an example is not its own, so its first token is neither target nor thought.

    span: what tells the thought, as thought_mask takes it. num_proc: processes that mark thoughts.
    """

    def marked(row: dict) -> dict:
        labels = row.get("labels", row["input_ids"])
        thought = thought_of(row["input_ids"], labels, span)
        return {"labels": [-100, *labels[1:]], "thought": [False, *thought[1:]]}

    dataset = dataset.map(marked, num_proc=num_proc, desc="Marking thoughts")
    return pack_dataset(dataset.select_columns(["input_ids", "labels", "thought"]), length, "bfd")


def _pad(rows: list[list[int]], length: int, value: int) -> tuple[Tensor, Tensor]:
    """Rows padded on the right and their mask, each [len(rows), length] int64."""
    lengths = np.fromiter(map(len, rows), np.int64, len(rows))
    mask = np.arange(length) < lengths[:, None]
    if mask.all():
        out = np.array(rows, dtype=np.int64)
    else:
        out = np.full(mask.shape, value, dtype=np.int64)
        out[mask] = np.concatenate([np.asarray(row, dtype=np.int64) for row in rows])
    return torch.from_numpy(out), torch.from_numpy(mask.astype(np.int64))


def check_pickable(dataset: Dataset, needs: str) -> None:
    """Raise ValueError for a stream or a dict of datasets, in the name of what needs rows that can
    be picked."""
    if not isinstance(dataset, Dataset):
        raise ValueError(
            f"{needs} needs a datasets.Dataset that is no stream, not {type(dataset).__name__}"
        )


def check_traces(dataset: Dataset, targets: str) -> None:
    """Raise ValueError for data that `targets` "traces" or "oracle" cannot be taken from."""
    check_pickable(dataset, f"targets={targets!r}")
    if missing := sorted({"prompt", "traces"} - set(dataset.column_names)):
        raise ValueError(
            f"targets={targets!r} needs columns {missing}; the data has {dataset.column_names}"
        )
    if not all(dataset["traces"]):
        raise ValueError(
            f"targets={targets!r}: row {list(map(bool, dataset['traces'])).index(False)} has no traces"
        )
    prompt, traces = dataset.features["prompt"], dataset.features["traces"]
    if not is_list(traces):
        raise ValueError(f"targets={targets!r}: column 'traces' holds no lists: give several a row")
    of_prompt, of_traces = ("chats" if is_list(f) else "texts" for f in (prompt, traces.feature))
    if of_prompt != of_traces:
        raise ValueError(
            f"targets={targets!r}: the prompts are {of_prompt} and the traces {of_traces}: give both as texts, or each "
            "trace, too, as a list of messages"
        )


def add_trace_ids(dataset, tokenizer, max_length: int | None = None, num_proc: int | None = None):
    """Tokenise the column `traces` of a data set, several by name, or None, prompt included, as TRL
    tokenises prompt and completion, in num_proc processes."""
    if isinstance(dataset, dict):
        how = tokenizer, max_length, num_proc
        return type(dataset)({name: add_trace_ids(rows, *how) for name, rows in dataset.items()})
    if dataset is None:
        return None

    def tokenise(row: dict) -> dict:
        if isinstance(row["prompt"], str):
            eos = tokenizer.eos_token
            texts = [row["prompt"] + t + ("" if t.endswith(eos) else eos) for t in row["traces"]]
            ids = tokenizer(texts)["input_ids"]
        else:
            chats, told = [row["prompt"] + trace for trace in row["traces"]], template_of(row)
            ids = [
                tokenizer.apply_chat_template(chat, return_dict=True, **told)["input_ids"]
                for chat in chats
            ]
        return {"trace_ids": [x[:max_length] for x in ids]}

    return dataset.map(tokenise, num_proc=num_proc, desc="Tokenizing traces")


def frontier(
    trace_ids: Tensor, trace_mask: Tensor | None = None, gold: Tensor | None = None
) -> Soft:
    """Oracle soft targets: at each position the empirical distribution of the traces' tokens there,
    the target of continuous supervised fine-tuning (CoT2, arXiv:2505.23648, section 3). Repeated
    ids stand side by side.

    trace_ids: [..., M, T] int64, equally likely; trace_mask: the same shape, 0 where a trace has
    ended (None: nowhere); gold: [..., T], the token where all have ended -> Soft [..., T, M].
    """
    ids = trace_ids.transpose(-1, -2)
    if trace_mask is None:
        return Soft(ids, torch.full(ids.shape, 1 / ids.shape[-1], device=ids.device))
    here = trace_mask.transpose(-1, -2).bool()
    none = ~here.any(-1, keepdim=True)
    here = here | none
    return Soft(ids.where(~none, gold[..., None]), here / here.sum(-1, keepdim=True))
