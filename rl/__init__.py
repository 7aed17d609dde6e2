"""Reinforcement learning on soft policies, over trl's trainers."""

from softar._lazy import lazy

_HOME = {
    "DiffusionGRPOConfig": "softar.rl.diffusion_config",
    "DiffusionRLOOConfig": "softar.rl.diffusion_config",
    "DiffusionGRPOTrainer": "softar.rl.diffusion_grpo",
    "DiffusionRLOOTrainer": "softar.rl.diffusion_grpo",
    "SoftGRPOConfig": "softar.rl.config",
    "SoftPPOConfig": "softar.rl.config",
    "SoftRLOOConfig": "softar.rl.config",
    "SoftGRPOTrainer": "softar.rl.grpo",
    "SoftPPOTrainer": "softar.rl.ppo",
    "SoftRLOOTrainer": "softar.rl.rloo",
}
__all__ = [*_HOME]
__getattr__, __dir__ = lazy(__name__, _HOME)
