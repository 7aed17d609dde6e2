"""Reinforcement learning on soft policies, over trl's trainers."""
