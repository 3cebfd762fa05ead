"""Makes the plans of each kernel path, whatever the heuristic would choose, and calls that follow them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from benchmarks.group_norm_silu.cases import DTYPES, Case
from unetgn.ops.arguments import DIFFERENTIABLE, Arguments, Needs
from unetgn.ops.triton import backward, entry, forward
from unetgn.ops.triton import plan_channels_last as channels_last
from unetgn.ops.triton import plan_contiguous as contiguous
from unetgn.ops.triton.device import Device
from unetgn.ops.triton.forward import Plan
from unetgn.ops.triton.launch import Strides
from unetgn.ops.triton.problem import Problem, power_of_two_divisor, problem_of
from unetgn.ops.triton.recipe import Recipe

EPS = 1e-5
Inputs = dict[str, Tensor]
Plans = dict[str, Plan]


def problem(case: Case) -> Problem:
    """Return the sizes of a case."""
    return problem_of(torch.Size(case.shape), case.groups, DTYPES[case.dtype])


def planned_forward(case: Case, device: Device) -> Plan:
    """Return the heuristic's plan, without clusters."""
    return forward.plan_forward(problem(case), case.layout == "channels_last", device, False)


def planned_backward(case: Case, device: Device) -> Plan:
    """Return the heuristic's plan, without clusters."""
    return backward.plan_backward(problem(case), case.layout == "channels_last", device, False)


def forward_plans(case: Case, device: Device) -> Plans:
    """Return the plans of the forward pass by name: "resident", "split", "cluster of 2", … where they are possible."""
    sizes = problem(case)
    if case.layout == "channels_last":
        limit, per_thread = (sizes.resident_elements(n) for n in (channels_last.FORWARD_RESIDENT, 96))
        found: dict[str, Plan | None] = {"split": channels_last.split(sizes, device)}
        for blocks in (1, *device.cluster_sizes):
            if sizes.spatial % blocks == 0 and sizes.length // blocks <= limit:
                found[_resident_name(blocks)] = channels_last.resident_of(sizes, device, limit, per_thread, blocks)
        return {name: plan for name, plan in found.items() if plan is not None}
    width = power_of_two_divisor(sizes.spatial)
    plans: Plans = {"split": contiguous.forward_split(sizes, device, width)}
    if sizes.length <= sizes.resident_elements(contiguous.FORWARD_RESIDENT):
        plans["resident"] = contiguous.forward_resident(sizes, device, width, 1)
    for blocks in device.cluster_sizes:
        shared = contiguous.width_in_share(sizes, width, blocks)
        if shared >= sizes.vector and sizes.length // blocks <= sizes.resident_elements(contiguous.FORWARD_RESIDENT):
            plans[_resident_name(blocks)] = contiguous.forward_resident(sizes, device, shared, blocks)
    return plans


def _resident_name(blocks: int) -> str:
    return "resident" if blocks == 1 else f"cluster of {blocks}"


def backward_plans(case: Case, device: Device) -> Plans:
    """Return the plans of the backward pass by name: "split", and "resident" and "cluster of 2", … where possible."""
    sizes = problem(case)
    if case.layout == "channels_last":
        plans: Plans = {"split": channels_last.split(sizes, device)}
        limit, roomy = channels_last.BACKWARD_RESIDENT[sizes.itemsize], channels_last.BACKWARD_ROOMY[sizes.itemsize]
        if sizes.length <= limit:
            resident = channels_last.resident_of(sizes, device, limit, 40, 1, roomy=roomy)
            plans |= {"resident": resident} if resident is not None else {}
        for blocks in device.cluster_sizes if case.extras != "maps" else ():
            several = channels_last.cluster_of(sizes, device, blocks)
            plans |= {_resident_name(blocks): several} if several is not None else {}
        return plans
    width, exact = contiguous.backward_segment(sizes)
    plans = {"split": contiguous.backward_split(sizes, device, width, exact)}
    if sizes.length <= contiguous.BACKWARD_RESIDENT[sizes.itemsize]:
        plans["resident"] = contiguous.backward_resident(sizes, device, width, exact)
    for blocks in device.cluster_sizes if exact and case.extras != "maps" else ():
        shared = contiguous.cluster_of(sizes, device, width, blocks)
        if shared is not None and sizes.length // blocks <= contiguous.BACKWARD_RESIDENT[sizes.itemsize]:
            plans[_resident_name(blocks)] = shared
    return plans


def arguments(inputs: Inputs, groups: int) -> Arguments:
    """Return the operator's arguments for a case's inputs."""
    given = {name: inputs.get(name) for name in DIFFERENTIABLE}
    return Arguments(num_groups=groups, eps=EPS, activation=True, implementation="triton", **given)  # type: ignore[arg-type]


def run_forward(plan: Plan, case: Case, device: Device, given: Arguments) -> tuple[Tensor, Tensor, Tensor]:
    """Compute y, mean and rstd by that plan."""
    recipe = forward.recipe_of(plan, problem(case), device, EPS, given.activation)
    return entry.follow_forward(recipe, given)


def run_backward(
    plan: Plan, case: Case, device: Device, given: Arguments, dy: Tensor, mean: Tensor, rstd: Tensor
) -> Inputs:
    """Compute the gradient of each tensor that is given, by that plan."""
    needs = Needs._make(getattr(given, name) is not None for name in DIFFERENTIABLE)
    recipe = backward.recipe_of(plan, problem(case), device, given.activation, entry.of_channels(given, needs))
    gradients = entry.follow_backward(recipe, dy, given, mean, rstd, needs)
    return {name: value for name, value in zip(DIFFERENTIABLE, gradients, strict=True) if value is not None}


def results(plans: tuple[Plan, Plan], case: Case, device: Device, inputs: Inputs) -> Inputs:
    """Return y and the gradient of each input, by explicit plans."""
    given = arguments(inputs, case.groups)
    y, mean, rstd = run_forward(plans[0], case, device, given)
    return {"y": y, **run_backward(plans[1], case, device, given, inputs["dy"], mean, rstd)}


Run = Callable[[Recipe, Sequence[Tensor | None], Tensor | None, Strides], None]


@contextmanager
def instead_of_running(run: Run) -> Iterator[None]:
    """Give the recipes of the block, with what is given to `entry.run`, to `run`."""
    usual, entry.run = entry.run, run  # type: ignore[assignment]
    try:
        yield
    finally:
        entry.run = usual
