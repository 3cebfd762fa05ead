"""Connects the operator with autograd: what is saved for the backward pass, and which way its gradients are computed.

Saved are x, mean, rstd and the small per-channel tensors; z is computed again. Three ways lead to the gradients:

    eager               the implementation's `backward`, called without further ceremony
    under a dispatch    the registered operator (`unetgn.ops.library`), which compilers, fake tensors, and
      mode or compiler    counters can see
    differentiable      the closed form of `unetgn.ops.reference` in plain PyTorch: for gradients of gradients, and for
                          `torch.func` transforms of the backward pass
"""

from typing import Any

import torch
from torch import Tensor

from unetgn.ops import dispatch, reference
from unetgn.ops.arguments import Arguments, Gradients, Needs, constants_of, in_order, spread, tensors_of


class GroupNormSiLUFunction(torch.autograd.Function):
    """Records the operator in eager mode. Its inputs are the `Arguments`, one by one.

    Its `forward` takes the context: for a separate `setup_context` PyTorch spends 30 µs a call.
    """

    @staticmethod
    def forward(ctx: Any, *values: Any) -> Tensor:
        y, mean, rstd = dispatch.forward(tuple.__new__(Arguments, values))  # a third of the time of Arguments._make
        save_for_backward(ctx, values, mean, rstd)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:
        return backward(ctx, dy)


# Without the search for `torch.func` transforms in `Function.apply`, which `group_norm_silu` has made already.
apply = super(torch.autograd.Function, GroupNormSiLUFunction).apply


def save_for_backward(ctx: Any, values: tuple[Any, ...], mean: Tensor, rstd: Tensor) -> None:
    """Keep the operator's arguments and statistics for `backward`."""
    ctx.save_for_backward(mean, rstd, *tensors_of(values))
    ctx.constants = constants_of(values)
    ctx.set_materialize_grads(False)


def backward(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:
    """Return a gradient, or None, for each argument of the operator."""
    if dy is None:
        return (None,) * len(Arguments._fields)
    mean, rstd, *tensors = ctx.saved_tensors
    arguments = tuple.__new__(Arguments, in_order((*tensors, *ctx.constants)))
    needs = tuple.__new__(Needs, tensors_of(ctx.needs_input_grad))
    if torch.is_grad_enabled() or _is_mapped(dy):
        gradients = reference.differentiable_gradients(dy, arguments, needs, mapped=_is_mapped(dy))
    elif dispatch.is_plain(arguments.x):
        gradients = dispatch.backward(dy, arguments, mean, rstd, needs)
    else:
        gradients = _registered(dy, arguments, mean, rstd, needs)
    return spread((*gradients, None))


def _is_mapped(dy: Tensor) -> bool:
    """Return True within a transform of `torch.func`, and for a batch of gradients (`is_grads_batched`)."""
    return dispatch.is_transformed() or torch._C._functorch.is_legacy_batchedtensor(dy)


def _registered(dy: Tensor, arguments: Arguments, mean: Tensor, rstd: Tensor, needs: Needs) -> Gradients:
    """Compute the gradients by the registered operator."""
    outputs = torch.ops.unetgn.group_norm_silu_backward(dy=dy, mean=mean, rstd=rstd, needs=needs, **arguments._asdict())
    return Gradients._make(out if need else None for out, need in zip(outputs, needs, strict=True))
