"""Registers PhysicsNeMo's group norm, which is torch's in training alone.

In evaluation it computes with the unbiased variance, another norm. Names as of physicsnemo 2.2.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from unetgn.fusion.norm_silu import fused_group_norm
from unetgn.fusion.norms import norm_rule

USES = (
    *("weight", "bias", "_validate_amp", "amp_mode", "dtype", "to", "training", "torch", "nn", "functional"),
    *("group_norm", "num_groups", "eps", "rearrange", "mean", "var", "rsqrt", "act_fn"),
)


@norm_rule("physicsnemo.nn.module.group_norm.GroupNorm", uses=USES)
def group_norm(norm: Any, x: Tensor, *, scale: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
    """Compute torch's group norm, the scale-shift and SiLU in training; else the norm's own forward, and these two."""
    forward = type(norm).forward
    if not norm.training or norm.act_fn is not None:
        y = forward(norm, x)
        y = y if scale is None else y * (1 + scale)
        return F.silu(y if shift is None else y + shift)
    forward.__globals__["_validate_amp"](norm.amp_mode)  # it raises under autocast
    return fused_group_norm(x, norm.num_groups, norm.weight, norm.bias, norm.eps, scale=scale, shift=shift, casts=True)
