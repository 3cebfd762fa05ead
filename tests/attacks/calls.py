"""Attacks the operator: calls of any shape, type, layout and kind of argument, against its definition in float64.

A call gives what the definition gives, or an error of PyTorch's kinds, and changes nothing that it was given.
"""

from __future__ import annotations

import contextlib
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.attacks.judge import Draw, Kind, Verdict, Wrong, refused
from unetgn import GroupNormSiLU, group_norm_silu
from unetgn.ops import implementation

ERRORS = (ValueError, TypeError, RuntimeError, NotImplementedError, IndexError)
FLOATS = (torch.float32, torch.float32, torch.float64, torch.float16, torch.bfloat16)
OTHERS = (torch.int64, torch.bool, torch.complex64, torch.uint8, torch.float8_e4m3fn)
SIZES = (1, 1, 2, 3, 4, 5, 8, 9, 16, 17, 31)
PARAMETERS = ("weight", "bias", "pre_bias", "scale", "shift")
Arguments = dict[str, Any]


def numbers(draw: Draw, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Draw numbers: ordinary ones mostly; else constant, huge, tiny, far from zero, NaN or infinite ones."""
    torch.manual_seed(draw.randrange(2**31))
    x = torch.randn(shape, dtype=torch.float64)
    kind = draw.choice(("ordinary",) * 6 + ("far", "huge", "tiny", "constant", "zero", "nan", "inf", "one huge"))
    if kind in ("far", "huge", "tiny"):
        x = x * {"far": 1.0, "huge": 1e30, "tiny": 1e-30}[kind] + (100 if kind == "far" else 0)
    elif kind in ("constant", "zero"):
        x = torch.full_like(x, 3.3 if kind == "constant" else 0.0)
    elif x.numel() and kind != "ordinary":
        x.view(-1)[draw.randrange(x.numel())] = {"nan": math.nan, "inf": math.inf, "one huge": 1e18}[kind]
    return x.to(dtype)


def laid_out(x: Tensor, draw: Draw) -> Tensor:
    """Give the tensor, or one of its shape, other strides: views, parts, steps, repeated and overlapping elements."""
    way = draw.choice(("as it is", "as it is", "channels last", "transposed", "part", "step", "repeated", "overlapping",
                       "offset", "negated", "leaf", "mirrored"))  # fmt: skip
    if way == "channels last" and x.ndim in (4, 5):
        return x.contiguous(memory_format=torch.channels_last if x.ndim == 4 else torch.channels_last_3d)
    if way == "transposed" and x.ndim > 1:
        order = draw.sample(range(x.ndim), x.ndim)
        return x.permute(order).contiguous().permute([order.index(axis) for axis in range(x.ndim)])
    if way == "part" and x.ndim:
        wide = torch.cat([x, x.clone().fill_(math.nan)], draw.randrange(x.ndim))
        return wide[tuple(slice(0, size) for size in x.shape)]
    if way == "step" and x.ndim:
        axis = draw.randrange(x.ndim)
        return x.repeat_interleave(2, axis)[tuple(slice(None, None, 2 if a == axis else 1) for a in range(x.ndim))]
    if way == "repeated" and x.ndim:
        axis = draw.randrange(x.ndim)
        return x.narrow(axis, 0, 1).expand(x.shape) if x.shape[axis] else x
    if way == "overlapping" and x.numel():
        strides = [draw.choice((0, 1, 1, 2, 3)) for _ in x.shape]
        reach = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, strides, strict=True))
        return torch.as_strided(x.flatten()[:1].repeat(reach) + torch.arange(reach).to(x.dtype), x.shape, strides)
    if way == "offset":
        return torch.cat([x.flatten()[:1], x.flatten()])[x.numel() and 1 :].view(x.shape)
    if way == "negated" and x.is_floating_point():
        return torch._neg_view(x.neg())
    return x.detach().requires_grad_() if way == "leaf" and x.is_floating_point() else x


def sound(draw: Draw) -> Arguments:
    """Draw arguments that are right."""
    groups = draw.choice((1, 1, 2, 3, 4, 8))
    channels = groups * draw.choice((1, 1, 2, 3, 4))
    shape = (draw.choice((0, 1, 1, 2, 3)), channels, *(draw.choice(SIZES) for _ in range(draw.randrange(4))))
    dtype = draw.choice(FLOATS)
    arguments: Arguments = {"x": laid_out(numbers(draw, shape, dtype), draw), "num_groups": groups}
    sizes = {"weight": (channels,), "bias": (channels,), **dict.fromkeys(("pre_bias", "scale", "shift"), shape[:2])}
    for name, size in sizes.items():
        if draw.random() < 0.5:
            kind = dtype if draw.random() < 0.7 else draw.choice(FLOATS)
            arguments[name] = laid_out(numbers(draw, size, kind), draw)
    arguments["eps"] = draw.choice((1e-5, 1e-6, 1e-3, 0, 0.0, 1, 1e-300, 1e30))
    arguments["activation"] = draw.choice(("silu", None))
    return arguments


WRONG: dict[str, tuple[Callable[[random.Random], Any], ...]] = {
    "x": (
        lambda draw: None, lambda draw: [1.0], lambda draw: 3.0, lambda draw: torch.zeros(()),
        lambda draw: torch.zeros(4), lambda draw: torch.zeros(2, 0, 4), lambda draw: torch.zeros(1, 4, 1, 1, 1, 1),
        lambda draw: torch.zeros(2, 4).to_sparse(),
        lambda draw: torch.zeros(2, 4, dtype=draw.choice(OTHERS)), lambda draw: torch.zeros(2, 4, device="meta"),
        lambda draw: torch.zeros(1, 1, 1).expand(1, 10**9, 2**20), lambda draw: torch.empty(1, 2**40, device="meta"),
        lambda draw: torch.nested.nested_tensor([torch.zeros(2, 3), torch.zeros(2, 4)]),
        lambda draw: torch.zeros(2, 4).to_mkldnn(),
        lambda draw: torch.quantize_per_tensor(torch.zeros(2, 4), 0.1, 0, torch.qint8),
    ),
    "num_groups": tuple(lambda draw, value=value: value for value in
                        (0, -1, 7, 10**30, 2**63, True, None, "2", 2.0, math.nan, [2], torch.tensor(2), -(2**63))),
    "eps": tuple(lambda draw, value=value: value for value in
                 (-1.0, math.nan, math.inf, "1", None, True, 10**400, 1j, torch.tensor(1.0))),
    "activation": tuple(lambda draw, value=value: value for value in ("relu", "", 1, True, "SiLU")),
    **dict.fromkeys(PARAMETERS, (
        lambda draw: 1.0, lambda draw: [1.0], lambda draw: torch.zeros(()), lambda draw: torch.zeros(1, 1, 1),
        lambda draw: torch.zeros(draw.randrange(70)), lambda draw: torch.zeros(draw.randrange(5), draw.randrange(70)),
        lambda draw: torch.zeros(4, device="meta"), lambda draw: torch.zeros(4, dtype=draw.choice(OTHERS)),
        lambda draw: torch.zeros(2, 4).to_sparse(), lambda draw: torch.zeros(0),
    )),
}  # fmt: skip


def definition(arguments: Arguments) -> Tensor:
    """Compute y by its definition, in float64."""
    given = {name: value.double() if isinstance(value, Tensor) else value for name, value in arguments.items()}
    x, groups = given["x"], given["num_groups"]
    spread = (..., *(None,) * (x.ndim - 2))
    h = x if given.get("pre_bias") is None else x + given["pre_bias"][spread]
    grouped = h.reshape(x.shape[0], groups, math.prod(x.shape[1:]) // groups)
    centred = grouped - grouped.mean(2, keepdim=True)
    z = (centred / (centred.square().mean(2, keepdim=True) + given["eps"]).sqrt()).reshape(x.shape)
    for name, join in (("weight", torch.mul), ("bias", torch.add)):
        if given.get(name) is not None:
            z = join(z, given[name].view(1, -1)[spread])
    if given.get("scale") is not None:
        z = z * (1 + given["scale"])[spread]
    if given.get("shift") is not None:
        z = z + given["shift"][spread]
    return z * z.sigmoid() if given["activation"] else z


def bounds(arguments: Arguments) -> tuple[float, float]:
    """Return what y may be off by at most, and what its largest number may be for gradients to be compared."""
    x = arguments["x"].double()
    parameters = {
        name: arguments[name].double() for name in WRONG if isinstance(arguments.get(name), Tensor) and name != "x"
    }
    if not all(tensor.isfinite().all() for tensor in (x, *parameters.values())) or not x.numel():
        return math.inf, 0.0
    h = x if "pre_bias" not in parameters else x + parameters["pre_bias"][(..., *(None,) * (x.ndim - 2))]
    groups = arguments["num_groups"]
    variance = h.reshape(h.shape[0] * groups, math.prod(h.shape[1:]) // groups).var(1, correction=0)
    largest, deviation = float(h.abs().max()), float((variance.min() + arguments["eps"]).sqrt())
    double = arguments["x"].dtype is torch.float64
    exact, huge, tiny = (2.0**-52, 1e140, 1e-100) if double else (2.0**-23, 1e15, 1e-15)
    if largest > huge or most_of(parameters) > huge**2 or deviation < max(tiny, 4 * exact * largest):
        return math.inf, 0.0  # squares overflow, or nothing is left of the difference from the mean
    sizes = {name: float(value.abs().max()) for name, value in parameters.items()}
    a = sizes.get("weight", 1.0) * (1 + sizes.get("scale", 0.0))
    b = sizes.get("shift", 0.0) + sizes.get("bias", 0.0) * (1 + sizes.get("scale", 0.0))
    elements = h[0].numel() // groups
    most = a * math.sqrt(max(1, elements)) + b
    rounding = torch.finfo(arguments["x"].dtype).eps
    # PyTorch's kernels for channels_last sum squares one after the other, where the mean is up to four deviations.
    sums = 16 * math.sqrt(elements) * min(largest / deviation, 4.0) ** 2
    off = exact * (256 * (largest / deviation + 4) + sums * math.sqrt(elements)) * (a + b) + rounding * most
    off += 0 if double else 1e-7
    return off, most if largest / deviation < 100 and max(a, b) < 100 else math.inf


def most_of(parameters: Arguments) -> float:
    """Return the largest number of all parameters, and of the product of weight and scale."""
    sizes = {name: float(value.abs().max()) if value.numel() else 0.0 for name, value in parameters.items()}
    return max([sizes.get("weight", 1.0) * (1 + sizes.get("scale", 0.0)), *sizes.values()])


def bits(value: Any) -> Any:
    """Copy a tensor's values, whatever they are."""
    if not isinstance(value, Tensor) or value.layout is not torch.strided:
        return None
    if value.is_meta or value.is_nested or value.is_quantized:
        return None
    whole = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}.get(value.element_size())
    return None if value.numel() > 10**6 or whole is None else value.detach().resolve_neg().clone().view(whole)


