"""Checks correctness on a device: forward and backward against the definition in float64.

The benchmark checks each case before it times it; `tests/ops/test_triton_gpu.py` has the odd sizes of `checks`.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

import unetgn
from benchmarks.group_norm_silu.cases import DTYPES, Case
from unetgn.ops import implementation

# Of the root mean square of the exact result: rounding to the type, a few times over.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
OFF_CENTRE = 2e-4  # of float32, where the mean of x is 1000 times its deviation
SMALL = ("weight", "bias", "pre_bias", "scale", "shift")


@dataclass(frozen=True)
class Check:
    """Describes one comparison: a call on random x of this shape, from its seed."""

    shape: tuple[int, ...]
    groups: int
    dtype: torch.dtype
    channels_last: bool
    extras: tuple[str, ...]
    mean: float = 0.0
    seed: int = 0

    def inputs(self, device: str) -> tuple[dict[str, Tensor], Tensor]:
        """Return (x and the small tensors, dy), made on the CPU so that every device gets the same."""
        generator = torch.Generator().manual_seed(self.seed)
        n, c = self.shape[:2]

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, self.dtype)

        maps = "maps" in self.extras
        scale, shift = (random(*self.shape), random(*self.shape)) if maps else random(n, 2 * c).chunk(2, dim=1)
        made = {"weight": random(c), "bias": random(c), "pre_bias": random(n, c), "scale": scale, "shift": shift}
        formats = {4: torch.channels_last, 5: torch.channels_last_3d}
        memory_format = formats[len(self.shape)] if self.channels_last else torch.contiguous_format
        x, dy = (random(*self.shape) + mean for mean in (self.mean, 0.0))
        chosen = {name: made[name] for name in SMALL if name in self.extras}
        return {"x": x.contiguous(memory_format=memory_format), **chosen}, dy.contiguous(memory_format=memory_format)

    @property
    def tolerance(self) -> float:
        return OFF_CENTRE if self.mean else TOLERANCE[self.dtype]


def checks() -> Iterator[Check]:
    """List resident and split groups, masked tiles, odd sizes, both layouts, all dtypes and extras, a large mean."""
    shapes = (
        ((2, 64, 8, 8), 32),
        ((2, 96, 15, 17), 32),
        ((1, 320, 32, 32), 32),
        ((1, 64, 128, 128), 2),
        ((3, 30, 1, 1), 3),
    )
    for shape, groups in shapes:
        for channels_last in (False, True):
            for dtype in TOLERANCE:
                for extras in (("weight", "bias"), SMALL, ("pre_bias",), (), (*SMALL, "maps")):
                    yield Check(shape, groups, dtype, channels_last, extras)
            if shape[2] > 1:
                yield Check(shape, groups, torch.float32, channels_last, SMALL, mean=1000.0)
    for channels_last in (False, True):
        yield Check((1, 64, 8, 16, 16), 4, torch.bfloat16, channels_last, SMALL)


def cluster_checks() -> Iterator[Check]:
    """List groups that a cluster of blocks holds, where clusters are chosen."""
    for shape in ((1, 320, 64, 64), (8, 320, 64, 64), (1, 1280, 32, 32), (2, 512, 64, 64)):
        for channels_last in (False, True):
            for dtype in (torch.float32, torch.bfloat16):
                for extras in (("weight", "bias"), ("weight", "bias", "scale", "shift"), ("pre_bias",), SMALL):
                    yield Check(shape, 32, dtype, channels_last, extras)


def results(groups: int, inputs: dict[str, Tensor], dy: Tensor) -> dict[str, Tensor]:
    """Return y and the gradient of every input."""
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in inputs.items()}
    weight, bias, pre_bias, scale, shift = (leaves.get(name) for name in SMALL)
    y = unetgn.group_norm_silu(leaves["x"], groups, weight, bias, pre_bias=pre_bias, scale=scale, shift=shift)
    gradients = torch.autograd.grad(y, list(leaves.values()), dy)
    return {"y": y.detach(), **dict(zip(leaves, gradients, strict=True))}


def faults(check: Check, name: str, device: str) -> list[str]:
    """List what the named implementation gets wrong on the device; empty where all is right."""
    inputs, dy = check.inputs(device)
    return [f"{check}: {fault}" for fault in wrong(check.groups, inputs, dy, check.tolerance, name)]


def faults_of_case(case: Case, device: torch.device, name: str) -> list[str]:
    """Do the same for a case of the benchmark, at its own size; in float32 with a mean of 1000 deviations as well."""
    inputs = case.inputs(device, seed=0)
    dy = inputs.pop("dy")
    dtype = DTYPES[case.dtype]
    found = wrong(case.groups, inputs, dy, TOLERANCE[dtype], name)
    if dtype == torch.float32:
        inputs["x"] = inputs["x"] + 1000.0
        found += [f"with a mean of 1000, {fault}" for fault in wrong(case.groups, inputs, dy, OFF_CENTRE, name)]
    return found


def wrong(groups: int, inputs: dict[str, Tensor], dy: Tensor, tolerance: float, name: str) -> list[str]:
    """List results that are farther from the definition in float64 than the tolerance, or differ between two runs."""
    with implementation(name):
        found = results(groups, inputs, dy)
        again = results(groups, inputs, dy)
    with implementation("reference"):
        exact = results(groups, {key: tensor.double() for key, tensor in inputs.items()}, dy.double())
    terms = exact["x"].square().mean().sqrt() * dy[0, 0].numel() ** 0.5  # of the sum that dpre_bias is
    problems = []
    for key, value in found.items():
        size = exact[key].square().mean().sqrt().clamp_min(terms if key == "pre_bias" else 1e-30)
        error = ((value.double() - exact[key]).square().mean().sqrt() / size).item()
        if not error < tolerance:
            problems.append(f"{key} is off by {error:.1e} of its size, more than {tolerance:.1e}")
        if not torch.equal(value, again[key]):
            problems.append(f"two runs differ in {key}")
    return problems
