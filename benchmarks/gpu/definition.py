"""Computes the operator in float64 on the device, in slices that fit it at any size, and compares results with it.

Groups are independent of each other, so a slice is some groups of one sample; the gradients of weight and bias are sums
over slices. The formula is written out here once more, with PyTorch's derivative: not even the package's own reference
is trusted.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

SLICE = 2**24  # elements: 128 MiB in float64
# An element is far off where it differs by this many times the tolerance of its own size and that of its tensor: the
# root mean square alone would not notice one tile that was not written.
FAR = 4.0
Inputs = dict[str, Tensor]


def define(inputs: Inputs, groups: int, eps: float) -> Tensor:
    """Compute y of float64 inputs: x (N, C, *spatial), weight and bias (C,), the others (N, C), or maps as x."""
    x = inputs["x"]
    spatial = (1,) * (x.dim() - 2)

    def per_sample(name: str) -> Tensor:
        values = inputs[name]
        return values if values.shape == x.shape else values.reshape(*values.shape, *spatial)

    h = x + per_sample("pre_bias") if "pre_bias" in inputs else x
    grouped = h.reshape(h.shape[0], groups, -1)
    var, mean = torch.var_mean(grouped, 2, correction=0, keepdim=True)
    z = ((grouped - mean) / (var + eps).sqrt()).reshape(h.shape)
    for name, combine in (("weight", torch.mul), ("bias", torch.add)):
        z = combine(z, inputs[name].reshape(-1, *spatial)) if name in inputs else z
    z = z * (1 + per_sample("scale")) if "scale" in inputs else z
    z = z + per_sample("shift") if "shift" in inputs else z
    return F.silu(z)


def slices(samples: int, groups: int, length: int) -> Iterator[tuple[int, slice]]:
    """List (sample, range of groups) such that each has at most SLICE elements, or is one group of `length`."""
    most = max(1, min(groups, SLICE // length))
    for sample in range(samples):
        for first in range(0, groups, most):
            yield sample, slice(first, min(groups, first + most))


@dataclass
class Distance:
    """Adds up how far a result is from the exact one."""

    tolerance: float
    terms: float = 0.0  # a size to measure against, where sums cancel
    parts: list[Tensor] = field(
        default_factory=list
    )  # of each slice: squares of differences, of exact values, far, all

    def add(self, found: Tensor, exact: Tensor) -> None:
        """Add a slice. NaN is far from everything."""
        exact = exact.detach()
        off = (found.double() - exact).abs()
        size = exact.square().mean().sqrt().clamp_min(self.terms)
        far = (~(off <= FAR * self.tolerance * (exact.abs() + size))).sum()
        count = torch.full_like(size, off.numel())
        self.parts.append(torch.stack([off.square().sum(), exact.square().sum(), far.double(), count]))

    def result(self) -> tuple[float, int]:
        """Return the root mean square of the differences over that of the exact values, and how many are far off."""
        squares, exact, far, count = torch.stack(self.parts).sum(0).tolist()
        size = max((exact / count) ** 0.5, self.terms, 1e-30)
        return (squares / count) ** 0.5 / size, int(far)


def compare(found: Inputs, inputs: Inputs, groups: int, tolerance: float, eps: float = 1e-5) -> dict[str, Any]:
    """Compare y and gradients with the definition: errors by name, and faults in words, none where all is right.

    A dshortcut among the inputs is part of the gradient of x.
    """
    x, dy = inputs["x"], inputs["dy"]
    samples, channels = x.shape[:2]
    width = channels // groups
    length = x[0].numel() // groups
    terms = _terms(inputs, length // width)
    distances = {name: Distance(tolerance, terms if name == "pre_bias" else 0.0) for name in found}
    sums = {name: torch.zeros(channels, dtype=torch.float64, device=x.device) for name in ("weight", "bias")}
    for sample, some in slices(samples, groups, length):
        own, one = slice(some.start * width, some.stop * width), slice(sample, sample + 1)
        leaves = {
            name: (tensor[own] if tensor.dim() == 1 else tensor[one, own]).double().requires_grad_()
            for name, tensor in inputs.items()
            if name not in ("dy", "dshortcut")
        }
        y = define(leaves, some.stop - some.start, eps)
        gradients = dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), dy[one, own].double()), strict=True))
        if "dshortcut" in inputs:
            gradients["x"] = gradients["x"] + inputs["dshortcut"][one, own].double()
        distances["y"].add(found["y"][one, own], y)
        for name, gradient in gradients.items():
            if name in sums:
                sums[name][own] += gradient
            elif name in found:
                distances[name].add(found[name][one, own], gradient)
    for name in sums.keys() & found.keys():
        distances[name].add(found[name], sums[name])
    errors = {name: distance.result() for name, distance in distances.items()}
    return {
        "errors": {name: error for name, (error, _) in errors.items()},
        "tolerance": tolerance,
        "faults": [fault for name, error in errors.items() for fault in _faults(name, *error, tolerance)],
    }


def _terms(inputs: Inputs, spatial: int) -> float:
    """Return the size of the terms of the sum that the gradient of pre_bias is: they cancel."""
    if "pre_bias" not in inputs:
        return 0.0
    dy = inputs["dy"]
    return float(torch.linalg.vector_norm(dy, dtype=torch.float64)) * (spatial / dy.numel()) ** 0.5


def _faults(name: str, error: float, far: int, tolerance: float) -> Iterator[str]:
    if not error < tolerance:
        yield f"{name} is off by {error:.1e} of its size, more than {tolerance:.1e}"
    if far:
        yield f"{far} elements of {name} are far off"
