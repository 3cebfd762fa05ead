"""Turns the plan of a forward pass into its recipe: the launches that fill y, mean and rstd.

Resident and cluster: one launch. Split: statistics of chunks, on some paths a merge of them, then y. `entry` adds the
tensors.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from unetgn.ops.triton import plan_channels_last, plan_contiguous
from unetgn.ops.triton.device import Device, device_of
from unetgn.ops.triton.kernels import forward_channels_last as channels_last
from unetgn.ops.triton.kernels import forward_contiguous as contiguous
from unetgn.ops.triton.launch import Launch, launch_of
from unetgn.ops.triton.problem import INT32_POSITIONS, Problem, ceil_div, power_of_two_at_least, problem_of
from unetgn.ops.triton.recipe import RECIPES, Recipe, Scratch, Shape

Plan = (
    plan_contiguous.Resident
    | plan_contiguous.Cluster  # of backward passes
    | plan_contiguous.Split
    | plan_channels_last.Resident
    | plan_channels_last.Cluster  # of backward passes
    | plan_channels_last.Split
)

MANY_CHUNKS = 256  # more chunks of a group than this are merged once, by a kernel of their own
MERGED_ELEMENTS = 1024  # that a merging program holds at a time


class ForwardOperands(NamedTuple):
    """Holds the tensors of one forward pass, under the names that the kernels give them, in the order of a recipe."""

    x: Tensor
    weight: Tensor | None
    bias: Tensor | None
    pre_bias: Tensor | None
    scale: Tensor | None
    shift: Tensor | None
    scale_map: Tensor | None  # of x's shape and layout
    shift_map: Tensor | None
    y: Tensor
    mean_of_group: Tensor  # (N, G)
    rstd_of_group: Tensor
    partials: Tensor | None  # mean and M2 of parts of each group
    pre_bias_stride: int  # from sample to sample
    scale_stride: int
    shift_stride: int


@lru_cache(RECIPES)
def forward_recipe(
    shape: torch.Size,
    dtype: torch.dtype,
    channels_last: bool,
    device: torch.device,
    num_groups: int,
    eps: float,
    activation: bool,
    clusters: bool,
) -> Recipe:
    """Return the recipe of the plan that the heuristic makes for x of that shape, dtype, layout and device."""
    problem, properties = problem_of(shape, num_groups, dtype), device_of(device)
    return recipe_of(plan_forward(problem, channels_last, properties, clusters), problem, properties, eps, activation)


def plan_forward(problem: Problem, channels_last: bool, device: Device, clusters: bool) -> Plan:
    """Make the heuristic's plan."""
    plans = plan_channels_last if channels_last else plan_contiguous
    return plans.plan_forward(problem, device, clusters)


def recipe_of(plan: Plan, problem: Problem, device: Device, eps: float, activation: bool) -> Recipe:
    """Turn a plan into its recipe. Raises TypeError for a plan of a backward pass."""
    if isinstance(plan, plan_contiguous.Resident):
        return _contiguous_resident(plan, problem, device, eps, activation)
    if isinstance(plan, plan_contiguous.Split):
        return _contiguous_split(plan, problem, device, eps, activation)
    if isinstance(plan, plan_channels_last.Resident):
        return _channels_last_resident(plan, problem, device, eps, activation)
    if isinstance(plan, plan_channels_last.Split):
        return _channels_last_split(plan, problem, device, eps, activation)
    raise TypeError(f"{plan} is a plan of a backward pass: give it to `backward.recipe_of`")


def has_assembly(problem: Problem, device: Device) -> bool:
    """Return True for 16-bit tiles on NVIDIA: kernels take shortcuts in PTX there (`kernels.elements`: `hold`, `PTX`).

    `hold` halves the registers. Never interpreted.
    """
    return problem.itemsize == 2 and device.nvidia and not device.interpreted


def _contiguous_resident(
    plan: plan_contiguous.Resident, problem: Problem, device: Device, eps: float, activation: bool
) -> Recipe:
    launch = launch_of(
        contiguous.resident_forward,
        ForwardOperands,
        problem.programs,
        plan.num_warps,
        plan.blocks,
        num_groups=problem.groups,
        group_channels=problem.group_channels,
        channel_segments=problem.spatial // plan.width,
        eps=eps,
        SILU=activation,
        BLOCKS=plan.blocks,
        TILES=plan.tiles,
        TILE=plan.tile,
        VECTOR=min(plan.width, problem.vector),
        WIDTH=plan.width,
        MASKED=plan.masked,
        HOLD=has_assembly(problem, device),
        PTX=has_assembly(problem, device),
        CLUSTER_SYNC=plan.blocks > 1 and not device.interpreted,
    )
    return _recipe(problem, (launch,), (problem.programs, 2, plan.blocks) if plan.blocks > 1 else None)


