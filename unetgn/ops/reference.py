"""The operator's definition in plain PyTorch, and its gradients in closed form: what all others are tested against.

    h     = x + pre_bias                        pre_bias (N, C), optional
    mean, var over (C/G, *spatial) of h         a pair for each sample and group; biased variance
    xhat  = (h - mean) / sqrt(var + eps)
    z     = xhat * weight + bias                (C,), as in torch.nn.GroupNorm
    z     = z * (1 + scale) + shift             (N, C), optional
    y     = z * sigmoid(z)                      or z, without an activation

Group normalization: Wu & He 2018 (arXiv 1803.08494). SiLU: Elfwing et al. 2017 (arXiv 1702.03118), Ramachandran et al.
2017 (arXiv 1710.05941). Scale and shift: Dhariwal & Nichol 2021 (arXiv 2105.05233), section 3.

Every step is a differentiable operator of PyTorch: the functions here have derivatives of any order, in both modes, and
may be mapped by `torch.func`. Arithmetic is float64 for a float64 x, else float32.
"""

import math

import torch
from torch import Tensor

from unetgn.ops.layout import accumulation_dtype, memory_format_of, of_channel

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]
Needs = tuple[bool, bool, bool, bool, bool, bool]


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
    y, mean, rstd = define(x, num_groups, weight, bias, eps, activation, pre_bias, scale, shift)
    return y.contiguous(memory_format=memory_format_of(x)), mean, rstd


def define(
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
    """`forward` without its promise about the layout of y, which a mapped tensor cannot be asked for."""
    h = flat(x, pre_bias)
    mean, rstd = statistics(h, num_groups, eps)
    z = _affine(_normalize(h, mean, rstd), weight, bias, scale, shift)
    y = z * torch.sigmoid(z) if activation else z
    return y.to(x.dtype).reshape(x.shape), mean, rstd


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
    """Gradients of (x, weight, bias, pre_bias, scale, shift); dx in the layout of x."""
    statistics = mean, rstd
    dx, *others = gradients(dy, x, statistics, num_groups, weight, bias, activation, pre_bias, scale, shift, needs)
    return dx if dx is None else dx.contiguous(memory_format=memory_format_of(x)), *others  # type: ignore[return-value]


def gradients(
    dy: Tensor,
    x: Tensor,
    statistics: tuple[Tensor, Tensor],
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    activation: bool,
    pre_bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    needs: Needs,
) -> Gradients:
    """`backward` without its promise about the layout of dx. With a = weight * (1 + scale), L elements in a group,
    S0 the sum of dz and S1 the sum of dz * xhat over the spatial axes, both (N, C):

        dx        = rstd * (dz * a - m1 - xhat * m2)     m1, m2: sums over the group of a * S0 / L and of a * S1 / L
        dweight   = sum over n of (1 + scale) * S1       dscale = weight * S1 + bias * S0
        dbias     = sum over n of (1 + scale) * S0       dshift = S0
        dpre_bias = sum of dx over the spatial axes
    """
    needs_x, needs_pre_bias = needs[0], needs[3]
    mean, rstd = statistics
    xhat = _normalize(flat(x, pre_bias), mean, rstd)
    dz = flat(dy, None).to(xhat.dtype)
    if activation:
        z = _affine(xhat, weight, bias, scale, shift)
        gate = torch.sigmoid(z)
        dz = dz * gate * (1 + z * (1 - gate))
    s0, s1 = dz.sum(2), (dz * xhat).sum(2)
    dx = dh = None
    if needs_x or needs_pre_bias:
        a = torch.ones_like(s0) if scale is None else 1 + scale.to(s0.dtype)
        a = a if weight is None else a * weight.to(a.dtype)
        m1, m2 = (_group_mean(a * s, num_groups, xhat) for s in (s0, s1))
        dh = of_channel(rstd, xhat.shape[1]).unsqueeze(2) * (dz * a.unsqueeze(2) - m1 - xhat * m2)
        dx = dh.to(x.dtype).reshape(x.shape) if needs_x else None
    return dx, *parameter_gradients(dh, s0, s1, weight, bias, pre_bias, scale, shift, needs)


def parameter_gradients(
    dh: Tensor | None,
    s0: Tensor,
    s1: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    pre_bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    needs: Needs,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of (weight, bias, pre_bias, scale, shift) from dh (N, C, L) and the sums S0 and S1 (N, C); without
    scale and shift the latter may be (1, C), summed over samples already."""
    _, needs_weight, needs_bias, needs_pre_bias, needs_scale, needs_shift = needs
    dscale = None
    if needs_scale:
        dscale = s1 if weight is None else s1 * weight.to(s1.dtype)
        dscale = dscale if bias is None else dscale + s0 * bias.to(s0.dtype)
    if scale is None:
        t0, t1 = s0, s1
    else:
        gain = 1 + scale.to(s0.dtype)
        t0, t1 = s0 * gain, s1 * gain
    return (
        _like(t1.sum(0), weight) if needs_weight else None,
        _like(t0.sum(0), bias) if needs_bias else None,
        _like(dh.sum(2), pre_bias) if needs_pre_bias and dh is not None else None,
        _like(dscale, scale),
        _like(s0, shift) if needs_shift else None,
    )


def statistics(h: Tensor, num_groups: int, eps: float) -> tuple[Tensor, Tensor]:
    """Mean and 1/sqrt(var + eps) of each sample and group of h (N, C, ...), both (N, G); var from centred values.

    A sum of many values rounds, so the mean is taken of what a first mean leaves: that of equal values is their value.
    """
    grouped = h.reshape(h.shape[0], num_groups, math.prod(h.shape[1:]) // num_groups)
    centre = grouped.detach().mean(2)
    mean = centre + (grouped - centre.unsqueeze(2)).mean(2)
    return mean, torch.rsqrt((grouped - mean.unsqueeze(2)).square().mean(2) + eps)


def flat(x: Tensor, pre_bias: Tensor | None) -> Tensor:
    """x + pre_bias in the dtype of the arithmetic, as (N, C, number of spatial elements)."""
    h = x.to(accumulation_dtype(x)).reshape(x.shape[0], x.shape[1], math.prod(x.shape[2:]))
    return h if pre_bias is None else h + pre_bias.to(h.dtype).unsqueeze(2)


def _normalize(h: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
    channels = h.shape[1]
    return (h - of_channel(mean, channels).unsqueeze(2)) * of_channel(rstd, channels).unsqueeze(2)


def _affine(
    z: Tensor, weight: Tensor | None, bias: Tensor | None, scale: Tensor | None, shift: Tensor | None
) -> Tensor:
    if weight is not None:
        z = z * weight.to(z.dtype).unsqueeze(1)
    if bias is not None:
        z = z + bias.to(z.dtype).unsqueeze(1)
    if scale is not None:
        z = z * (1 + scale.to(z.dtype)).unsqueeze(2)
    return z if shift is None else z + shift.to(z.dtype).unsqueeze(2)


def _group_mean(sums: Tensor, num_groups: int, xhat: Tensor) -> Tensor:
    """Sums over space (N, C) -> means over the elements of each group, repeated for its channels: (N, C, 1)."""
    n, channels, elements = xhat.shape
    means = sums.reshape(n, num_groups, channels // num_groups).mean(2) / elements
    return of_channel(means, channels).unsqueeze(2)


def _like(gradient: Tensor | None, parameter: Tensor | None) -> Tensor | None:
    return None if gradient is None or parameter is None else gradient.to(parameter.dtype)
