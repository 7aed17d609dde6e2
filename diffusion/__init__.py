"""Soft decoding and training for masked-diffusion language models: LLaDA and Dream."""
