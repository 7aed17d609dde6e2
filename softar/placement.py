"""In which dtype and on which device a model is opened, and in which mode it runs."""

import functools
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

DTYPES = {
    "auto": "auto",
    "float32": torch.float32,
    "float64": torch.float64,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}
HALF = [torch.float16, torch.bfloat16]


def to_dtype(dtype: str | torch.dtype, model_kwargs: dict) -> torch.dtype | str:
    """The dtype or "auto"; takes torch_dtype, transformers' old name for it, out of
    `model_kwargs`."""
    asked = (
        [dtype] if "torch_dtype" not in model_kwargs else [dtype, model_kwargs.pop("torch_dtype")]
    )
    for value in asked:
        if not isinstance(value, (str, torch.dtype)) or value not in (*DTYPES, *DTYPES.values()):
            raise ValueError(f"dtype={value!r:.80} is unknown: choose one of {sorted(DTYPES)}")
    dtypes = {DTYPES.get(value, value) for value in asked}
    if len(dtypes) > 1 and asked[0] != "auto":
        raise ValueError(f"dtype={asked[0]!r} and torch_dtype={asked[1]!r}: give one of them")
    return DTYPES.get(asked[-1], asked[-1])


def computed_in(stored: torch.dtype, device: torch.device) -> torch.dtype:
    """What weights are computed in where no dtype is asked for: as stored, or, said once, float32
    on a CPU that has no instructions for them."""
    slow = [torch.float16] if torch.cpu._is_avx512_bf16_supported() else HALF
    if device.type != "cpu" or stored not in slow:
        return stored
    _tell_once(f'{stored} is slow on this CPU: taking float32; dtype="{stored}" keeps it')
    return torch.float32


@functools.cache
def _tell_once(message: str) -> None:
    logging.getLogger("softar").warning(message.replace("torch.", ""))


def to_machine(model, dtype: torch.dtype | str, device: torch.device | None):
    """The model where it is to run, None where it is already; "auto" is settled by
    `computed_in`."""
    if device is None:
        return model
    # a quantised model cannot be cast
    if dtype == "auto" and "quantization_config" not in model.config:
        dtype = computed_in(model.dtype, device)
        if dtype != model.dtype:
            model.to(dtype)
            model.config.dtype = dtype
    return model.to(device)


def to_device(device: str | torch.device | None, model_kwargs: dict) -> torch.device | None:
    """Where to move the model; None where `device_map` places it."""
    if "device_map" in model_kwargs:
        if device is not None:
            raise ValueError(
                f"device={device!r} and device_map={model_kwargs['device_map']!r}: give one of them"
            )
        return None
    if device is None:
        if not torch.cuda.is_available():
            return torch.device("cpu")
        # Under a launcher each process has a GPU of its own, which nobody has made current yet
        return torch.device(
            "cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count()
        )
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(
            f"device={device!r:.80} is unknown: give 'cpu', 'cuda', 'cuda:1', 'mps', ..."
        ) from error
    if found.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"device={str(device)!r}: there is no CUDA device that torch can use here; give 'cpu'"
        )
    return found


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model without dropout meanwhile; then each module is in the mode that it was in."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True
