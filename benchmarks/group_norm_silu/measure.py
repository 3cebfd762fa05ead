"""Turns a case into rows of results."""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.group_norm_silu.cases import DTYPES, EXTRAS, PASSES, Case
from benchmarks.group_norm_silu.contenders import Function, Maker, contenders, eager, ours
from benchmarks.group_norm_silu.timing import Machine, rotations
from unetgn.ops import implementation

Row = dict[str, Any]
Inputs = dict[str, Tensor]


class DeviceLost(RuntimeError):
    """Says that a kernel has broken the process's context: nothing more can be measured in this process."""


def row(case: Case, which: str, times: Row, bandwidth: float, rotated: int, *, cluster: bool = False) -> Row:
    """Make one row of the results: `bytes` is the limit's, `copy_bandwidth` in bytes a second.

    `times`: NAME_us of each contender, or NAME_error where it failed. `rotations` sets of inputs took turns, of which a
    call reads `bytes_read`.
    """
    return {
        **case.describe(),
        "pass": which,
        "clusters": cluster,
        **times,
        "copy_bandwidth": bandwidth,
        "bytes": case.bytes_moved(which, clusters=cluster),
        "rotations": rotated,
        "bytes_read": case.bytes_read(which),
    }


def rows(case: Case, machine: Machine, bandwidth: float) -> list[Row]:
    """Measure forward and backward of all contenders.

    Both passes are those of a call that records for backward: the compiled contender is compiled once a case.
    """
    counts = {which: rotations(case.bytes_read(which), machine.cache_bytes()) for which in PASSES}
    inputs = [case.inputs(machine.device, seed) for seed in range(max(counts.values()))]
    makers = {name: cache(make) for name, make in contenders(case).items()}
    found = []
    for which in PASSES:
        times: Row = {}
        for name, make in makers.items():
            times |= timed(name, make, inputs[: counts[which]], which, machine)
        found.append(row(case, which, times, bandwidth, counts[which]))
    return found


def cluster_rows(case: Case, machine: Machine, bandwidth: float) -> list[Row]:
    """Measure our passes that clusters change, to be called where they are chosen."""
    found = []
    for which in passes_with_clusters(case, machine.device):
        count = rotations(case.bytes_read(which), machine.cache_bytes())
        inputs = [case.inputs(machine.device, seed) for seed in range(count)]
        times = timed("ours", lambda: partial(ours, groups=case.groups), inputs, which, machine)
        found.append(row(case, which, times, bandwidth, count, cluster=True))
    return found


def passes_with_clusters(case: Case, device: torch.device) -> list[str]:
    """List the passes in which a cluster would hold groups that are otherwise split or held by one block."""
    from unetgn.ops.triton.backward import plan_backward  # needs Triton
    from unetgn.ops.triton.device import device_of
    from unetgn.ops.triton.forward import plan_forward
    from unetgn.ops.triton.problem import problem_of

    if "maps" in EXTRAS[case.extras]:  # as `entry.may_take_clusters`
        return []
    sizes = problem_of(torch.Size(case.shape), case.groups, DTYPES[case.dtype]), case.layout == "channels_last"
    plans = {"forward": plan_forward, "backward": plan_backward}
    of_device = device_of(device)
    return [
        which for which in PASSES if plans[which](*sizes, of_device, False) != plans[which](*sizes, of_device, True)
    ]


def timed(name: str, make: Maker, inputs: list[Inputs], which: str, machine: Machine) -> Row:
    """Return {NAME_us: microseconds}, or {NAME_error: message}: one contender's failure is not that of the others."""
    try:
        function = make()
        with implementation(machine.implementation):
            return {f"{name}_us": machine.device_us([call(function, one, which) for one in inputs])}
    except Exception as error:
        if not machine.is_alive():
            raise DeviceLost(f"{name}, {which}: {first_line(error)}") from error
        return {f"{name}_error": first_line(error)}


def first_line(error: Exception) -> str:
    """Return the kind of an error and the beginning of what it says."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"[:300]


def call(function: Function, inputs: Inputs, which: str) -> Callable[[], Any]:
    """Return one call that records for backward, or one backward pass of a call made beforehand."""
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in inputs.items() if name != "dy"}
    if which == "forward":
        return lambda: function(leaves)
    y = function(leaves)
    return lambda: torch.autograd.grad(y, list(leaves.values()), inputs["dy"], retain_graph=True, allow_unused=True)


def host_rows(machine: Machine) -> list[Row]:
    """Measure the host time of a call on a small tensor, for which the device waits: ours and eager, each pass."""
    case = Case((1, 320, 8, 8), "bfloat16", "contiguous")
    inputs = case.inputs(machine.device, 0)
    with implementation(machine.implementation):
        return [
            {
                **case.describe(),
                "pass": which,
                "ours_us": machine.host_us(call(ours, inputs, which)),
                "eager_us": machine.host_us(call(eager, inputs, which)),
            }
            for which in PASSES
        ]
