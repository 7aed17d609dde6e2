"""Measuring: decoders on the same rows with intervals, grids of runs, lm-evaluation-harness."""
