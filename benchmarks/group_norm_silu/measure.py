"""From a case to rows of results."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.group_norm_silu.cases import PASSES, Case
from benchmarks.group_norm_silu.contenders import Function, contenders, eager, ours
from benchmarks.group_norm_silu.timing import device_us, host_us, rotations
from unetgn.ops.triton_device import clusters, device_of
from unetgn.ops.triton_forward import plan_forward
from unetgn.ops.triton_launch import call_of


def row(
    case: Case, which: str, microseconds: dict[str, float], bandwidth: float, *, cluster: bool = False
) -> dict[str, Any]:
    """One row of the results: `bytes` is the limit's, `copy_bandwidth` in bytes a second."""
    return {
        **case.describe(),
        "pass": which,
        "clusters": cluster,
        **{f"{name}_us": value for name, value in microseconds.items()},
        "copy_bandwidth": bandwidth,
        "bytes": case.bytes_moved(which, clusters=cluster),
    }


def rows(case: Case, device: torch.device, bandwidth: float, *, clusters_too: bool) -> list[dict[str, Any]]:
    """Forward and backward of all contenders; ours once more where clusters are asked for and change the plan."""
    size = 2 * case.elements * case.itemsize
    inputs = [case.inputs(device, seed) for seed in range(rotations(size, device))]
    functions = contenders(case)
    found = [
        row(case, which, {name: _time(f, inputs, which) for name, f in functions.items()}, bandwidth)
        for which in PASSES
    ]
    if clusters_too and clusters_change_the_plan(inputs[0], device):
        with clusters(True):
            found.append(row(case, "forward", {"ours": _time(ours, inputs, "forward")}, bandwidth, cluster=True))
    return found


def clusters_change_the_plan(inputs: dict[str, Tensor], device: torch.device) -> bool:
    """True where a cluster would hold groups that are otherwise split or held by one block."""
    small = (inputs.get(name) for name in ("weight", "bias", "pre_bias", "scale", "shift"))
    call = call_of(inputs["x"], 32, True, device_of(device), *small)
    return plan_forward(call, True) != plan_forward(call, False)


def _time(function: Function, inputs: list[dict[str, Tensor]], which: str) -> float:
    return device_us([_call(function, one, which) for one in inputs])


def _call(function: Function, inputs: dict[str, Tensor], which: str) -> Callable[[], Any]:
    """One call without gradients, or one backward pass of a call made beforehand."""
    if which == "forward":

        def forward() -> Tensor:
            with torch.no_grad():
                return function(inputs)

        return forward
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in inputs.items() if name != "dy"}
    y = function(leaves)
    return lambda: torch.autograd.grad(y, list(leaves.values()), inputs["dy"], retain_graph=True, allow_unused=True)


def host_rows(device: torch.device) -> list[dict[str, Any]]:
    """Host time of a call on a small tensor, where the device waits for the host: ours and eager, each pass."""
    case = Case((1, 320, 8, 8), "bfloat16", "contiguous")
    inputs = case.inputs(device, 0)
    return [
        {
            **case.describe(),
            "pass": which,
            "ours_us": host_us(_call(ours, inputs, which)),
            "eager_us": host_us(_call(eager, inputs, which)),
        }
        for which in PASSES
    ]
