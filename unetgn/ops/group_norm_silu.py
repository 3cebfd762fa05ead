"""The public function."""

from torch import Tensor

from unetgn.ops.autograd import GroupNormSiLUFunction
from unetgn.ops.choice import chosen


def group_norm_silu(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    activation: str | None = "silu",
    pre_bias: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
) -> Tensor:
    """Group normalization followed by SiLU."""
    if activation not in ("silu", None):
        raise ValueError(f"activation must be 'silu' or None, got {activation!r}")
    return GroupNormSiLUFunction.apply(
        x, weight, bias, pre_bias, scale, shift, num_groups, eps, activation == "silu", chosen()
    )
