"""Reinforcement learning on soft policies, over trl's trainers."""

from importlib import import_module

# Name -> module: TRL takes seconds to import, so a name is loaded when it is asked for.
NAMES = {
    "SoftGRPOConfig": "config",
    "SoftPPOConfig": "config",
    "SoftGRPOTrainer": "grpo",
    "SoftPPOTrainer": "ppo",
    "SoftRLOOTrainer": "rloo",
}
__all__ = list(NAMES)


def __getattr__(name: str):
    if name not in NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"{__name__}.{NAMES[name]}"), name)
    return value


def __dir__():
    return sorted([*globals(), *NAMES])
