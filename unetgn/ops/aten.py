"""Computes the operator with PyTorch's own kernels: for CPU, MPS and every device without Triton.

Two ways lead through it, forward and backward:

    native     PyTorch's group norm, where it keeps the layout and is exact and fast. PyTorch takes a weight and a bias
               for each channel (C,) only; scale and shift (N, C) differ between samples. So with these a contiguous
               (N, C, L) is viewed as one sample of N * C channels in N * G groups, which has the same groups.
    centred    plain tensor operations on h - mean, for any layout and any mean

SiLU works in place. 16-bit tensors are computed in float32, so that z is rounded once and cannot overflow on the way.
"""

import math
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from unetgn.ops.arguments import Arguments, Gradients, Needs
from unetgn.ops.layout import ACCUMULATION_DTYPE

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


def forward(arguments: Arguments) -> tuple[Tensor, Tensor, Tensor]:
    """Compute y in the dtype and layout of x, and mean and rstd (N, G) in the dtype of the arithmetic."""
    x, num_groups, eps = arguments.x, arguments.num_groups, arguments.eps
    h = _with_pre_bias(x, arguments.pre_bias)
    a, b = _affine(h, arguments)
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
    if arguments.activation:
        F.silu(z, inplace=True)
    return _as(x, z), mean, rstd


def backward(dy: Tensor, arguments: Arguments, mean: Tensor, rstd: Tensor, needs: Needs) -> Gradients:
    """Compute the gradients by the closed form that `reference` has; dx in the dtype and layout of x."""
    x = arguments.x
    h = _with_pre_bias(x, arguments.pre_bias)
    a, b = _affine(h, arguments)
    h, dz = _flat(h), _flat(_as(h, dy))
    centred = h - _of_channel(mean, h)
    if arguments.activation:
        gain = _of_channel(rstd, h) if a is None else _of_channel(rstd, h) * a.unsqueeze(-1)
        z = _plus(centred * gain, b)
        dz = torch.ops.aten.silu_backward.grad_input(dz, z, grad_input=z)
    way = _native_backward if _native_backward_is_good(centred, rstd, a) else _centred_backward
    dh, s0, s1 = way(dz, centred, rstd, a, needs.x or needs.pre_bias)
    dx = _as(x, dh.view(x.shape)) if dh is not None and needs.x else None
    return _with_parameter_gradients(dx, dh, s0, s1, arguments, needs)


def _with_parameter_gradients(
    dx: Tensor | None, dh: Tensor | None, s0: Tensor, s1: Tensor, arguments: Arguments, needs: Needs
) -> Gradients:
    """Return all gradients: dx as given, the others from dh (N, C, L) and the sums S0 and S1 of `reference`.

    The sums are (N, C). Without scale and shift they may be (1, C): summed over the samples already.
    """
    weight, bias, pre_bias = arguments.weight, arguments.bias, arguments.pre_bias
    scale, shift = arguments.scale, arguments.shift
    t0, t1, dscale = s0, s1, None
    if scale is not None:
        factor = 1 + scale.to(s0.dtype)
        t0, t1 = s0 * factor, s1 * factor
        if needs.scale:
            dscale = s1 if weight is None else s1 * weight.to(s1.dtype)
            dscale = _as(scale, dscale if bias is None else dscale + s0 * bias.to(s0.dtype))
    return Gradients(
        dx,
        dweight=_as(weight, t1.sum(0)) if needs.weight and weight is not None else None,
        dbias=_as(bias, t0.sum(0)) if needs.bias and bias is not None else None,
        dpre_bias=_as(pre_bias, dh.sum(2)) if needs.pre_bias and pre_bias is not None and dh is not None else None,
        dscale=dscale,
        dshift=_as(shift, s0) if needs.shift and shift is not None else None,
    )


def is_off_centre(mean: Tensor, rstd: Tensor, limit: float) -> bool:
    """Return True where some group lies so far from zero that sums of uncentred values lose too many digits.

    The criterion is safe for statistics that have cancelled themselves: the mean is right to a few roundings, and such
    a variance is at most about 1e-6 * mean^2, which makes |mean| * rstd large. NaN counts as off centre, since it may
    hide the other groups.
    """
    return not (mean * rstd).abs_().max().item() <= limit


