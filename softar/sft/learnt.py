"""The filters of the mixtures as far as soft SFT trains them: temperature, min-p, top-k, and what
makes a temperature of each step.

While it trains each is a parameter of the model, in a form that has no bounds; what decoding uses are
plain numbers, which soft_config.json keeps, and the file beside it.
"""

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..config import CONFIG_FILE, SoftConfig
from ..defaults import config_of, own_config
from ..feedback import StepTemperature, hidden_size, load_step_temperature, step_temperature_of
from ..models import origin_of
from ..relaxed import relaxed_dist
from ..soft import Soft, mk_proba_dist

ROOM = 2  # a learnt top-k may become so many times what it starts from
# filter -> the parameter of the model
PARAMETERS = {
    "temperature": "soft_log_temperature",
    "min_p": "soft_logit_min_p",
    "top_k": "soft_logit_top_k",
}
STEP = "step_temperature"
STEP_PARAMETER = "soft_step_temperature"  # [D], the weights


def learnt_of(args) -> list[str]:
    """The filters that a SoftSFTConfig trains."""
    return [name for name in (*PARAMETERS, STEP) if getattr(args, f"learn_{name}")]


def begins_from(model, args) -> SoftConfig | None:
    """The model's own configuration, where it has a step temperature that is trained on. model: or
    the name of one. Raises ValueError for one that would get lost, and where none can be made of
    the model's hidden states."""
    is_named, learns = isinstance(model, str), args.learn_step_temperature
    if learns and not is_named:
        hidden_size(model)
    name = model if is_named else origin_of(model).name
    own = own_config if is_named else config_of
    theirs = own(model, args.soft_mixer)
    if theirs is None or theirs.step_temperature is None:
        return None
    if not learns:
        raise ValueError(
            f"step_temperature in {CONFIG_FILE} of {name}: this training would leave it out; give "
            "learn_step_temperature=True to train it on, or take that field out of the file"
        )
    if not is_named:
        step_temperature_of(theirs, model)
    return theirs


def mixture(logits: Tensor, args, learnt: dict[str, Tensor], most: int, progress: float) -> Soft:
    """What `args` filters of logits [..., V], with these numbers in place of its own.

    most: as for relaxed_dist, where min-p or top-k are learnt. progress: of the training, in [0, 1].
    """
    filters = args.filters | learnt
    gates = {name: filters.pop(name) for name in ("min_p", "top_k") if name in learnt}
    if not gates:
        return mk_proba_dist(logits, **filters)
    how = dict(most=most, scale=args.gate_scale(progress), gradient=args.gate_gradient)
    return relaxed_dist(logits, **gates, **how, **filters)


