"""Measures how fast the fused group norm + SiLU is on a GPU: `python -m benchmarks.group_norm_silu`."""
