"""Forward: from a call to the launches that compute it.

A recipe is all that follows from sizes: the plan's kernels, their grids, and every argument that is no tensor. It is
made once for equal calls; `forward_launches` adds the tensors, each kernel's in the order of its arguments.
"""

from dataclasses import dataclass
from functools import lru_cache

from torch import Tensor

from unetgn.ops.triton import plan_channels_last, plan_contiguous
from unetgn.ops.triton.device import Device
from unetgn.ops.triton.kernels import forward_channels_last as channels_last
from unetgn.ops.triton.kernels import forward_contiguous as contiguous
from unetgn.ops.triton.launch import RECIPES, Call, Launch, Stage
from unetgn.ops.triton.problem import INT32_POSITIONS, Problem, ceil_div, power_of_two_at_least

Plan = plan_contiguous.Resident | plan_contiguous.Split | plan_channels_last.Resident | plan_channels_last.Split

MANY_CHUNKS = 256  # more partial statistics than this are merged once, by a kernel of their own
MERGED_ELEMENTS = 1024  # that a merging program holds at a time


@dataclass(frozen=True)
class ForwardRecipe:
    """The stages of a forward pass: `first`, on the split paths `merge` (or None) and `apply`; and the shape of the
    scratch tensor between them."""

    channels_last: bool
    first: Stage
    merge: Stage | None = None
    apply: Stage | None = None
    scratch: tuple[int, ...] | None = None


def plan_forward(problem: Problem, layout: bool, device: Device, clusters: bool) -> Plan:
    """The heuristic's plan; `layout` is True for channels_last."""
    plans = plan_channels_last if layout else plan_contiguous
    return plans.plan_forward(problem, device, clusters)


@lru_cache(RECIPES)
def forward_recipe(
    problem: Problem, layout: bool, device: Device, clusters: bool, activation: bool, eps: float
) -> ForwardRecipe:
    """The recipe of the heuristic's plan."""
    return recipe_of(plan_forward(problem, layout, device, clusters), problem, device, activation, eps)


def recipe_of(plan: Plan, problem: Problem, device: Device, activation: bool, eps: float) -> ForwardRecipe:
    """The recipe of that plan."""
    if isinstance(plan, plan_contiguous.Resident):
        return _contiguous_resident(plan, problem, device, activation, eps)
    if isinstance(plan, plan_contiguous.Split):
        return _contiguous_split(plan, problem, activation, eps)
    if isinstance(plan, plan_channels_last.Resident):
        return _channels_last_resident(plan, problem, device, activation, eps)
    return _channels_last_split(plan, problem, activation, eps)


def forward_launches(
    recipe: ForwardRecipe, call: Call, x: Tensor, y: Tensor, mean: Tensor, rstd: Tensor
) -> list[Launch]:
    """The launches that fill y like x, and mean and rstd (N, G)."""
    scratch = None if recipe.scratch is None else mean.new_empty(recipe.scratch)
    pre_bias = call.pre_bias, call.strides[0]
    if recipe.apply is None:
        return [recipe.first.launch(x, y, mean, rstd, scratch, *call.affine, *call.strides)]
    if recipe.channels_last:
        assert recipe.merge is not None
        return [
            recipe.first.launch(x, scratch),
            recipe.merge.launch(scratch, mean, rstd, *pre_bias),
            recipe.apply.launch(x, y, mean, rstd, *call.affine, *call.strides),
        ]
    launches = [recipe.first.launch(x, scratch, *pre_bias)]
    if recipe.merge is not None:
        launches.append(recipe.merge.launch(scratch, mean, rstd))
    return [*launches, recipe.apply.launch(x, y, mean, rstd, scratch, *call.affine, *call.strides)]


def _hold(problem: Problem, device: Device) -> bool:
    """The opaque identity (`kernels.elements.hold`) is for 16-bit tiles, on NVIDIA, and not for the interpreter."""
    return problem.itemsize == 2 and device.nvidia and not device.interpreted


