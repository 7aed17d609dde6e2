"""How to decode, as data: checked when it is made, saved beside a checkpoint as
soft_config.json."""

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .mixers import Mixed, mk_mixer
from .soft import RESCALES, check_dist

Ids = int | str | tuple[int, ...] | None
CONFIG_FILE = "soft_config.json"


@dataclass(frozen=True)
class SoftConfig:
    """How to decode. The defaults think softly, deterministically, in the whole completion."""

    # name in softar.MIXERS, or a function of its signature
    mixer: str | Callable[..., Mixed] = "soft"
    mixer_args: dict[str, Any] = field(default_factory=dict)  # its knobs, e.g. {"tau": 0.5}
    # share of the mixture in what is fed back, the rest is its token; 0 is hard decoding
    alpha: float = 1.0
    temperature: float = 1.0  # of the thought; 0 is the argmax
    top_k: int | None = 10  # tokens kept in a mixture; None keeps the vocabulary
    top_p: float | None = None
    min_p: float | None = None
    keep: int | None = None  # cap on the mixture after the filters
    banned: tuple[int, ...] = ()  # ids that never enter a mixture
    rescale: str | None = None  # see soft_embed
    max_new_tokens: int = 64  # thought and answer together
    # Where it is soft. Without any of these: in the whole completion.
    think_start: Ids = None  # opens the thought; None: the completion starts inside it
    think_end: Ids = None  # closes it for good
    # soft steps at most, then think_end is put in (or, without one, the answer starts)
    budget: int | None = None
    # nats; the same after `cold_stop_steps` consecutive steps below it
    cold_stop_entropy: float | None = None
    cold_stop_steps: int = 256
    # The answer, always discrete.
    answer_temperature: float = 0.0  # 0 is greedy
    answer_top_k: int | None = None
    answer_top_p: float | None = None
    answer_min_p: float | None = None

    def __post_init__(self):
        check_dist(
            None, self.temperature, self.top_k, self.top_p, self.min_p, self.keep, self.banned
        )
        check_dist(
            None, self.answer_temperature, self.answer_top_k, self.answer_top_p, self.answer_min_p
        )
        mk_mixer(self.mixer, **self.mixer_args)
        if not 0 <= self.alpha <= 1:
            raise ValueError(
                f"alpha={self.alpha} must lie in [0, 1]: 0 feeds the token alone, 1 the mixture alone"
            )
        if self.rescale not in RESCALES:
            raise ValueError(f"rescale={self.rescale!r} is unknown: choose one of {RESCALES}")
        for name, least in (("max_new_tokens", 1), ("cold_stop_steps", 1), ("budget", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name}={value} must be at least {least}")
        if self.cold_stop_entropy is not None and not self.cold_stop_entropy >= 0:
            raise ValueError(
                f"cold_stop_entropy={self.cold_stop_entropy} must be >= 0 nats; None switches it off"
            )
        if self.think_start in ("", ()) or self.think_end in ("", ()):
            raise ValueError(
                f"think_start={self.think_start!r}, think_end={self.think_end!r}: empty; None is for none"
            )
        if self.think_start is not None and self.think_end is None:
            raise ValueError(
                f"think_start={self.think_start!r} needs a think_end that closes the thought"
            )

    def resolve(self, tokenizer) -> "SoftConfig":
        """The same configuration with think_start and think_end given as text turned into token
        ids."""
        found = {}
        for name in ("think_start", "think_end"):
            value = getattr(self, name)
            if isinstance(value, str):
                if tokenizer is None:
                    raise ValueError(f"{name}={value!r} is text: pass tokenizer=, or its token ids")
                value = tuple(tokenizer.encode(value, add_special_tokens=False))
                if not value:
                    raise ValueError(f"{name}={getattr(self, name)!r} is empty for this tokenizer")
            found[name] = value
        return dataclasses.replace(self, **found)

    def save(self, folder: str | Path) -> None:
        """Write soft_config.json beside a checkpoint."""
        if callable(self.mixer):
            raise ValueError(
                f"mixer={self.mixer!r} is a function and cannot be saved: register it in softar.MIXERS"
            )
        Path(folder, CONFIG_FILE).write_text(json.dumps(dataclasses.asdict(self), indent=2) + "\n")

    @classmethod
    def load(cls, folder: str | Path) -> "SoftConfig":
        values = json.loads(Path(folder, CONFIG_FILE).read_text())
        known = {f.name for f in dataclasses.fields(cls)}
        if unknown := sorted(set(values) - known):
            raise ValueError(
                f"{CONFIG_FILE} in {folder} has unknown fields {unknown}; known: {sorted(known)}"
            )
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})
