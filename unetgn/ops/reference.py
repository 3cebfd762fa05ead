"""The operator's definition in plain PyTorch, and its gradients in closed form. All other implementations are tested
against this file.

    h     = x + pre_bias                        pre_bias (N, C), optional
    mean, var over (C/G, *spatial) of h         a pair per sample and group; biased variance
    xhat  = (h - mean) / sqrt(var + eps)
    z     = xhat * weight + bias                (C,), as in torch.nn.GroupNorm
    z     = z * (1 + scale) + shift             (N, C), optional
    y     = z * sigmoid(z)                      or z, without an activation

Group normalization: Wu & He 2018 (arXiv 1803.08494). SiLU: Elfwing et al. 2017 (arXiv 1702.03118), Ramachandran et al.
2017 (arXiv 1710.05941). Scale and shift: Dhariwal & Nichol 2021 (arXiv 2105.05233), section 3.

Every step is a differentiable operator of PyTorch, so these functions have derivatives of any order and may be mapped
(`torch.func`). Arithmetic is float64 for a float64 x, else float32.
"""

import math

import torch
from torch import Tensor

from unetgn.ops.layout import accumulation_dtype, memory_format_of, per_channel

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
    """y like x, mean (N, G) and rstd (N, G), as defined at the top of this file."""
    h = _with_pre_bias(x, pre_bias)
    mean, rstd = statistics(h, num_groups, eps)
    z = _affine(normalize(h, mean, rstd), weight, bias, scale, shift)
    y = z * torch.sigmoid(z) if activation else z
    return y.to(x.dtype).contiguous(memory_format=memory_format_of(x)), mean, rstd


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
    """Gradients of (x, weight, bias, pre_bias, scale, shift); None where `needs` says that one is not asked for.

    With a = weight * (1 + scale), S0 = sum of dz and S1 = sum of dz * xhat over the spatial axes, L elements a group:

        dx = rstd * (dz * a - m1 - xhat * m2),  m1 = sum over the group of a * S0 / L,  m2 = of a * S1 / L
        dweight = sum over n of (1 + scale) * S1      dscale = weight * S1 + bias * S0      dpre_bias = sum of dx
        dbias   = sum over n of (1 + scale) * S0      dshift = S0
    """
    h = _with_pre_bias(x, pre_bias)
    xhat = normalize(h, mean, rstd)
    dz = dy.to(h.dtype)
    if activation:
        z = _affine(xhat, weight, bias, scale, shift)
        gate = torch.sigmoid(z)
        dz = dz * gate * (1 + z * (1 - gate))
    spatial = tuple(range(2, x.dim()))
    s0 = dz.sum(spatial) if spatial else dz
    s1 = (dz * xhat).sum(spatial) if spatial else dz * xhat

    gain = 1 if scale is None else 1 + scale.to(h.dtype)
    needs_x, needs_weight, needs_bias, needs_pre_bias, needs_scale, needs_shift = needs
    dx = dpre_bias = None
    if needs_x or needs_pre_bias:
        a = gain if weight is None else gain * weight.to(h.dtype)
        m1 = _group_mean(a * s0, x, num_groups)
        m2 = _group_mean(a * s1, x, num_groups)
        dz = dz if isinstance(a, int) else dz * per_channel(a, x)
        dh = _of_group(rstd, x) * (dz - _of_group(m1, x) - xhat * _of_group(m2, x))
        dx = dh.to(x.dtype).contiguous(memory_format=memory_format_of(x)) if needs_x else None
        dpre_bias = (dh.sum(spatial) if spatial else dh) if needs_pre_bias else None
    dscale = None
    if needs_scale:
        dscale = s1 if weight is None else s1 * weight.to(h.dtype)
        dscale = dscale if bias is None else dscale + s0 * bias.to(h.dtype)
    return (
        dx,
        _cast((gain * s1).sum(0) if needs_weight else None, weight),
        _cast((gain * s0).sum(0) if needs_bias else None, bias),
        _cast(dpre_bias, pre_bias),
        _cast(dscale, scale),
        _cast(s0 if needs_shift else None, shift),
    )


def statistics(h: Tensor, num_groups: int, eps: float) -> tuple[Tensor, Tensor]:
    """Mean and 1/sqrt(var + eps) of each sample and group, both (N, G); the variance from centred values."""
    grouped = h.reshape(h.shape[0], num_groups, -1)
    mean = grouped.mean(2)
    var = (grouped - mean.unsqueeze(2)).square().mean(2)
    return mean, torch.rsqrt(var + eps)


def normalize(h: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
    """(h - mean) * rstd, with mean and rstd (N, G) spread over their groups."""
    return (h - _of_group(mean, h)) * _of_group(rstd, h)


def _with_pre_bias(x: Tensor, pre_bias: Tensor | None) -> Tensor:
    dtype = accumulation_dtype(x)
    return x.to(dtype) if pre_bias is None else x.to(dtype) + per_channel(pre_bias.to(dtype), x)


def _affine(
    xhat: Tensor, weight: Tensor | None, bias: Tensor | None, scale: Tensor | None, shift: Tensor | None
) -> Tensor:
    z = xhat
    if weight is not None:
        z = z * per_channel(weight.to(z.dtype), z)
    if bias is not None:
        z = z + per_channel(bias.to(z.dtype), z)
    if scale is not None:
        z = z * per_channel(1 + scale.to(z.dtype), z)
    if shift is not None:
        z = z + per_channel(shift.to(z.dtype), z)
    return z


def _of_group(values: Tensor, x: Tensor) -> Tensor:
    """Spread values (N, G) over the channels of their groups, to broadcast against x (N, C, *spatial)."""
    n, num_groups = values.shape
    channels = x.shape[1]
    spread = values.unsqueeze(2).expand(n, num_groups, channels // num_groups).reshape(n, channels)
    return per_channel(spread, x)


def _group_mean(sums: Tensor, x: Tensor, num_groups: int) -> Tensor:
    """Add sums (N, C) over the channels of each group and divide by the group's number of elements: (N, G)."""
    n, channels = x.shape[:2]
    length = (channels // num_groups) * math.prod(x.shape[2:])
    return sums.reshape(n, num_groups, -1).sum(2) / length


def _cast(gradient: Tensor | None, parameter: Tensor | None) -> Tensor | None:
    return None if gradient is None or parameter is None else gradient.to(parameter.dtype)