def _contiguous_resident(
    plan: plan_contiguous.Resident, problem: Problem, device: Device, activation: bool, eps: float
) -> ForwardRecipe:
    cluster = plan.blocks > 1
    vector = min(plan.width, problem.vector)
    sizes = (
        *(problem.groups, problem.group_channels, problem.spatial // plan.width, eps, activation, plan.blocks),
        *(plan.tiles, plan.tile, vector, plan.width, plan.masked, _hold(problem, device)),
        cluster and not device.interpreted,
    )
    return ForwardRecipe(
        channels_last=False,
        first=Stage(contiguous.resident_forward, problem.programs, sizes, plan.num_warps, plan.blocks),
        scratch=(problem.programs * 2 * plan.blocks,) if cluster else None,
    )


def _contiguous_split(plan: plan_contiguous.Split, problem: Problem, activation: bool, eps: float) -> ForwardRecipe:
    chunks = ceil_div(problem.length, plan.tile)
    pieces = ceil_div(problem.length, plan.apply_tile)
    slots = min(power_of_two_at_least(chunks), MERGED_ELEMENTS)
    merge = chunks > MANY_CHUNKS
    groups = problem.groups, problem.group_channels, problem.spatial // plan.width
    vector = min(plan.width, problem.vector)
    wide = problem.spatial >= INT32_POSITIONS
    masked = chunks * plan.tile != problem.length
    statistics = (*groups, chunks, 1, plan.tile, vector, plan.width, masked, False, wide)
    masked = pieces * plan.apply_tile != problem.length
    apply = (
        *(*groups, problem.length, chunks, pieces, eps, activation, plan.apply_tile, vector, plan.width, masked),
        *(plan.tile, slots, not merge, wide),
    )
    merging = chunks, problem.length, eps, plan.tile, slots
    return ForwardRecipe(
        channels_last=False,
        first=Stage(contiguous.split_statistics, problem.programs * chunks, statistics, plan.num_warps),
        merge=Stage(contiguous.merge_statistics, problem.programs, merging, 4) if merge else None,
        apply=Stage(contiguous.split_apply, problem.programs * pieces, apply, plan.apply_warps),
        scratch=(problem.programs, chunks, 2),
    )


def _channels_last_resident(
    plan: plan_channels_last.Resident, problem: Problem, device: Device, activation: bool, eps: float
) -> ForwardRecipe:
    cluster = plan.blocks > 1
    sizes = (
        *(problem.groups // plan.groups, problem.spatial, eps, activation, plan.blocks, plan.tiles, plan.rows),
        *(plan.groups, plan.steps, plan.vector, plan.masked, _hold(problem, device)),
        cluster and not device.interpreted,
    )
    programs = problem.programs // plan.groups
    return ForwardRecipe(
        channels_last=True,
        first=Stage(channels_last.resident_forward, programs, sizes, plan.num_warps, plan.blocks),
        scratch=(problem.programs * 2 * plan.blocks,) if cluster else None,
    )


def _channels_last_split(
    plan: plan_channels_last.Split, problem: Problem, activation: bool, eps: float
) -> ForwardRecipe:
    row_blocks = ceil_div(problem.spatial, plan.rows)
    apply_blocks = ceil_div(problem.spatial, plan.apply_rows)
    column_blocks = ceil_div(problem.channels, plan.columns)
    ragged = column_blocks * plan.columns != problem.channels
    vectors = problem.channels // plan.vector
    tile = plan.columns, plan.vector
    masked = ragged or row_blocks * plan.rows != problem.spatial
    statistics = (problem.spatial, vectors, row_blocks, column_blocks, plan.rows, *tile, masked)
    padded = power_of_two_at_least(problem.group_channels)
    slots = min(power_of_two_at_least(row_blocks), max(1, MERGED_ELEMENTS // padded))
    groups = problem.groups, problem.group_channels, problem.spatial
    merge = (*groups, row_blocks, eps, plan.rows, slots, padded)
    masked = ragged or apply_blocks * plan.apply_rows != problem.spatial
    apply = (*groups, vectors, apply_blocks, column_blocks, activation, plan.apply_rows, *tile, masked)
    tiles = problem.samples * column_blocks
    return ForwardRecipe(
        channels_last=True,
        first=Stage(channels_last.split_statistics, tiles * row_blocks, statistics, plan.num_warps),
        merge=Stage(channels_last.merge_statistics, problem.programs, merge, 8),
        apply=Stage(channels_last.split_apply, tiles * apply_blocks, apply, plan.apply_warps),
        scratch=(problem.samples, row_blocks, 2, problem.channels),
    )
