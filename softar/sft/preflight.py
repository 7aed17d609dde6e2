"""What soft SFT checks of its model and rows, and says, before the first step."""

import inspect
from itertools import islice

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from accelerate.utils import is_peft_model
from datasets import Dataset
from torch import nn

from ..config import SoftConfig
from ..guard import check_range
from ..mixers import BUILT_IN, check_mixed, mk_mixer
from ..models import check_autoregressive, check_keeps_apart, layers_of
from ..soft import mk_proba_dist
from ..training import prepare_trained
from .data import check_pickable, check_traces, has_turns, thought_of
from .forward import check_sequential
from .learnt import ROOM, learnt_of, mixture

LOOKED_AT = 1000  # rows that the forecast is made from


def check_columns(model, args, train_dataset) -> None:
    """Raise ValueError for training data that lacks what the options need."""
    if args.packing:
        check_pickable(train_dataset, "packing=True")
    _check_turns(args, train_dataset, "train_dataset")
    if args.targets != "gold":
        check_traces(train_dataset, args.targets)
    if args.completion_logits:
        check_takes_fewer_logits(model, train_dataset)


def _check_turns(args, rows, data: str) -> None:
    """Raise ValueError for chats that do not say what of them is prompt. data: their name."""
    is_said = args.assistant_only_loss or args.think_start is not None
    if has_turns(rows) and args.is_soft and not is_said:
        raise ValueError(
            f"{data} has the columns {rows.column_names}, chats in which what users say would be thought, too: give "
            "rows of prompt and completion, think_start, or assistant_only_loss=True"
        )


def check_held_out(args, rows, score, data: str = "eval_dataset") -> None:
    """Raise ValueError for held-out rows, one data set or several by name, that lack what an evaluation
    reads of them, or would be read otherwise than they are decoded. data: their name."""
    if isinstance(rows, dict):
        for key, each in rows.items():
            check_held_out(args, each, score, f"{data}[{key!r}]")
        return
    if rows is not None:
        _check_turns(args, rows, data)
    if score is not None and args.eval_decode_rows and rows is not None:
        check_pickable(rows, "eval_dataset with score=")
        if "prompt" not in rows.column_names:
            raise ValueError(
                f"score= needs a column 'prompt' in the held-out rows, not {rows.column_names}: give it, or "
                "eval_decode_rows=0"
            )
    if args.targets == "oracle" and rows is not None:
        check_traces(rows, args.targets)


def check_model(trainer) -> None:
    """Make a saved adapter trainable. Raises ValueError for a model that soft SFT cannot train."""
    # by TRL, for every mixture of experts whose configuration has a coefficient
    if trainer.aux_loss_enabled:
        raise ValueError(
            f"router_aux_loss_coef={trainer.router_aux_loss_coef}: soft SFT leaves out the experts' "
            f"load-balancing loss, set it to 0 to agree"
        )
    check_autoregressive(trainer.model, "train it with softar.diffusion's DiffusionSFTTrainer")
    if trainer.args.soft_mode == "sequential":
        check_sequential(trainer.model)
    beside = bool(trainer.args.think_tokens or learnt_of(trainer.args))
    opened = trainer.args.model_init_kwargs
    prepare_trained(type(trainer).__name__, trainer.model, beside=beside, opened=opened)


def check_mixer(args, vocab_size: int, device: torch.device) -> None:
    """Raise ValueError for a mixer that is not softar's and makes of some beliefs what cannot be fed
    back: decoding refuses it at its first step."""
    if args.soft_mixer in BUILT_IN:
        return
    rng = torch.Generator().manual_seed(0)
    logits = torch.randn(2, vocab_size, generator=rng).to(device)
    mixer = mk_mixer(args.soft_mixer, **(args.soft_mixer_args or {}))
    mixed = mixer(mk_proba_dist(logits, **args.filters), rng=rng)
    check_mixed(mixed, *logits.shape, args.soft_mixer)


