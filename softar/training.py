"""What all trainers share: options with their help texts, checks before training."""

import contextlib
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from trl import SFTConfig
from trl.models.utils import _ForwardRedirection


@contextlib.contextmanager
def no_interrupt():
    """Hold Ctrl-C back until the block is through, so that it cannot cut a checkpoint in half."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    held = []
    before = signal.signal(signal.SIGINT, lambda *args: held.append(args))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if held:
            signal.raise_signal(signal.SIGINT)


def inside_forward(wrapped: nn.Module, model: nn.Module, function: Callable, *inputs):
    """function(*inputs), run inside the forward of `wrapped`: there DDP and FSDP have the parameters
    of `model` at hand, and count the call as a forward. TRL's helper for it is private to TRL."""
    return _ForwardRedirection()(wrapped, model, function, *inputs)


class MicroBatches:
    """Mixin of a trainer that draws: numbers the micro-batches of each step, and of each
    evaluation, from 0, so that a draw can depend on the step and this number alone."""

    _micro = 0

    def next_micro(self) -> int:
        micro, self._micro = self._micro, self._micro + 1
        return micro

    def restart_micro(self) -> None:
        self._micro = 0

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        self.restart_micro()
        return super().get_batch_samples(epoch_iterator, num_batches, device)

    def evaluate(self, *args, **kwargs):
        self.restart_micro()
        return super().evaluate(*args, **kwargs)


def opt(default: Any, text: str):
    return field(default=default, metadata={"help": text})


@dataclass
class PlainSFTConfig(SFTConfig):
    """TRL's SFTConfig for a loss of our own on an example a row: CPU where there is nothing else,
    no packing."""

    def __post_init__(self):
        if not torch.accelerator.is_available():
            self.use_cpu = True
            self.bf16 = bool(self.bf16)
        super().__post_init__()
        if self.packing or self.padding_free:
            given = f"packing={self.packing}, padding_free={self.padding_free}"
            raise ValueError(f"{given}: {type(self).__name__} needs an example a row")
        if self.loss_type != "nll" or self.label_smoothing_factor:
            given = f"loss_type={self.loss_type!r}, label_smoothing_factor={self.label_smoothing_factor}"
            raise ValueError(
                f"{given}: {type(self).__name__} has a loss of its own, leave them at 'nll' and 0"
            )