def _contiguous_split(
    plan: plan_contiguous.Split, problem: Problem, device: Device, eps: float, activation: bool
) -> Recipe:
    length, width, wide = problem.length, plan.width, problem.spatial >= INT32_POSITIONS
    chunks, tiles = ceil_div(length, plan.tile), ceil_div(length, plan.apply_tile)
    slots = min(power_of_two_at_least(chunks), MERGED_ELEMENTS)
    merged_once = chunks > MANY_CHUNKS
    statistics = launch_of(
        contiguous.split_statistics,
        ForwardOperands,
        problem.programs * chunks,
        plan.num_warps,
        num_groups=problem.groups,
        group_channels=problem.group_channels,
        channel_segments=problem.spatial // width,
        chunks=chunks,
        TILES=1,
        TILE=plan.tile,
        VECTOR=min(width, problem.vector),
        WIDTH=width,
        MASKED=chunks * plan.tile != length,
        HOLD=False,
        PTX=has_assembly(problem, device),
        WIDE=wide,
    )
    merge = launch_of(
        contiguous.merge_statistics,
        ForwardOperands,
        problem.programs,
        4,
        chunks=chunks,
        length=length,
        eps=eps,
        CHUNK=plan.tile,
        SLOTS=slots,
        TURNS=ceil_div(chunks, slots),
    )
    apply = launch_of(
        contiguous.split_apply,
        ForwardOperands,
        problem.programs * tiles,
        plan.apply_warps,
        num_groups=problem.groups,
        group_channels=problem.group_channels,
        channel_segments=problem.spatial // width,
        length=length,
        chunks=chunks,
        group_tiles=tiles,
        eps=eps,
        SILU=activation,
        PTX=has_assembly(problem, device),
        TILE=plan.apply_tile,
        VECTOR=min(width, problem.vector),
        WIDTH=width,
        MASKED=tiles * plan.apply_tile != length,
        CHUNK=plan.tile,
        SLOTS=slots,
        TURNS=ceil_div(chunks, slots),
        MERGE=not merged_once,
        WIDE=wide,
    )
    launches = (statistics, merge, apply) if merged_once else (statistics, apply)
    return _recipe(problem, launches, (problem.programs, chunks, 2))


def _channels_last_resident(
    plan: plan_channels_last.Resident, problem: Problem, device: Device, eps: float, activation: bool
) -> Recipe:
    programs = problem.programs // plan.groups
    launch = launch_of(
        channels_last.resident_forward,
        ForwardOperands,
        programs,
        plan.num_warps,
        plan.blocks,
        bundles=problem.groups // plan.groups,
        spatial=problem.spatial,
        eps=eps,
        SILU=activation,
        BLOCKS=plan.blocks,
        TILES=plan.tiles,
        ROWS=plan.rows,
        GROUPS=plan.groups,
        STEPS=plan.steps,
        VECTOR=plan.vector,
        MASKED=plan.masked,
        HOLD=has_assembly(problem, device),
        PTX=has_assembly(problem, device),
        CLUSTER_SYNC=plan.blocks > 1 and not device.interpreted,
    )
    return _recipe(problem, (launch,), (programs, 2, plan.blocks, plan.groups) if plan.blocks > 1 else None)


def _channels_last_split(
    plan: plan_channels_last.Split, problem: Problem, device: Device, eps: float, activation: bool
) -> Recipe:
    chunks, strips = ceil_div(problem.spatial, plan.rows), ceil_div(problem.spatial, plan.apply_rows)
    column_tiles = ceil_div(problem.channels, plan.columns)
    ragged = column_tiles * plan.columns != problem.channels
    padded = power_of_two_at_least(problem.group_channels)
    statistics = launch_of(
        channels_last.split_statistics,
        ForwardOperands,
        problem.samples * chunks * column_tiles,
        plan.num_warps,
        spatial=problem.spatial,
        row_vectors=problem.channels // plan.vector,
        strips=chunks,
        column_tiles=column_tiles,
        PTX=has_assembly(problem, device),
        **plan.tiles_at_once(plan.rows, 1),
        COLUMNS=plan.columns,
        VECTOR=plan.vector,
        MASKED=ragged or chunks * plan.rows != problem.spatial,
    )
    merge = launch_of(
        channels_last.merge_statistics,
        ForwardOperands,
        problem.programs,
        8,
        num_groups=problem.groups,
        group_channels=problem.group_channels,
        spatial=problem.spatial,
        chunks=chunks,
        eps=eps,
        ROWS=plan.rows,
        SLOTS=min(power_of_two_at_least(chunks), max(1, MERGED_ELEMENTS // padded)),
        PADDED=padded,
    )
    apply = launch_of(
        channels_last.split_apply,
        ForwardOperands,
        problem.samples * strips * column_tiles,
        plan.num_warps,
        num_groups=problem.groups,
        group_channels=problem.group_channels,
        spatial=problem.spatial,
        row_vectors=problem.channels // plan.vector,
        strips=strips,
        column_tiles=column_tiles,
        SILU=activation,
        PTX=has_assembly(problem, device),
        **plan.tiles_at_once(plan.apply_rows, 1),
        COLUMNS=plan.columns,
        VECTOR=plan.vector,
        MASKED=ragged or strips * plan.apply_rows != problem.spatial,
    )
    return _recipe(problem, (statistics, merge, apply), (problem.samples, chunks, 2, problem.channels))


def _recipe(problem: Problem, launches: tuple[Launch, ...], partials: Shape | None) -> Recipe:
    scratch = Scratch(problem.itemsize)
    parts = (None if partials is None else scratch.part(partials),)
    return Recipe(launches, scratch.elements, parts)
