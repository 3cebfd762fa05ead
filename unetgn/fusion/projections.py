"""Lays out the result of the group norm before an attention's projections: no SiLU follows it, but three copies do.

diffusers' attention normalizes (N, C, H·W) and hands the transpose, (N, H·W, C), to the projections for queries, keys
and values. Each of the three makes a contiguous copy of its own and keeps it for the backward pass. Laid out the other
way by the norm, one tensor serves all three. The values are the same, bit for bit.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from unetgn.fusion.classes import owner_of, path_of

_norms: dict[str, str] = {}  # from the path of an attention class to the name of its norm


def register_norm_before_projections(target: str, norm: str) -> None:
    """Name the norm of an attention class, given by path, that feeds several projections with its transposed result."""
    _norms[target] = norm


def norm_before_projections(module: nn.Module) -> str | None:
    """Return the name of the module's norm that feeds several projections, where it is a plain group norm."""
    name = _norms.get(path_of(owner_of(type(module), "forward")))
    norm = getattr(module, name, None) if name is not None else None
    return name if norm is not None and type(norm).forward is nn.GroupNorm.forward else None


def transposed_group_norm(norm: nn.GroupNorm, x: Tensor) -> Tensor:
    """Compute nn.GroupNorm of x (N, C, L), with the result in the memory of a contiguous (N, L, C)."""
    y = F.group_norm(x, norm.num_groups, norm.weight, norm.bias, norm.eps)
    return y.transpose(1, 2).contiguous().transpose(1, 2) if x.dim() == 3 else y
