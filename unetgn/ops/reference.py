"""Computes the operator by its definition in plain PyTorch, and its gradients in closed form.

All other implementations are tested against this one.

    h     = x + pre_bias                        pre_bias (N, C), optional
    mean, var over (C/G, *spatial) of h         a pair for each sample and group; biased variance
    xhat  = (h - mean) / sqrt(var + eps)
    z     = xhat * weight + bias                (C,), as in torch.nn.GroupNorm
    z     = z * (1 + scale) + shift             (N, C), or maps of x's shape; optional
    y     = z * sigmoid(z)                      or z, without an activation

Group normalization: Wu & He 2018 (arXiv 1803.08494), equations 1, 2 and 6, with the set of equation 7. SiLU: Elfwing et
al. 2017 (arXiv 1702.03118), Ramachandran et al. 2017 (arXiv 1710.05941). Scale and shift: Dhariwal & Nichol 2021
(arXiv 2105.05233), section 3; as maps: Park et al. 2019 (arXiv 1903.07291), equation 1.

Every step is a differentiable operator of PyTorch: the functions here have derivatives of any order, in both modes, and
may be mapped by `torch.func`. Arithmetic is float64 for a float64 x, else float32.
"""

import math

import torch
from torch import Tensor

from unetgn.ops.arguments import Arguments, Gradients, Needs
from unetgn.ops.checks import has_maps, without_maps
from unetgn.ops.layout import ACCUMULATION_DTYPE, memory_format_of


def forward(arguments: Arguments) -> tuple[Tensor, Tensor, Tensor]:
    """Compute y in the dtype and layout of x, and mean and rstd (N, G) in the dtype of the arithmetic."""
    y, mean, rstd = define(arguments)
    return y.contiguous(memory_format=memory_format_of(arguments.x)), mean, rstd


def define(arguments: Arguments) -> tuple[Tensor, Tensor, Tensor]:
    """Compute y, mean and rstd, y in any layout: a mapped tensor cannot be asked for its own."""
    x = arguments.x
    h = _flat(x, arguments.pre_bias)
    mean, rstd = _statistics(h, arguments.num_groups, arguments.eps)
    z = _affine(_normalize(h, mean, rstd), arguments).reshape(x.shape)
    y = z * torch.sigmoid(z) if arguments.activation else z.clone()  # no view of z
    return y.to(x.dtype), mean, rstd


def backward(
    dy: Tensor,
    arguments: Arguments,
    mean: Tensor,
    rstd: Tensor,
    needs: Needs,
    dshortcut: Tensor | None = None,
) -> Gradients:
    """Compute the gradients from the statistics of `forward`; dx in the layout of x, with `dshortcut` added."""
    return _in_layout_of(arguments.x, _gradients(dy, arguments, mean, rstd, needs, dshortcut))


def differentiable_gradients(
    dy: Tensor, arguments: Arguments, needs: Needs, dshortcut: Tensor | None = None, *, mapped: bool
) -> Gradients:
    """Compute the gradients such that they can be differentiated again: the statistics depend on x, too.

    dx, with `dshortcut` added, is in the layout of x, but where tensors are `mapped` by `torch.func`.
    """
    h = _flat(arguments.x, arguments.pre_bias)
    mean, rstd = _statistics(h, arguments.num_groups, arguments.eps)
    gradients = _gradients(dy, arguments, mean, rstd, needs, dshortcut)
    return gradients if mapped else _in_layout_of(arguments.x, gradients)


def _in_layout_of(x: Tensor, gradients: Gradients) -> Gradients:
    layout = memory_format_of(x)

    def laid_out(gradient: Tensor | None) -> Tensor | None:
        if gradient is None or gradient.dim() != x.dim():
            return gradient
        return gradient.contiguous(memory_format=layout)

    return Gradients._make(map(laid_out, gradients))


def _gradients(
    dy: Tensor, arguments: Arguments, mean: Tensor, rstd: Tensor, needs: Needs, dshortcut: Tensor | None
) -> Gradients:
    """Compute the gradients by the closed form.

    With a = weight * (1 + scale), L elements in a group, S0 the sum of dz and S1 the sum of dz * xhat over the spatial
    axes, both (N, C):

        dx        = rstd * (dz * a - m1 - xhat * m2)     m1, m2: sums over the group of a * S0 / L and of a * S1 / L
        dweight   = sum over n of (1 + scale) * S1       dscale = weight * S1 + bias * S0
        dbias     = sum over n of (1 + scale) * S0       dshift = S0
        dpre_bias = sum of dx over the spatial axes

    Of maps dscale = dz * (xhat * weight + bias) and dshift = dz, and the others are those of a call without maps to
    which dz * (1 + scale) comes back. dshortcut is added to dx before that is rounded.
    """
    x = arguments.x
    xhat = _normalize(_flat(x, arguments.pre_bias), mean, rstd)
    dz = _flat(dy, None).to(xhat.dtype)
    if arguments.activation:
        z = _affine(xhat, arguments)
        gate = torch.sigmoid(z)
        dz = dz * gate * (1 + z * (1 - gate))
    if not has_maps(arguments):
        return _gradients_of_channels(dz, xhat, arguments, rstd, needs, dshortcut)
    dscale, dshift, of_channels = None, None, without_maps(arguments)
    if needs.scale:
        dscale = _like((dz * _affine(xhat, of_channels)).reshape(x.shape), arguments.scale)
    if needs.shift:
        dshift = _like(dz.reshape(x.shape), arguments.shift)
    if arguments.scale is not None:
        dz = dz * _factor(arguments.scale, dz)
    rest = _gradients_of_channels(dz, xhat, of_channels, rstd, needs._replace(scale=False, shift=False), dshortcut)
    return rest._replace(dscale=dscale, dshift=dshift)


