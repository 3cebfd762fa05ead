"""The operator out of PyTorch's own kernels: for CPU, MPS and every device without Triton.

Contiguous tensors go through `native_group_norm`; a scale and shift of each sample is the same operator on one sample
of N * C channels in N * G groups. SiLU works in place. 16-bit tensors are computed in float32, so that z is rounded
once and cannot overflow on the way.

PyTorch's kernels for the CPU lose digits where the mean of a group is many times its standard deviation: channels_last
takes the variance as E[x^2] - E[x]^2, contiguous evaluates x * a + b and differences of large sums. `is_off_centre`
finds such groups by their statistics; then everything is computed from h - mean instead.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from unetgn.ops.layout import accumulation_dtype, channels_last_strides, of_channel
from unetgn.ops.reference import Gradients, Needs, parameter_gradients

# Limits of |mean| * rstd. In float32 E[x^2] - E[x]^2 is off by about 5e-7 * (mean / std)^2 of the variance, the other
# errors are about 1e-7 * mean / std (both measured against float64), so that these limits stand for 8e-6 and 4e-6.
_LIMIT_OF_SQUARES = 4.0
_LIMIT_OF_SUMS = 32.0


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
        z, mean, rstd = _contiguous(h, num_groups, a, b, eps)
    elif h.is_cpu:
        z, mean, rstd = _channels_last_cpu(h, num_groups, a, b, eps)
    else:
        z, mean, rstd = _channels_last(h, num_groups, a, b, eps)
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
    rstd_c = _of_channel(rstd, h)
    centred = h - _of_channel(mean, h)
    native = scale is None and shift is None and _native_backward_is_right(h, mean, rstd)
    if activation:
        gain = rstd_c if a is None else rstd_c * a.unsqueeze(-1)
        z = centred.mul_(gain) if native else centred * gain
        z = z if b is None else z.add_(b.unsqueeze(-1))
        dz = torch.ops.aten.silu_backward.grad_input(dz, z, grad_input=z)

    needs_dh = needs[0] or needs[3]
    if not native:
        dh, s0, s1 = _centred_backward(dz, centred, rstd, rstd_c, a, needs_dh)
        dx = _as(x, dh.view(x.shape)) if dh is not None and needs[0] else None
        return dx, *parameter_gradients(dh, s0, s1, weight, bias, pre_bias, scale, shift, needs)
    dh, dweight, dbias = _native_backward(dz, h, mean, rstd, a, [needs_dh, needs[1], needs[2]])
    return (
        _as(x, dh.view(x.shape)) if needs[0] else None,
        _as(weight, dweight) if needs[1] and weight is not None else None,
        _as(bias, dbias) if needs[2] and bias is not None else None,
        _as(pre_bias, dh.sum(2)) if needs[3] and pre_bias is not None else None,
        None,
        None,
    )


def is_off_centre(mean: Tensor, rstd: Tensor, limit: float) -> bool:
    """Whether some group lies far from zero for its spread, so that sums of uncentred values lose too many digits.

    The criterion is safe for statistics that have lost digits themselves: the mean is right to a few roundings, and a
    variance that has cancelled is at most about 1e-6 * mean^2, which makes |mean| * rstd large. NaN counts as off
    centre, since it may hide the other groups.
    """
    return not (mean * rstd).abs_().max().item() <= limit


def _contiguous(
    h: Tensor, num_groups: int, a: Tensor | None, b: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    n, channels = h.shape[0], h.shape[1]
    elements = h.numel() // (n * channels)
    if a is not None and b is not None and a.dim() == 2:
        rows, groups = n * channels, n * num_groups
        flat = h.view(1, rows, elements)
        z, mean, rstd = torch.native_group_norm(flat, a.flatten(), b.flatten(), 1, rows, elements, groups, eps)
        z, mean, rstd = z.view(h.shape), mean.view(n, num_groups), rstd.view(n, num_groups)
    elif h.dim() > 3 and (channels == 1 or elements == 1):  # with four axes PyTorch may read it as channels_last
        flat = h.view(n, channels, elements)
        z, mean, rstd = torch.native_group_norm(flat, a, b, n, channels, elements, num_groups, eps)
        z = z.view(h.shape)
    else:
        z, mean, rstd = torch.native_group_norm(h, a, b, n, channels, elements, num_groups, eps)
    if h.is_cpu and is_off_centre(mean, rstd, _LIMIT_OF_SUMS):
        mean = _refined(mean, h)
        z = _apply(h, mean, rstd, a, b)
    return z, mean, rstd


def _channels_last_cpu(
    h: Tensor, num_groups: int, a: Tensor | None, b: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    per_sample = a is not None and a.dim() == 2
    affine = (None, None) if per_sample else (a, b)
    z, mean, rstd = _native_channels_last(h, num_groups, *affine, eps)
    if is_off_centre(mean, rstd, _LIMIT_OF_SQUARES):
        centre = _refined(mean, h)
        centred = (_flat(h) - _of_channel(centre, h)).view(h.shape)
        z, mean, rstd = _native_channels_last(centred, num_groups, *affine, eps)
        mean = mean + centre
    if per_sample:
        _affine_(_flat(z), a, b)
    return z, mean, rstd


def _native_channels_last(
    h: Tensor, num_groups: int, a: Tensor | None, b: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """PyTorch's kernel reads the layout from all strides, and those of an axis of one element may be any."""
    if 1 in h.shape and h.stride() != channels_last_strides(h.shape):
        h = h.as_strided(h.shape, channels_last_strides(h.shape))
    n, channels = h.shape[0], h.shape[1]
    return torch.native_group_norm(h, a, b, n, channels, h.numel() // (n * channels), num_groups, eps)


def _channels_last(
    h: Tensor, num_groups: int, a: Tensor | None, b: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """For devices whose group norm would copy the tensor to the contiguous layout."""
    var, mean = torch.var_mean(h.view(h.shape[0], num_groups, h.shape[1] // num_groups, -1), (2, 3), correction=0)
    rstd = torch.rsqrt(var + eps)
    return _apply(h, mean, rstd, a, b), mean, rstd


def _refined(mean: Tensor, h: Tensor) -> Tensor:
    """A mean that was off by a few roundings is off by one after the mean of what it leaves has been added."""
    rest = _flat(h) - _of_channel(mean, h)
    return mean + rest.mean(2).view(*mean.shape, -1).mean(2)


def _apply(h: Tensor, mean: Tensor, rstd: Tensor, a: Tensor | None, b: Tensor | None) -> Tensor:
    """(h - mean) * rstd * a + b, in the layout of h."""
    z = _flat(h) - _of_channel(mean, h)
    return _affine_(z.mul_(_of_channel(rstd, h)), a, b).view(h.shape)


def _affine_(z: Tensor, a: Tensor | None, b: Tensor | None) -> Tensor:
    """z * a + b in place, for z (N, C, L) and a, b (C,) or (N, C)."""
    if a is not None:
        z.mul_(a.unsqueeze(-1))
    return z if b is None else z.add_(b.unsqueeze(-1))


def _native_backward_is_right(h: Tensor, mean: Tensor, rstd: Tensor) -> bool:
    """Only on the CPU is it known, and asking the statistics free; groups of one element have dh = 0, exactly."""
    if not h.is_cpu or not h.is_contiguous() or h.numel() == mean.numel():
        return False
    return not is_off_centre(mean, rstd, _LIMIT_OF_SUMS)


def _native_backward(
    dz: Tensor, h: Tensor, mean: Tensor, rstd: Tensor, a: Tensor | None, mask: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """dh (N, C, L), and the gradients (C,) of weight and bias, of contiguous tensors (N, C, L)."""
    n, channels, elements = h.shape
    if a is None and mask[2]:  # PyTorch has no gradient of the bias alone
        a = h.new_ones(channels)
    return torch.ops.aten.native_group_norm_backward(dz, h, mean, rstd, a, n, channels, elements, mean.shape[1], mask)


def _centred_backward(
    dz: Tensor, centred: Tensor, rstd: Tensor, rstd_c: Tensor, a: Tensor | None, needs_dh: bool
) -> tuple[Tensor | None, Tensor, Tensor]:
    """dh (N, C, L), S0 and S1 (N, C) from dz and h - mean (N, C, L) in any layout. Overwrites the latter.

    `rstd_c` (N, C, 1) is `rstd` (N, G) of each channel.
    """
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
    weight = None if weight is None else _as(h, weight)
    bias = None if bias is None else _as(h, bias)
    if scale is None and shift is None:
        return weight, bias
    n, channels = h.shape[0], h.shape[1]
    gain = h.new_ones(n, channels) if scale is None else 1 + scale.to(h.dtype)
    b = h.new_zeros(n, channels) if bias is None else gain * bias
    a = gain if weight is None else gain * weight
    return a, b if shift is None else b + shift.to(h.dtype)


def _flat(x: Tensor) -> Tensor:
    """View a dense x (N, C, *spatial), of either layout, as (N, C, L)."""
    return x.view(x.shape[0], x.shape[1], -1)


def _of_channel(values: Tensor, x: Tensor) -> Tensor:
    """Values of groups (N, G) for each channel of x: (N, C, 1), so that an inner loop over channels is a plain one."""
    return of_channel(values, x.shape[1]).unsqueeze(2)


def _as(like: Tensor, values: Tensor) -> Tensor:
    return values if values.dtype == like.dtype else values.to(like.dtype)
