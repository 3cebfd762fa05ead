"""Backward: from a call to the launches that compute it. Recipes as in `forward`."""

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from torch import Tensor

from unetgn.ops.triton import plan_channels_last, plan_contiguous
from unetgn.ops.triton.device import Device
from unetgn.ops.triton.forward import Plan
from unetgn.ops.triton.kernels import backward_channels_last as channels_last
from unetgn.ops.triton.kernels import backward_contiguous as contiguous
from unetgn.ops.triton.kernels.parameters import fold_slots, parameter_gradients
from unetgn.ops.triton.launch import RECIPES, Call, Launch, Stage
from unetgn.ops.triton.problem import Problem, ceil_div, power_of_two_at_least

FOLDED_ELEMENTS = 1024  # that a folding program holds at a time
FOLDED_ELEMENTS_64 = 512  # of 64 bits each
PARAMETER_COLUMNS = 32  # channels of a program of the parameter gradients
PARAMETER_ROWS = 64  # samples that it adds at a time, at most


class Gradients(NamedTuple):
    """The gradients to fill; None where one is not asked for."""

    dx: Tensor | None
    dweight: Tensor | None
    dbias: Tensor | None
    dpre_bias: Tensor | None
    dscale: Tensor | None
    dshift: Tensor | None


class Inputs(NamedTuple):
    """What the forward pass kept, and the gradient that comes in."""

    dy: Tensor
    x: Tensor
    mean: Tensor
    rstd: Tensor


@dataclass(frozen=True)
class BackwardRecipe:
    """The stages of a backward pass.

    Resident (no `apply`): `first` writes dx and the sums of each channel. Split: `first` writes the sums, `fold` makes
    group means of them, `apply` writes dx. `parameters` makes all other gradients.
    """

    first: Stage
    fold: Stage | None  # None where the sums have one slot
    apply: Stage | None
    parameters: Stage
    sums: tuple[int, int, int, int]  # shape: planes, samples, slots, channels
    folded: tuple[int, int, int, int]


def plan_backward(problem: Problem, layout: bool, device: Device) -> Plan:
    """The heuristic's plan; `layout` is True for channels_last."""
    plans = plan_channels_last if layout else plan_contiguous
    return plans.plan_backward(problem, device)


@lru_cache(RECIPES)
def backward_recipe(
    problem: Problem, layout: bool, device: Device, activation: bool, with_xhat: bool
) -> BackwardRecipe:
    """The recipe of the heuristic's plan."""
    return recipe_of(plan_backward(problem, layout, device), problem, activation, with_xhat)


def recipe_of(plan: Plan, problem: Problem, activation: bool, with_xhat: bool) -> BackwardRecipe:
    """The recipe of that plan; `with_xhat`: the sums have a third plane, for the gradient of pre_bias."""
    resident = isinstance(plan, plan_contiguous.Resident | plan_channels_last.Resident)
    slots = _slots(plan, problem)
    if isinstance(plan, plan_contiguous.Resident):
        first = _contiguous_resident(plan, problem, activation, with_xhat)
    elif isinstance(plan, plan_channels_last.Resident):
        first = _channels_last_resident(plan, problem, activation, with_xhat)
    else:
        first = _split(plan, problem, activation, with_xhat, last=False)
    planes = 3 if with_xhat else 2
    return BackwardRecipe(
        first=first,
        fold=None if resident and slots == 1 else _fold(problem, slots, with_xhat),
        apply=None if resident else _split(plan, problem, activation, with_xhat, last=True),
        parameters=_parameters(problem),
        sums=(planes, problem.samples, slots, problem.channels),
        folded=(planes, problem.samples, 1, problem.channels),
    )


def backward_launches(recipe: BackwardRecipe, call: Call, inputs: Inputs, gradients: Gradients) -> list[Launch]:
    """The launches that fill the gradients; those of parameters only where one is asked for."""
    dy, x, mean, rstd = inputs
    dx, dweight, dbias, dpre_bias, dscale, dshift = gradients
    weight, bias, _pre_bias, scale, shift = call.affine
    _, scale_stride, shift_stride = call.strides
    affine = (*call.affine, *call.strides)
    parameters = any(gradient is not None for gradient in gradients[1:])
    means = mean.new_empty((mean.numel(), 2))
    sums = folded = mean.new_empty(recipe.sums) if parameters or recipe.apply is not None else None

    if recipe.apply is None:
        launches = [recipe.first.launch(x, dy, dx, mean, rstd, sums, means, *affine)]
    else:
        launches = [recipe.first.launch(x, dy, mean, rstd, sums, *affine)]
    if recipe.fold is not None and sums is not None:
        folded = mean.new_empty(recipe.folded)
        small = weight, bias, scale, shift, scale_stride, shift_stride
        launches.append(recipe.fold.launch(sums, folded, means, *small))
    if recipe.apply is not None and dx is not None:
        launches.append(recipe.apply.launch(x, dy, dx, mean, rstd, means, *affine))
    if parameters:
        into = dweight, dbias, dpre_bias, dscale, dshift
        launches.append(recipe.parameters.launch(folded, rstd, means, weight, bias, scale, *into, scale_stride))
    return launches


