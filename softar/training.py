"""What all trainers share: options with their help texts, checks before training."""

import contextlib
import copy
import math
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate.utils import is_peft_model
from torch import Tensor, nn
from transformers import (
    PreTrainedTokenizerBase,
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
)
from trl import SFTConfig
from trl.models.utils import _ForwardRedirection

from .checks import check_idle, check_least, check_writable
from .inherited import (
    IDLE_TEXTS,
    OF_TEXTS,
    check_before,
    check_filter,
    check_neutral,
    check_open,
    check_prepares,
)
from .models.adapter import remember_base
from .models.kind import uncompiled
from .models.origin import note_changed
from .progress import Pace, step_line
from .resume import (
    ARGUMENTS,
    arguments_of,
    changes,
    check_whole,
    checkpoint_of,
    last_checkpoint,
    last_whole,
)


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

    @property
    def is_logged(self) -> bool:
        """Will what is noted of this step be logged? A step that is not need not wait for the device."""
        args, step = self.args, self.state.global_step + 1
        if args.logging_strategy == "steps" and step % max(1, int(self.state.logging_steps)) == 0:
            return True
        return args.logging_strategy == "epoch" or (args.logging_first_step and step == 1)

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        self.restart_micro()
        return super().get_batch_samples(epoch_iterator, num_batches, device)

    def evaluation_loop(self, *args, **kwargs):  # of `predict`, too
        self.restart_micro()
        return super().evaluation_loop(*args, **kwargs)


class WatchedLosses:
    """Mixin of a trainer, first among its bases. It stops at a loss or a gradient that is NaN or
    infinite, before the weights take it (transformers would log 0 and go on), and its train_loss is
    that of all steps, those before a resume too."""

    _step_loss: Tensor | float = 0.0  # of the micro-batches of this step, on this process
    _losses, _loss_steps = 0.0, 0  # their sum since the start of the training, and of how many
    _started = 0.0  # on the clock
    # of the training up to the checkpoint that it has gone on from, None where that does not say
    seconds_before: float | None = 0.0

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs):
        """True is the newest checkpoint of the output folder, a path that one, False none; left out it is
        what the arguments say.

        Raises:
            ValueError: the checkpoint is damaged, or its optimiser goes on with other numbers than
                were given. FloatingPointError: a loss or a gradient is damaged.
        """
        if resume_from_checkpoint is None:
            resume_from_checkpoint = checkpoint_of(self.args)
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_checkpoint(self.args.output_dir) or True
        if isinstance(resume_from_checkpoint, str):
            check_whole(resume_from_checkpoint)
            if line := changes(resume_from_checkpoint, self.args):
                self.accelerator.print(line)
        self._started = time.perf_counter()
        note_changed(self.model)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def training_step(self, model, inputs, num_items_in_batch=None):
        try:
            loss = super().training_step(model, inputs, num_items_in_batch)
        except FloatingPointError as error:  # of a rollout
            raise FloatingPointError(self._stopped(str(error))) from error
        self._step_loss = self._step_loss + loss
        return loss

    def _get_grad_norm(self, model, grad_norm=None):
        norm = super()._get_grad_norm(model, grad_norm)  # comes right before the optimiser's step
        loss, self._step_loss = self._step_loss, 0.0
        if self.accelerator.num_processes > 1:  # a NaN of one is a NaN of all: they stop together
            loss = self.accelerator.reduce(loss, "mean")
        loss, size = float(loss), 0.0 if norm is None else float(norm)
        # in float16 gradients overflow until the scale of the loss has come down, without harm
        scaler = self.accelerator.scaler
        skips = scaler is not None and scaler.get_scale() > 1
        if not math.isfinite(loss) or not (math.isfinite(size) or skips):
            what = f"the loss is {loss:.4g} and the norm of the gradient {size:.4g}"
            raise FloatingPointError(self._stopped(what))
        self._losses, self._loss_steps = self._losses + loss, self._loss_steps + 1
        return norm

    def _stopped(self, what: str) -> str:
        folder = last_whole(self.args.output_dir)
        rest = (
            "there is no checkpoint yet" if folder is None else f"{folder!r} is the last checkpoint"
        )
        return (
            f"step {self.state.global_step + 1}: {what}, so training stops before the weights are "
            f"changed; {rest}. Lower learning_rate or max_grad_norm, or look at the data of this step"
        )

    # -- the sum of the losses, and the time, go with the checkpoints, in trainer_state.json

    def _init_training_state(self, *args, **kwargs):
        place = super()._init_training_state(*args, **kwargs)
        before = self.state.stateful_callbacks.get(LOSSES, {})
        self._step_loss = 0.0
        self._losses, self._loss_steps = before.get("sum", 0.0), before.get("steps", 0)
        self.seconds_before = before.get("seconds", None if self.state.global_step else 0.0)
        return place

    def _save_checkpoint(self, model, trial):
        seconds = time.perf_counter() - self._started
        self.state.stateful_callbacks[LOSSES] = {
            "sum": self._losses,
            "steps": self._loss_steps,
            "seconds": None if self.seconds_before is None else self.seconds_before + seconds,
        }
        self.state.stateful_callbacks[ARGUMENTS] = arguments_of(self.args)
        super()._save_checkpoint(model, trial)

    def _finalize_training(self, trial, num_train_samples, start_time):
        if self._loss_steps:
            # transformers adds what was not logged yet and divides by the steps since the resume
            steps = max(self.state.global_step - self._initial_global_step, 0.001)
            self._total_loss_scalar = self._losses / self._loss_steps * steps - self._tr_loss.item()
        return super()._finalize_training(trial, num_train_samples, start_time)