def call(draw: Draw, folder: Path) -> Verdict | None:
    """Call the function, the module or an implementation by name, with right arguments."""
    arguments = sound(draw)
    before = {name: bits(value) for name, value in arguments.items()}
    tensors = [value for value in arguments.values() if isinstance(value, Tensor)]
    differentiated = draw.random() < 0.4 and not any(tensor.requires_grad for tensor in tensors)
    way = draw.choice(("function", "function", "module", "reference", "inference", "registered"))
    leaves = [tensor.requires_grad_() for tensor in tensors if tensor.is_leaf] if differentiated else []
    with implementation("reference") if way == "reference" else contextlib.nullcontext():
        try:
            y = by(way, arguments)
        except ERRORS as error:
            said = f"{type(error).__name__}: {error}"
            raise Wrong(f"{way}: {said} for right arguments: {described(arguments)}") from error
    check_result(y, arguments, way)
    if leaves and y.requires_grad:
        check_gradients(y, arguments, leaves, way)
    for name, kept in before.items():
        if kept is not None and not torch.equal(bits(arguments[name]), kept):
            raise Wrong(f"{way}: {name} was changed; {described(arguments)}")
    return None


def by(way: str, arguments: Arguments) -> Tensor:
    """Compute y in one of the ways that there are."""
    given = dict(arguments)
    if way == "module":
        x = given.pop("x")
        module = GroupNormSiLU(given["num_groups"], x.shape[1], given["eps"], activation=given["activation"])
        module.weight = module.bias = None
        for name in ("weight", "bias"):
            if name in given:
                module.register_buffer(f"given_{name}", given[name])
                del module._parameters[name]
                setattr(module, name, given[name])
        return module(x, **{name: given[name] for name in ("pre_bias", "scale", "shift") if name in given})
    if way == "registered":
        names = ("x", "num_groups", "weight", "bias", "eps", "activation", "pre_bias", "scale", "shift")
        values = [given.get(name) for name in names]
        values[5] = given["activation"] is not None
        return torch.ops.unetgn.group_norm_silu(*values, "auto")[0]
    with torch.inference_mode() if way == "inference" else contextlib.nullcontext():
        return group_norm_silu(**given)


