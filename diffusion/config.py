"""How to denoise, as data: checked when it is made."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from softar.soft import check_dist

from .parity import DEFAULT, PARITY, Quirks
from .schedules import REMASKS, SCHEDULES
from .select import SELECTORS
from .soften import Softener, mk_softener

CACHES = (None, "prefix", "dual")
SHARING = ("uniform", "linear", "ancestral")  # the schedules that `steps` says something to
REMASK_KNOBS = {
    "cap": {"eta"},
    "rescale": {"eta"},
    "conf": set(),
    "loop": {"eta", "t_on", "t_off", "alpha_on"},
}


@dataclass(frozen=True)
class DenoiseConfig:
    """How to denoise. The defaults commit the surest token in each forward, greedily, hard."""

    gen_length: int = 128  # masks appended to each prompt; 0 fills the masks of a template
    # blocks are decoded from left to right; None is one block of all
    block_length: int | None = None
    steps: int | None = None  # forwards in all, shared by the blocks; None is one for each mask
    schedule: str | Callable | None = (
        None  # name in SCHEDULES; None is uniform, or what `threshold` or `factor` asks for
    )
    threshold: float | None = None  # in (0, 1], of schedule "threshold"
    factor: float | None = None  # > 0, of schedule "factor"
    dilation: int = 1  # of schedule "pyramid": how often each number of tokens comes
    eps: float = 1e-3  # of schedule "linear": the time at which it ends
    select: str | Callable = "confidence"  # name in SELECTORS: which positions are the best
    alg_temp: float = 0.0  # > 0 draws the positions from softmax(score / alg_temp)
    # name in SOFTENERS: what a masked slot shows; None is as the model was trained: its soft masks,
    # or hard
    soften: str | Callable | Softener | None = None
    # for "soft-mask", instead of what the model learnt
    soften_args: dict[str, Any] = field(default_factory=dict)
    # keys and values kept within a block: "prefix" what is left of it, "dual" both sides
    cache: str | None = None
    remask: str | None = None  # ReMDM: "cap", "rescale", "conf" or "loop"
    remask_args: dict[str, Any] = field(default_factory=dict)  # eta, t_on, t_off, alpha_on
    temperature: float = 0.0  # of the proposals; 0 is the argmax
    top_k: int | None = None  # of the proposals
    top_p: float | None = None
    # guidance away from the model without the prompt (arXiv:2410.18514); 0 is none
    cfg_scale: float = 0.0
    ban_eos: bool = False  # never propose the end-of-text token
    ends_last: bool = False  # commit end tokens when nothing else is left to commit
    end_ids: tuple[int, ...] | None = None  # the end tokens; None is the model's own
    # a row is over when a finished block holds an end token; the rest becomes end-of-text
    early_stop: bool = False
    # name in PARITY: a public implementation to reproduce, defects included
    parity: str | None = None

    def __post_init__(self):
        for name, least in (("gen_length", 0), ("block_length", 1), ("steps", 1), ("dilation", 1)):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < least):
                raise ValueError(f"{name}={value!r} must be a whole number, at least {least}")
        if self.gen_length and self.block_length and self.gen_length % self.block_length:
            raise ValueError(
                f"block_length={self.block_length} does not divide gen_length={self.gen_length}: choose a divisor"
            )
        blocks = (
            self.gen_length // self.block_length if self.gen_length and self.block_length else 1
        )
        if self.steps is not None and self.steps % blocks and self.parity is None:
            raise ValueError(
                f"steps={self.steps} cannot be shared by {blocks} blocks: choose a multiple of {blocks}"
            )
        for name, known in (("schedule", SCHEDULES), ("select", SELECTORS), ("parity", PARITY)):
            value = getattr(self, name)
            if isinstance(value, str) and value not in known:
                raise ValueError(f"{name}={value!r} is unknown: choose one of {sorted(known)}")
        if self.cache not in CACHES:
            raise ValueError(f"cache={self.cache!r} is unknown: choose one of {CACHES}")
        self._check_schedule()
        mk_softener("hard" if self.soften is None else self.soften, **self.soften_args)
        check_dist(None, self.temperature, self.top_k, self.top_p)
        for name in ("alg_temp", "cfg_scale"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(
                    f"{name}={getattr(self, name)} must be >= 0 and finite; 0 switches it off"
                )
        if not 0 <= self.eps < 1:
            raise ValueError(f"eps={self.eps} must lie in [0, 1)")

    def _check_schedule(self):
        name = self.schedule_name
        if self.threshold is not None:
            low = 0 <= self.threshold if self.parity else 0 < self.threshold
            if not (low and self.threshold <= 1):
                raise ValueError(f"threshold={self.threshold} must lie in (0, 1]: a probability")
        if self.factor is not None and not 0 < self.factor < float("inf"):
            raise ValueError(f"factor={self.factor} must be > 0")
        for option in ("threshold", "factor"):
            if name == option and getattr(self, option) is None:
                raise ValueError(
                    f"schedule={option!r} needs {option}=, for example {'0.9' if option[0] == 't' else '1.0'}"
                )
            if name != option and getattr(self, option) is not None and self.parity is None:
                raise ValueError(
                    f"{option}={getattr(self, option)} does not go with schedule={name!r}: leave one out"
                )
        if self.parity is None:
            self._check_idle(name)
        if (
            name in ("threshold", "factor")
            and self.select not in ("confidence", "margin")
            and self.parity is None
        ):
            raise ValueError(
                f"schedule={name!r} compares probabilities, which select={self.select!r} does not give"
            )
        if name in ("threshold", "factor") and self.alg_temp:
            raise ValueError(
                f"schedule={name!r} compares probabilities: alg_temp={self.alg_temp} must be 0"
            )
        if self.remask is None:
            if self.remask_args:
                raise ValueError(
                    f"remask_args={self.remask_args} without remask: choose one of {REMASKS}"
                )
            return
        if self.remask not in REMASKS:
            raise ValueError(f"remask={self.remask!r} is unknown: choose one of {REMASKS}")
        if name not in SHARING:
            raise ValueError(
                f"remask={self.remask!r} needs a fixed number of steps: schedule={name!r} has none"
            )
        if self.steps is None:
            raise ValueError(f"remask={self.remask!r} needs steps=")
        if self.soften == "evolving":
            raise ValueError(
                "soften='evolving' revises decoded tokens itself: it does not go with remask"
            )
        knobs = REMASK_KNOBS[self.remask]
        if unknown := sorted(set(self.remask_args) - knobs):
            raise ValueError(
                f"remask={self.remask!r} does not take {unknown}: it takes {sorted(knobs)}"
            )
        for knob, value in self.remask_args.items():
            if not 0 <= value <= 1:
                raise ValueError(f"remask_args {knob}={value} must lie in [0, 1]")
        t_on, t_off = self.remask_args.get("t_on", 0.55), self.remask_args.get("t_off", 0.05)
        if t_off > t_on:
            raise ValueError(
                f"remask_args t_off={t_off} must be at most t_on={t_on}: time runs from 1 to 0"
            )

    def _check_idle(self, name: str | Callable) -> None:
        if self.steps is not None and isinstance(name, str) and name not in SHARING:
            raise ValueError(
                f"steps={self.steps} does not go with schedule={name!r}, which takes as many as it needs"
            )
        for option, idle, owner in (("dilation", 1, "pyramid"), ("eps", 1e-3, "linear")):
            value = getattr(self, option)
            if value != idle and isinstance(name, str) and name != owner:
                raise ValueError(
                    f"{option}={value} does not go with schedule={name!r}: it is of {owner!r}"
                )
        if name == "ancestral" and (self.alg_temp or self.select not in ("confidence", "random")):
            raise ValueError(
                f"schedule='ancestral' draws each position by itself: select={self.select!r}, alg_temp={self.alg_temp} "
                f"say nothing to it"
            )

    def as_trained(self, learnt: dict[str, Any] | None) -> "DenoiseConfig":
        """With `soften` decided: `learnt` are the soft-mask settings of the model, which
        `soften_args` overrule."""
        if self.soften is None:
            # The public samplers know nothing of a head.
            soft = learnt is not None and self.parity is None
            return replace(
                self, soften="soft-mask" if soft else "hard", soften_args=learnt if soft else {}
            )
        if self.soften == "soft-mask" and learnt is not None and self.parity is None:
            return replace(self, soften_args=learnt | self.soften_args)
        return self

    @property
    def quirks(self) -> Quirks:
        """What the public implementation `parity` does otherwise."""
        return DEFAULT if self.parity is None else PARITY[self.parity]

    @property
    def schedule_name(self) -> str | Callable:
        if self.schedule is not None:
            return self.schedule
        return (
            "threshold"
            if self.threshold is not None
            else "factor"
            if self.factor is not None
            else "uniform"
        )
