"""Computes GroupNorm + SiLU as one operator: the core of the library."""

from unetgn.ops.dispatch import implementation
from unetgn.ops.functional import group_norm_silu, group_norm_silu_with_shortcut

__all__ = ["group_norm_silu", "group_norm_silu_with_shortcut", "implementation"]