LOSSES = "softar_losses"


def give_own_rate(trainer, parameters: list[nn.Parameter], rate: float) -> None:
    """Move parameters of a trainer's optimiser, when it has been made, into a group of their own,
    with this learning rate and without weight decay."""
    moved = {id(p) for p in parameters}
    for group in trainer.optimizer.param_groups:
        group["params"] = [p for p in group["params"] if id(p) not in moved]
    learnt = [p for p in parameters if p.requires_grad]
    trainer.optimizer.add_param_group({"params": learnt, "lr": rate, "weight_decay": 0.0})


def opt(default: Any, text: str):
    return field(default=default, metadata={"help": text})


def check_arguments(trainer: str, model, kind: type, args, tokenizer, others: dict, *names) -> None:
    """Raise ValueError for arguments that no trainer of this name can work with. kind: the class of
    its configuration. others: the arguments that go on to TRL's trainer. names: what it may have to
    open beside the model."""
    if uncompiled(model) is not model:
        raise ValueError(
            f"model is compiled, and {trainer} runs its parts one by one: hand over the model itself"
        )
    if not isinstance(args, kind):
        raise ValueError(f"args={args!r}: {trainer} needs a {kind.__name__}")
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise ValueError(f"processing_class={tokenizer!r}: {trainer} needs the model's tokenizer")
    check_open(args, others, (model, *names))
    check_writable(args.output_dir)


def prepare_trained(
    trainer: str, model: nn.Module, *, beside: bool = False, opened: dict | None = None
) -> None:
    """Let the active adapter of a PeftModel be trained on, where all of it is frozen as PEFT opens a
    saved one, for inference. What else has been set by hand stays.

    beside: is anything trained that is no part of the model? opened: keywords of the model's loading,
        where the trainer has opened it.

    Raises ValueError for virtual tokens, which nothing that feeds embeddings puts before a prompt, for
    an adapter whose base nothing opens again, and for a model of which nothing would be trained.
    """
    if is_peft_model(model):
        name, config = model.active_adapter, model.active_peft_config
        if config.is_prompt_learning:
            raise ValueError(
                f"peft_type={config.peft_type.value}: {trainer} feeds mixtures of tokens, virtual tokens are not "
                "there; use LoRA"
            )
        own = [p for key, p in model.named_parameters() if name in key.split(".")]
        if config.inference_mode and not any(p.requires_grad for p in own):
            config.inference_mode = False
            model.set_adapter(name)
        remember_base(model, opened)
    if not beside and not any(p.requires_grad for p in model.parameters()):
        raise ValueError(
            f"model: no parameter of this {type(model).__name__} has requires_grad, so {trainer} would train "
            "nothing: call model.requires_grad_(), or give peft_config; an adapter is opened by softar's load"
        )


