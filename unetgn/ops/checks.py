"""Refuses wrong arguments of the operator, with what was given and what would be right; tells maps from the others."""

import math
import sys

import torch
from torch import Tensor

from unetgn.ops.arguments import Arguments

_DTYPES = frozenset((torch.float16, torch.bfloat16, torch.float32, torch.float64))


def check_arguments(arguments: Arguments) -> None:
    """Raise ValueError or TypeError where group_norm_silu cannot be computed from these arguments.

    The activation, which has its name no more here, is checked alone: `check_activation`.
    """
    x, num_groups, weight, bias, eps, _, pre_bias, scale, shift, _ = arguments
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a tensor (N, C, *spatial), got {type(x).__name__}")
    if x.dtype not in _DTYPES:
        raise TypeError(f"x must be float16, bfloat16, float32 or float64, got {x.dtype}; convert it with x.float()")
    if x.layout is not torch.strided or x.is_nested:
        raise TypeError(f"x must be a dense tensor (N, C, *spatial), got {_kind(x)}; convert it first")
    shape = x.shape
    if not 2 <= len(shape) <= 5:
        raise ValueError(
            f"x must be (N, C, *spatial) with none to three spatial axes, got shape {tuple(shape)}; "
            f"flatten the spatial axes or add those that are missing"
        )
    n, channels = shape[0], shape[1]
    # What is right is seen here, for a call costs time; what may be wrong is looked at more closely there.
    ints = type(num_groups) is int and type(channels) is int
    if not ints or num_groups < 1 or channels < 1 or channels % num_groups != 0:
        check_num_groups(num_groups, channels)
    if type(eps) is not float or not 0 <= eps <= sys.float_info.max:
        check_eps(eps)
    if weight is not None:
        _check_parameter("weight", weight, x, "(C,)", (channels,))
    if bias is not None:
        _check_parameter("bias", bias, x, "(C,)", (channels,))
    if pre_bias is not None:
        _check_parameter("pre_bias", pre_bias, x, "(N, C)", (n, channels))
    if scale is not None:
        _check_parameter("scale", scale, x, "(N, C)", (n, channels), or_as_x=True)
    if shift is not None:
        _check_parameter("shift", shift, x, "(N, C)", (n, channels), or_as_x=True)
        if scale is not None and scale.dim() != shift.dim():
            raise ValueError(
                f"scale and shift must both be (N, C), or both of x's shape {tuple(shape)}, got {tuple(scale.shape)} "
                f"and {tuple(shift.shape)}; for one (N, C) beside a map, give .reshape(N, C, 1, ...).expand_as(x)"
            )


def has_maps(arguments: Arguments) -> bool:
    """Return True where scale and shift, or the one that is given, are maps."""
    scale, shift = arguments.scale, arguments.shift
    return (scale is not None and scale.dim() > 2) or (shift is not None and shift.dim() > 2)


def without_maps(arguments: Arguments) -> Arguments:
    """Return the arguments that belong to channels: without scale and shift where these are maps."""
    return arguments._replace(scale=None, shift=None) if has_maps(arguments) else arguments


def check_num_groups(num_groups: int, num_channels: int) -> None:
    """Raise TypeError unless both are ints, ValueError unless num_groups divides num_channels.

    The latter names the nearest counts that would do.
    """
    check_int("num_groups", num_groups)
    check_int("num_channels", num_channels)
    if num_channels < 1:
        raise ValueError(f"there must be at least one channel, got {num_channels}")
    if num_groups < 1 or num_channels % num_groups != 0:
        divisors = _divisors(int(num_channels))
        nearest = [str(c) for c in (_last(divisors, num_groups), _first(divisors, num_groups)) if c is not None]
        raise ValueError(
            f"num_groups must divide the number of channels, got num_groups={num_groups} for {num_channels} channels; "
            f"the nearest that would do: {' or '.join(nearest)} (unetgn.largest_group_count picks one)"
        )


def check_int(name: str, value: int) -> None:
    """Raise TypeError unless the value is an int (or the compiler's stand-in for one), and no bool."""
    if type(value) is not int and (isinstance(value, bool) or not isinstance(value, (int, torch.SymInt))):
        if isinstance(value, Tensor) and torch.jit.is_tracing():  # sizes are tensors there
            raise TypeError("torch.jit.trace, which PyTorch has deprecated, is not supported; use torch.export")
        raise TypeError(f"{name} must be an int, got {_shown(value)}; int(...) makes one")


def check_eps(eps: float) -> None:
    """Raise TypeError unless eps is a number, ValueError unless it is finite and at least 0."""
    if type(eps) is not float and (isinstance(eps, bool) or not isinstance(eps, (float, int, torch.SymFloat))):
        raise TypeError(f"eps must be a float, got {_shown(eps)}; float(...) makes one")
    if not 0 <= eps <= sys.float_info.max:  # which an int of 400 digits is beyond, though finite
        raise ValueError(f"eps must be finite and 0 or more, got {eps}; 1e-5 and 1e-6 are usual")


def check_activation(activation: str | None) -> None:
    """Raise ValueError unless the activation is one that the operator has."""
    if activation is not None and activation != "silu":
        raise ValueError(f"activation must be 'silu' or None, got {activation!r}")


def _shown(value: object) -> str:
    """Name the value and its type; of arrays and tensors, which a compiler cannot print, the type alone."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return f"{value!r} of type {type(value).__name__}"
    return f"one of type {type(value).__name__}"


def _kind(x: Tensor) -> str:
    return "a nested tensor" if x.is_nested else f"one of layout {x.layout}"


def _divisors(number: int) -> list[int]:
    """List the divisors in order; of a number beyond 1e12 those that are small enough to be found at once."""
    small = [count for count in range(1, min(math.isqrt(number), 10**6) + 1) if number % count == 0]
    return sorted({*small, *(number // count for count in small)})


def _last(divisors: list[int], limit: int) -> int | None:
    below = [count for count in divisors if count < limit]
    return below[-1] if below else None


def _first(divisors: list[int], limit: int) -> int | None:
    above = [count for count in divisors if count > limit]
    return above[0] if above else None


def _check_parameter(
    name: str, value: Tensor, x: Tensor, meaning: str, shape: tuple[int, ...], *, or_as_x: bool = False
) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor {meaning} or None, got {type(value).__name__}")
    if value.layout is not torch.strided or value.is_nested:
        raise TypeError(f"{name} must be a dense tensor {meaning} or None, got {_kind(value)}; convert it first")
    if value.shape != shape and not (or_as_x and value.shape == x.shape):
        other = ", or that of x," if or_as_x and x.dim() > 2 else ""
        raise ValueError(
            f"{name} must have shape {meaning} = {shape}{other} for x of shape {tuple(x.shape)}, "
            f"got {tuple(value.shape)}"
        )
    if value.dtype is not x.dtype and value.dtype not in _DTYPES:
        raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {value.dtype}")
    if not (value.is_cpu and x.is_cpu) and value.device != x.device:  # the first is fast
        raise ValueError(f"{name} is on {value.device} but x is on {x.device}; move one of them with .to(device)")