def _slots(plan: Plan, problem: Problem) -> int:
    """How many partial sums a channel has."""
    if isinstance(plan, plan_channels_last.Resident):
        return 1
    if isinstance(plan, plan_channels_last.Split):
        return ceil_div(problem.spatial, plan.rows)
    return ceil_div(problem.spatial, plan.width)


def _contiguous_resident(plan: plan_contiguous.Resident, problem: Problem, activation: bool, with_xhat: bool) -> Stage:
    segments = ceil_div(problem.spatial, plan.width)
    plane = problem.samples * segments * problem.channels
    sizes = (
        *(plane, problem.groups, problem.group_channels, problem.spatial, segments, activation, with_xhat),
        *(plan.tiles, plan.tile // plan.width, plan.width, plan.masked, plan.exact),
    )
    return Stage(contiguous.resident_backward, problem.programs, sizes, plan.num_warps)


def _channels_last_resident(
    plan: plan_channels_last.Resident, problem: Problem, activation: bool, with_xhat: bool
) -> Stage:
    sizes = (
        *(problem.samples * problem.channels, problem.groups // plan.groups, problem.spatial, activation, with_xhat),
        *(plan.tiles, plan.rows, plan.groups, plan.steps, plan.vector, plan.masked),
    )
    return Stage(channels_last.resident_backward, problem.programs // plan.groups, sizes, plan.num_warps)


def _split(plan: Plan, problem: Problem, activation: bool, with_xhat: bool, *, last: bool) -> Stage:
    """The pass for the sums, or the last one, for dx."""
    plane = () if last else (problem.samples * _slots(plan, problem) * problem.channels,)
    flags = (activation,) if last else (activation, with_xhat)
    groups = problem.groups, problem.group_channels, problem.spatial
    if isinstance(plan, plan_channels_last.Split):
        rows = plan.apply_rows if last else plan.rows
        row_blocks = ceil_div(problem.spatial, rows)
        column_blocks = ceil_div(problem.channels, plan.columns)
        masked = row_blocks * rows != problem.spatial or column_blocks * plan.columns != problem.channels
        blocks = problem.channels // plan.vector, row_blocks, column_blocks
        sizes = (*plane, *groups, *blocks, *flags, rows, plan.columns, plan.vector, masked)
        kernel = channels_last.split_apply if last else channels_last.split_sums
        programs = problem.samples * row_blocks * column_blocks
    else:
        assert isinstance(plan, plan_contiguous.Split)
        segments = ceil_div(problem.spatial, plan.width)
        rows = (plan.apply_tile if last else plan.tile) // plan.width
        row_blocks = ceil_div(problem.channels * segments, rows)
        masked = not plan.exact or row_blocks * rows != problem.channels * segments
        sizes = (*plane, *groups, segments, row_blocks, *flags, rows, plan.width, masked, plan.exact)
        kernel = contiguous.split_apply if last else contiguous.split_sums
        programs = problem.samples * row_blocks
    return Stage(kernel, programs, sizes, plan.apply_warps if last else plan.num_warps)


def _fold(problem: Problem, slots: int, with_xhat: bool) -> Stage:
    elements = FOLDED_ELEMENTS if problem.itemsize < 8 else FOLDED_ELEMENTS_64
    columns = min(power_of_two_at_least(problem.group_channels), elements)
    planes = problem.samples * slots * problem.channels, problem.samples * problem.channels
    groups = problem.groups, problem.group_channels, problem.spatial
    tile = min(power_of_two_at_least(slots), elements // columns), columns, ceil_div(problem.group_channels, columns)
    return Stage(fold_slots, problem.programs, (*planes, *groups, slots, with_xhat, *tile), 4)


def _parameters(problem: Problem) -> Stage:
    rows = min(power_of_two_at_least(problem.samples), PARAMETER_ROWS)
    groups = problem.groups, problem.group_channels, problem.spatial
    sizes = (problem.samples * problem.channels, problem.samples, *groups, rows, PARAMETER_COLUMNS)
    return Stage(parameter_gradients, ceil_div(problem.channels, PARAMETER_COLUMNS), sizes, 4)
