"""Asks what each launch of a plan takes by itself, and whether other plans than the heuristic's are faster."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor

from benchmarks.gpu import paths
from benchmarks.gpu.checks import TINY, in_both_layouts, name_of
from benchmarks.gpu.machine import Place
from benchmarks.gpu.worker import Data, Unit
from benchmarks.group_norm_silu.cases import PASSES, Case, Shape
from benchmarks.group_norm_silu.timing import rotations
from unetgn.ops.triton import recipe as recipes
from unetgn.ops.triton.device import Device, device_of
from unetgn.ops.triton.forward import Plan
from unetgn.ops.triton.launch import Launch

SHAPES: tuple[Shape, ...] = (
    (32, 256, 64, 64),
    (8, 320, 64, 64),
    (2, 512, 128, 128),
    (1, 128, 512, 512),
    (64, 128, 32, 32),
    (8, 640, 32, 32),
    (8, 1280, 16, 16),
    (1, 320, 64, 64),
)
# Changes of the heuristic's plan, by shape, layout and pass: what the offline study could not decide.
CHANGES: tuple[tuple[Shape, str, str, dict[str, int]], ...] = (
    ((8, 320, 64, 64), "contiguous", "forward", {"num_warps": 32}),
    ((8, 640, 32, 32), "contiguous", "forward", {"num_warps": 8}),
    ((64, 128, 32, 32), "contiguous", "backward", {"tiles": 4, "tile": 1024, "width": 1024, "num_warps": 4}),
    ((64, 128, 32, 32), "contiguous", "backward", {"tiles": 2, "tile": 2048, "width": 1024, "num_warps": 8}),
    ((32, 256, 64, 64), "channels_last", "forward", {"rows": 64, "apply_rows": 32}),
    ((32, 256, 64, 64), "channels_last", "forward", {"rows": 256, "apply_rows": 128}),
    ((32, 256, 64, 64), "channels_last", "backward", {"rows": 64, "apply_rows": 32}),
    ((8, 1280, 16, 16), "channels_last", "backward", {"num_warps": 16}),
)
DIFFERENT = 1e-2  # of the size of a result in bf16: another plan adds up in another order


def units(machine: Place) -> Iterator[Unit]:
    """List the heuristic's plans, then the other paths, then changes of single sizes."""
    some, device = TINY if machine.tiny else in_both_layouts(SHAPES), device_of(machine.device)
    plain = [(case, which) for case in some for which in PASSES]
    for case, which in plain[::3] if machine.tiny else plain:
        yield _unit(case, which, "as planned", planned(case, which, device), machine)
    for case, which in plain[1:3] if machine.tiny else plain:
        for name, plan in possible(case, which, device).items():
            if plan != planned(case, which, device) and not name.startswith("cluster"):
                yield _unit(case, which, name, plan, machine)
    for shape, layout, which, change in () if machine.tiny else CHANGES:
        case = Case(shape, "bfloat16", layout)
        words = ", ".join(f"{key} {value}" for key, value in change.items())
        other = changed(planned(case, which, device), change)
        if other is not None:
            yield _unit(case, which, words, other, machine)


def planned(case: Case, which: str, device: Device) -> Plan:
    """Return the heuristic's plan of a pass."""
    return (paths.planned_forward if which == "forward" else paths.planned_backward)(case, device)


def possible(case: Case, which: str, device: Device) -> paths.Plans:
    """Return the plans of a pass by name."""
    return (paths.forward_plans if which == "forward" else paths.backward_plans)(case, device)


def changed(plan: Plan, change: dict[str, int]) -> Plan | None:
    """Return the plan with other sizes; None where it is of another path, which does not have them."""
    return replace(plan, **change) if set(change) <= set(vars(plan)) else None  # type: ignore[arg-type]


def _unit(case: Case, which: str, words: str, plan: Plan, machine: Place) -> Unit:
    name = f"launch {name_of(case).removesuffix(' bfloat16')} {which}: {words}"
    return Unit(name, "launch", 1.0, 40.0, partial(launch_times, case, which, plan, machine))


def launch_times(case: Case, which: str, plan: Plan, machine: Place) -> Data:
    """Measure the microseconds of a plan and of each of its launches alone; compare its results with the usual ones."""
    device = device_of(machine.device)
    count = rotations(case.bytes_read(which), machine.cache_bytes())
    calls: list[Any] = []
    alone: list[list[Any]] = []
    kept = []
    for seed in range(count):
        inputs = case.inputs(machine.device, seed)
        call = _call(case, which, plan, device, inputs)
        seen: list[Any] = []
        with paths.instead_of_running(partial(_run_and_note, seen)):
            kept.append(call())
        calls.append(call)
        alone.append(seen)
    inputs = case.inputs(machine.device, 0)
    usual = _call(case, which, planned(case, which, device), device, inputs)()
    faults = [f"{name} is not as usual" for name in usual if not _alike(kept[0][name], usual[name])]
    found: Data = {"plan": repr(plan), "us": machine.device_us(calls), "launches": [], "faults": faults}
    for index, (first, *_) in enumerate(alone[0]):
        runs = [partial(recipes.run, *one[index]) for one in alone]
        found["launches"].append({"launch": _describe(first.launches[0]), "us": machine.device_us(runs)})
    return found | {"bytes": case.bytes_moved(which), "copy_bandwidth": machine.bandwidth}


def _call(case: Case, which: str, plan: Plan, device: Device, inputs: paths.Inputs) -> Any:
    """Return a call of the pass; the backward pass takes the statistics of a forward pass made now."""
    given = paths.arguments(inputs, case.groups)
    if which == "forward":
        return lambda: dict(zip(("y", "mean", "rstd"), paths.run_forward(plan, case, device, given), strict=True))
    _, mean, rstd = paths.run_forward(paths.planned_forward(case, device), case, device, given)
    return lambda: paths.run_backward(plan, case, device, given, inputs["dy"], mean, rstd)


def _run_and_note(seen: list[Any], recipe: recipes.Recipe, *given: Any) -> None:
    """Run the recipe, and note each of its launches as a recipe of its own, which keeps its compiled kernel apart."""
    seen += [(replace(recipe, launches=(one,), ready={}), *given) for one in recipe.launches]
    recipes.run(recipe, *given)


def _describe(one: Launch) -> str:
    function = getattr(one.kernel, "fn", one.kernel)
    return f"{getattr(function, '__name__', function)} on {one.programs} programs"


def _alike(found: Tensor, usual: Tensor) -> bool:
    difference = (found.double() - usual.double()).square().mean().sqrt()
    return bool(difference <= DIFFERENT * usual.double().square().mean().sqrt())
