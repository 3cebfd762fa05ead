"""Computes the gradients: the backward pass.

It takes h itself where every mean is near zero, else h - mean; z is computed again by one pass. The derivative of SiLU
works in place.
"""

import torch
from torch import Tensor

from unetgn.ops.arguments import Arguments, Gradients, Needs
from unetgn.ops.aten.operands import (
    MANY_ELEMENTS,
    SHORT_RUN,
    affine,
    as_dtype_of,
    by_group,
    channels_last_strides,
    is_off_centre,
    modulate,
    of_channels,
)
from unetgn.ops.checks import has_maps, without_maps

_BEYOND_THE_CACHE = 2**20  # 4 MB: from here on a second pass costs more than batch normalization. Measured on x86.

# The backward pass may take its sums over h itself, instead of h - mean, where |mean| * rstd is at most this. S1 is a
# difference of such sums: the gradient of the weight is off by up to 3e-6 then, over 64 to 262,144 positions, where
# centred values give 1e-6.
_LIMIT_OF_PRODUCTS = 1.0

_SILU_BACKWARD = torch.ops.aten.silu_backward.grad_input
_GROUP_NORM_BACKWARD = torch.ops.aten.native_group_norm_backward.default


def backward(dy: Tensor, arguments: Arguments, mean: Tensor, rstd: Tensor, needs: Needs) -> Gradients:
    """Compute the gradients by the closed form that `reference` has; dx in the dtype and layout of x."""
    x, pre_bias, maps = arguments.x, arguments.pre_bias, None
    if has_maps(arguments):
        maps, arguments = arguments, without_maps(arguments)
    a, b = affine(mean, arguments)
    h, dz = as_dtype_of(mean, x), as_dtype_of(mean, dy)
    n, groups = mean.shape
    shape = (n, groups, x.shape[1] // groups, -1)
    h, dz = h.view(shape), dz.view(shape)
    a, b = (None if t is None else by_group(t, groups) for t in (a, b))
    average, gain = mean.view(n, groups, 1, 1), rstd.view(n, groups, 1, 1)
    gain = gain if a is None else gain * a
    centre = None  # what is still to be taken from h
    if pre_bias is not None:
        h = h + (by_group(as_dtype_of(mean, pre_bias), groups) - average)
    elif _is_near_zero(h, mean, rstd):
        centre = average
    else:
        h = h - of_channels(average, h)
    if maps is not None:
        dz, dscale, dshift = _backward_of_maps(dz, _scaled(h, centre, gain, b), maps, needs)
        needs = needs._replace(scale=False, shift=False)
    elif arguments.activation:
        z = _scaled(h, centre, gain, b)
        dz = _SILU_BACKWARD(dz, z, grad_input=z)
    way = _native_backward if _native_backward_is_good(h, rstd, a) else _plain_backward
    dh, s0, s1 = way(dz, h, centre, rstd, a, gain, needs.x or needs.pre_bias)
    dx = as_dtype_of(x, dh.view(x.shape)) if dh is not None and needs.x else None
    gradients = _with_parameter_gradients(dx, dh, s0, s1, arguments, needs)
    return gradients if maps is None else gradients._replace(dscale=dscale, dshift=dshift)


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


def _is_near_zero(h: Tensor, mean: Tensor, rstd: Tensor) -> bool:
    """Return True where the backward pass may take its sums over h itself, and h is large enough to be worth asking."""
    if not h.is_cpu or h.numel() < MANY_ELEMENTS:
        return False
    return not is_off_centre(mean, rstd, _LIMIT_OF_PRODUCTS)


def _scaled(h: Tensor, centre: Tensor | None, gain: Tensor, b: Tensor | None) -> Tensor:
    """Compute z = (h - centre) * gain + b in one pass.

    In contiguous tensors gain and b are numbers for whole rows. For these PyTorch's vectorized functions on the CPU are
    a product and a sum, which is the fastest where the product stays in the cache, and, for one pass over memory, batch
    normalization in evaluation: here of one sample with rows for channels, by mean 0 and variance 0 + 1. (`addcmul` is
    vectorized for values of each element alone.)
    """
    if centre is not None:
        b = -centre * gain if b is None else torch.addcmul(b, centre, gain, value=-1)
    if h.is_cpu and h.is_contiguous():
        if b is None or h.numel() < _BEYOND_THE_CACHE:
            z = h * gain
            return z if b is None else z.add_(b)
        rows = h.shape[:3].numel()
        zeros = gain.new_zeros(rows)
        gain = gain.expand(*h.shape[:3], 1).reshape(rows)
        b = b.expand(*h.shape[:3], 1).reshape(rows)
        return torch.native_batch_norm(h.view(1, rows, -1), gain, b, zeros, zeros, False, 0.0, 1.0)[0].view(h.shape)
    gain = of_channels(gain, h)
    return h * gain if b is None else torch.addcmul(of_channels(b, h), h, gain)


def _native_backward_is_good(h: Tensor, rstd: Tensor, a: Tensor | None) -> bool:
    """Return True where PyTorch's backward is right and fast.

    It has been tried on the CPU alone. Groups of one element have dh = 0 exactly, which PyTorch's sums miss. In
    channels_last it is slow for few channels a group, and an `a` of each sample cannot be given to it: the view as one
    sample of N * C channels, which `_native_backward` takes for that, exists for contiguous tensors alone.
    """
    if not h.is_cpu or h.numel() == rstd.numel():
        return False
    return h.is_contiguous() or (h.shape[2] >= SHORT_RUN and (a is None or a.dim() == 3))


def _native_backward(
    dz: Tensor, h: Tensor, centre: Tensor | None, rstd: Tensor, a: Tensor | None, gain: Tensor, needs_dh: bool
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Compute dh, S0 and S1 by PyTorch's backward of group norm.

    Where `a` is of each sample, the tensors are read as one sample of N * C channels, and the sums are (N, C); else
    PyTorch has summed over samples, and they are (C,).
    PyTorch computes S1 as a difference of sums, which cancels with a mean far from zero: h is h - mean then.
    """
    shape = n, groups, width, elements = h.shape
    sizes, mask = (n, groups * width, elements), [needs_dh, True, True]
    mean = torch.zeros_like(rstd) if centre is None else centre.view(n, groups)
    of_samples = a is not None and a.dim() == 4
    if a is None:  # PyTorch has no gradient of the bias alone
        a = h.new_ones(groups * width)
    if of_samples:
        sizes, groups = (1, n * groups * width, elements), n * groups
        mean, rstd = mean.view(1, groups), rstd.view(1, groups)
    elif not h.is_contiguous():
        mask[0] = True  # PyTorch 2.13 writes dh in channels_last whether asked or not, and crashes
        image = torch.Size((*sizes, 1))
        dz, h = (t.as_strided(image, channels_last_strides(image)) for t in (dz, h))
    dh, s1, s0 = _GROUP_NORM_BACKWARD(dz, h, mean, rstd, a.reshape(-1), *sizes, groups, mask)
    if of_samples:
        s0, s1 = s0.view(n, -1), s1.view(n, -1)
    return dh.view(shape) if needs_dh else None, s0, s1


def _plain_backward(
    dz: Tensor, h: Tensor, centre: Tensor | None, rstd: Tensor, a: Tensor | None, gain: Tensor, needs_dh: bool
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Compute dh, S0 and S1 (N, C) in any layout, with one more tensor of h's size, that of dh."""
    product = dz * h
    s0, s1 = dz.sum(3, keepdim=True), product.sum(3, keepdim=True)
    rstd = rstd.view(*rstd.shape, 1, 1)
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
