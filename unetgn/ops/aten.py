"""The operator out of PyTorch's own kernels: for CPU, MPS and every device without Triton.

Two ways lead through it, forward and backward:

    native     PyTorch's group norm, where it keeps the layout and is exact and fast; with a scale and shift of each
               sample it works on one sample of N * C channels in N * G groups
    centred    plain tensor operations on h - mean, for any layout and any mean

SiLU works in place. 16-bit tensors are computed in float32, so that z is rounded once and cannot overflow on the way.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from unetgn.ops.layout import accumulation_dtype, channels_last_strides, of_channel
from unetgn.ops.reference import Gradients, Needs, parameter_gradients

# PyTorch's forward kernels for the CPU lose digits where the mean of a group is many times its standard deviation.
# Contiguous ones evaluate x * a + b, which is off by about 1e-7 * mean / std. Those for channels_last take the variance
# as E[x^2] - E[x]^2 from sums that run on and on. What these lose grows with the number of positions, with any mean: y
# is off by 1e-6 over 16,384, 7e-6 over 65,536, 5e-5 over 262,144 and 3e-4 over a million (one thread, float32 against
# float64), and by about (mean / std)^2 times as much beyond mean = std. The limits of |mean| * rstd stand for 3e-6 and
# 1e-5; where even mean 0 would miss the latter, the kernel is not used.
_LIMIT_OF_SUMS = 32.0
_LIMIT_OF_SQUARES = 4.0  # up to so many positions, then falling with their square root
_POSITIONS = 16384
_MOST_POSITIONS = 65536

# In channels_last they run along the channels of a group, which is slow where those are few: forward only in samples of
# fewer positions than PyTorch's threshold (`feature_map_threshold` in its group_norm_kernel.cpp), and worth the centred
# way's dozen calls from this many elements on. Measured on x86.
_SHORT_RUN = 8
_FEW_POSITIONS = 1024
_MANY_ELEMENTS = 16384

_GROUP_NORM_BACKWARD = torch.ops.aten.native_group_norm_backward.default


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
) -> tuple[Tensor, Tensor, Tensor]:
    """y in the dtype and layout of x; mean and rstd (N, G) in the dtype of the arithmetic."""
    h = _with_pre_bias(x, pre_bias)
    a, b = _affine(h, weight, bias, scale, shift)
    if h.is_contiguous():
        z, mean, rstd = _native(h, num_groups, a, b, eps)
        exact = not h.is_cpu or not is_off_centre(mean, rstd, _LIMIT_OF_SUMS)
    elif _native_channels_last_is_good(h, num_groups):
        z, mean, rstd = _native_channels_last(h, num_groups, a, b, eps)
        exact = not is_off_centre(mean, rstd, _limit_of_squares(h))
    else:
        exact = False
    if not exact:
        z, mean, rstd = _centred(h, num_groups, a, b, eps)
    if activation:
        F.silu(z, inplace=True)
    return _as(x, z), mean, rstd


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
) -> Gradients:
    """Gradients of (x, weight, bias, pre_bias, scale, shift), by the formulas of `reference.gradients`; dx in the
    dtype and layout of x."""
    h = _with_pre_bias(x, pre_bias)
    a, b = _affine(h, weight, bias, scale, shift)
    h, dz = _flat(h), _flat(_as(h, dy))
    centred = h - _of_channel(mean, h)
    if activation:
        gain = _of_channel(rstd, h) if a is None else _of_channel(rstd, h) * a.unsqueeze(-1)
        z = _plus(centred * gain, b)
        dz = torch.ops.aten.silu_backward.grad_input(dz, z, grad_input=z)
    way = _native_backward if _native_backward_is_good(centred, rstd, a) else _centred_backward
    dh, s0, s1 = way(dz, centred, rstd, a, needs[0] or needs[3])
    dx = _as(x, dh.view(x.shape)) if dh is not None and needs[0] else None
    return dx, *parameter_gradients(dh, s0, s1, weight, bias, pre_bias, scale, shift, needs)


def is_off_centre(mean: Tensor, rstd: Tensor, limit: float) -> bool:
    """Whether some group lies far from zero for its spread, so that sums of uncentred values lose too many digits.

    The criterion is safe for statistics that have cancelled themselves: the mean is right to a few roundings, and such
    a variance is at most about 1e-6 * mean^2, which makes |mean| * rstd large. NaN counts as off centre, since it may
    hide the other groups.
    """
    return not (mean * rstd).abs_().max().item() <= limit


def _limit_of_squares(h: Tensor) -> float:
    """The limit for samples of as many positions as those of h."""
    if h.numel() <= _POSITIONS:  # spares small calls the rest
        return _LIMIT_OF_SQUARES
    return _LIMIT_OF_SQUARES * min(1.0, math.sqrt(_POSITIONS / h.shape[2:].numel()))


def _native(
    h: Tensor, num_groups: int, a: Tensor | None, b: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """z, mean and rstd of a contiguous h."""
    n, channels = h.shape[0], h.shape[1]
    elements = h.numel() // (n * channels)
    if a is not None and b is not None and a.dim() == 2:
        rows, groups = n * channels, n * num_groups
        flat = h.view(1, rows, elements)
        z, mean, rstd = torch.native_group_norm(flat, a.flatten(), b.flatten(), 1, rows, elements, groups, eps)
        return z.view(h.shape), mean.view(n, num_groups), rstd.view(n, num_groups)
    if h.dim() > 3 and (channels == 1 or elements == 1):  # with four axes PyTorch may read it as channels_last
        flat = h.view(n, channels, elements)
        z, mean, rstd = torch.native_group_norm(flat, a, b, n, channels, elements, num_groups, eps)
        return z.view(h.shape), mean, rstd
    return torch.native_group_norm(h, a, b, n, channels, elements, num_groups, eps)


def _native_channels_last_is_good(h: Tensor, num_groups: int) -> bool:
    """Whether PyTorch's kernel keeps the layout, which it does on the CPU, and is exact and fast."""
    if not h.is_cpu or h.numel() < _MANY_ELEMENTS:
        return h.is_cpu
    positions = h.shape[2:].numel()
    long_runs = h.shape[1] // num_groups >= _SHORT_RUN
    return positions <= _MOST_POSITIONS and (long_runs or positions >= _FEW_POSITIONS)


