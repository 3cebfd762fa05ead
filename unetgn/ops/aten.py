"""Computes the operator with PyTorch's own kernels: for CPU, MPS and every device without Triton.

Two ways lead through it, forward and backward:

    native     PyTorch's group norm, where it keeps the layout and is exact and fast. PyTorch takes a weight and a bias
               for each channel (C,) only; scale and shift (N, C) differ between samples. So with these a contiguous
               (N, C, L) is viewed as one sample of N * C channels in N * G groups, which has the same groups.
    plain      tensor operations, for any layout; forward they are centred, for any mean

16-bit tensors are computed in float32, so that z is rounded once and cannot overflow on the way. SiLU and its
derivative work in place. The backward pass takes h itself where every mean is near zero, else h - mean.
"""

import math
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from unetgn.ops.arguments import UNKNOWN_EPS, Arguments, Gradients, Needs
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

# In channels_last they run along the channels of a group, position by position. Below `_FEW_POSITIONS`
# (`feature_map_threshold` in its group_norm_kernel.cpp, where another kernel takes over) that is slow for groups of one
# channel; from there on only the backward pass is slow, for groups of fewer than `_SHORT_RUN`. Measured on x86. Below
# `_MANY_ELEMENTS` it is fast enough for all, beside the dozen calls of the centred way.
_FEW_POSITIONS = 1024
_SHORT_RUN = 8
_MANY_ELEMENTS = 16384  # from here on, passes over memory count for more than the number of calls
_FEW_GROUPS = 1024  # up to here, a call of PyTorch's group norm costs less than some calls on small tensors. On x86.

# The backward pass may take its sums over h itself, instead of h - mean, where |mean| * rstd is at most this. S1 is a
# difference of such sums: the gradient of the weight is off by up to 3e-6 then, over 64 to 262,144 positions, where
# centred values give 1e-6.
_LIMIT_OF_PRODUCTS = 1.0

_SILU_BACKWARD = torch.ops.aten.silu_backward.grad_input
_GROUP_NORM_BACKWARD = torch.ops.aten.native_group_norm_backward.default


def forward(arguments: Arguments) -> tuple[Tensor, Tensor, Tensor]:
    """Compute y in the dtype and layout of x, and mean and rstd (N, G) in the dtype of the arithmetic."""
    x, num_groups, eps = arguments.x, arguments.num_groups, arguments.eps
    h = _with_pre_bias(x, arguments.pre_bias)
    maps = has_maps(arguments)
    a, b = _affine(h, without_maps(arguments) if maps else arguments)
    if h.is_contiguous():
        z, mean, rstd = _native(h, num_groups, a, b, eps)
        exact = not h.is_cpu or not _is_off_centre(mean, rstd, _LIMIT_OF_SUMS)
    elif _native_channels_last_is_good(h, num_groups):
        z, mean, rstd = _native_channels_last(h, num_groups, a, b, eps)
        exact = not _is_off_centre(mean, rstd, _limit_of_squares(h))
    else:
        exact = False
    if not exact:
        z, mean, rstd = _centred(h, num_groups, a, b, eps)
    if maps:
        _modulate(z, arguments.scale, arguments.shift)
    if arguments.activation:
        F.silu(z, inplace=True)
    return _as_dtype_of(x, z), mean, rstd


def _limit_of_squares(h: Tensor) -> float:
    """Return the limit for samples of as many positions as those of h."""
    allowed = max(0.0, _SQUARE_POSITIONS / h.shape[2:].numel() - 1) / 1.4
    return min(_LIMIT_OF_SQUARES, math.sqrt(allowed))


