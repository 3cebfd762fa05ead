"""The operator's place in autograd."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from unetgn.ops.choice import resolve
from unetgn.ops.layout import dense, memory_format_of


class GroupNormSiLUFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        pre_bias: Tensor | None,
        scale: Tensor | None,
        shift: Tensor | None,
        num_groups: int,
        eps: float,
        activation: bool,
        implementation: str,
    ) -> Tensor:
        xd = dense(x, memory_format_of(x))
        y, mean, rstd = resolve(implementation, x).forward(
            xd, num_groups, weight, bias, eps, activation, pre_bias, scale, shift
        )
        ctx.save_for_backward(x, mean, rstd, weight, bias, pre_bias, scale, shift)
        ctx.static = num_groups, activation, implementation
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, mean, rstd, weight, bias, pre_bias, scale, shift = ctx.saved_tensors
        num_groups, activation, implementation = ctx.static
        fmt = memory_format_of(x)
        grads = resolve(implementation, x).backward(
            dense(dy, fmt),
            dense(x, fmt),
            mean,
            rstd,
            num_groups,
            weight,
            bias,
            activation,
            pre_bias,
            scale,
            shift,
            ctx.needs_input_grad[:6],
        )
        return *grads, None, None, None, None
