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


class WithShortcutFunction(torch.autograd.Function):
    """Records the operator and returns x too, whose gradient is then added to dx where dx is written."""

    @staticmethod
    def forward(ctx: Any, *values: Any) -> tuple[Tensor, Tensor]:
        return GroupNormSiLUFunction.forward(ctx, *values), values[0]  # PyTorch makes a view of it

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dshortcut: Tensor | None) -> tuple[Tensor | None, ...]:
        return backward(ctx, dy, dshortcut)


# Without the search for `torch.func` transforms in `Function.apply`, which those who call have made already.
apply = super(torch.autograd.Function, GroupNormSiLUFunction).apply
apply_with_shortcut = super(torch.autograd.Function, WithShortcutFunction).apply


def save_for_backward(ctx: Any, values: tuple[Any, ...], mean: Tensor, rstd: Tensor) -> None:
    """Keep the operator's arguments and statistics for `backward`."""
    ctx.save_for_backward(mean, rstd, *tensors_of(values))
    ctx.constants = constants_of(values)
    ctx.set_materialize_grads(False)


def backward(ctx: Any, dy: Tensor | None, dshortcut: Tensor | None = None) -> tuple[Tensor | None, ...]:
    """Return a gradient, or None, for each argument of the operator; dshortcut is part of the first, that of x."""
    if dy is None:
        return dshortcut, *(None,) * (len(Arguments._fields) - 1)
    mean, rstd, *tensors = ctx.saved_tensors
    arguments = tuple.__new__(Arguments, in_order((*tensors, *ctx.constants)))
    needs = tuple.__new__(Needs, tensors_of(ctx.needs_input_grad))
    mapped = _is_mapped(dy) or (dshortcut is not None and _is_mapped(dshortcut))
    if mapped or torch.is_grad_enabled():
        gradients = reference.differentiable_gradients(dy, arguments, needs, dshortcut, mapped=mapped)
    elif dispatch.is_plain(arguments.x):
        gradients = dispatch.backward(dy, arguments, mean, rstd, needs, dshortcut)
    else:
        gradients = _registered(dy, arguments, mean, rstd, needs)
        if dshortcut is not None and gradients.dx is not None:  # for which the registered operator has no place
            gradients = gradients._replace(dx=gradients.dx + dshortcut)
    return spread((*gradients, None))


def _is_mapped(dy: Tensor) -> bool:
    """Return True within a transform of `torch.func`, and for a batch of gradients (`is_grads_batched`)."""
    return dispatch.is_transformed() or torch._C._functorch.is_legacy_batchedtensor(dy)


def _registered(dy: Tensor, arguments: Arguments, mean: Tensor, rstd: Tensor, needs: Needs) -> Gradients:
    """Compute the gradients by the registered operator."""
    outputs = torch.ops.unetgn.group_norm_silu_backward(dy=dy, mean=mean, rstd=rstd, needs=needs, **arguments._asdict())
    return Gradients._make(out if need else None for out, need in zip(outputs, needs, strict=True))
