"""The core: fused GroupNorm + SiLU as an operator."""

from unetgn.ops.dispatch import implementation
from unetgn.ops.functional import group_norm_silu

__all__ = ["group_norm_silu", "implementation"]
