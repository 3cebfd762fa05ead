"""Turns the plan of a backward pass into its recipe: the launches that fill the gradients. As in `forward`.

The kernels write sums of each channel into slots: `sums` (2 or 3, N, slots, C), one plane for S0, one for S1 and, where
pre_bias needs a gradient, one for S2 (`kernels.backward_contiguous` has the formulas). `fold` adds up the slots, and
`parameters` makes all gradients but dx.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from unetgn.ops.arguments import Needs
from unetgn.ops.triton import plan_channels_last, plan_contiguous
from unetgn.ops.triton.device import Device, device_of
from unetgn.ops.triton.forward import Plan, has_assembly
from unetgn.ops.triton.kernels import backward_channels_last as channels_last
from unetgn.ops.triton.kernels import backward_contiguous as contiguous
from unetgn.ops.triton.kernels.parameters import fold_slots, parameter_gradients
from unetgn.ops.triton.launch import Launch, launch_of
from unetgn.ops.triton.problem import Problem, ceil_div, power_of_two_at_least, problem_of
from unetgn.ops.triton.recipe import RECIPES, Recipe, Scratch

FOLDED_ELEMENTS = 1024  # that a folding program holds at a time
FOLDED_ELEMENTS_64 = 512  # of 64 bits each
PARAMETER_COLUMNS = 32  # channels of a program of the parameter gradients
PARAMETER_SAMPLES = 64  # that it adds at a time, at most


class BackwardOperands(NamedTuple):
    """Holds the tensors of one backward pass, under the names that the kernels give them, in the order of a recipe."""

    x: Tensor
    dy: Tensor
    dshortcut: Tensor | None  # of x's shape and layout: added to dx
    mean_of_group: Tensor  # (N, G)
    rstd_of_group: Tensor
    weight: Tensor | None
    bias: Tensor | None
    pre_bias: Tensor | None
    scale: Tensor | None
    shift: Tensor | None
    scale_map: Tensor | None  # of x's shape and layout
    shift_map: Tensor | None
    dx: Tensor | None
    dweight: Tensor | None
    dbias: Tensor | None
    dpre_bias: Tensor | None
    dscale: Tensor | None
    dshift: Tensor | None
    dscale_map: Tensor | None
    dshift_map: Tensor | None
    sums: Tensor | None  # (2 or 3, N, slots, C)
    folded: Tensor | None  # (2 or 3, N, 1, C); `sums` themselves where they have one slot
    m1_m2: Tensor  # (N * G, 2)
    partials: Tensor | None  # (N * G, 2, blocks): the parts of m1 and m2 that the blocks of a cluster exchange
    pre_bias_stride: int  # from sample to sample
    scale_stride: int
    shift_stride: int


@lru_cache(RECIPES)
def backward_recipe(
    shape: torch.Size,
    dtype: torch.dtype,
    channels_last: bool,
    device: torch.device,
    num_groups: int,
    activation: bool,
    clusters: bool,
    needs: Needs,
) -> Recipe:
    """Return the recipe of the plan that the heuristic makes for x of that shape, dtype, layout and device."""
    problem, properties = problem_of(shape, num_groups, dtype), device_of(device)
    return recipe_of(
        plan_backward(problem, channels_last, properties, clusters), problem, properties, activation, needs
    )


def plan_backward(problem: Problem, channels_last: bool, device: Device, clusters: bool) -> Plan:
    """Make the heuristic's plan."""
    plans = plan_channels_last if channels_last else plan_contiguous
    return plans.plan_backward(problem, device, clusters)


def recipe_of(plan: Plan, problem: Problem, device: Device, activation: bool, needs: Needs) -> Recipe:
    """Turn a plan into its recipe.

    Resident, cluster: dx and the sums, a fold where there are several slots, parameters. Split: the sums, a fold, dx,
    parameters. Launches whose results nobody asks for are left out.
    """
    ptx = has_assembly(problem, device)
    with_xhat, parameters = needs.pre_bias, any(needs[1:])
    slots, planes = _slots(plan, problem), 3 if with_xhat else 2
    if isinstance(plan, plan_contiguous.Resident):
        launches = [_contiguous_resident(plan, problem, activation, ptx, with_xhat)]
    elif isinstance(plan, plan_contiguous.Cluster):
        launches = [_contiguous_cluster(plan, problem, device, activation, with_xhat)]
    elif isinstance(plan, plan_channels_last.Cluster):
        launches = [_channels_last_cluster(plan, problem, device, activation, with_xhat)]
    elif isinstance(plan, plan_channels_last.Resident):
        launches = [_channels_last_resident(plan, problem, activation, ptx, with_xhat)]
    elif isinstance(plan, plan_contiguous.Split):
        launches = [_contiguous_sums(plan, problem, activation, ptx, with_xhat)]
    else:
        launches = [_channels_last_sums(plan, problem, activation, ptx, with_xhat)]
    split = isinstance(plan, plan_contiguous.Split | plan_channels_last.Split)
    summed = split or parameters  # a resident kernel needs no sums for dx
    folded = split or (parameters and slots > 1)
    if folded:
        launches.append(_fold(problem, slots, with_xhat))
    if needs.x and isinstance(plan, plan_contiguous.Split):
        launches.append(_contiguous_apply(plan, problem, activation, ptx))
    elif needs.x and isinstance(plan, plan_channels_last.Split):
        launches.append(_channels_last_apply(plan, problem, activation, ptx))
    if parameters:
        launches.append(_parameters(problem))
    scratch = Scratch(problem.itemsize)
    sums = scratch.part((planes, problem.samples, slots, problem.channels)) if summed else None
    once = scratch.part((planes, problem.samples, 1, problem.channels)) if folded else sums
    m1_m2 = scratch.part((problem.programs, 2))
    partials = None
    if isinstance(plan, plan_contiguous.Cluster | plan_channels_last.Cluster):
        partials = scratch.part((problem.programs, 2, plan.blocks))
    return Recipe(tuple(launches), scratch.elements, (sums, once, m1_m2, partials))