def _native_channels_last(
    h: Tensor, num_groups: int, a: Tensor | None, b: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """z, mean and rstd of a channels_last h on the CPU. PyTorch's kernel reads the layout from all strides, and those
    of an axis of one element may be any."""
    if 1 in h.shape and h.stride() != channels_last_strides(h.shape):
        h = h.as_strided(h.shape, channels_last_strides(h.shape))
    n, channels = h.shape[0], h.shape[1]
    elements = h.numel() // (n * channels)
    if a is None or a.dim() == 1:
        return torch.native_group_norm(h, a, b, n, channels, elements, num_groups, eps)
    z, mean, rstd = torch.native_group_norm(h, None, None, n, channels, elements, num_groups, eps)
    _plus(_flat(z).mul_(a.unsqueeze(-1)), b)
    return z, mean, rstd


def _centred(
    h: Tensor, num_groups: int, a: Tensor | None, b: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """z, mean and rstd of h in any layout. What a first mean leaves has a mean too, because sums round: that is taken
    back, so that the mean of equal values is their value."""
    flat = _flat(h)
    n, channels = flat.shape[:2]

    def of_group(values: Tensor) -> Tensor:
        """(N, C) -> means (N, G)."""
        return values.view(n, num_groups, channels // num_groups).mean(2)

    centre = of_group(flat.mean(2))
    d = flat - _of_channel(centre, flat)
    rest = of_group(d.mean(2))
    d.sub_(_of_channel(rest, flat))
    rstd = torch.rsqrt(of_group((d * d).mean(2)) + eps)
    gain = _of_channel(rstd, flat)
    z = _plus(d.mul_(gain if a is None else gain * a.unsqueeze(-1)), b)
    return z.view(h.shape), centre + rest, rstd


def _native_backward_is_good(centred: Tensor, rstd: Tensor, a: Tensor | None) -> bool:
    """Whether PyTorch's backward is right and fast: tried on the CPU alone; groups of one element have dh = 0, exactly;
    and in channels_last samples are no channels of one larger sample, as scales of each sample would need it."""
    if not centred.is_cpu or centred.numel() == rstd.numel():
        return False
    per_sample = a is not None and a.dim() == 2
    return centred.is_contiguous() or (centred.shape[1] // rstd.shape[1] >= _SHORT_RUN and not per_sample)


def _native_backward(
    dz: Tensor, centred: Tensor, rstd: Tensor, a: Tensor | None, needs_dh: bool
) -> tuple[Tensor | None, Tensor, Tensor]:
    """dh (N, C, L), S0 and S1 from dz and h - mean (N, C, L). The sums are of each sample (N, C) where `a` is, as
    forward one sample of N * C channels; else over samples (1, C).

    PyTorch takes S1 as a difference of sums, which cancels with any mean but zero, so h - mean is its x.
    """
    sizes, groups, mask = centred.shape, rstd.shape[1], [needs_dh, True, True]
    n, channels, elements = sizes
    if a is None:  # PyTorch has no gradient of the bias alone
        a = centred.new_ones(channels)
    elif a.dim() == 2:
        sizes, groups, a = torch.Size((1, n * channels, elements)), n * groups, a.flatten()
        dz, centred, rstd = dz.view(sizes), centred.view(sizes), rstd.view(1, groups)
    if not centred.is_contiguous():
        mask[0] = True  # PyTorch 2.13 writes dh in channels_last whether asked or not, and crashes
        image = torch.Size((*sizes, 1))
        dz, centred = (t.as_strided(image, channels_last_strides(image)) for t in (dz, centred))
    mean = torch.zeros_like(rstd)
    dh, s1, s0 = _GROUP_NORM_BACKWARD(dz, centred, mean, rstd, a, *sizes, groups, mask)
    return dh.view(n, channels, elements) if needs_dh else None, s0.view(-1, channels), s1.view(-1, channels)


def _centred_backward(
    dz: Tensor, centred: Tensor, rstd: Tensor, a: Tensor | None, needs_dh: bool
) -> tuple[Tensor | None, Tensor, Tensor]:
    """dh (N, C, L), S0 and S1 (N, C) from dz and h - mean (N, C, L) in any layout. Overwrites the latter."""
    rstd_c = _of_channel(rstd, centred)
    s0, s1 = dz.sum(2), (dz * centred).sum(2).mul_(rstd_c.squeeze(2))
    if not needs_dh:
        return None, s0, s1
    t0, t1, daz = (s0, s1, dz) if a is None else (s0 * a, s1 * a, dz * a.unsqueeze(-1))
    n, num_groups = rstd.shape
    length = dz.shape[1] * dz.shape[2] // num_groups
    m1, m2 = (t.view(n, num_groups, -1).sum(2).div_(length) for t in (t0, t1))
    dh = centred.mul_(_of_channel(m2 * rstd, dz)).add_(_of_channel(m1, dz)).sub_(daz).mul_(-rstd_c)
    return dh, s0, s1


def _with_pre_bias(x: Tensor, pre_bias: Tensor | None) -> Tensor:
    dtype = accumulation_dtype(x)
    h = x if x.dtype == dtype else x.to(dtype)
    return h if pre_bias is None else h + pre_bias.to(dtype).view(*pre_bias.shape, *(1,) * (x.dim() - 2))


def _affine(
    h: Tensor, weight: Tensor | None, bias: Tensor | None, scale: Tensor | None, shift: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """a = weight * (1 + scale) and b = bias * (1 + scale) + shift, so that z = xhat * a + b.

    Without scale and shift weight and bias themselves, each (C,) or None; else both are (N, C).
    """
    weight = None if weight is None else _as(h, weight).contiguous()  # PyTorch's kernels read them as dense
    bias = None if bias is None else _as(h, bias).contiguous()
    if scale is None and shift is None:
        return weight, bias
    n, channels = h.shape[0], h.shape[1]
    gain = h.new_ones(n, channels) if scale is None else 1 + scale.to(h.dtype)
    b = h.new_zeros(n, channels) if bias is None else gain * bias
    a = gain if weight is None else gain * weight
    return a, b if shift is None else b + shift.to(h.dtype)


def _plus(z: Tensor, b: Tensor | None) -> Tensor:
    """z (N, C, L) + b, (C,) or (N, C), in place."""
    return z if b is None else z.add_(b.unsqueeze(-1))


def _flat(x: Tensor) -> Tensor:
    """View a dense x (N, C, *spatial), of either layout, as (N, C, L)."""
    return x.view(x.shape[0], x.shape[1], -1)


def _of_channel(values: Tensor, x: Tensor) -> Tensor:
    """Values of groups (N, G) for each channel of x: (N, C, 1), so that an inner loop over channels is a plain one."""
    return of_channel(values, x.shape[1]).unsqueeze(2)


def _as(like: Tensor, values: Tensor) -> Tensor:
    return values if values.dtype == like.dtype else values.to(like.dtype)
