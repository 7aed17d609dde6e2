"""What an engine of vLLM changes in the process that starts it, and how the process stays as it was."""

import contextlib
import logging
import os
import random
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from torch import nn
from trl.trainer.utils import ensure_master_addr_port

from softar.vllm.machine import on_cpu

SHARED = Path("/dev/shm")  # of POSIX, on Linux
WHERE = "VLLM_ENABLE_V1_MULTIPROCESSING"


def repack_tied(model: nn.Module) -> None:
    """vLLM 0.32 reloads a tied embedding, but not what its head made of it for a CPU's kernels."""
    layers = [layer for layer in model.modules() if layer._parameters.get("weight") is not None]
    uses = Counter(id(layer.weight) for layer in layers)
    for layer in layers:
        if uses[id(layer.weight)] > 1 and hasattr(layer, "quant_method"):
            layer.quant_method.process_weights_after_loading(layer)


@contextlib.contextmanager
def as_torchrun(accelerator):
    """Tell vLLM, in torchrun's words, the group of processes that it joins, or makes where there is
    but one. Only while it starts: the next trainer of the program would take itself for one of
    torchrun's."""
    before = {
        key: os.environ.get(key)
        for key in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    }
    places = accelerator.process_index, accelerator.local_process_index, accelerator.num_processes
    os.environ.update(zip(before, map(str, places)))
    ensure_master_addr_port()
    try:
        yield
    finally:
        for key, value in before.items():
            os.environ.pop(key, None)
            if value is not None:
                os.environ[key] = value


@contextlib.contextmanager
def leaving_no_trace():
    """Start an engine here without a trace in the process: vLLM seeds all generators, forbids to
    change the number of threads, sets how float32 is multiplied and where later engines run, and
    tells all that it does."""
    log, threads, precision = (
        logging.getLogger("vllm"),
        torch.set_num_threads,
        torch.get_float32_matmul_precision(),
    )
    where = os.environ.get(WHERE)
    level, states = log.level, (random.getstate(), np.random.get_state())  # noqa: NPY002
    if "VLLM_LOGGING_LEVEL" not in os.environ:
        log.setLevel(logging.ERROR)
    try:
        with torch.random.fork_rng():
            yield
    finally:
        torch.set_num_threads = threads
        torch.set_float32_matmul_precision(precision)
        os.environ.pop(WHERE, None)
        if where is not None:
            os.environ[WHERE] = where
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        log.setLevel(level)


@contextlib.contextmanager
def naming_no_memory(accelerator):
    """Start an engine that is split over processes. On a CPU these share memory by files, whose names
    are the same for all engines of torchrun's processes; vLLM leaves them, and the next engine of the
    machine would end on them (errno 17). Once all have opened them, no name is needed."""
    _unname(accelerator)
    yield
    _unname(accelerator)


def _unname(accelerator):
    """Take the names away between two barriers: all that is being opened has been, and nobody makes any
    before they are gone."""
    accelerator.wait_for_everyone()
    if on_cpu() and accelerator.num_processes > 1:
        for file in SHARED.glob("-*-cpushm_*"):
            with contextlib.suppress(OSError):  # another process was first; another user's
                file.unlink()
    accelerator.wait_for_everyone()


def without_compiling():
    """On a CPU vLLM would compile small functions at the first prompts, which takes longer than
    they ever do."""
    return torch._dynamo.config.patch(disable=True) if on_cpu() else contextlib.nullcontext()