def without_task(adapter):
    """A copy of a PEFT configuration that names no task, for models that PEFT's wrapper of causal ones
    asks for methods that they have not; None stays None."""
    if adapter is not None:
        adapter = copy.copy(adapter)
        adapter.task_type = None
    return adapter


@dataclass
class PlainSFTConfig(SFTConfig):
    """TRL's SFTConfig for a loss of our own: CPU where there is nothing else, and rows that the
    trainers pack by themselves."""

    logging_nan_inf_filter: bool = opt(
        False, "Not there: a NaN or infinite loss ends the training."
    )

    def __post_init__(self):
        check_before(self)
        if not torch.accelerator.is_available():
            self.use_cpu = True
            self.bf16 = bool(self.bf16)
        super().__post_init__()
        check_filter(self)
        check_neutral(self, OF_TEXTS)
        check_prepares(self)
        check_least(self, pad_to_multiple_of=1)
        if self.packing and self.packing_strategy != "bfd":
            raise ValueError(
                f"packing_strategy={self.packing_strategy!r} cuts examples in two: leave it at 'bfd'"
            )
        if self.packing and self.max_length is None:
            raise ValueError("packing=True needs a max_length, which is the length of its rows")
        check_idle(self, IDLE_TEXTS)
        self.eval_packing = False  # TRL would pack what `evaluate` is given


def unpacked(args: PlainSFTConfig) -> PlainSFTConfig:
    """For TRL, which packs without telling where thoughts or noise begin: a copy where it would."""
    if args.packing:
        args = copy.copy(args)
        args.packing = False
    return args


class ProgressLines(TrainerCallback):
    """Says how far the training is, in lines of softar.progress, every so often; in the place of a
    bar."""

    def __init__(self, title: str, pace: Pace):
        self.title, self.pace, self.values = title, pace, {}

    def on_train_begin(self, args, state, control, **kwargs):
        self.started, self.first = time.monotonic(), state.global_step
        self.say(state, f"starts at step {self.first} of {state.max_steps}")

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.values = self.values | {k: logs[k] for k in ("loss", "reward") if k in logs}
        scores = [
            f"{k} {v:.4g}" for k, v in logs.items() if k.startswith("eval_") and "_per_" not in k
        ]
        if scores:
            self.say(state, f"at step {state.global_step}: {', '.join(scores)}")

    def on_step_end(self, args, state, control, **kwargs):
        step, steps = state.global_step, state.max_steps
        if step == steps or self.pace.is_due(step / steps):
            seconds = (time.monotonic() - self.started) / (step - self.first) * (steps - step)
            self.say(state, step_line(step, steps, self.values, seconds))

    def say(self, state, text: str) -> None:
        if state.is_world_process_zero:
            print(f"{self.title}: {text}", flush=True)


def tell_progress(trainer: Trainer, title: str, *, to_log: bool) -> None:
    """Lines in the place of the trainer's bar, where no terminal would draw it. to_log: for the log of
    a process of its own: oftener, and all that is logged beside."""
    if sys.stderr.isatty() and not (to_log or trainer.args.disable_tqdm):
        return
    for callback in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(callback)
    pace = Pace(seconds=5, share=0.01, gap=0.2) if to_log else Pace()
    trainer.add_callback(ProgressLines(title, pace))
    if to_log:
        trainer.add_callback(PrinterCallback())