def check_tokens(rows, args, room: int | None, vocab_size: int) -> None:
    """Raise ValueError for tokenised rows of a Dataset that are none, longer than the model's
    positions, or hold ids that it does not know, also where TRL has dropped all of them: it does so
    with prompts that fill max_length. Of a dict each; streams are seen only once."""
    if isinstance(rows, dict):
        for some in rows.values():
            check_tokens(some, args, room, vocab_size)
    if not isinstance(rows, Dataset):
        return
    if len(rows) == 0:
        raise ValueError(
            f"max_length={args.max_length} leaves no row: all prompts are as long; raise it or shorten them"
        )
    columns = [name for name in ("input_ids", "trace_ids") if name in rows.column_names]
    done = 0
    for table in rows.select_columns(columns).with_format("arrow").iter(batch_size=1000):
        for name in columns:
            _check_column(table[name], done, room, vocab_size, args)
        done += len(table)


def _check_column(lists, first: int, room: int | None, vocab_size: int, args) -> None:
    """lists: an arrow column of ids, or of lists of them, whose first row has this number."""
    row_of = None
    if pa.types.is_nested(lists.type.value_type):  # traces
        row_of, lists = pc.list_parent_indices(lists), pc.list_flatten(lists)
    lengths = pc.list_value_length(lists)
    if room is not None and len(lengths) and (longest := pc.max(lengths).as_py()) > room:
        at = pc.index(lengths, longest).as_py()
        number = first + (at if row_of is None else row_of[at].as_py())
        raise ValueError(
            f"row {number} of the data has {longest} tokens, and the model's positions end at {room}: set "
            f"max_length={room}, or drop such rows"
        )
    multiple = 1 if args.packing else args.pad_to_multiple_of or 1
    if room is not None and len(lengths) and longest + -longest % multiple > room:
        raise ValueError(
            f"pad_to_multiple_of={multiple} pads {longest} tokens to {longest + -longest % multiple}, and the model's "
            f"positions end at {room}: lower one of pad_to_multiple_of and max_length"
        )
    ends = pc.min_max(pc.list_flatten(lists)).as_py()
    if ends["min"] is not None:
        check_range("the data", ends["min"], ends["max"], vocab_size)


def say_cut(trainer, given) -> None:
    """Print what max_length has taken from the training rows: TRL cuts them at it and drops those
    that are prompt throughout then, without a word. given: the rows before TRL has prepared them."""
    rows, room = trainer.train_dataset, trainer.args.max_length
    if room is None or not (isinstance(given, Dataset) and isinstance(rows, Dataset)):
        return
    tables = rows.select_columns("input_ids").with_format("arrow").iter(batch_size=1000)
    lengths = [pc.list_value_length(table["input_ids"]) for table in tables]
    cut = sum(pc.sum(pc.greater_equal(each, room)).as_py() for each in lengths)
    dropped = len(given) - len(rows)
    taken = [f"{cut} are as long or cut there"] if cut else []
    taken += [f"{dropped} are left out, as their prompts fill it"] if dropped > 0 else []
    if taken:
        said = " and ".join(taken)
        trainer.accelerator.print(f"max_length={room}: of {len(given)} training rows {said}")


def eval_length(trainer) -> int:
    """Most tokens that evaluations, and whoever decodes by the saved soft_config.json, decode. Prints
    where that cuts completions like those that are trained on, and of a stream that it may."""
    args, longest = trainer.args, _longest_completion(trainer.train_dataset)
    most = args.eval_new_tokens
    if most is None and longest is not None:
        return longest + (args.latent_stages or 0) * (args.latents_per_step or 1)
    cut = "evaluations, and decoding by the saved soft_config.json, cut"
    if most is None:
        most = SoftConfig.max_new_tokens
        trainer.accelerator.print(
            f"eval_new_tokens={most}, as a stream does not show how long its completions are: {cut} there"
        )
    elif longest is not None and longest > most:
        trainer.accelerator.print(
            f"eval_new_tokens={most}: the longest completion has {longest} tokens; {cut} there"
        )
    return most


