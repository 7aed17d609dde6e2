"""What soft SFT checks of its model and rows, and says, before the first step."""

from itertools import islice

import torch
from datasets import Dataset
from torch import nn

from ..mixers import mk_mixer
from ..soft import mk_proba_dist
from .data import thought_mask

LOOKED_AT = 1000  # rows that the forecast is made from


def check_left(dataset, max_length: int | None) -> None:
    """Raise ValueError where TRL has dropped every row: it does so with prompts that fill
    max_length."""
    if isinstance(dataset, Dataset) and len(dataset) == 0:
        raise ValueError(
            f"max_length={max_length} leaves no row: all prompts are as long; raise it or shorten them"
        )


def check_room(dataset, room: int | None) -> None:
    """Raise ValueError for a row longer than the model's table of positions. room: its size, None
    without one."""
    if room is None or not isinstance(dataset, Dataset):
        return
    for number, row in enumerate(dataset):
        longest = max(map(len, [row["input_ids"], *row.get("trace_ids", [])]))
        if longest > room:
            raise ValueError(
                f"row {number} has {longest} tokens, and the model a table of {room} positions: give "
                f"max_length={room} or drop such rows"
            )


def room_of(model: nn.Module) -> int | None:
    """Positions in the model's learnt table of them; None where there is none, and any number of
    positions can be computed."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and name.rpartition(".")[2] in TABLES:
            most = model.config.get_text_config(decoder=True).max_position_embeddings
            # RoBERTa counts from behind its padding
            behind = 0 if module.padding_idx is None else module.padding_idx + 1
            return min(most, module.num_embeddings - behind)
    return None


TABLES = ("wpe", "embed_positions", "position_embeddings", "position_embedding")


def forecast(args, dataset, span: dict) -> str | None:
    """What a step will cost, in a line: forwards, and the tokens that they read. None for a stream,
    whose rows are seen once, and where no mixture is read.

    span: what tells the thought, as thought_mask takes it.
    """
    if not isinstance(dataset, Dataset) or not args.is_soft:
        return None
    rows = list(islice(dataset, LOOKED_AT))
    labels = [row.get("labels", row["input_ids"]) for row in rows]
    thoughts = [int(thought_mask(torch.tensor([row]), **span).sum()) for row in labels]
    length, thought, B = max(map(len, labels)), max(thoughts), args.per_device_train_batch_size
    passes = thought if args.soft_passes is None else args.soft_passes
    if args.targets == "oracle":
        cost = f"1 forward of {B} x {length} tokens"
    elif args.soft_mode == "parallel":
        cost = f"{passes + 1} forwards of {B} x {length} tokens"
    else:
        cost = f"{thought + 1} forwards, one for each column of thought, of {B} x {length} tokens in all"
    whole = args.think_end is None and args.think_steps is None
    what = " (no think_end or think_steps: the whole completion is soft)" if whole else ""
    width = args.soft_top_k or "all"
    return (
        f"soft SFT: thoughts of up to {thought} tokens{what}; a micro-batch takes up to {cost}, "
        f"mixtures of {width} tokens"
    )


def check_learnable(args) -> None:
    """Raise ValueError where a learnt temperature would get no gradient."""
    if args.soft_temperature == 0:
        raise ValueError(
            f"soft_temperature={args.soft_temperature} cannot be learnt from: start above 0"
        )
    why = None
    if args.targets == "oracle":
        why = "targets='oracle' reads the traces' mixtures"
    elif not args.is_soft:
        why = "no mixture is ever read: alpha stays 1, or the mixer gives single tokens"
    elif args.soft_mode == "parallel" and (args.soft_grad_passes == 1 or args.soft_passes == 0):
        why = "soft_passes=0 and soft_grad_passes=1 take the soft inputs as constants"
    elif not _has_gradient(args):
        why = f"mixtures of soft_mixer={args.soft_mixer!r} with these filters do not depend on it"
    if why is not None:
        raise ValueError(f"learn_temperature=True gets no gradient: {why}; leave it at False")


def _has_gradient(args) -> bool:
    temperature = torch.tensor(args.soft_temperature, requires_grad=True)
    logits = torch.linspace(0, 1, max(8, args.soft_top_k or 0))[None]
    dist = mk_proba_dist(logits, **args.filters | {"temperature": temperature})
    mixer = mk_mixer(args.soft_mixer, **(args.soft_mixer_args or {}))
    weights = mixer(dist, rng=torch.Generator().manual_seed(0)).soft.weights
    if not weights.requires_grad:
        return False
    total = (weights * torch.arange(weights.shape[-1]).square()).sum()
    (gradient,) = torch.autograd.grad(total, temperature, allow_unused=True)
    return gradient is not None and bool(gradient != 0)
