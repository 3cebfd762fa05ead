"""The operator's place in autograd: what is saved for the backward pass, and which way its gradients are computed.

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
from torch.autograd import forward_ad

from unetgn.ops import dispatch, reference
from unetgn.ops.layout import memory_format_of
from unetgn.ops.reference import Gradients, Needs

_DIFFERENTIABLE = (0, 2, 3, 6, 7, 8)  # x, weight, bias, pre_bias, scale, shift among the arguments of the operator


class GroupNormSiLUFunction(torch.autograd.Function):
    """The operator in eager mode. Its arguments are those of `dispatch.forward`.

    Its `forward` takes the context: for a separate `setup_context` PyTorch spends 30 µs a call.
    """

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        y, mean, rstd = dispatch.forward(*arguments)
        save_for_backward(ctx, arguments, mean, rstd)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:
        return backward(ctx, dy)


# Without the search for `torch.func` transforms in `Function.apply`, which `group_norm_silu` has made already.
apply = super(torch.autograd.Function, GroupNormSiLUFunction).apply


def save_for_backward(ctx: Any, arguments: tuple[Any, ...], mean: Tensor, rstd: Tensor) -> None:
    """Keep what `backward` needs of the operator's arguments and statistics."""
    x, num_groups, weight, bias, eps, activation, pre_bias, scale, shift, implementation = arguments
    ctx.save_for_backward(x, mean, rstd, weight, bias, pre_bias, scale, shift)
    ctx.constants = num_groups, eps, activation, implementation
    ctx.set_materialize_grads(False)


def backward(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:
    """A gradient, or None, for each argument of the operator."""
    needed: tuple[bool, ...] = ctx.needs_input_grad
    gradients: list[Tensor | None] = [None] * len(needed)
    if dy is not None:
        needs: Needs = tuple(needed[i] for i in _DIFFERENTIABLE)  # type: ignore[assignment]
        computed = _gradients(dy, needs, *ctx.saved_tensors, *ctx.constants)
        for i, gradient in zip(_DIFFERENTIABLE, computed, strict=True):
            gradients[i] = gradient
    return tuple(gradients)


def is_plain(x: Tensor) -> bool:
    """Whether x may go straight to an implementation: an ordinary tensor that no compiler, dispatch mode (FLOP counter,
    fake tensors, selective checkpointing) or tensor subclass looks at."""
    return type(x) in _ORDINARY and not torch.compiler.is_compiling() and not torch._C._len_torch_dispatch_stack()


_ORDINARY = (Tensor, torch.nn.Parameter)


def is_transformed() -> bool:
    """Whether a `torch.func` transform or forward-mode differentiation is under way: then the operator is evaluated by
    its definition, which PyTorch can differentiate and map to any depth."""
    return _torch_func_is_active() or forward_ad._current_level >= 0


@torch.compiler.assume_constant_result  # a compiler guards on the transforms that it compiles under
def _torch_func_is_active() -> bool:
    return torch._C._are_functorch_transforms_active()


def _gradients(
    dy: Tensor,
    needs: Needs,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    pre_bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    num_groups: int,
    eps: float,
    activation: bool,
    implementation: str,
) -> Gradients:
    shared = num_groups, weight, bias, activation, pre_bias, scale, shift, needs
    mapped = is_transformed() or torch._C._functorch.is_legacy_batchedtensor(dy)  # the latter: is_grads_batched
    if torch.is_grad_enabled() or mapped:
        dx, *others = reference.gradients(
            dy, x, reference.statistics(reference.flat(x, pre_bias), num_groups, eps), *shared
        )
        if dx is not None and not mapped:
            dx = dx.contiguous(memory_format=memory_format_of(x))
        return dx, *others  # type: ignore[return-value]
    if is_plain(x):
        return dispatch.backward(dy, x, mean, rstd, *shared, implementation)
    outputs = torch.ops.unetgn.group_norm_silu_backward(dy, x, mean, rstd, *shared, implementation)
    return tuple(out if need else None for out, need in zip(outputs, needs, strict=True))  # type: ignore[return-value]
