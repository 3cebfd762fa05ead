"""Asks of the shortcut's gradient, added in the kernel that writes dx: is it right, and what does it save?

What it would cost else is a kernel of autograd, which reads two gradients of x and writes their sum.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from benchmarks.gpu.checks import PATH_SHAPES, TINY, compare_twice, gathered, in_both_layouts, name_of
from benchmarks.gpu.machine import Place
from benchmarks.gpu.paths import Inputs
from benchmarks.gpu.worker import Data, Unit
from benchmarks.group_norm_silu.cases import Case
from benchmarks.group_norm_silu.timing import rotations
from unetgn.ops import group_norm_silu, group_norm_silu_with_shortcut, implementation


def units(machine: Place) -> Iterator[Unit]:
    """List the paths of the backward pass at full size, in both layouts."""
    for case in TINY if machine.tiny else in_both_layouts(PATH_SHAPES):
        yield Unit(f"shortcut {name_of(case)}", "shortcut", 2.0, 40.0, partial(check_and_time, case, machine))


def check_and_time(case: Case, machine: Place) -> Data:
    """Check the gradients; where they are right, time the backward pass with the sum in the kernel and after it."""
    with implementation(machine.implementation):
        found = gathered({"": compare_twice(case, machine, partial(results, case.groups), shortcut=True)})
        if found["faults"]:
            return found
        count = rotations(case.bytes_read("backward") * 3 // 2, machine.cache_bytes())
        inputs = [case.inputs(machine.device, seed) for seed in range(count)]
        for name, passed in (("kernel", True), ("autograd", False)):
            calls = [backward_of(one, case.groups, one["dy"].clone(), passed=passed) for one in inputs]
            found[f"{name}_us"] = machine.device_us(calls)
    return found


def results(groups: int, inputs: Inputs) -> Inputs:
    """Return y and the gradients; that of x has dshortcut in it."""
    leaves = _leaves(inputs)
    y, x = group_norm_silu_with_shortcut(leaves["x"], groups, leaves["weight"], leaves["bias"])
    gradients = torch.autograd.grad((y, x), list(leaves.values()), (inputs["dy"], inputs["dshortcut"]))
    return {"y": y.detach(), **dict(zip(leaves, gradients, strict=True))}


def backward_of(inputs: Inputs, groups: int, dshortcut: torch.Tensor, *, passed: bool) -> Callable[[], Any]:
    """Return the backward pass of a call made now, at whose end dshortcut has been added to the gradient of x."""
    leaves = _leaves(inputs)
    given = leaves["x"], groups, leaves["weight"], leaves["bias"]
    if passed:
        outputs = group_norm_silu_with_shortcut(*given)
    else:
        outputs = group_norm_silu(*given), leaves["x"].view_as(leaves["x"])
    gradients = inputs["dy"], dshortcut
    return lambda: torch.autograd.grad(outputs, list(leaves.values()), gradients, retain_graph=True)


def _leaves(inputs: Inputs) -> Inputs:
    return {name: inputs[name].detach().requires_grad_() for name in ("x", "weight", "bias")}
