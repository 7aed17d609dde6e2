"""The checkpoints of a training: which of them are whole, and what to go on from."""

import json
import os
import zipfile
from dataclasses import fields, is_dataclass
from enum import Enum
from pathlib import Path

STATE = "trainer_state.json"  # comes last in a checkpoint
PICKLES = (".pt", ".pth", ".bin")
WEIGHTS = ("*model*.safetensors", "*model*.bin")
ANY_WHOLE = "whole"
EARLIER = "_earlier"  # in a folder, what an earlier training left there
ADAPTER = ("adapter_config.json", "adapter_model.safetensors")
ARGUMENTS = "softar_arguments"  # in STATE, what the training was told of the following
# The optimiser goes on with these as they were; so it does with the learning rates of its parts
KEPT = ("optim", "optim_args", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon")
RATE = "learning_rate"  # the end of their names
LENGTH = ("max_steps", "num_train_epochs")
SCHEDULE = (*LENGTH, "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps")
ROWS = (
    *("per_device_train_batch_size", "gradient_accumulation_steps", "seed", "data_seed"),
    *("train_sampling_strategy", "dataloader_drop_last"),
    *("num_generations", "steps_per_generation", "num_iterations"),
)
# What rows are made of, where there are texts to learn
TEXTS = (
    *("max_length", "packing", "truncation_mode", "shuffle_dataset", "dataset_text_field"),
    *("completion_only_loss", "assistant_only_loss", "eos_token", "chat_template_path"),
)
# What a step learns of its rows, beside softar's own options
LEARNT = (
    *("max_grad_norm", "bf16", "fp16", "neftune_noise_alpha", "max_completion_length"),
    *("temperature", "beta", "delta", "epsilon", "epsilon_high", "entropy_coef", "loss_type"),
    *("reward_weights", "scale_rewards", "multi_objective_aggregation"),
    *("mask_truncated_completions", "chat_template_kwargs"),
)
# Beside the arguments: an attribute that a recipe gives them, a dict of what else its rows are made with
MADE_WITH = "made_with"
# A training goes on with these alone
FIXED = (
    *("program", "model", "model_revision", "from_causal", "sft_steps"),
    *("use_peft", "use_rslora", "use_dora", "lora_r", "lora_alpha"),
    *("lora_target_modules", "lora_target_parameters", "lora_modules_to_save"),
)


def resumes(training) -> bool:
    return str(training.resume_from_checkpoint or "false").lower() != "false"


def checkpoint_of(training) -> str | None:
    """What to go on from: "true" is the newest checkpoint of the output folder, "whole" the newest
    that is not damaged, anything else the path of one. None: from the start.

    Raises:
        ValueError: the checkpoint is damaged; names the whole one before it.
    """
    if not resumes(training):
        return None
    wanted = str(training.resume_from_checkpoint)
    if wanted.lower() == ANY_WHOLE:
        path = last_whole(training.output_dir)
    else:
        path = last_checkpoint(training.output_dir) if wanted.lower() == "true" else wanted
        if path is not None:
            check_whole(path)
    if path is not None:
        changes(path, training)
    return path


def arguments_of(training) -> dict:
    """What a checkpoint has to know of training arguments, for `changes`, as JSON gives it back."""
    kept = {*KEPT, *SCHEDULE, *ROWS, *TEXTS, *LEARNT} | own_options(training)
    values = {k: v for k, v in vars(training).items() if k in kept or k.endswith(RATE)}
    values |= vars(training).get(MADE_WITH, {})
    return json.loads(json.dumps(values, default=_as_json))


def own_options(training) -> set[str]:
    """The options of a configuration that are softar's, not transformers' or TRL's."""
    if not is_dataclass(training):
        return set()
    classes = [cls for cls in type(training).__mro__ if is_dataclass(cls)]
    theirs = [cls for cls in classes if cls.__module__.split(".")[0] in ("transformers", "trl")]
    return {f.name for f in fields(training)} - {f.name for cls in theirs for f in fields(cls)}


def _as_json(value):
    if isinstance(value, Enum):
        return value.value
    return str(value) if isinstance(value, Path) else type(value).__name__


def others(before: dict, training) -> dict:
    """The arguments of a training that are other than before, as `arguments_of` gave those."""
    now = arguments_of(training)
    other = {k: v for k, v in now.items() if k in before and v != before[k]}
    if training.max_steps > 0 and "max_steps" not in other:
        other.pop("num_train_epochs", None)  # does not count
    if "model" in other and os.path.realpath(other["model"]) == os.path.realpath(before["model"]):
        del other["model"]  # the same folder by another path
    return other


def check_same(before: dict, other: dict, where: str | Path) -> None:
    """Raise ValueError for what a training in `where` cannot go on with: another program or model."""
    for name in (name for name in FIXED if name in other):
        raise ValueError(
            f"{name}={other[name]!r}, but {str(where)!r} is of a training with {before[name]!r}: give the same, or "
            "start anew without resume_from_checkpoint"
        )


def is_of_optimiser(name: str) -> bool:
    return name in KEPT or name.endswith(RATE)


def changes(checkpoint: str | Path, training) -> str | None:
    """What becomes different where a training goes on from a checkpoint with other arguments, in a
    line; None where nothing does, and of a checkpoint that does not know its own.

    Raises:
        ValueError: for what would do nothing, as the optimiser in the checkpoint has its own, and for
            another program, model or adapter.
    """
    file = Path(checkpoint, STATE)
    state = json.loads(file.read_text()) if file.is_file() else {}
    before = state.get("stateful_callbacks", {}).get(ARGUMENTS)
    if before is None:
        return None
    other = others(before, training)
    check_same(before, other, checkpoint)
    has_optimiser = Path(checkpoint, "scheduler.pt").is_file()
    of_optimiser = tuple(filter(is_of_optimiser, other))
    for name in of_optimiser if has_optimiser else ():
        raise ValueError(
            f"{name}={other[name]!r} does nothing, as {str(checkpoint)!r} goes on with its optimiser's "
            f"{before[name]!r}: give the same, or start a new run from its weights"
        )
    rest = {*other}.difference(of_optimiser, *WHAT)
    said = [
        ", ".join(f"{k}={other[k]!r}, not {before[k]!r}" for k in names if k in other) + what
        for names, what in (*WHAT.items(), (of_optimiser, ANEW), (sorted(rest), FROM_HERE))
        if {*names} & {*other}
    ]
    return f"goes on from {checkpoint} with {'; '.join(said)}" if said else None


WHAT = {
    SCHEDULE: " (schedules go on as if it had been so from the start)",
    (*ROWS, "data"): " (of this epoch some rows come twice, others not)",
    TEXTS: " (rows are made so from here on, and the place in this epoch is counted in them)",
}
ANEW = " (the checkpoint has no optimiser, so that it begins anew)"
FROM_HERE = " (from here on)"


def set_adapter_apart(folder: Path) -> bool:
    """Move an adapter of an earlier training into the folder EARLIER, as whole weights have been saved
    beside it, in whose place `load` would open it. False where there is none."""
    left = [folder / name for name in ADAPTER if (folder / name).is_file()]
    for path in left:
        (folder / EARLIER).mkdir(exist_ok=True)
        path.replace(folder / EARLIER / path.name)
    return bool(left)


def checkpoints(folder: str | Path) -> list[Path]:
    """Those that were written to their end, the newest first."""
    ended = [p.parent for p in Path(folder).glob(f"checkpoint-*/{STATE}")]
    return sorted(ended, key=lambda p: int(p.name.split("-")[1]), reverse=True)


def last_checkpoint(folder: str | Path) -> str | None:
    """The newest checkpoint that was written to its end."""
    return next(map(str, checkpoints(folder)), None)


def last_whole(folder: str | Path) -> str | None:
    """The newest checkpoint without a damaged file."""
    return next((str(path) for path in checkpoints(folder) if damage(path) is None), None)


def check_whole(path: str | Path) -> None:
    """Raise ValueError for a damaged checkpoint, in the name of the whole one before it."""
    what = damage(path)
    if what is None:
        return
    folder = Path(path).parent
    before = next((p for p in checkpoints(folder) if p != Path(path) and damage(p) is None), None)
    remedy = (
        "there is no other, start anew"
        if before is None
        else f"{str(before)!r} is whole, go on from it with resume_from_checkpoint={ANY_WHOLE!r}"
    )
    raise ValueError(f"resume_from_checkpoint={str(path)!r} is damaged: {what}; {remedy}")


def damage(checkpoint: str | Path) -> str | None:
    """What is wrong with the files of a checkpoint, None where nothing is: as far as their ends and
    beginnings tell, without reading the weights."""
    if not Path(checkpoint).is_dir():
        return "there is no such folder"
    files = sorted(path for path in Path(checkpoint).iterdir() if path.is_file())
    folders = any(path.is_dir() for path in Path(checkpoint).iterdir())  # of sharded weights
    if not folders and not any(path.match(pattern) for path in files for pattern in WEIGHTS):
        return "it holds no weights"
    for path in files:
        check = CHECKS.get(path.suffix)
        if check is not None and (what := check(path)) is not None:
            return f"{path.name} {what}"
    return None


def _json(path: Path) -> str | None:
    try:
        json.loads(path.read_text())
    except ValueError as error:
        return f"is no JSON ({error})"
    return None


def _safetensors(path: Path) -> str | None:
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= size - 8:
            return f"is cut off after {size} bytes"
        try:
            header = json.loads(file.read(length))
            ends = [entry["data_offsets"][1] for k, entry in header.items() if k != "__metadata__"]
        except (ValueError, TypeError, KeyError, AttributeError):
            return "has a broken header"
    needs = 8 + length + max(ends, default=0)
    return None if size == needs else f"has {size} bytes of {needs}"


def _pickle(path: Path) -> str | None:
    """torch.save writes a zip archive, whose table of contents comes last."""
    is_whole = zipfile.is_zipfile(path)
    return None if is_whole else f"is cut off after {path.stat().st_size} bytes"


CHECKS = {".json": _json, ".safetensors": _safetensors, **dict.fromkeys(PICKLES, _pickle)}