class LearntFilters:
    """The filters that a trainer trains. The model has them only `on_model`.

    Args:
        args: a SoftSFTConfig.
        vocab_size: bounds a learnt top-k.
        theirs: what `begins_from` says of the model.
    """

    def __init__(self, model: nn.Module, args, vocab_size: int, theirs: SoftConfig | None = None):
        self.model, self.args, learnt = model, args, learnt_of(args)
        self.names = [name for name in learnt if name != STEP]
        self.most = min(ROOM * (args.soft_top_k or 1), vocab_size)
        self.parameters: dict[str, nn.Parameter] = {}
        if "top_k" in self.names and args.soft_top_k >= vocab_size:
            raise ValueError(
                f"soft_top_k={args.soft_top_k} cannot be learnt from: start below the vocabulary of {vocab_size}"
            )
        for name in self.names:
            start = torch.tensor(self._free(name, args.filters[name]), device=model.device)
            self.parameters[PARAMETERS[name]] = nn.Parameter(start)
        self.step = None  # for step temperatures
        if STEP in learnt:
            start = torch.zeros(hidden_size(model), device=model.device)
            if theirs is not None:
                start = step_temperature_of(theirs, model).weights.clone()
            self.step = self.parameters[STEP_PARAMETER] = nn.Parameter(start)

    def __bool__(self) -> bool:
        """Is there anything that it trains?"""
        return bool(self.parameters)

    @contextlib.contextmanager
    def on_model(self) -> Iterator[None]:
        """The model has them, for DDP and the optimiser; and only meanwhile: what is made of it later has
        its weights."""
        for name, parameter in self.parameters.items():
            self.model.register_parameter(name, parameter)
        try:
            yield
        finally:
            for name in self.parameters:
                delattr(self.model, name)

    def parameter(self, name: str) -> nn.Parameter:
        return self.parameters[PARAMETERS[name]]

    def values(self) -> dict[str, Tensor]:
        """Their numbers [], with gradients."""
        return {name: self._number(name, self.parameter(name)) for name in self.names}

    def plain(self) -> dict[str, float | StepTemperature]:
        """Fields of SoftConfig: how decoding uses them."""
        fields = {name: value.item() for name, value in self.values().items()}
        if "top_k" in fields:  # as the gate rounds it
            fields["top_k"] = math.floor(fields["top_k"] + 0.5)
        if self.step is not None:
            fields[STEP] = StepTemperature(self.step.detach().clone())
        return fields

    def logged(self) -> dict[str, float]:
        """Their numbers, of step temperatures the largest factor that a hidden state can get."""
        values = self.values()
        if self.step is not None:  # the state that is parallel to the weights
            values[STEP] = StepTemperature(self.step)(self.step)
        return {name: value.item() for name, value in values.items()}

    def mixture(self, logits: Tensor, progress: float, hidden: Tensor | None = None) -> Soft:
        """hidden: [..., D] the last hidden states, where a step has its own temperature."""
        values = self.values()
        if self.step is not None:
            number = values.get("temperature", self.args.soft_temperature)
            factor = StepTemperature(self.step)(hidden).to(logits.device)
            values["temperature"] = number * factor
        return mixture(logits, self.args, values, self.most, progress)

    def nothing(self) -> Tensor | float:
        """A 0 with all of them in its graph."""
        step = 0.0 if self.step is None else 0.0 * self.step.sum()
        return sum((0.0 * value for value in self.values().values()), step)

    def rates(self) -> list[tuple[nn.Parameter, float]]:
        """Their learning rates."""
        own, other = self.args.temperature_learning_rate, self.args.filter_learning_rate
        rates = [(self.parameter(n), own if n == "temperature" else other) for n in self.names]
        return rates if self.step is None else [*rates, (self.step, own)]

    def without(self, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """Of the model: they belong to the decoding."""
        return {k: v for k, v in state_dict.items() if not k.endswith((*self.parameters,))}

    def state(self) -> dict[str, float]:
        return {name: self.parameter(name).item() for name in self.names}

    def restore(self, state: dict[str, float], config: dict[str, Any]) -> None:
        """From `state()`, or of a checkpoint without one from the fields of its soft_config.json. Raises
        ValueError for one that no training can go on from."""
        if self.step is not None:
            own = config[STEP]
            self.step.data.zero_()  # decodes at the number alone
            if own is not None:
                self.step.data.copy_(load_step_temperature(own).weights)
        for name in self.names:
            try:
                free = state[name] if name in state else self._free(name, config[name])
            except (TypeError, ValueError):  # None, or an end of its range
                raise ValueError(
                    f"the checkpoint decodes with {name}={config[name]} and did not learn it: resume without "
                    f"learn_{name}, or begin a new training"
                ) from None
            self.parameter(name).data.fill_(free)

    def _number(self, name: str, free: Tensor) -> Tensor:
        if name == "temperature":
            return free.exp()
        return free.sigmoid() if name == "min_p" else 1 + (self.most - 1) * free.sigmoid()

    def _free(self, name: str, number: float) -> float:
        if name == "temperature":
            return math.log(number)
        share = number if name == "min_p" else (number - 1) / (self.most - 1)
        return math.log(share / (1 - share))
