"""Prepares what both passes compute with: factors and terms, views by group, and whether means are far from zero."""

from functools import lru_cache

import torch
from torch import Tensor

from unetgn.ops.arguments import Arguments

# In channels_last PyTorch's kernels of group norm are slow for groups of fewer channels than this. Measured on x86.
SHORT_RUN = 8
MANY_ELEMENTS = 16384  # from here on, passes over memory count for more than the number of calls


def affine(h: Tensor, arguments: Arguments) -> tuple[Tensor | None, Tensor | None]:
    """Return a = weight * (1 + scale) and b = bias * (1 + scale) + shift, so that z = xhat * a + b.

    Without scale and shift they are weight and bias themselves, each (C,) or None; else both are (N, C). Dense, as
    PyTorch's kernels read them; and of a sum that begins with b its strides would decide on the layout.
    """
    weight, bias, scale, shift = arguments.weight, arguments.bias, arguments.scale, arguments.shift
    weight = None if weight is None else as_dtype_of(h, weight).contiguous()
    bias = None if bias is None else as_dtype_of(h, bias).contiguous()
    if scale is None and shift is None:
        return weight, bias
    n, channels = arguments.x.shape[:2]
    factor = h.new_ones(n, channels) if scale is None else 1 + scale.to(h.dtype)
    b = h.new_zeros(n, channels) if bias is None else factor * bias
    a = factor if weight is None else factor * weight
    b = b if shift is None else b + shift.to(h.dtype)
    return a.contiguous(), b.contiguous()


def modulate(z: Tensor, scale: Tensor | None, shift: Tensor | None) -> None:
    """Apply maps to z in place."""
    if scale is not None:
        z.addcmul_(z, as_dtype_of(z, scale).view(z.shape))
    if shift is not None:
        z.add_(as_dtype_of(z, shift).view(z.shape))


def is_off_centre(mean: Tensor, rstd: Tensor, limit: float) -> bool:
    """Return True where some group lies so far from zero that sums of uncentred values lose too many digits.

    The criterion is safe for statistics that have cancelled themselves: the mean is right to a few roundings, and such
    a variance is at most about 1e-6 * mean^2, which makes |mean| * rstd large. NaN counts as off centre, since it may
    hide the other groups.
    """
    low, high = torch.aminmax(mean * rstd)
    return not (-limit <= low.item() and high.item() <= limit)


def of_channels(values: Tensor, h: Tensor) -> Tensor:
    """Repeat values (N, G, 1, 1) for each channel of an h in channels_last: a loop over all channels is a plain one."""
    if h.stride(3) == 1 or values.shape[-2] == h.shape[2]:
        return values
    return values.expand(*h.shape[:3], 1).contiguous()


def by_group(values: Tensor, num_groups: int) -> Tensor:
    """View (C,) or (N, C) as (G, C/G, 1) or (N, G, C/G, 1)."""
    if values.dim() == 1:
        return values.view(num_groups, -1, 1)
    return values.reshape(values.shape[0], num_groups, -1, 1)


def grouped(h: Tensor, statistics: Tensor) -> Tensor:
    """View h (N, C, ...) as (N, G, C/G, L), by statistics (N, G)."""
    n, groups = statistics.shape
    return h.view(n, groups, h.shape[1] // groups, -1)


def as_native(h: Tensor, num_groups: int, a: Tensor | None) -> tuple[Tensor, tuple[int, int, int, int]]:
    """View h such that PyTorch's group norm reads it right, and return the sizes that it asks for: N, C, L and G.

    PyTorch takes an `a` of each channel only; with one of each sample (N, C), a contiguous h is one sample of N * C
    channels in N * G groups. PyTorch reads the layout from all strides, and those of an axis of one element may be any.
    """
    shape = h.shape  # asked once: PyTorch makes a new one each time
    n, channels = shape[0], shape[1]
    elements = h.numel() // (n * channels)
    if a is not None and a.dim() == 2:
        rows = n * channels
        return h.view(1, rows, elements), (1, rows, elements, n * num_groups)
    if 1 in shape:
        if not h.is_contiguous():
            h = h.as_strided(shape, channels_last_strides(shape))
        elif channels == 1 or elements == 1:  # with four axes PyTorch may read it as channels_last
            h = h.view(n, channels, elements)
    return h, (n, channels, elements, num_groups)


def as_dtype_of(like: Tensor, values: Tensor) -> Tensor:
    return values if values.dtype == like.dtype else values.to(like.dtype)


@lru_cache(maxsize=1024)
def channels_last_strides(shape: torch.Size) -> tuple[int, ...]:
    """Return the strides of a dense channels_last tensor of that shape.

    Those of an axis of one element are arbitrary in a tensor, and yet PyTorch's own kernels read the layout from them.
    """
    strides, step = [], shape[1]
    for size in reversed(shape[2:]):
        strides.append(step)
        step *= size
    return step, 1, *reversed(strides)
