"""What an engine lets soft requests do, as `softar serve` says it: the entry "softar" of vLLM's own
additional_config, which reaches all of its processes."""

import json
from dataclasses import asdict, dataclass

from ..checks import check_least
from ..names import is_code

ENTRY = "softar"


@dataclass(frozen=True)
class Switches:
    """Without them an engine thinks where it takes embeddings (enable_prompt_embeds)."""

    soft: bool = False  # requests may think, yet clients may send no embeddings
    # answers to soft requests at a time; None is as many as there come, in vLLM's own queue
    max_soft: int | None = None

    # mixers of one's own that requests may name, "module:function" each: what they say must never
    # decide which code is imported
    mixers: tuple[str, ...] = ()

    def __post_init__(self):
        if isinstance(self.mixers, str) or not all(
            isinstance(name, str) and is_code(name) for name in self.mixers
        ):
            raise ValueError(f"mixers={self.mixers!r} must be a list of 'module:function'")
        object.__setattr__(self, "mixers", tuple(self.mixers))  # JSON has lists
        for name in ("max_soft", "mixers"):
            if getattr(self, name) and not self.soft:
                raise ValueError(f"{name}={getattr(self, name)} needs soft=True (--soft)")
        check_least(self, max_soft=1)

    @property
    def entry(self) -> dict:
        """For additional_config; {} where nothing is switched on."""
        changed = {k: v for k, v in asdict(self).items() if v != getattr(Switches, k)}
        return {ENTRY: changed} if changed else {}

    @property
    def arguments(self) -> list[str]:
        """For the command line of `vllm serve`, beside what else stands in additional_config."""
        return [
            word
            for name, value in self.entry.items()
            for word in (f"--additional-config.{name}", json.dumps(value))
        ]


def switches_of(vllm_config) -> Switches:
    config = vllm_config.additional_config
    return Switches(**config.get(ENTRY, {})) if isinstance(config, dict) else Switches()


def thinks(vllm_config) -> bool:
    """May its requests think softly?"""
    return vllm_config.model_config.enable_prompt_embeds or switches_of(vllm_config).soft
