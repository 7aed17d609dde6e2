"""TRL's trainer of GRPO, without its warning about vLLM's version: softar's rollouts in vLLM are its
own, and softar asks for the version that they work in."""

import warnings

with warnings.catch_warnings():
    warnings.filterwarnings("ignore", "TRL currently supports vLLM")
    from trl import GRPOTrainer

__all__ = ["GRPOTrainer"]