def _native(
    h: Tensor, num_groups: int, a: Tensor | None, b: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute z, mean and rstd of a contiguous h by PyTorch's group norm."""
    flat, sizes = _as_native(h, num_groups, a)
    if flat is h:
        return torch.native_group_norm(h, a, b, *sizes, eps)
    a, b = (None if t is None else t.view(-1) for t in (a, b))
    z, mean, rstd = torch.native_group_norm(flat, a, b, *sizes, eps)
    return z.view(h.shape), mean.view(h.shape[0], num_groups), rstd.view(h.shape[0], num_groups)


def _native_channels_last_is_good(h: Tensor, num_groups: int) -> bool:
    """Return True where PyTorch's kernel keeps the layout, which it does on the CPU, and is exact and fast."""
    if not h.is_cpu or h.numel() < _MANY_ELEMENTS:
        return h.is_cpu
    positions = h.shape[2:].numel()
    return positions <= _MOST_POSITIONS and (h.shape[1] > num_groups or positions >= _FEW_POSITIONS)


def _native_channels_last(
    h: Tensor, num_groups: int, a: Tensor | None, b: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute z, mean and rstd of a channels_last h on the CPU by PyTorch's group norm."""
    h, sizes = _as_native(h, num_groups, None)
    if a is None or a.dim() == 1:
        return torch.native_group_norm(h, a, b, *sizes, eps)
    z, mean, rstd = torch.native_group_norm(h, None, None, *sizes, eps)
    by_channel = _grouped(z, mean).mul_(_by_group(a, num_groups))
    if b is not None:
        by_channel.add_(_by_group(b, num_groups))
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
    d = d - _of_channels(centre, d)
    rest = of_group(d)
    d.sub_(_of_channels(rest, d))
    rstd = torch.rsqrt(of_group(d * d) + eps)
    gain = rstd if a is None else rstd * _by_group(a, num_groups)
    d.mul_(_of_channels(gain, d))
    if b is not None:
        d.add_(_by_group(b, num_groups))
    return d.view(shape), (centre + rest).view(n, num_groups), rstd.view(n, num_groups)


def _with_pre_bias(x: Tensor, pre_bias: Tensor | None) -> Tensor:
    dtype = ACCUMULATION_DTYPE[x.dtype]
    h = x if x.dtype == dtype else x.to(dtype)
    return h if pre_bias is None else h + pre_bias.to(dtype).view(*pre_bias.shape, *(1,) * (x.dim() - 2))


def backward(
    dy: Tensor, arguments: Arguments, mean: Tensor, rstd: Tensor, needs: Needs, dshortcut: Tensor | None = None
) -> Gradients:
    """Compute the gradients by the closed form that `reference` has; dx, with dshortcut, in dtype and layout of x.

    Of a small channels_last tensor, copies cost less than the calls that its layout takes.
    """
    x, maps = arguments.x, None
    if x.is_cpu and not x.is_contiguous() and x.numel() < _MANY_ELEMENTS and not has_maps(arguments):
        gradients = backward(dy.contiguous(), arguments._replace(x=x.contiguous()), mean, rstd, needs, dshortcut)
        dx = gradients.dx
        return gradients if dx is None else gradients._replace(dx=torch.empty_like(x).copy_(dx))
    if has_maps(arguments):
        maps, arguments = arguments, without_maps(arguments)
    a, b = _affine(mean, arguments)
    h, centre = _centred_where_needed(_as_dtype_of(mean, x), arguments.pre_bias, mean, rstd)
    dz = _as_dtype_of(mean, dy)
    if maps is not None:
        z = _once_more(h, centre, rstd, a, b, arguments.eps)
        dz, dscale, dshift = _backward_of_maps(dz, z, maps, needs)
        needs = needs._replace(scale=False, shift=False)
    elif arguments.activation:
        z = _once_more(h, centre, rstd, a, b, arguments.eps)
        dz = _SILU_BACKWARD(dz, z, grad_input=z)
    way = _native_backward if _native_backward_is_good(h, rstd, a) else _plain_backward
    dh, s0, s1 = way(dz, h, centre, rstd, a, needs.x or needs.pre_bias)
    gradients = _with_parameter_gradients(dh, s0, s1, arguments, needs)
    if dh is not None and needs.x:
        dx = dh.view(x.shape) if dshortcut is None else dh.view(x.shape).add_(dshortcut)
        gradients = gradients._replace(dx=_as_dtype_of(x, dx))
    return gradients if maps is None else gradients._replace(dscale=dscale, dshift=dshift)


def _centred_where_needed(
    x: Tensor, pre_bias: Tensor | None, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Return h - mean and None, or, where that can wait since every mean is near zero, h itself and mean."""
    if pre_bias is None and x.is_cpu and not _is_off_centre(mean, rstd, _LIMIT_OF_PRODUCTS):
        return x, mean
    h, centre = _grouped(x, mean), mean.view(*mean.shape, 1, 1)
    if pre_bias is None:
        h = h - _of_channels(centre, h)
    else:
        h = h + (_by_group(_as_dtype_of(mean, pre_bias), mean.shape[1]) - centre)
    return h.view(x.shape), None


def _once_more(
    h: Tensor, centre: Tensor | None, rstd: Tensor, a: Tensor | None, b: Tensor | None, eps: float
) -> Tensor:
    """Compute z = (h - centre) * rstd * a + b once more.

    PyTorch's group norm does that for a contiguous h, and computes the known statistics anew: one call costs less than
    those that make rstd * a and b - centre * rstd * a, and one pass less than a product and a sum. It takes some 40 ns
    a group, though. (`addcmul`, one pass too, is vectorized for values of each element alone.)
    """
    contiguous = h.is_contiguous()
    if contiguous and h.is_cpu and rstd.numel() <= _FEW_GROUPS and eps != UNKNOWN_EPS:
        return _native(h, rstd.shape[1], a, b, eps)[0]
    shape, h = h.shape, _grouped(h, rstd)
    gain, b = _gain(rstd, a), None if b is None else _by_group(b, h.shape[1])
    if centre is not None:
        shift = centre.view(*centre.shape, 1, 1) * gain
        b = -shift if b is None else b - shift
    if contiguous:
        z = h * gain
        return (z if b is None else z.add_(b)).view(shape)
    gain = _of_channels(gain, h)
    return (h * gain if b is None else torch.addcmul(_of_channels(b, h), h, gain)).view(shape)


def _gain(rstd: Tensor, a: Tensor | None) -> Tensor:
    """Return rstd * a (N, G, C/G, 1), or without a (N, G, 1, 1)."""
    rstd = rstd.view(*rstd.shape, 1, 1)
    return rstd if a is None else rstd * _by_group(a, rstd.shape[1])


def _backward_of_maps(
    dy: Tensor, z: Tensor, arguments: Arguments, needs: Needs
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Compute what comes back to z, which z is before the maps, and the gradients of scale and shift."""
    scale, shift, dz, dscale, dshift = arguments.scale, arguments.shift, dy, None, None
    if arguments.activation:
        modulated = z.clone() if needs.scale else z
        _modulate(modulated, scale, shift)
        dz = _SILU_BACKWARD(dy, modulated, grad_input=modulated)
    if needs.shift and shift is not None:
        dshift = _as_dtype_of(shift, dz).view(shift.shape)
        dshift = dshift if arguments.activation else dshift.clone()  # no view of dy
    if scale is not None:
        dscale = _as_dtype_of(scale, dz * z).view(scale.shape) if needs.scale else None
        dz = torch.addcmul(dz, dz, _as_dtype_of(dz, scale).view(dz.shape))
    return dz, dscale, dshift


def _with_parameter_gradients(
    dh: Tensor | None, s0: Tensor, s1: Tensor, arguments: Arguments, needs: Needs
) -> Gradients:
    """Return all gradients but dx, from dh (N, G, C/G, L) and the sums S0 and S1 of `reference`.

    The sums are (N, C). Without scale and shift they may be (C,): summed over the samples already.
    """
    weight, bias, pre_bias = arguments.weight, arguments.bias, arguments.pre_bias
    scale, shift = arguments.scale, arguments.shift
    t0, t1, dscale = s0, s1, None
    if scale is not None:
        factor = 1 + scale.to(s0.dtype)
        t0, t1 = s0 * factor, s1 * factor
        if needs.scale:
            dscale = s1 if weight is None else s1 * weight.to(s1.dtype)
            dscale = _as_dtype_of(scale, dscale if bias is None else dscale + s0 * bias.to(s0.dtype))
    return Gradients(
        None,
        dweight=_as_dtype_of(weight, _over_samples(t1)) if needs.weight and weight is not None else None,
        dbias=_as_dtype_of(bias, _over_samples(t0)) if needs.bias and bias is not None else None,
        dpre_bias=None
        if not needs.pre_bias or pre_bias is None or dh is None
        else _as_dtype_of(pre_bias, dh.view(*pre_bias.shape, -1).sum(2)),
        dscale=dscale,
        dshift=_as_dtype_of(shift, s0) if needs.shift and shift is not None else None,
    )


def _native_backward_is_good(h: Tensor, rstd: Tensor, a: Tensor | None) -> bool:
    """Return True where PyTorch's backward is right and fast.

    It has been tried on the CPU alone. Groups of one element have dh = 0 exactly, which PyTorch's sums miss. In
    channels_last it is slow for few channels a group (`_SHORT_RUN`, `_FEW_POSITIONS`), and an `a` of each sample cannot
    be given to it: the view as one sample of N * C channels, which `_as_native` makes for that, exists for contiguous
    tensors alone.
    """
    if not h.is_cpu or h.numel() == rstd.numel():
        return False
    if h.is_contiguous():
        return True
    fewest = 2 if h.shape[2:].numel() < _FEW_POSITIONS else _SHORT_RUN
    return h.shape[1] // rstd.shape[1] >= fewest and (a is None or a.dim() == 1)


def _native_backward(
    dz: Tensor, h: Tensor, centre: Tensor | None, rstd: Tensor, a: Tensor | None, needs_dh: bool
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Compute dh, S0 and S1 by PyTorch's backward of group norm.

    Where `a` is of each sample, the tensors are read as one sample of N * C channels, and the sums are (N, C); else
    PyTorch has summed over samples, and they are (C,).
    PyTorch computes S1 as a difference of sums, which cancels with a mean far from zero: h is h - mean then.
    """
    mean = torch.zeros_like(rstd) if centre is None else centre
    a = h.new_ones(h.shape[1]) if a is None else a  # PyTorch has no gradient of the bias alone
    flat, sizes = _as_native(h, rstd.shape[1], a)
    dz, _ = _as_native(dz, rstd.shape[1], a)
    mask = [needs_dh or not h.is_contiguous(), True, True]  # in channels_last PyTorch 2.13 crashes without dh
    if a.dim() == 1:
        dh, s1, s0 = _GROUP_NORM_BACKWARD(dz, flat, mean, rstd, a, *sizes, mask)
    else:
        mean, rstd, row = mean.view(1, -1), rstd.view(1, -1), a.view(-1)
        dh, s1, s0 = _GROUP_NORM_BACKWARD(dz, flat, mean, rstd, row, *sizes, mask)
        s0, s1 = s0.view(a.shape), s1.view(a.shape)
    return dh if needs_dh else None, s0, s1


def _plain_backward(
    dz: Tensor, h: Tensor, centre: Tensor | None, rstd: Tensor, a: Tensor | None, needs_dh: bool
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Compute dh, S0 and S1 (N, C) in any layout, with one more tensor of h's size, that of dh."""
    h, dz, gain = _grouped(h, rstd), _grouped(dz, rstd), _gain(rstd, a)
    product = dz * h
    s0, s1 = dz.sum(3, keepdim=True), product.sum(3, keepdim=True)
    rstd = rstd.view(*rstd.shape, 1, 1)
    a = None if a is None else _by_group(a, rstd.shape[1])
    centre = None if centre is None else centre.view(rstd.shape)
    s1 = (s1 if centre is None else s1 - s0 * centre) * rstd
    sums = s0.flatten(1), s1.flatten(1)
    if not needs_dh:
        return None, *sums
    if h.numel() == rstd.numel():  # groups of one element: zero, whatever rounds, or NaN
        return product.mul_(0), *sums
    m1, m2 = ((t if a is None else t * a).sum(2, keepdim=True) / -h.shape[2:].numel() for t in (s0, s1))
    factor = m2 * rstd * rstd
    rest = m1 * rstd if centre is None else m1 * rstd - factor * centre
    dh = torch.addcmul(_of_channels(rest, h), h, _of_channels(factor, h), out=product)
    return dh.addcmul_(dz, _of_channels(gain, h)), *sums


def _over_samples(sums: Tensor) -> Tensor:
    return sums if sums.dim() == 1 else sums.sum(0)


def _affine(h: Tensor, arguments: Arguments) -> tuple[Tensor | None, Tensor | None]:
    """Return a = weight * (1 + scale) and b = bias * (1 + scale) + shift, so that z = xhat * a + b.

    Without scale and shift they are weight and bias themselves, each (C,) or None; else both are (N, C). Dense, as
    PyTorch's kernels read them; and of a sum that begins with b its strides would decide on the layout.
    """
    weight, bias, scale, shift = arguments.weight, arguments.bias, arguments.scale, arguments.shift
    weight = None if weight is None else _as_dtype_of(h, weight).contiguous()
    bias = None if bias is None else _as_dtype_of(h, bias).contiguous()
    if scale is None and shift is None:
        return weight, bias
    n, channels = arguments.x.shape[:2]
    factor = h.new_ones(n, channels) if scale is None else 1 + scale.to(h.dtype)
    b = h.new_zeros(n, channels) if bias is None else factor * bias
    a = factor if weight is None else factor * weight
    b = b if shift is None else b + shift.to(h.dtype)
    return a.contiguous(), b.contiguous()


def _modulate(z: Tensor, scale: Tensor | None, shift: Tensor | None) -> None:
    """Apply maps to z in place."""
    if scale is not None:
        z.addcmul_(z, _as_dtype_of(z, scale).view(z.shape))
    if shift is not None:
        z.add_(_as_dtype_of(z, shift).view(z.shape))


def _is_off_centre(mean: Tensor, rstd: Tensor, limit: float) -> bool:
    """Return True where some group lies so far from zero that sums of uncentred values lose too many digits.

    The criterion is safe for statistics that have cancelled themselves: the mean is right to a few roundings, and such
    a variance is at most about 1e-6 * mean^2, which makes |mean| * rstd large. NaN counts as off centre, since it may
    hide the other groups.
    """
    low, high = torch.aminmax(mean * rstd)
    return not (-limit <= low.item() and high.item() <= limit)


def _of_channels(values: Tensor, h: Tensor) -> Tensor:
    """Repeat values (N, G, 1, 1) for each channel of an h in channels_last: a loop over all channels is a plain one."""
    if h.stride(3) == 1 or values.shape[-2] == h.shape[2]:
        return values
    return values.expand(*h.shape[:3], 1).contiguous()


def _by_group(values: Tensor, num_groups: int) -> Tensor:
    """View (C,) or (N, C) as (G, C/G, 1) or (N, G, C/G, 1)."""
    if values.dim() == 1:
        return values.view(num_groups, -1, 1)
    return values.reshape(values.shape[0], num_groups, -1, 1)


def _grouped(h: Tensor, statistics: Tensor) -> Tensor:
    """View h (N, C, ...) as (N, G, C/G, L), by statistics (N, G)."""
    n, groups = statistics.shape
    return h.view(n, groups, h.shape[1] // groups, -1)


def _as_native(h: Tensor, num_groups: int, a: Tensor | None) -> tuple[Tensor, tuple[int, int, int, int]]:
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
            h = h.as_strided(shape, _channels_last_strides(shape))
        elif channels == 1 or elements == 1:  # with four axes PyTorch may read it as channels_last
            h = h.view(n, channels, elements)
    return h, (n, channels, elements, num_groups)


def _as_dtype_of(like: Tensor, values: Tensor) -> Tensor:
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