def _gradients_of_channels(
    dz: Tensor, xhat: Tensor, arguments: Arguments, rstd: Tensor, needs: Needs, dshortcut: Tensor | None
) -> Gradients:
    """Compute the gradients from dz and xhat (N, C, L), without maps."""
    x, num_groups, weight, scale = arguments.x, arguments.num_groups, arguments.weight, arguments.scale
    s0, s1 = dz.sum(2), (dz * xhat).sum(2)
    dx = dh = None
    if needs.x or needs.pre_bias:
        a = torch.ones_like(s0) if scale is None else 1 + scale.to(s0.dtype)
        a = a if weight is None else a * weight.to(a.dtype)
        m1, m2 = (_group_mean(a * s, num_groups, xhat) for s in (s0, s1))
        dh = _of_channel(rstd, xhat) * (dz * a.unsqueeze(2) - m1 - xhat * m2)
        if needs.x:
            dx = dh if dshortcut is None else dh + _flat(dshortcut, None)
            dx = dx.to(x.dtype).reshape(x.shape)
    return _with_parameter_gradients(dx, dh, s0, s1, arguments, needs)


def _with_parameter_gradients(
    dx: Tensor | None, dh: Tensor | None, s0: Tensor, s1: Tensor, arguments: Arguments, needs: Needs
) -> Gradients:
    """Return all gradients: dx as given, the others from dh (N, C, L) and the sums S0 and S1 (N, C)."""
    weight, bias, scale = arguments.weight, arguments.bias, arguments.scale
    dscale = None
    if needs.scale:
        dscale = s1 if weight is None else s1 * weight.to(s1.dtype)
        dscale = dscale if bias is None else dscale + s0 * bias.to(s0.dtype)
    if scale is None:
        t0, t1 = s0, s1
    else:
        factor = 1 + scale.to(s0.dtype)
        t0, t1 = s0 * factor, s1 * factor
    return Gradients(
        dx=dx,
        dweight=_like(t1.sum(0), weight) if needs.weight else None,
        dbias=_like(t0.sum(0), bias) if needs.bias else None,
        dpre_bias=_like(dh.sum(2), arguments.pre_bias) if needs.pre_bias and dh is not None else None,
        dscale=_like(dscale, scale),
        dshift=_like(s0, arguments.shift) if needs.shift else None,
    )


def _statistics(h: Tensor, num_groups: int, eps: float) -> tuple[Tensor, Tensor]:
    """Compute mean and 1/sqrt(var + eps) of each sample and group of h (N, C, ...), both (N, G).

    A sum of many values rounds. So the mean of what a first mean leaves is added to it: the mean of equal values is
    then their value. The variance is that of the centred values.
    """
    grouped = h.reshape(h.shape[0], num_groups, math.prod(h.shape[1:]) // num_groups)
    centre = grouped.detach().mean(2)
    mean = centre + (grouped - centre.unsqueeze(2)).mean(2)
    return mean, torch.rsqrt((grouped - mean.unsqueeze(2)).square().mean(2) + eps)


def _flat(x: Tensor, pre_bias: Tensor | None) -> Tensor:
    """Return x + pre_bias in the dtype of the arithmetic, as (N, C, number of spatial elements)."""
    h = x.to(ACCUMULATION_DTYPE[x.dtype]).reshape(x.shape[0], x.shape[1], math.prod(x.shape[2:]))
    return h if pre_bias is None else h + pre_bias.to(h.dtype).unsqueeze(2)


def _normalize(h: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
    return (h - _of_channel(mean, h)) * _of_channel(rstd, h)


def _affine(z: Tensor, arguments: Arguments) -> Tensor:
    weight, bias, scale, shift = arguments.weight, arguments.bias, arguments.scale, arguments.shift
    if weight is not None:
        z = z * weight.to(z.dtype).unsqueeze(1)
    if bias is not None:
        z = z + bias.to(z.dtype).unsqueeze(1)
    if scale is not None:
        z = z * _factor(scale, z)
    return z if shift is None else z + _over_space(shift, z)


def _factor(scale: Tensor, z: Tensor) -> Tensor:
    """Return 1 + scale for z (N, C, L)."""
    return 1 + _over_space(scale, z)


def _over_space(values: Tensor, z: Tensor) -> Tensor:
    """Return (N, C) as (N, C, 1), and a map as z (N, C, L), in the dtype of z."""
    return values.to(z.dtype).reshape(*values.shape[:2], math.prod(values.shape[2:]))


def _group_mean(sums: Tensor, num_groups: int, xhat: Tensor) -> Tensor:
    """Turn sums over space (N, C) into means over the elements of each group, repeated for its channels: (N, C, 1)."""
    n, channels, elements = xhat.shape
    means = sums.reshape(n, num_groups, channels // num_groups).mean(2) / elements
    return _of_channel(means, xhat)


def _of_channel(values: Tensor, h: Tensor) -> Tensor:
    """Repeat values of groups (N, G) for each channel of h (N, C, L): (N, C, 1)."""
    n, num_groups = values.shape
    channels = h.shape[1]
    return values.unsqueeze(2).expand(n, num_groups, channels // num_groups).reshape(n, channels).unsqueeze(2)


def _like(gradient: Tensor | None, parameter: Tensor | None) -> Tensor | None:
    return None if gradient is None or parameter is None else gradient.to(parameter.dtype)