def _slots(plan: Plan, problem: Problem) -> int:
    """Return how many partial sums a channel has."""
    if isinstance(plan, plan_channels_last.Resident):
        return 1
    if isinstance(plan, plan_channels_last.Cluster):
        return plan.blocks
    if isinstance(plan, plan_channels_last.Split):
        return ceil_div(problem.spatial, plan.rows)
    return ceil_div(problem.spatial, plan.width)


def _contiguous_resident(
    plan: plan_contiguous.Resident, problem: Problem, activation: bool, ptx: bool, with_xhat: bool
) -> Launch:
    channel_segments = ceil_div(problem.spatial, plan.width)
    return launch_of(
        contiguous.resident_backward,
        BackwardOperands,
        problem.programs,
        plan.num_warps,
        plane_size=problem.samples * channel_segments * problem.channels,
        num_groups=problem.groups,
        group_channels=problem.group_channels,
        spatial=problem.spatial,
        channel_segments=channel_segments,
        SILU=activation,
        PTX=ptx,
        WITH_XHAT=with_xhat,
        TILES=plan.tiles,
        SEGMENTS=plan.tile // plan.width,
        WIDTH=plan.width,
        MASKED=plan.masked,
        EXACT=plan.exact,
    )


def _contiguous_cluster(
    plan: plan_contiguous.Cluster, problem: Problem, device: Device, activation: bool, with_xhat: bool
) -> Launch:
    channel_segments = problem.spatial // plan.width
    return launch_of(
        contiguous.cluster_backward,
        BackwardOperands,
        problem.programs,
        plan.num_warps,
        plan.blocks,
        plane_size=problem.samples * channel_segments * problem.channels,
        num_groups=problem.groups,
        group_channels=problem.group_channels,
        spatial=problem.spatial,
        channel_segments=channel_segments,
        SILU=activation,
        PTX=has_assembly(problem, device),
        WITH_XHAT=with_xhat,
        BLOCKS=plan.blocks,
        TILES=plan.tiles,
        WIDTH=plan.width,
        CLUSTER_SYNC=not device.interpreted,
    )


def _channels_last_resident(
    plan: plan_channels_last.Resident, problem: Problem, activation: bool, ptx: bool, with_xhat: bool
) -> Launch:
    return launch_of(
        channels_last.resident_backward,
        BackwardOperands,
        problem.programs // plan.groups,
        plan.num_warps,
        plane_size=problem.samples * problem.channels,
        bundles=problem.groups // plan.groups,
        spatial=problem.spatial,
        SILU=activation,
        PTX=ptx,
        WITH_XHAT=with_xhat,
        TILES=plan.tiles,
        ROWS=plan.rows,
        GROUPS=plan.groups,
        STEPS=plan.steps,
        VECTOR=plan.vector,
        MASKED=plan.masked,
    )


def _channels_last_cluster(
    plan: plan_channels_last.Cluster, problem: Problem, device: Device, activation: bool, with_xhat: bool
) -> Launch:
    return launch_of(
        channels_last.cluster_backward,
        BackwardOperands,
        problem.programs,
        plan.num_warps,
        plan.blocks,
        plane_size=problem.samples * plan.blocks * problem.channels,
        num_groups=problem.groups,
        spatial=problem.spatial,
        SILU=activation,
        PTX=has_assembly(problem, device),
        WITH_XHAT=with_xhat,
        BLOCKS=plan.blocks,
        TILES=plan.tiles,
        ROWS=plan.rows,
        STEPS=plan.steps,
        VECTOR=plan.vector,
        CLUSTER_SYNC=not device.interpreted,
    )


