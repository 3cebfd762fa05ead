"""Defines the public function: what it computes, its arguments, and the way that a call takes."""

from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from unetgn.ops import autograd, dispatch, reference, sharding
from unetgn.ops.arguments import Arguments, tensors_of
from unetgn.ops.checks import check_activation, check_arguments


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
    """Normalize x in groups of channels and apply SiLU, in one pass over x.

        h     = x + pre_bias
        xhat  = (h - mean) / sqrt(var + eps)       mean and biased variance over (C / num_groups, *spatial) of h
        z     = (xhat * weight + bias) * (1 + scale) + shift
        y     = z * sigmoid(z)                     or z with activation=None

    Shapes: x (N, C, *spatial) with none to three spatial axes -> y the same; weight and bias (C,), each optional;
    pre_bias, scale and shift (N, C), each optional. scale and shift may be maps instead, both: of x's own shape, for a
    modulation that varies over space. N may be 0. num_groups divides C.

    Layout: y and the gradient of x are contiguous or channels_last as x is, and so are those of maps. Other strides are
    copied first, and so are maps, and a gradient of y that is expanded, where they lie in another layout than x. Within
    `torch.func` transforms, and where a compiler sees the implementation "reference", the layout is PyTorch's choice.
    Dtypes: x is float16, bfloat16, float32 or float64, and y is as x; the parameters may be of another of these, and
    their gradients are as they are. Statistics and arithmetic are float32, float64 for a float64 x.
    Under autocast y keeps the dtype of x. (Autocast on CUDA turns the output of torch.nn.GroupNorm into float32, which
    moves 32 bytes an element where this operator moves 4.)

    Differentiable any number of times with respect to x, weight, bias, pre_bias, scale and shift; saved for that are x,
    a mean and a 1/sqrt(var + eps) for each group, and the other arguments. Within `torch.func` transforms
    (grad, vmap, jvp, …), in forward-mode differentiation, and for gradients of gradients the definition is evaluated in
    plain PyTorch: right, but not fused. Two runs on one machine give the same bits.
    Tensor subclasses and modes with `__torch_function__` are asked, as PyTorch's functions ask them; DTensors are
    sharded by sample.

    Raises, with what was given and what would be right:
        TypeError     x or a parameter is no tensor, is sparse, nested or of another dtype; num_groups is no int, eps no
                      float (True is neither)
        ValueError    x has other axes or no channels; num_groups does not divide C; eps is negative or not finite; the
                      activation is unknown; a parameter has another shape or lies on another device than x
        RuntimeError  the implementation that was named cannot run on x
    `unetgn.ops.implementation` says which implementation computes it, and chooses another. G = 1 is layer normalization
    over (C, *spatial), G = C is instance normalization.

    Wu & He 2018 (arXiv 1803.08494), equations 1, 2 and 6; scale and shift after Dhariwal & Nichol 2021
    (arXiv 2105.05233), section 3; as maps: Park et al. 2019 (arXiv 1903.07291), equation 1,
    and Zheng et al. 2022 (arXiv 2209.09002).
    """
    if activation != "silu":
        check_activation(activation)
    compiling = torch.compiler.is_compiling()
    if not compiling and has_torch_function_variadic(x, weight, bias, pre_bias, scale, shift):
        extras: dict[str, Any] = {"activation": activation, "pre_bias": pre_bias, "scale": scale, "shift": shift}
        tensors = (x, weight, bias, pre_bias, scale, shift)
        return handle_torch_function(group_norm_silu, tensors, x, num_groups, weight, bias, eps, **extras)
    implementation = dispatch.chosen()
    silu = activation is not None
    arguments = Arguments(x, num_groups, weight, bias, eps, silu, pre_bias, scale, shift, implementation)
    check_arguments(arguments)
    if not compiling and not torch._C._is_torch_function_enabled():  # called again, by the handler of a subclass
        arguments = dispatch.without_subclass(arguments)
        x = arguments.x
    if dispatch.is_transformed():
        return reference.define(arguments)[0]
    if not dispatch.is_plain(x):  # asks for a compiler anew: it may have begun with this line
        if implementation == "reference":  # for a compiler, plain PyTorch
            return reference.forward(arguments)[0]
        sharding.register_for(x)
        return torch.ops.unetgn.group_norm_silu(*arguments)[0]
    if torch.is_grad_enabled() and (x.requires_grad or _requires_grad(arguments)):
        return autograd.apply(*arguments)
    return dispatch.forward(arguments)[0]


def group_norm_silu_with_shortcut(
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
) -> tuple[Tensor, Tensor]:
    """Return y of `group_norm_silu` and x itself, for a sum shortcut(x) + f(y) around the norm.

    Whoever goes on with the x that is returned gets its gradient added to that of x by the kernel that writes it,
    dx = dx of the norm + dshortcut, rounded once. Autograd adds two gradients of x by a kernel of its own, which reads
    both and writes the sum: 6 bytes an element at 16 bits in place of 2.

    Arguments, errors and what is saved are those of `group_norm_silu`. The x that is returned is a view of x, not to be
    changed in place. It is x, and autograd adds, where x has no gradient and where others look on: compilers, tracers,
    `torch.func` transforms, dispatch modes, tensor subclasses.
    """
    extras: dict[str, Any] = {"activation": activation, "pre_bias": pre_bias, "scale": scale, "shift": shift}
    if not _takes_a_shortcut(x) or has_torch_function_variadic(x, weight, bias, pre_bias, scale, shift):
        return group_norm_silu(x, num_groups, weight, bias, eps, **extras), x
    check_activation(activation)
    silu, implementation = activation is not None, dispatch.chosen()
    arguments = Arguments(x, num_groups, weight, bias, eps, silu, pre_bias, scale, shift, implementation)
    check_arguments(arguments)
    return autograd.apply_with_shortcut(*arguments)


def _takes_a_shortcut(x: Tensor) -> bool:
    """Return True where a gradient of x is recorded, and nobody looks on for whom y has to be the only output."""
    return (
        not torch.compiler.is_compiling()
        and type(x) in dispatch.ORDINARY
        and x.requires_grad
        and torch.is_grad_enabled()
        and torch._C._is_torch_function_enabled()
        and dispatch.is_plain(x)
        and not dispatch.is_transformed()
        and not torch.jit.is_tracing()
    )


def _requires_grad(arguments: Arguments) -> bool:
    for tensor in tensors_of(arguments):  # noqa: SIM110  # a generator would take as long as the rest of the call
        if tensor is not None and tensor.requires_grad:
            return True
    return False
