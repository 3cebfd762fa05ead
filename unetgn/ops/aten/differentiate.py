"""Computes the gradients: the backward pass.

It takes h itself where every mean is near zero, else h - mean; z is computed once more. The derivative of SiLU works
in place.
"""

import torch
from torch import Tensor

from unetgn.ops.arguments import UNKNOWN_EPS, Arguments, Gradients, Needs
from unetgn.ops.aten.normalize import native
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

_FEW_GROUPS = 1024  # up to here, a call of PyTorch's group norm costs less than some calls on small tensors. On x86.

# The backward pass may take its sums over h itself, instead of h - mean, where |mean| * rstd is at most this. S1 is a
# difference of such sums: the gradient of the weight is off by up to 3e-6 then, over 64 to 262,144 positions, where
# centred values give 1e-6.
_LIMIT_OF_PRODUCTS = 1.0

_SILU_BACKWARD = torch.ops.aten.silu_backward.grad_input
_GROUP_NORM_BACKWARD = torch.ops.aten.native_group_norm_backward.default


def backward(dy: Tensor, arguments: Arguments, mean: Tensor, rstd: Tensor, needs: Needs) -> Gradients:
    """Compute the gradients by the closed form that `reference` has; dx in the dtype and layout of x."""
    x, maps = arguments.x, None
    if has_maps(arguments):
        maps, arguments = arguments, without_maps(arguments)
    a, b = affine(mean, arguments)
    h, centre = _centred_where_needed(as_dtype_of(mean, x), arguments.pre_bias, mean, rstd)
    dz = as_dtype_of(mean, dy)
    if maps is not None:
        z = _once_more(h, centre, rstd, a, b, arguments.eps)
        dz, dscale, dshift = _backward_of_maps(dz, z, maps, needs)
        needs = needs._replace(scale=False, shift=False)
    elif arguments.activation:
        z = _once_more(h, centre, rstd, a, b, arguments.eps)
        dz = _SILU_BACKWARD(dz, z, grad_input=z)
    way = _native_backward if _native_backward_is_good(h, rstd, a) else _plain_backward
    dh, s0, s1 = way(dz, h, centre, rstd, a, needs.x or needs.pre_bias)
    dx = as_dtype_of(x, dh).view(x.shape) if dh is not None and needs.x else None
    gradients = _with_parameter_gradients(dx, dh, s0, s1, arguments, needs)
    return gradients if maps is None else gradients._replace(dscale=dscale, dshift=dshift)


