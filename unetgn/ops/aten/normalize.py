"""Computes y, and the statistics of each group: the forward pass. SiLU works in place."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from unetgn.ops.arguments import Arguments
from unetgn.ops.aten.operands import (
    MANY_ELEMENTS,
    SHORT_RUN,
    affine,
    as_dtype_of,
    as_native,
    by_group,
    grouped,
    is_off_centre,
    modulate,
    of_channels,
)
from unetgn.ops.checks import has_maps, without_maps
from unetgn.ops.layout import ACCUMULATION_DTYPE

# PyTorch's forward kernels for the CPU lose digits where the mean of a group is many times its standard deviation.
# Contiguous ones evaluate x * a + b, which is off by about 1e-7 * mean / std: 3e-6 at the limit of |mean| * rstd.
# Those for channels_last take the variance as E[x^2] - E[x]^2 from sums that run on and on over the positions. With one
# thread, in float32 against float64, y is off by 1e-6 over 16,384 positions, 7e-6 over 65,536 and 3e-4 over a million,
# and by about (mean / std)^2 times as much beyond mean = std: 1e-5, or a few times that in groups of few channels.
# That is where roundings cancel. Where values repeat (flat regions), they add up: y is off by up to
# positions * 2^-27 * (1 + 1.4 * (mean / std)^2), and the limit falls with the positions so that this is at most 2e-3.
_LIMIT_OF_SUMS = 32.0
_LIMIT_OF_SQUARES = 4.0
_SQUARE_POSITIONS = 2**18
_MOST_POSITIONS = 65536

# In channels_last they run along the channels of a group, which is slow where those are few (`SHORT_RUN`): forward
# only in samples of fewer positions than PyTorch's threshold (`feature_map_threshold` in its group_norm_kernel.cpp),
# and worth the centred way's dozen calls from `MANY_ELEMENTS` on.
_FEW_POSITIONS = 1024


def forward(arguments: Arguments) -> tuple[Tensor, Tensor, Tensor]:
    """Compute y in the dtype and layout of x, and mean and rstd (N, G) in the dtype of the arithmetic."""
    x, num_groups, eps = arguments.x, arguments.num_groups, arguments.eps
    h = _with_pre_bias(x, arguments.pre_bias)
    maps = has_maps(arguments)
    a, b = affine(h, without_maps(arguments) if maps else arguments)
    if h.is_contiguous():
        z, mean, rstd = native(h, num_groups, a, b, eps)
        exact = not h.is_cpu or not is_off_centre(mean, rstd, _LIMIT_OF_SUMS)
    elif _native_channels_last_is_good(h, num_groups):
        z, mean, rstd = _native_channels_last(h, num_groups, a, b, eps)
        exact = not is_off_centre(mean, rstd, _limit_of_squares(h))
    else:
        exact = False
    if not exact:
        z, mean, rstd = _centred(h, num_groups, a, b, eps)
    if maps:
        modulate(z, arguments.scale, arguments.shift)
    if arguments.activation:
        F.silu(z, inplace=True)
    return as_dtype_of(x, z), mean, rstd


def _limit_of_squares(h: Tensor) -> float:
    """Return the limit for samples of as many positions as those of h."""
    allowed = max(0.0, _SQUARE_POSITIONS / h.shape[2:].numel() - 1) / 1.4
    return min(_LIMIT_OF_SQUARES, math.sqrt(allowed))


def native(h: Tensor, num_groups: int, a: Tensor | None, b: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Compute z, mean and rstd of a contiguous h by PyTorch's group norm."""
    flat, sizes = as_native(h, num_groups, a)
    if flat is h:
        return torch.native_group_norm(h, a, b, *sizes, eps)
    a, b = (None if t is None else t.view(-1) for t in (a, b))
    z, mean, rstd = torch.native_group_norm(flat, a, b, *sizes, eps)
    return z.view(h.shape), mean.view(h.shape[0], num_groups), rstd.view(h.shape[0], num_groups)


def _native_channels_last_is_good(h: Tensor, num_groups: int) -> bool:
    """Return True where PyTorch's kernel keeps the layout, which it does on the CPU, and is exact and fast."""
    if not h.is_cpu or h.numel() < MANY_ELEMENTS:
        return h.is_cpu
    positions = h.shape[2:].numel()
    long_runs = h.shape[1] // num_groups >= SHORT_RUN
    return positions <= _MOST_POSITIONS and (long_runs or positions >= _FEW_POSITIONS)


def _native_channels_last(
    h: Tensor, num_groups: int, a: Tensor | None, b: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute z, mean and rstd of a channels_last h on the CPU by PyTorch's group norm."""
    h, sizes = as_native(h, num_groups, None)
    if a is None or a.dim() == 1:
        return torch.native_group_norm(h, a, b, *sizes, eps)
    z, mean, rstd = torch.native_group_norm(h, None, None, *sizes, eps)
    by_channel = grouped(z, mean).mul_(by_group(a, num_groups))
    if b is not None:
        by_channel.add_(by_group(b, num_groups))
    return z, mean, rstd


def _centred(
    h: Tensor, num_groups: int, a: Tensor | None, b: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute z, mean and rstd of h in any layout by plain tensor operations.

    Sums round, so what a first mean leaves has a mean too. That is added to the first: the mean of equal values is
    then their value.
    """
    shape = h.shape
    n, channels = shape[:2]
    d = h.view(n, num_groups, channels // num_groups, -1)

    def of_group(values: Tensor) -> Tensor:
        """Average over the positions, then over the channels of each group: (N, G, 1, 1)."""
        return values.mean(3, keepdim=True).mean(2, keepdim=True)

    centre = of_group(d)
    d = d - of_channels(centre, d)
    rest = of_group(d)
    d.sub_(of_channels(rest, d))
    rstd = torch.rsqrt(of_group(d * d) + eps)
    gain = rstd if a is None else rstd * by_group(a, num_groups)
    d.mul_(of_channels(gain, d))
    if b is not None:
        d.add_(by_group(b, num_groups))
    return d.view(shape), (centre + rest).view(n, num_groups), rstd.view(n, num_groups)


def _with_pre_bias(x: Tensor, pre_bias: Tensor | None) -> Tensor:
    dtype = ACCUMULATION_DTYPE[x.dtype]
    h = x if x.dtype == dtype else x.to(dtype)
    return h if pre_bias is None else h + pre_bias.to(dtype).view(*pre_bias.shape, *(1,) * (x.dim() - 2))
