"""Diffusion U-Nets around a fused GroupNorm + SiLU."""
