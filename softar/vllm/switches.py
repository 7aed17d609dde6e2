"""What an engine lets soft requests do, as `softar serve` says it: the entry "softar" of vLLM's own
additional_config, which reaches all of its processes."""

import json
from dataclasses import asdict, dataclass

from ..checks import check_least


@dataclass(frozen=True)
class Switches:
    """Without them an engine thinks where it takes embeddings (enable_prompt_embeds)."""

    soft: bool = False  # requests may think, yet clients may send no embeddings
    # answers to soft requests at a time; None is as many as there come, in vLLM's own queue
    max_soft: int | None = None

    def __post_init__(self):
        if self.max_soft is not None and not self.soft:
            raise ValueError(f"max_soft={self.max_soft} needs soft=True (softar serve --soft)")
        check_least(self, max_soft=1)

    @property
    def arguments(self) -> list[str]:
        """For the command line of `vllm serve`."""
        changed = {k: v for k, v in asdict(self).items() if v != getattr(Switches, k)}
        return ["--additional-config.softar", json.dumps(changed)] if changed else []


def switches_of(vllm_config) -> Switches:
    config = vllm_config.additional_config
    return Switches(**config.get("softar", {})) if isinstance(config, dict) else Switches()


def thinks(vllm_config) -> bool:
    """May its requests think softly?"""
    return vllm_config.model_config.enable_prompt_embeds or switches_of(vllm_config).soft
