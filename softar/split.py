"""Weights split over processes, by FSDP2 or by DeepSpeed's ZeRO-3: they come together layer by layer,
in the forwards that all processes run in step.

A decode takes as many forwards as its texts are long, so it has the weights whole; training counts
its forwards alike in all processes (`softar.sft.forward.most_of_all`).
"""

import os
from collections.abc import Callable

from accelerate import DistributedType
from torch import nn
from torch.distributed.fsdp import FSDPModule
from trl.distributed import DistributedBackend
from trl.models.utils import unwrap_model_for_generation

from .inherited import check_whole_rows
from .training import inside_forward


def is_split(accelerator) -> bool:
    """Has a process only a part of the weights? Not under DDP, ZeRO-1 and ZeRO-2."""
    backend = DistributedBackend(accelerator)
    return backend.is_fsdp or backend.is_zero3


def check_split(trainer, **options) -> None:
    """Raise ValueError for a way to split that accelerate leaves out here, or that decodes would hang
    under, and for options of a trainer that need whole weights: name=(value, why not, what else)."""
    accelerator = trainer.accelerator
    backend, kind = DistributedBackend(accelerator), accelerator.distributed_type
    for name, (variable, there) in ASKED_BY.items():
        if os.environ.get(variable, "false").lower() == "true" and kind != there:
            raise ValueError(
                f"{name} splits weights over GPUs, and here accelerate has them whole in each process "
                f"({kind.value}): leave it out; --num_processes N alone trains in N processes"
            )
    if backend.fsdp_version == 1:
        raise ValueError(f"fsdp_version=1: {type(trainer).__name__} trains under FSDP2, give 2")
    if backend.is_fsdp and (form := accelerator.state.fsdp_plugin.state_dict_type.name) != WHOLE:
        raise ValueError(
            f"fsdp_state_dict_type={form}: a checkpoint is a model to be opened, give {WHOLE}"
        )
    check_whole_rows(accelerator.parallelism_config)
    args = trainer.args
    has_state = args.optim != "sgd" or "momentum" in (args.optim_args or "")
    if backend.is_fsdp and not (has_state or args.save_strategy == "no" or args.save_only_model):
        raise ValueError(
            "optim='sgd' under FSDP2: torch does not go on from a checkpoint of an optimiser without a state; give "
            "optim_args='momentum=0.9', another optim, or save_strategy='no'"
        )
    if backend.is_zero3 and not _zero(accelerator).get(GATHERS):
        raise ValueError(
            f"{GATHERS} is off: a checkpoint is a model to be opened, set it (in accelerate's file "
            "zero3_save_16bit_model: true)"
        )
    for name, (value, why) in options.items() if is_split(accelerator) else ():
        if value:
            raise ValueError(f"{name}={value!r} under FSDP or ZeRO-3: {why}")


def with_whole_weights(trainer, function: Callable):
    """function(the trainer's model), with all weights at hand meanwhile; to be called in all
    processes. On each device there must be room for the model."""
    accelerator, args = trainer.accelerator, trainer.args
    how = dict(gradient_checkpointing_kwargs=args.gradient_checkpointing_kwargs)
    error = None
    with unwrap_model_for_generation(trainer.model_wrapped, accelerator, **how) as model:
        try:
            if not isinstance(model, FSDPModule):
                return function(model)
            # the outermost module has to be the first that FSDP2 sees at work
            return inside_forward(model, model, lambda: _gathered(model, function))
        # TRL puts gradient checkpointing and DeepSpeed's hooks back only where nothing is raised
        except BaseException as raised:
            error = raised
    try:
        raise error
    finally:
        del error  # it holds this frame, which would hold it


def on_main(trainer, function: Callable):
    """The same, in all processes too, of which the main one alone calls function; None in others."""
    here = trainer.accelerator.is_main_process
    return with_whole_weights(trainer, lambda model: function(model) if here else None)


WHOLE, GATHERS = "FULL_STATE_DICT", "stage3_gather_16bit_weights_on_model_save"
ASKED_BY = {
    "FSDP": ("ACCELERATE_USE_FSDP", DistributedType.FSDP),
    "DeepSpeed": ("ACCELERATE_USE_DEEPSPEED", DistributedType.DEEPSPEED),
}


def _zero(accelerator) -> dict:
    return accelerator.state.deepspeed_plugin.deepspeed_config["zero_optimization"]


def _gathered(model: nn.Module, function: Callable):
    parts = [module for module in model.modules() if isinstance(module, FSDPModule)]
    # whether each lets go of its weights after a forward; torch sets that and does not tell it
    groups = [group for part in parts for group in part._get_fsdp_state()._fsdp_param_groups]
    before = [group.post_forward_mesh_info for group in groups]
    try:
        model.set_reshard_after_forward(False)
        for part in parts:
            part.unshard()
        return function(model)
    finally:
        for part in parts:
            part.reshard()
        for group, info in zip(groups, before, strict=True):
            group.post_forward_mesh_info = info
