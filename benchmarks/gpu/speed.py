"""Asks how fast the operator is: device time of ours, eager and compiled, and host time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.checks import TINY, check_case, in_both_layouts, name_of, plain_cases
from benchmarks.gpu.machine import Place
from benchmarks.gpu.worker import Data, Unit
from benchmarks.group_norm_silu.cases import PASSES, Case, Shape
from benchmarks.group_norm_silu.contenders import Maker, eager, ours
from benchmarks.group_norm_silu.measure import call, row, timed
from benchmarks.group_norm_silu.timing import rotations
from unetgn.ops import implementation

HOST_SHAPES: tuple[Shape, ...] = ((1, 320, 8, 8), (1, 320, 64, 64))  # backward in two launches and in four


def units(machine: Place) -> Iterator[Unit]:
    """List the copy, then ours and eager, then ours and compiled, for each case."""
    yield Unit("copy", "speed", 1.0, 30.0, lambda: {"bytes_a_second": machine.bandwidth})
    for peer, seconds, limit in (("eager", 1.5, 40.0), ("compiled", 5.0, 90.0)):
        for case in plain_cases(machine.tiny):
            run = partial(speed, case, ("ours", peer), machine)
            yield Unit(f"{peer} {name_of(case)}", "speed" if peer == "eager" else "compiled", seconds, limit, run)


def speed(case: Case, names: Sequence[str], machine: Place) -> Data:
    """Measure forward and backward of these contenders, one right after the other."""

    def usual(inputs: dict[str, Tensor]) -> Tensor:  # a function, because a partial one would not be compiled
        return eager(inputs, case.groups)

    makers: dict[str, Maker] = {
        "ours": lambda: partial(ours, groups=case.groups),
        "eager": lambda: usual,
        "compiled": cache(lambda: machine.compile(usual)),
    }
    counts = {which: rotations(case.bytes_read(which), machine.cache_bytes()) for which in PASSES}
    inputs = [case.inputs(machine.device, seed) for seed in range(max(counts.values()))]
    rows = []
    for which in PASSES:
        times: Data = {}
        for name in names:
            times |= timed(name, makers[name], inputs[: counts[which]], which, machine)
        rows.append(row(case, which, times, machine.bandwidth, counts[which]))
    return {"rows": rows}


def check_and_speed(case: Case, machine: Place) -> Data:
    """Check a case; where it is right, time ours and eager."""
    found = check_case(case, machine)
    return found if found["faults"] else {**found, **speed(case, ("ours", "eager"), machine)}


def host_units(machine: Place) -> Iterator[Unit]:
    """List the calls whose host time is measured: those that a network makes by the dozen."""
    for case in TINY if machine.tiny else in_both_layouts(HOST_SHAPES):
        yield Unit(f"host {name_of(case)}", "host", 2.0, 40.0, partial(host, case, machine))


def host(case: Case, machine: Place) -> Data:
    """Measure the microseconds that the host needs to issue a call: inference, recorded, backward; ours and eager."""
    inputs = case.inputs(machine.device, 0)
    found: Data = {"shape": list(case.shape), "layout": case.layout}
    with implementation(machine.implementation):
        for name, contender in (("ours", ours), ("eager", eager)):
            function = partial(contender, groups=case.groups)
            found[f"inference_{name}_us"] = machine.host_us(_without_gradients(partial(function, inputs)))
            found[f"recorded_{name}_us"] = machine.host_us(call(function, inputs, "forward"))
            found[f"backward_{name}_us"] = machine.host_us(call(function, inputs, "backward"))
    return found


def _without_gradients(function: Callable[[], Any]) -> Callable[[], Any]:
    @torch.no_grad()
    def run() -> Any:
        return function()

    return run
