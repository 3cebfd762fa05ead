"""Computes a norm and the SiLU after it in one call, between modules that we did not write.

The modules themselves are never patched. It would be shorter to make the norm return an activated tensor and the
activation pass it through. But then any other caller of one of them (a block that indexes into its Sequential, a time
embedding that shares the activation) would get wrong numbers, and a hook on either would see tensors that it was not
written for. So the block that calls both makes one call instead of two, and decides anew at each call:

- Nothing sits on norm or activation: the fused operator reads the norm's parameters, and neither module is called.
- A hook of any kind sits on one of them (torch's, accelerate's, diffusers', a sharding library's), or one of them has
  been replaced: both modules are called as before. Hooks run, see what they would have seen, and may move, cast or
  gather parameters. For as long as the hook is there, that place is as fast and as large as it was.

`torch.jit.trace` records both modules, too, since a trace cannot follow an operator that looks at its numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from unetgn import ops
from unetgn.fusion.activations import is_bare_silu
from unetgn.fusion.norms import (
    dtypes_taken,
    fused_forward,
    is_group_norm_function,
    is_plain_group_norm,
    own_arguments,
    takes_scale,
)
from unetgn.fusion.recognition import is_bare
from unetgn.ops.layout import ACCUMULATION_DTYPE, CHANNELS_LAST, memory_format_of


def norm_silu(
    norm: Any,
    act: Callable[[Tensor], Tensor],
    x: Tensor,
    /,
    *norm_args: Any,
    pre_bias: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    **norm_kwargs: Any,
) -> Tensor:
    """Compute act(norm(x + pre_bias, *norm_args, **norm_kwargs) * (1 + scale) + shift), in one pass over x if possible.

    `norm` is a module, x is (N, C, *spatial), `act` is an nn.SiLU or `torch.nn.functional.silu`. pre_bias, scale and
    shift broadcast with x or are None; those that are constant over space, (N, C, 1, …), go into the fused operator, as
    do scale and shift that both have x's shape. Where norm or act is anything else (of another class, with a hook or a
    forward of its own), both are called as written.
    """
    extras: dict[str, Any] = {"pre_bias": pre_bias, "scale": scale, "shift": shift}
    if is_group_norm_function(norm):
        if torch.jit.is_tracing() or not is_bare_silu(act):
            return _as_written(norm, act, x, *norm_args, **extras, **norm_kwargs)
        num_groups, weight, bias, eps = own_arguments(norm, *norm_args, **norm_kwargs)
        return fused_group_norm(x, num_groups, weight, bias, eps, **extras)
    if torch.jit.is_tracing() or not (is_bare(norm) and is_bare_silu(act)):
        return _as_written(norm, act, x, *norm_args, **extras, **norm_kwargs)
    if is_plain_group_norm(norm) and not norm_args and not norm_kwargs:
        taken = dtypes_taken(norm)
        if taken is not None:
            if isinstance(pre_bias, Tensor) and pre_bias.dtype != x.dtype:
                x, extras["pre_bias"] = x + pre_bias, None  # the sum may have another dtype than x
            if not {(x.dtype, p.dtype) for p in (norm.weight, norm.bias) if p is not None} <= taken:
                return _as_written(norm, act, x, **extras)
            extras["casts"] = True
        return fused_group_norm(x, norm.num_groups, norm.weight, norm.bias, norm.eps, **extras)
    fused = fused_forward(norm)
    if fused is not None and takes_scale(norm):
        norm_kwargs |= {"scale": scale, "shift": shift}
    elif fused is None or scale is not None or shift is not None:
        return _as_written(norm, act, x, *norm_args, **extras, **norm_kwargs)
    return fused(norm, x if pre_bias is None else x + pre_bias, *norm_args, **norm_kwargs)


def norm_by_maps_silu(
    norm: Any, act: Callable[[Tensor], Tensor], x: Tensor, /, factor: Tensor, shift: Tensor
) -> Tensor:
    """Compute act(norm(x) * factor + shift), in one pass over each where these are maps of x's shape and dtype.

    The operator multiplies by 1 + scale: the scale is factor - 1 in the dtype of its arithmetic, for in 16 bits a small
    factor would be lost in the difference.
    """
    maps = x.shape == factor.shape == shift.shape and x.dtype == factor.dtype == shift.dtype
    known = is_bare(norm) and is_bare_silu(act) and is_plain_group_norm(norm) and dtypes_taken(norm) is None
    if torch.jit.is_tracing() or not (maps and known and _has_dtypes(x, norm.weight, norm.bias)):
        return act(norm(x) * factor + shift)
    if x.numel() == norm.num_groups or (not torch.compiler.is_compiling() and has_torch_function((x, factor, shift))):
        return act(norm(x) * factor + shift)
    x = x.contiguous(memory_format=_layout_by_strides(x))
    scale = factor.to(ACCUMULATION_DTYPE[x.dtype]) - 1
    return ops.group_norm_silu(x, norm.num_groups, norm.weight, norm.bias, norm.eps, scale=scale, shift=shift)


def fused_group_norm(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    *,
    pre_bias: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    casts: bool = False,
) -> Tensor:
    """Compute SiLU(group_norm(x + pre_bias) * (1 + scale) + shift), laid out as F.group_norm's result is on the CPU.

    Noise that is drawn like the result, and code that flattens it, depend on the layout. What the operator does not
    take, or would change x's dtype, is applied outside of it. Dtypes of weight and bias that F.group_norm may
    not take with x are handed to it; casts: the norm is known to take them.
    """
    tensors = (x, weight, bias, pre_bias, scale, shift)
    if not torch.compiler.is_compiling() and has_torch_function(tensors):
        extras: dict[str, Any] = {"pre_bias": pre_bias, "scale": scale, "shift": shift, "casts": casts}
        return handle_torch_function(fused_group_norm, tensors, x, num_groups, weight, bias, eps, **extras)
    if x.numel() == num_groups:
        F.group_norm(x, num_groups)  # raises: PyTorch has no norm of a single value a group, the operator has
    channel_bias = _per_channel(pre_bias, x)
    if pre_bias is not None and channel_bias is None:
        x = x + pre_bias
    if not (casts or _has_dtypes(x, weight, bias)):
        x = x if pre_bias is None or channel_bias is None else x + pre_bias
        return F.silu(_modulate(F.group_norm(x, num_groups, weight, bias, eps), scale, shift))
    layout = _layout_by_strides(x)
    x = x if layout == memory_format_of(x) else x.contiguous(memory_format=layout)
    channel_scale, channel_shift = _per_channel(scale, x), _per_channel(shift, x)
    if _are_maps(scale, shift, x):
        channel_scale, channel_shift = scale, shift
    inside = (scale is None or channel_scale is not None) and (shift is None or channel_shift is not None)
    if inside:
        return ops.group_norm_silu(
            x, num_groups, weight, bias, eps, pre_bias=channel_bias, scale=channel_scale, shift=channel_shift
        )
    y = ops.group_norm_silu(x, num_groups, weight, bias, eps, activation=None, pre_bias=channel_bias)
    return F.silu(_modulate(y, scale, shift))


def _has_dtypes(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> bool:
    """Return True where F.group_norm takes weight and bias with x: on the CPU float32 beside 16 bits, too.

    Autocast makes dtypes equal.
    """
    dtypes, device = {parameter.dtype for parameter in (weight, bias) if parameter is not None}, x.device.type
    if dtypes <= {x.dtype} or (torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)):
        return True
    return dtypes == {torch.float32} and x.dtype in (torch.bfloat16, torch.float16) and device == "cpu"


def _as_written(
    norm: Callable[..., Tensor],
    act: Callable[[Tensor], Tensor],
    x: Tensor,
    *norm_args: Any,
    pre_bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    **norm_kwargs: Any,
) -> Tensor:
    if pre_bias is not None:
        x = x + pre_bias
    return act(_modulate(norm(x, *norm_args, **norm_kwargs), scale, shift))


def _modulate(y: Tensor, scale: Tensor | None, shift: Tensor | None) -> Tensor:
    if scale is not None:
        y = y * (1 + scale)
    return y if shift is None else y + shift


def _layout_by_strides(x: Tensor) -> torch.memory_format:
    """Return the layout that PyTorch's kernels for the CPU read from the strides of x; F.group_norm's result has it.

    Strides that grow from C over the spatial axes, backwards, to N are channels_last. The stride of a batch of one
    counts, although no element depends on it. It is too small where attention has transposed (1, H·W, C); the operator
    by itself would return that as channels_last.
    """
    if x.is_contiguous() or x.dim() not in CHANNELS_LAST:
        return torch.contiguous_format
    shape, strides = x.shape, x.stride()
    step = 1
    for axis in (1, *range(x.dim() - 1, 1, -1), 0):
        if strides[axis] < step:
            return torch.contiguous_format
        step = strides[axis] * shape[axis]
    return CHANNELS_LAST[x.dim()]


def _are_maps(scale: Tensor | None, shift: Tensor | None, x: Tensor) -> bool:
    """Return True where those that are given have the shape of an x with spatial axes, and keep its dtype."""
    return x.dim() > 2 and all(
        isinstance(t, Tensor) and t.shape == x.shape and t.is_floating_point() and _keeps_dtype(t, x)
        for t in (scale, shift)
        if t is not None
    )


def _per_channel(extra: Tensor | None, x: Tensor) -> Tensor | None:
    """Return `extra` as (N, C), where it is (N or 1, C, 1, …) and adding it would not change x's dtype; else None."""
    if not isinstance(extra, Tensor) or extra.dim() != x.dim() or extra.shape[1] != x.shape[1]:
        return None
    if not extra.is_floating_point():
        return None
    samples, channels = x.shape[:2]
    rows = extra.shape[0]
    if extra.numel() != rows * channels or (rows != samples and rows != 1):  # `in` and `len` fix symbolic sizes
        return None
    if not _keeps_dtype(extra, x):
        return None
    flat = extra.flatten(1)
    return flat if rows == samples else flat.expand(samples, channels)


def _keeps_dtype(extra: Tensor, x: Tensor) -> bool:
    """Return True where a sum of the two has the dtype of x."""
    return extra.dtype == x.dtype or torch.promote_types(extra.dtype, x.dtype) == x.dtype
