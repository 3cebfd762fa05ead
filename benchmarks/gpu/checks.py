"""Asks of each kernel path at full size whether it is right: against the definition in float64, twice alike.

Results are written into memory that holds NaN, so that an element that nobody writes is found.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from itertools import product

import torch

from benchmarks.gpu import definition, paths
from benchmarks.gpu.machine import Place
from benchmarks.gpu.paths import Inputs, Plans
from benchmarks.gpu.worker import Absent, Data, Unit
from benchmarks.group_norm_silu import cases, measure
from benchmarks.group_norm_silu.cases import DTYPES, EXTRAS, LAYOUTS, PASSES, Case, Shape
from benchmarks.group_norm_silu.checks import OFF_CENTRE, TOLERANCE, Check, checks, cluster_checks, faults
from benchmarks.group_norm_silu.checks import results as by_the_public_door
from unetgn.ops import implementation
from unetgn.ops.triton.device import Device, clusters, device_of
from unetgn.ops.triton.forward import Plan

TINY = tuple(Case((1, 8, 8, 8), "bfloat16", layout, groups=1) for layout in LAYOUTS)  # of a rehearsal
# Groups of 40960, 10240, 4096 and 32768 elements: a large and a small number of them, few and many channels in each.
PATH_SHAPES: tuple[Shape, ...] = ((8, 320, 64, 64), (8, 1280, 16, 16), (64, 128, 32, 32), (32, 256, 64, 64))
CLUSTER_SHAPES: tuple[Shape, ...] = ((8, 320, 64, 64), (32, 256, 64, 64), (2, 512, 128, 128))
ODD_TOGETHER = 17  # small checks in one unit
MEAN = 1000.0  # of x, in deviations


def plain_cases(tiny: bool) -> list[Case]:
    """List the cases in bf16 without extras: 24, the most important first."""
    if tiny:
        return list(TINY)
    return [case for case in cases.cases(dtypes=("bfloat16",)) if case.extras == "none"]


def name_of(case: Case) -> str:
    """Name a case: 8x320x64x64 channels_last bfloat16 pre_bias."""
    parts = ["x".join(map(str, case.shape)), case.layout, case.dtype, case.extras]
    return " ".join(parts if case.extras != "none" else parts[:-1])


def units(machine: Place) -> Iterator[Unit]:
    """List the checks of the paths that calls take, then of all paths in all types, with all extras."""
    for case in plain_cases(machine.tiny):
        yield Unit(f"check {name_of(case)}", "check", 1.0, 40.0, partial(check_case, case, machine))
    for case in TINY if machine.tiny else in_both_layouts(PATH_SHAPES):
        for path in path_names(case, machine):
            unit = f"path {name_of(case).removesuffix(' bfloat16')} {path}"
            yield Unit(unit, "path", 3.0, 60.0, partial(check_path, case, path, machine))


def in_both_layouts(shapes: Iterable[Shape]) -> list[Case]:
    """List the cases of these shapes in bf16, both layouts side by side."""
    return [Case(shape, "bfloat16", layout) for shape in shapes for layout in LAYOUTS]


def odd_units(machine: Place) -> Iterator[Unit]:
    """List the checks of odd sizes, some together."""
    odd = [Check((1, 6, 3, 1), 1, torch.float64, True, ("weight",))] if machine.tiny else list(checks())
    for first in range(0, len(odd), ODD_TOGETHER):
        some = odd[first : first + ODD_TOGETHER]
        yield Unit(f"odd {first}", "odd", 3.5, 90.0, partial(check_odd, some, machine))


def path_names(case: Case, machine: Place) -> list[str]:
    """List the paths that both passes have for this case, clusters apart."""
    device = device_of(machine.device)
    forward, backward = paths.forward_plans(case, device), paths.backward_plans(case, device)
    return [name for name in ("resident", "split") if name in forward or name in backward]


def check_case(case: Case, machine: Place, extra_mean: bool = True) -> Data:
    """Check a call by its public door; in float32 with a mean of 1000 deviations as well."""
    found = {}

    def run(inputs: Inputs) -> Inputs:
        tensors = {name: tensor for name, tensor in inputs.items() if name != "dy"}
        with implementation(machine.implementation):
            return by_the_public_door(case.groups, tensors, inputs["dy"])

    found[""] = compare_twice(case, machine, run)
    if extra_mean and case.dtype == "float32":
        found[f"mean {MEAN:.0f}: "] = compare_twice(case, machine, run, mean=MEAN)
    return gathered(found)


def check_path(case: Case, path: str, machine: Place) -> Data:
    """Check one path in each dtype and with each of the extras, where the path is possible."""
    device, found = device_of(machine.device), {}
    for dtype, extras in [("float16", "pre_bias")] if machine.tiny else product(DTYPES, EXTRAS):
        one = replace(case, dtype=dtype, extras=extras)
        forward, backward = paths.forward_plans(one, device), paths.backward_plans(one, device)
        if path in forward or path in backward:
            plans = _either(forward, path), _either(backward, path)
            run = partial(paths.results, plans, one, device)
            print(f"{path} path, {name_of(one)}", file=sys.stderr)  # should it hang
            found[f"{dtype} {extras}: "] = compare_twice(one, machine, run)
    return gathered(found)


def _either(plans: Plans, path: str) -> Plan:
    """Return the plan of that path, or the only other one: split, which is always possible."""
    return plans.get(path, plans["split"])


def check_odd(some: list[Check], machine: Place) -> Data:
    """Check odd sizes, as the tests do."""
    found = [fault for check in some for fault in faults(check, machine.implementation, machine.device.type)]
    return {"checks": len(some), "faults": found[:8]}


def compare_twice(
    case: Case, machine: Place, run: Callable[[Inputs], Inputs], mean: float = 0.0, *, shortcut: bool = False
) -> Data:
    """Run twice, and compare the results with each other and with the definition; with a dshortcut among the inputs."""
    inputs = case.inputs(machine.device, seed=0)
    if shortcut:
        inputs["dshortcut"] = case.inputs(machine.device, seed=1)["dy"]
    if mean:
        inputs["x"] = inputs["x"] + mean
    tolerance = OFF_CENTRE if mean else TOLERANCE[DTYPES[case.dtype]]
    found = []
    for _ in range(2):
        poison(inputs["x"])
        found.append(run(inputs))
    compared = definition.compare(found[0], inputs, case.groups, tolerance)
    differing = [name for name, value in found[0].items() if not torch.equal(value, found[1][name])]
    compared["faults"] += [f"two runs differ in {name}" for name in differing]
    return compared


def poison(x: torch.Tensor) -> None:
    """Leave NaN in the memory that the allocator will hand out next, in tensors as large as x and in smaller ones."""
    sizes = [2**k for k in range(8, 21, 2) if 2**k < x.numel()]
    held = [torch.full_like(x, math.nan) for _ in range(3)]
    held += [torch.full((size,), math.nan, device=x.device) for size in sizes for _ in range(3)]
    del held


def gathered(found: dict[str, Data]) -> Data:
    """Put several comparisons into one result: all errors, and the faults with the words before them."""
    return {
        "errors": {
            f"{words}{name}": round_error(e) for words, one in found.items() for name, e in one["errors"].items()
        },
        "faults": [f"{words}{fault}" for words, one in found.items() for fault in one["faults"]],
    }


def round_error(error: float) -> float:
    """Keep three digits; NaN, which JSON has no word for, is written as infinity's stand-in 1e300."""
    return float(f"{error:.3g}") if math.isfinite(error) else 1e300


