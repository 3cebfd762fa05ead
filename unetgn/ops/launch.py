"""From the operator's arguments to an implementation: picks it, hands it dense tensors, and answers for empty ones."""

import torch
from torch import Tensor

from unetgn.ops.choice import resolve
from unetgn.ops.layout import accumulation_dtype, memory_format_of
from unetgn.ops.reference import Gradients, Needs


def forward(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    activation: bool,
    pre_bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    implementation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """y in the dtype and layout of x (see `layout`); mean and rstd (N, G) in the dtype of the arithmetic."""
    if x.numel() == 0:
        return allocate(x, num_groups)
    dense = x.contiguous(memory_format=memory_format_of(x))
    compute = resolve(implementation, x).forward
    return compute(dense, num_groups, weight, bias, eps, activation, pre_bias, scale, shift)


def backward(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    activation: bool,
    pre_bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    needs: Needs,
    implementation: str,
) -> Gradients:
    """Gradients of (x, weight, bias, pre_bias, scale, shift), None where not needed; dx in dtype and layout as x."""
    if x.numel() == 0:
        inputs = (x, weight, bias, pre_bias, scale, shift)
        zeros = (torch.zeros_like(t) if t is not None and need else None for t, need in zip(inputs, needs, strict=True))
        return tuple(zeros)  # type: ignore[return-value]
    layout = memory_format_of(x)
    dense, dy = x.contiguous(memory_format=layout), dy.contiguous(memory_format=layout)
    compute = resolve(implementation, x).backward
    return compute(dy, dense, mean, rstd, num_groups, weight, bias, activation, pre_bias, scale, shift, needs)


def allocate(x: Tensor, num_groups: int) -> tuple[Tensor, Tensor, Tensor]:
    """y, mean and rstd as the operator returns them, their values not computed: zero statistics, y as it comes."""
    y = torch.empty_like(x, memory_format=memory_format_of(x))
    mean = x.new_zeros((x.shape[0], num_groups), dtype=accumulation_dtype(x))
    return y, mean, torch.zeros_like(mean)