def _contiguous_sums(
    plan: plan_contiguous.Split, problem: Problem, activation: bool, ptx: bool, with_xhat: bool
) -> Launch:
    sizes = _contiguous_sizes(plan, problem, plan.tile)
    return launch_of(
        contiguous.split_sums,
        BackwardOperands,
        problem.samples * sizes["sample_tiles"],
        plan.num_warps,
        plane_size=problem.samples * sizes["channel_segments"] * problem.channels,
        SILU=activation,
        PTX=ptx,
        WITH_XHAT=with_xhat,
        **sizes,
    )


def _contiguous_apply(plan: plan_contiguous.Split, problem: Problem, activation: bool, ptx: bool) -> Launch:
    sizes = _contiguous_sizes(plan, problem, plan.apply_tile)
    programs = problem.samples * sizes["sample_tiles"]
    return launch_of(
        contiguous.split_apply, BackwardOperands, programs, plan.apply_warps, SILU=activation, PTX=ptx, **sizes
    )


def _contiguous_sizes(plan: plan_contiguous.Split, problem: Problem, tile: int) -> dict[str, int]:
    """Return what both passes over tiles of that many elements take."""
    channel_segments, tile_segments = ceil_div(problem.spatial, plan.width), tile // plan.width
    sample_tiles = ceil_div(problem.channels * channel_segments, tile_segments)
    return {
        "num_groups": problem.groups,
        "group_channels": problem.group_channels,
        "spatial": problem.spatial,
        "channel_segments": channel_segments,
        "sample_tiles": sample_tiles,
        "SEGMENTS": tile_segments,
        "WIDTH": plan.width,
        "MASKED": not plan.exact or sample_tiles * tile_segments != problem.channels * channel_segments,
        "EXACT": plan.exact,
    }


def _channels_last_sums(
    plan: plan_channels_last.Split, problem: Problem, activation: bool, ptx: bool, with_xhat: bool
) -> Launch:
    sizes = _channels_last_sizes(plan, problem, plan.rows)
    return launch_of(
        channels_last.split_sums,
        BackwardOperands,
        problem.samples * sizes["strips"] * sizes["column_tiles"],
        plan.num_warps,
        plane_size=problem.samples * sizes["strips"] * problem.channels,
        SILU=activation,
        PTX=ptx,
        WITH_XHAT=with_xhat,
        **sizes,
    )


def _channels_last_apply(plan: plan_channels_last.Split, problem: Problem, activation: bool, ptx: bool) -> Launch:
    sizes = _channels_last_sizes(plan, problem, plan.apply_rows)
    programs = problem.samples * sizes["strips"] * sizes["column_tiles"]
    return launch_of(
        channels_last.split_apply, BackwardOperands, programs, plan.num_warps, SILU=activation, PTX=ptx, **sizes
    )


def _channels_last_sizes(plan: plan_channels_last.Split, problem: Problem, rows: int) -> dict[str, int]:
    """Return what both passes along strips of that many rows take."""
    strips, column_tiles = ceil_div(problem.spatial, rows), ceil_div(problem.channels, plan.columns)
    return {
        "num_groups": problem.groups,
        "group_channels": problem.group_channels,
        "spatial": problem.spatial,
        "row_vectors": problem.channels // plan.vector,
        "strips": strips,
        "column_tiles": column_tiles,
        **plan.tiles_at_once(rows, 2),
        "COLUMNS": plan.columns,
        "VECTOR": plan.vector,
        "MASKED": strips * rows != problem.spatial or column_tiles * plan.columns != problem.channels,
    }


def _fold(problem: Problem, slots: int, with_xhat: bool) -> Launch:
    elements = FOLDED_ELEMENTS if problem.itemsize < 8 else FOLDED_ELEMENTS_64
    columns = min(power_of_two_at_least(problem.group_channels), elements)
    return launch_of(
        fold_slots,
        BackwardOperands,
        problem.programs,
        4,
        plane_size=problem.samples * slots * problem.channels,
        folded_plane_size=problem.samples * problem.channels,
        num_groups=problem.groups,
        group_channels=problem.group_channels,
        spatial=problem.spatial,
        slots=slots,
        WITH_XHAT=with_xhat,
        SLOTS=min(power_of_two_at_least(slots), elements // columns),
        COLUMNS=columns,
        COLUMN_TILES=ceil_div(problem.group_channels, columns),
    )


def _parameters(problem: Problem) -> Launch:
    return launch_of(
        parameter_gradients,
        BackwardOperands,
        ceil_div(problem.channels, PARAMETER_COLUMNS),
        4,
        folded_plane_size=problem.samples * problem.channels,
        samples=problem.samples,
        num_groups=problem.groups,
        group_channels=problem.group_channels,
        spatial=problem.spatial,
        SAMPLES=min(power_of_two_at_least(problem.samples), PARAMETER_SAMPLES),
        COLUMNS=PARAMETER_COLUMNS,
    )