def cluster_units(machine: Place) -> Iterator[Unit]:
    """List what clusters are asked: right where the heuristic takes them; each number of blocks, and how fast."""
    device = device_of(machine.device)
    for case in plain_cases(machine.tiny):
        if device.largest_cluster > 1 and measure.passes_with_clusters(case, machine.device):
            yield Unit(f"cluster {name_of(case)}", "cluster", 2.0, 20.0, partial(cluster_case, case, machine))
    for case in TINY if machine.tiny else in_both_layouts(CLUSTER_SHAPES):
        for which in PASSES:
            for name in cluster_names(case, which, device):
                if not (machine.tiny and name != "cluster of 2"):
                    run = partial(cluster_plan, case, which, name, machine)
                    yield Unit(f"{name}, {which}: {name_of(case)}", "cluster", 2.0, 20.0, run)
    some = list(cluster_checks())[:0] if machine.tiny else list(cluster_checks())
    for first in range(0, len(some), ODD_TOGETHER):
        run = partial(cluster_odd, some[first : first + ODD_TOGETHER], machine)
        yield Unit(f"cluster sizes {first}", "cluster", 6.0, 40.0, run)


def cluster_case(case: Case, machine: Place) -> Data:
    """Check a call whose groups are held by clusters, then time it."""
    with clusters(True):
        found = check_case(case, machine)
        rows = [] if found["faults"] else measure.cluster_rows(case, machine, machine.bandwidth)
    return {**found, "rows": rows}


def cluster_names(case: Case, which: str, device: Device) -> list[str]:
    """List the clusters that could hold the groups of a case in that pass: "cluster of 2", …"""
    plans = paths.forward_plans(case, device) if which == "forward" else paths.backward_plans(case, device)
    return [name for name in plans if name.startswith("cluster")]


def cluster_plan(case: Case, which: str, name: str, machine: Place) -> Data:
    """Check a number of blocks in a cluster without extras and with pre_bias, then time the pass without."""
    device = device_of(machine.device)
    forward, backward = paths.forward_plans(case, device), paths.backward_plans(case, device)
    plans = (forward[name], backward["split"]) if which == "forward" else (forward["split"], backward[name])
    found = {}
    for extras in ("none", "pre_bias"):
        one = replace(case, extras=extras)
        found[f"{extras}: "] = compare_twice(one, machine, partial(paths.results, plans, one, device))
    calls: list[Callable[[], object]] = []
    for seed in range(2 if machine.tiny else 3):
        inputs = case.inputs(machine.device, seed)
        given = paths.arguments(inputs, case.groups)
        if which == "forward":
            calls.append(partial(paths.run_forward, plans[0], case, device, given))
        else:
            _, mean, rstd = paths.run_forward(plans[0], case, device, given)
            calls.append(partial(paths.run_backward, plans[1], case, device, given, inputs["dy"], mean, rstd))
    plan = repr(plans[PASSES.index(which)])
    return {**gathered(found), "plan": plan, f"{which}_us": machine.device_us(calls)}


def cluster_odd(some: list[Check], machine: Place) -> Data:
    """Check clusters at the sizes that the tests have."""
    if device_of(machine.device).largest_cluster == 1:
        raise Absent("this device has no clusters")
    with clusters(True):
        return check_odd(some, machine)