def _longest_completion(rows) -> int | None:
    """Tokens of the longest completion, or trace of one, that is trained on; None of a stream."""
    if not isinstance(rows, Dataset):
        return None
    own = "labels" if "labels" in rows.column_names else "input_ids"  # of texts without prompts
    names = [own, *(name for name in ("trace_ids",) if name in rows.column_names)]
    longest = 1
    for table in rows.select_columns(names).with_format("numpy").iter(batch_size=1000):
        for ids, traces in zip(table[own], table.get("trace_ids", [()] * len(table[own]))):
            kept = ids != -100
            prompt = int(kept.argmax())
            longest = max(longest, int(kept.sum()), *(len(trace) - prompt for trace in traces))
    return longest


def check_packed(trainer, examples: int) -> None:
    """Print how full the packed training rows are. Raises ValueError for a model that would mix the
    examples of a row. examples: that stand in them."""
    rows, args = trainer.train_dataset, trainer.args
    tables = rows.select_columns("seq_lengths").with_format("arrow").iter(batch_size=1000)
    lengths = [each for table in tables for each in table["seq_lengths"].to_pylist()]
    filled = sum(map(sum, lengths)) / len(rows) / args.max_length
    trainer.accelerator.print(
        f"packing=True: {examples} training examples in {len(rows)} rows, {filled:.0%} of their "
        f"{args.max_length} tokens filled; steps and epochs count rows"
    )
    several = next((i for i, each in enumerate(lengths) if len(each) > 1), None)
    if several is not None:
        ids = torch.tensor(rows[several]["input_ids"], device=trainer.model.device)
        with trainer.compute_loss_context_manager():  # in the dtype of the training
            beside = min(2, args.per_device_train_batch_size)
            check_keeps_apart(trainer.model, ids, lengths[several], beside)


def freeze(model: nn.Module, args) -> None:
    """Keep what a SoftSFTConfig says as it is. Raises ValueError for more layers than there are."""
    if args.freeze_embeddings:
        model.get_input_embeddings().requires_grad_(False)
    if layers := args.freeze_layers:
        stack = layers_of(model)
        if layers > len(stack):
            raise ValueError(
                f"freeze_layers={layers} but {type(model).__name__} has {len(stack)} layers"
            )
        for layer in stack[:layers]:
            layer.requires_grad_(False)


def whole_weights_for(args) -> dict:
    """What of a SoftSFTConfig needs whole weights, as check_split takes it."""
    in_step = "it takes as many forwards as a thought is long, and processes run theirs in step; use 'parallel'"
    alone = "what is learnt of the mixtures cannot be split; leave it out, or train under DDP"
    sequential = args.soft_mode == "sequential" and args.soft_mode
    tried = "that a model keeps examples apart is tried with whole weights; leave it out, or train under DDP"
    return {"soft_mode": (sequential, in_step), "packing": (args.packing, tried)} | {
        f"learn_{name}": (True, alone) for name in learnt_of(args)
    }


def check_takes_fewer_logits(model, dataset) -> None:
    """Raise ValueError where completion_logits could leave nothing out: for models that compute all
    logits whatever they are asked, and for texts without prompts."""
    inner = model.get_base_model() if is_peft_model(model) else model
    if "logits_to_keep" not in inspect.signature(inner.forward).parameters:
        raise ValueError(
            f"completion_logits=True: {type(inner).__name__} takes no logits_to_keep, set it to False"
        )
    columns = [] if isinstance(dataset, dict) else dataset.column_names or []
    if columns and "prompt" not in columns:
        raise ValueError(
            f"completion_logits=True: the data has {columns} and no prompts whose logits could be left out, set it "
            "to False"
        )


