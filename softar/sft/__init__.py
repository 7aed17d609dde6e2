"""Supervised fine-tuning with soft inputs: the forward pass, its data, settings and trainer."""
