"""The core: fused GroupNorm + SiLU as an operator."""

from unetgn.ops.choice import implementation
from unetgn.ops.group_norm_silu import group_norm_silu

__all__ = ["group_norm_silu", "implementation"]