def forecast(args, dataset, span: dict) -> str | None:
    """What a step will cost, in a line: forwards, and the tokens that they read. None for a stream,
    whose rows are seen once, and where no mixture is read.

    span: what tells the thought, as thought_mask takes it.
    """
    if not isinstance(dataset, Dataset) or not args.is_soft:
        return None
    rows = list(islice(dataset, LOOKED_AT))
    labels = [row.get("labels", row["input_ids"]) for row in rows]
    if args.packing:  # each example's
        ends = [
            (np.array(row["thought"], int), np.cumsum([0, *row["seq_lengths"][:-1]]))
            for row in rows
        ]
        thoughts = [int(np.add.reduceat(*each).max()) for each in ends]
    else:
        pairs = zip(rows, labels, strict=True)
        thoughts = [sum(thought_of(row["input_ids"], own, span)) for row, own in pairs]
    length, thought, B = max(map(len, labels)), max(thoughts), args.per_device_train_batch_size
    passes_of = args.soft_passes or 0
    passes = min(thought, passes_of)
    if args.targets == "oracle":
        cost = f"1 forward of {B} x {length} tokens"
    elif args.soft_mode == "parallel":
        cost = f"{passes + 1} forwards of {B} x {length} tokens"
        if passes and not args.packing:  # softar.sft.forward decides it by each batch
            cost += ", or one more that reads the prompts for all others"
    else:
        cost = (
            f"{thought + 1} forwards or more, one for each column of thought, of about {B} x {length} "
            "tokens in all"
        )
    whole = args.think_end is None and args.think_steps is None
    what = " (no think_end or think_steps: the whole completion is soft)" if whole else ""
    width = (args.soft_top_k or 0) * (ROOM if args.learn_top_k else 1) or "all"
    if args.latent_stages is not None:
        latents = args.latent_stages * args.latents_per_step
        forwards = 1 + (latents if args.soft_mode == "sequential" else min(latents, passes_of))
        return (
            f"soft SFT: thoughts of up to {thought} tokens{what} give way to {latents} hidden states in "
            f"{args.latent_stages} stages; a micro-batch of the last takes {forwards} forwards; evaluations and "
            "checkpoints decode as the last stage from the start"
        )
    return (
        f"soft SFT: thoughts of up to {thought} tokens{what}; a micro-batch takes up to {cost}, "
        f"mixtures of {width} tokens"
    )


STARTS = {  # of a learnt filter: where it may begin
    "temperature": (lambda value: value > 0, "start above 0"),
    "min_p": (
        lambda value: value is not None and 0 < value < 1,
        "start between 0 and 1, e.g. 0.05",
    ),
    "top_k": (lambda value: value is not None and value > 1, "start above 1, e.g. 10"),
}
FILTERS = {"step_temperature": "temperature"}  # what each is a part of


def check_learnable(args, name: str) -> None:
    """Raise ValueError where a filter that is to be learnt would get no gradient."""
    part = FILTERS.get(name, name)
    (fits, remedy), start = STARTS[part], args.filters[part]
    if not fits(start):
        raise ValueError(f"soft_{part}={start} cannot be learnt from: {remedy}")
    if name == "top_k" and args.soft_top_p is not None:
        raise ValueError(
            f"soft_top_p={args.soft_top_p} is taken of what a learnt top_k leaves: give one of them"
        )
    why = None
    if args.targets == "oracle":
        why = "targets='oracle' reads the traces' mixtures"
    elif args.think_steps == 0:
        why = "with think_steps=0 nothing is thought"
    elif not args.is_soft:
        why = "no mixture is ever read: alpha stays 1, or the mixer gives single tokens"
    elif args.soft_mode == "parallel" and (args.soft_grad_passes == 1 or args.soft_passes == 0):
        why = "soft_passes=0 and soft_grad_passes=1 take the soft inputs as constants"
    elif not _has_gradient(args, part):
        why = f"mixtures of soft_mixer={args.soft_mixer!r} with these filters do not depend on it"
    if why is not None:
        raise ValueError(f"learn_{name}=True gets no gradient: {why}; leave it at False")


def _has_gradient(args, name: str) -> bool:
    value = torch.tensor(float(args.filters[name]), requires_grad=True)
    most = max(8, ROOM * (args.soft_top_k or 0))
    logits = torch.linspace(0, 1, most)[None]
    dist = mixture(logits, args, {name: value}, most, 0.0)
    mixer = mk_mixer(args.soft_mixer, **(args.soft_mixer_args or {}))
    weights = mixer(dist, rng=torch.Generator().manual_seed(0)).soft.weights
    if not weights.requires_grad:
        return False
    total = (weights * torch.arange(weights.shape[-1]).square()).sum()
    (gradient,) = torch.autograd.grad(total, value, allow_unused=True)
    return gradient is not None and bool(gradient != 0)