def _limit_of_squares(h: Tensor) -> float:
    """Return the limit for samples of as many positions as those of h."""
    if h.numel() <= _POSITIONS:  # spares small calls the rest
        return _LIMIT_OF_SQUARES
    return _LIMIT_OF_SQUARES * min(1.0, math.sqrt(_POSITIONS / h.shape[2:].numel()))


def _native(
    h: Tensor, num_groups: int, a: Tensor | None, b: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute z, mean and rstd of a contiguous h by PyTorch's group norm."""
    shape = h.shape  # asked once: PyTorch makes a new one each time
    n, channels = shape[0], shape[1]
    elements = h.numel() // (n * channels)
    if a is not None and b is not None and a.dim() == 2:
        rows, groups = n * channels, n * num_groups
        flat = h.view(1, rows, elements)
        z, mean, rstd = torch.native_group_norm(flat, a.flatten(), b.flatten(), 1, rows, elements, groups, eps)
        return z.view(shape), mean.view(n, num_groups), rstd.view(n, num_groups)
    if len(shape) > 3 and (channels == 1 or elements == 1):  # with four axes PyTorch may read it as channels_last
        flat = h.view(n, channels, elements)
        z, mean, rstd = torch.native_group_norm(flat, a, b, n, channels, elements, num_groups, eps)
        return z.view(shape), mean, rstd
    return torch.native_group_norm(h, a, b, n, channels, elements, num_groups, eps)


def _native_channels_last_is_good(h: Tensor, num_groups: int) -> bool:
    """Return True where PyTorch's kernel keeps the layout, which it does on the CPU, and is exact and fast."""
    if not h.is_cpu or h.numel() < _MANY_ELEMENTS:
        return h.is_cpu
    positions = h.shape[2:].numel()
    long_runs = h.shape[1] // num_groups >= _SHORT_RUN
    return positions <= _MOST_POSITIONS and (long_runs or positions >= _FEW_POSITIONS)


def _native_channels_last(
    h: Tensor, num_groups: int, a: Tensor | None, b: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute z, mean and rstd of a channels_last h on the CPU by PyTorch's group norm.

    PyTorch reads the layout from all strides, and those of an axis of one element may be any: they are set first.
    """
    shape = h.shape
    if 1 in shape and h.stride() != _channels_last_strides(shape):
        h = h.as_strided(shape, _channels_last_strides(shape))
    n, channels = shape[0], shape[1]
    elements = h.numel() // (n * channels)
    if a is None or a.dim() == 1:
        return torch.native_group_norm(h, a, b, n, channels, elements, num_groups, eps)
    z, mean, rstd = torch.native_group_norm(h, None, None, n, channels, elements, num_groups, eps)
    _plus(_flat(z).mul_(a.unsqueeze(-1)), b)
    return z, mean, rstd


def _centred(
    h: Tensor, num_groups: int, a: Tensor | None, b: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute z, mean and rstd of h in any layout by plain tensor operations.

    Sums round, so what a first mean leaves has a mean too. That is added to the first: the mean of equal values is
    then their value.
    """
    flat = _flat(h)
    n, channels = flat.shape[:2]

    def of_group(values: Tensor) -> Tensor:
        """Average values (N, C) over the channels of each group: (N, G)."""
        return values.view(n, num_groups, channels // num_groups).mean(2)

    centre = of_group(flat.mean(2))
    d = flat - _of_channel(centre, flat)
    rest = of_group(d.mean(2))
    d.sub_(_of_channel(rest, flat))
    rstd = torch.rsqrt(of_group((d * d).mean(2)) + eps)
    rstd_c = _of_channel(rstd, flat)
    z = _plus(d.mul_(rstd_c if a is None else rstd_c * a.unsqueeze(-1)), b)
    return z.view(h.shape), centre + rest, rstd


def _native_backward_is_good(centred: Tensor, rstd: Tensor, a: Tensor | None) -> bool:
    """Return True where PyTorch's backward is right and fast.

    It has been tried on the CPU alone. Groups of one element have dh = 0 exactly, which PyTorch's sums miss. In
    channels_last it is slow for few channels a group, and an `a` of each sample (N, C) cannot be given to it: the view
    as one sample of N * C channels, which `_native_backward` takes for that, exists for contiguous tensors alone.
    """
    if not centred.is_cpu or centred.numel() == rstd.numel():
        return False
    per_sample = a is not None and a.dim() == 2
    return centred.is_contiguous() or (centred.shape[1] // rstd.shape[1] >= _SHORT_RUN and not per_sample)


def _native_backward(
    dz: Tensor, centred: Tensor, rstd: Tensor, a: Tensor | None, needs_dh: bool
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Compute dh (N, C, L), S0 and S1 from dz and h - mean (N, C, L) by PyTorch's backward of group norm.

    Where `a` is of each sample (N, C), the tensors are viewed as one sample of N * C channels, and the sums are (N, C);
    else PyTorch has summed over samples, and they are (1, C).
    PyTorch computes S1 as a difference of sums, which cancels with any mean but zero: it is given h - mean as its x.
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
        dz, centred = (t.as_strided(image, _channels_last_strides(image)) for t in (dz, centred))
    mean = torch.zeros_like(rstd)
    dh, s1, s0 = _GROUP_NORM_BACKWARD(dz, centred, mean, rstd, a, *sizes, groups, mask)
    return dh.view(n, channels, elements) if needs_dh else None, s0.view(-1, channels), s1.view(-1, channels)


def _centred_backward(
    dz: Tensor, centred: Tensor, rstd: Tensor, a: Tensor | None, needs_dh: bool
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Compute dh (N, C, L), S0 and S1 (N, C) from dz and h - mean (N, C, L) in any layout. Overwrites the latter."""
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
    dtype = ACCUMULATION_DTYPE[x.dtype]
    h = x if x.dtype == dtype else x.to(dtype)
    return h if pre_bias is None else h + pre_bias.to(dtype).view(*pre_bias.shape, *(1,) * (x.dim() - 2))


def _affine(h: Tensor, arguments: Arguments) -> tuple[Tensor | None, Tensor | None]:
    """Return a = weight * (1 + scale) and b = bias * (1 + scale) + shift, so that z = xhat * a + b.

    Without scale and shift they are weight and bias themselves, each (C,) or None; else both are (N, C).
    """
    weight, bias, scale, shift = arguments.weight, arguments.bias, arguments.scale, arguments.shift
    weight = None if weight is None else _as(h, weight).contiguous()  # PyTorch's kernels read them as dense
    bias = None if bias is None else _as(h, bias).contiguous()
    if scale is None and shift is None:
        return weight, bias
    n, channels = h.shape[0], h.shape[1]
    factor = h.new_ones(n, channels) if scale is None else 1 + scale.to(h.dtype)
    b = h.new_zeros(n, channels) if bias is None else factor * bias
    a = factor if weight is None else factor * weight
    return a, b if shift is None else b + shift.to(h.dtype)


def _plus(z: Tensor, b: Tensor | None) -> Tensor:
    """Add b, (C,) or (N, C), to z (N, C, L) in place."""
    return z if b is None else z.add_(b.unsqueeze(-1))


def _flat(x: Tensor) -> Tensor:
    """View a dense x (N, C, *spatial), of either layout, as (N, C, L)."""
    return x.view(x.shape[0], x.shape[1], -1)


def _of_channel(values: Tensor, h: Tensor) -> Tensor:
    """Repeat values of groups (N, G) for each channel of h: (N, C, 1), so that a loop over channels is a plain one."""
    n, num_groups = values.shape
    channels = h.shape[1]
    return values.unsqueeze(2).expand(n, num_groups, channels // num_groups).reshape(n, channels).unsqueeze(2)


def _as(like: Tensor, values: Tensor) -> Tensor:
    return values if values.dtype == like.dtype else values.to(like.dtype)


@lru_cache(maxsize=1024)
def _channels_last_strides(shape: torch.Size) -> tuple[int, ...]:
    """Return the strides of a dense channels_last tensor of that shape.

    Those of an axis of one element are arbitrary in a tensor, and yet PyTorch's own kernels read the layout from them.
    """
    strides, step = [], shape[1]
    for size in reversed(shape[2:]):
        strides.append(step)
        step *= size
    return step, 1, *reversed(strides)