def check_result(y: Tensor, arguments: Arguments, way: str) -> None:
    """Raise Wrong where y is not what the definition gives."""
    x = arguments["x"]
    if y.shape != x.shape or y.dtype != x.dtype or y.device != x.device:
        raise Wrong(f"{way}: y is {y.dtype} {tuple(y.shape)} on {y.device}; {described(arguments)}")
    off, _ = bounds(arguments)
    with torch.no_grad():
        wanted = definition(arguments)
    if not math.isfinite(off):
        return
    rounded = wanted.to(y.dtype)
    apart = (y.detach().double() - wanted).abs()
    apart[~rounded.isfinite() & ~y.isfinite()] = 0
    if y.numel() and not float(apart.max()) <= off:
        raise Wrong(f"{way}: off by {float(apart.max()):.3g} where {off:.3g} is the most; {described(arguments)}")


def check_gradients(y: Tensor, arguments: Arguments, leaves: list[Tensor], way: str) -> None:
    """Raise Wrong where gradients are far from those of the definition in float64."""
    _, most = bounds(arguments)
    dy = torch.ones_like(y) + torch.arange(y.numel(), dtype=torch.float64).sin().view(y.shape).to(y.dtype)
    gradients = torch.autograd.grad(y, leaves, dy, allow_unused=True)
    if not 0 < most < math.inf or y.dtype in (torch.float16, torch.bfloat16) or not y.numel():
        return
    wanted = torch.autograd.grad(definition(arguments), leaves, dy.double(), allow_unused=True)
    for one, other in zip(gradients, wanted, strict=True):
        if (one is None) != (other is None):
            raise Wrong(f"{way}: a gradient is missing; {described(arguments)}")
        if one is None or one.dtype in (torch.float16, torch.bfloat16):
            continue
        size = float(other.double().abs().max()) if other.numel() else 0.0
        limit = max(size, 1.0) * (1e-2 if y.dtype is torch.float32 else 1e-7) * max(1.0, most)
        apart = float((one.double() - other.double()).abs().max()) if one.numel() else 0.0
        if not apart <= limit:
            raise Wrong(f"{way}: a gradient of {size:.3g} is off by {apart:.3g}; {described(arguments)}")


