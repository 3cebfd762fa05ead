"""Computes GroupNorm + SiLU as one operator: the core of the library."""

from unetgn.ops.dispatch import implementation
from unetgn.ops.functional import group_norm_silu

__all__ = ["group_norm_silu", "implementation"]