def _centred_where_needed(
    x: Tensor, pre_bias: Tensor | None, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Return h - mean and None, or, where that can wait since every mean is near zero, h itself and mean.

    In a small channels_last tensor the terms that the mean adds to sums cost more than a pass over h.
    """
    worth_asking = x.is_cpu and (x.is_contiguous() or x.numel() >= MANY_ELEMENTS)
    if pre_bias is None and worth_asking and not is_off_centre(mean, rstd, _LIMIT_OF_PRODUCTS):
        return x, mean
    h, centre = grouped(x, mean), mean.view(*mean.shape, 1, 1)
    if pre_bias is None:
        h = h - of_channels(centre, h)
    else:
        h = h + (by_group(as_dtype_of(mean, pre_bias), mean.shape[1]) - centre)
    return h.view(x.shape), None


def _once_more(
    h: Tensor, centre: Tensor | None, rstd: Tensor, a: Tensor | None, b: Tensor | None, eps: float
) -> Tensor:
    """Compute z = (h - centre) * rstd * a + b once more.

    PyTorch's group norm does that for a contiguous h, with statistics that are known already: one call costs less than
    those that make rstd * a and b - centre * rstd * a, and one pass less than a product and a sum. It takes some 40 ns
    a group, though. (`addcmul`, one pass too, is vectorized for values of each element alone.)
    """
    contiguous = h.is_contiguous()
    if contiguous and h.is_cpu and rstd.numel() <= _FEW_GROUPS and eps != UNKNOWN_EPS:
        return native(h, rstd.shape[1], a, b, eps)[0]
    shape, h = h.shape, grouped(h, rstd)
    gain, b = _gain(rstd, a), None if b is None else by_group(b, h.shape[1])
    if centre is not None:
        shift = centre.view(*centre.shape, 1, 1) * gain
        b = -shift if b is None else b - shift
    if contiguous:
        z = h * gain
        return (z if b is None else z.add_(b)).view(shape)
    gain = of_channels(gain, h)
    return (h * gain if b is None else torch.addcmul(of_channels(b, h), h, gain)).view(shape)


def _gain(rstd: Tensor, a: Tensor | None) -> Tensor:
    """Return rstd * a (N, G, C/G, 1), or without a (N, G, 1, 1)."""
    rstd = rstd.view(*rstd.shape, 1, 1)
    return rstd if a is None else rstd * by_group(a, rstd.shape[1])


def _backward_of_maps(
    dy: Tensor, z: Tensor, arguments: Arguments, needs: Needs
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Compute what comes back to z, which z is before the maps, and the gradients of scale and shift."""
    scale, shift, dz, dscale, dshift = arguments.scale, arguments.shift, dy, None, None
    if arguments.activation:
        modulated = z.clone() if needs.scale else z
        modulate(modulated, scale, shift)
        dz = _SILU_BACKWARD(dy, modulated, grad_input=modulated)
    if needs.shift and shift is not None:
        dshift = as_dtype_of(shift, dz).view(shift.shape)
        dshift = dshift if arguments.activation else dshift.clone()  # no view of dy
    if scale is not None:
        dscale = as_dtype_of(scale, dz * z).view(scale.shape) if needs.scale else None
        dz = torch.addcmul(dz, dz, as_dtype_of(dz, scale).view(dz.shape))
    return dz, dscale, dshift


def _with_parameter_gradients(
    dx: Tensor | None, dh: Tensor | None, s0: Tensor, s1: Tensor, arguments: Arguments, needs: Needs
) -> Gradients:
    """Return all gradients: dx as given, the others from dh (N, G, C/G, L) and the sums S0 and S1 of `reference`.

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
            dscale = as_dtype_of(scale, dscale if bias is None else dscale + s0 * bias.to(s0.dtype))
    return Gradients(
        dx,
        dweight=as_dtype_of(weight, _over_samples(t1)) if needs.weight and weight is not None else None,
        dbias=as_dtype_of(bias, _over_samples(t0)) if needs.bias and bias is not None else None,
        dpre_bias=None
        if not needs.pre_bias or pre_bias is None or dh is None
        else as_dtype_of(pre_bias, dh.view(*pre_bias.shape, -1).sum(2)),
        dscale=dscale,
        dshift=as_dtype_of(shift, s0) if needs.shift and shift is not None else None,
    )


def _native_backward_is_good(h: Tensor, rstd: Tensor, a: Tensor | None) -> bool:
    """Return True where PyTorch's backward is right and fast.

    It has been tried on the CPU alone. Groups of one element have dh = 0 exactly, which PyTorch's sums miss. In
    channels_last it is slow for few channels a group, and an `a` of each sample cannot be given to it: the view as one
    sample of N * C channels, which `as_native` makes for that, exists for contiguous tensors alone.
    """
    if not h.is_cpu or h.numel() == rstd.numel():
        return False
    return h.is_contiguous() or (h.shape[1] // rstd.shape[1] >= SHORT_RUN and (a is None or a.dim() == 1))


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
    flat, sizes = as_native(h, rstd.shape[1], a)
    dz, _ = as_native(dz, rstd.shape[1], a)
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
    h, dz, gain = grouped(h, rstd), grouped(dz, rstd), _gain(rstd, a)
    product = dz * h
    s0, s1 = dz.sum(3, keepdim=True), product.sum(3, keepdim=True)
    rstd = rstd.view(*rstd.shape, 1, 1)
    a = None if a is None else by_group(a, rstd.shape[1])
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
    dh = torch.addcmul(of_channels(rest, h), h, of_channels(factor, h), out=product)
    return dh.addcmul_(dz, of_channels(gain, h)), *sums


def _over_samples(sums: Tensor) -> Tensor:
    return sums if sums.dim() == 1 else sums.sum(0)