def misuse(draw: Draw, folder: Path) -> Verdict | None:
    """Call with one to three wrong arguments: an error of PyTorch's kinds, or the definition where they fit."""
    arguments = sound(draw)
    for name in draw.sample(list(WRONG), draw.randrange(1, 4)):
        arguments[name] = draw.choice(WRONG[name])(draw)
    before = {name: bits(value) for name, value in arguments.items()}
    way = draw.choice(("function", "function", "reference", "registered"))
    try:
        with implementation("reference") if way == "reference" else contextlib.nullcontext():
            y = by(way, arguments)
    except ERRORS as error:
        verdict: Verdict | None = refused_in_words(error)
    else:
        verdict = None
        if not y.is_meta and way != "registered":
            check_result(y, arguments, way)
    for name, kept in before.items():
        if kept is not None and not torch.equal(bits(arguments[name]), kept):
            raise Wrong(f"{way}: {name} was changed; {described(arguments)}")
    return verdict


def refused_in_words(error: Exception) -> Verdict:
    """Judge an error, which PyTorch's own may spread over several lines."""
    if not str(error):
        raise Wrong(f"{type(error).__name__} without a word")
    return refused(type(error)(" ".join(str(error).split())[:1000]))


def described(arguments: Arguments) -> str:
    """Say what was given."""
    return ", ".join(f"{name}={tensor_in_words(value)}" for name, value in arguments.items())


def tensor_in_words(value: Any) -> str:
    """Say what a tensor is, but not its numbers."""
    if not isinstance(value, Tensor) or value.is_nested:
        return repr(value)
    strides = value.stride() if value.layout is torch.strided else value.layout
    return f"{value.dtype} {tuple(value.shape)} with strides {strides}"


KINDS = [Kind("operator: right calls", call, share=2), Kind("operator: wrong calls", misuse, share=2)]
