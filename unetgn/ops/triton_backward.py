"""Backward: from a call to the launches that compute it."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from unetgn.ops import triton_backward_channels_last as channels_last
from unetgn.ops import triton_backward_contiguous as contiguous
from unetgn.ops import triton_plan_channels_last as plan_channels_last
from unetgn.ops import triton_plan_contiguous as plan_contiguous
from unetgn.ops.triton_backward_parameters import fold_slots, parameter_gradients
from unetgn.ops.triton_forward import MERGED_ELEMENTS, Plan
from unetgn.ops.triton_launch import Call, Launch
from unetgn.ops.triton_plan import ceil_div, power_of_two_at_least

PARAMETER_COLUMNS = 32  # channels of a program of the parameter gradients
PARAMETER_ROWS = 64  # samples that it adds at a time, at most


@dataclass(frozen=True)
class Gradients:
    """The gradients to fill; None where one is not asked for."""

    dx: Tensor | None
    dweight: Tensor | None
    dbias: Tensor | None
    dpre_bias: Tensor | None
    dscale: Tensor | None
    dshift: Tensor | None

    @property
    def of_parameters(self) -> dict[str, Tensor | None]:
        """All but dx, under the names of the kernel's arguments."""
        return {
            "dweight": self.dweight,
            "dbias": self.dbias,
            "dpre_bias": self.dpre_bias,
            "dscale": self.dscale,
            "dshift": self.dshift,
        }


@dataclass(frozen=True)
class Inputs:
    """What the forward pass kept, and the gradient that comes in."""

    dy: Tensor
    x: Tensor
    mean: Tensor
    rstd: Tensor

    @property
    def arguments(self) -> dict[str, Tensor]:
        return {"x": self.x, "dy": self.dy, "mean_in": self.mean, "rstd_in": self.rstd}


def plan_backward(call: Call) -> Plan:
    """The heuristic's plan for a call."""
    plans = plan_channels_last if call.channels_last else plan_contiguous
    return plans.plan_backward(call.problem, call.device)


def backward_launches(plan: Plan, call: Call, inputs: Inputs, gradients: Gradients) -> list[Launch]:
    """The launches that fill the gradients.

    Resident: one kernel for dx and the sums of each channel. Split: a pass for the sums, a fold into group means, a
    pass for dx. Then the gradients of parameters, where any is asked for.
    """
    problem = call.problem
    planes = 2 if gradients.dpre_bias is None else 3
    resident = isinstance(plan, plan_contiguous.Resident | plan_channels_last.Resident)
    parameters = any(gradient is not None for gradient in gradients.of_parameters.values())
    slots = _slots(plan, call)
    sums = folded = None
    if parameters or not resident:
        sums = inputs.mean.new_empty((planes, problem.samples, slots, problem.channels))
        folded = (
            sums if resident and slots == 1 else inputs.mean.new_empty((planes, problem.samples, 1, problem.channels))
        )
    means = inputs.mean.new_empty((problem.programs, 2))
    shared = {"WITH_XHAT": planes == 3, "plane": problem.samples * slots * problem.channels}

    launches = []
    if isinstance(plan, plan_contiguous.Resident):
        launches.append(_contiguous_resident(plan, call, inputs, gradients.dx, sums, means, shared))
    elif isinstance(plan, plan_channels_last.Resident):
        launches.append(_channels_last_resident(plan, call, inputs, gradients.dx, sums, means, shared))
    else:
        launches.append(_split(plan, call, inputs, {"sums": sums, **shared}, last=False))
    if sums is not None and folded is not None and folded is not sums:
        launches.append(_fold(call, sums, folded, means, slots, shared))
    if not resident and gradients.dx is not None:
        launches.append(_split(plan, call, inputs, {"dx": gradients.dx, "group_means": means}, last=True))
    if parameters and folded is not None:
        launches.append(_parameters(call, inputs, gradients, folded, means))
    return launches


def _slots(plan: Plan, call: Call) -> int:
    """How many partial sums a channel has."""
    if isinstance(plan, plan_channels_last.Resident):
        return 1
    if isinstance(plan, plan_channels_last.Split):
        return ceil_div(call.problem.spatial, plan.rows)
    return ceil_div(call.problem.spatial, plan.width)


def _contiguous_resident(
    plan: plan_contiguous.Resident,
    call: Call,
    inputs: Inputs,
    dx: Tensor | None,
    sums: Tensor | None,
    means: Tensor,
    shared: dict[str, Any],
) -> Launch:
    problem = call.problem
    arguments = {
        **inputs.arguments,
        **{"dx": dx, "sums": sums, "group_means": means, **call.affine, **call.pre, **shared},
        "num_groups": problem.groups,
        "group_channels": problem.group_channels,
        "spatial": problem.spatial,
        "segments": ceil_div(problem.spatial, plan.width),
        "SILU": call.activation,
        "TILES": plan.tiles,
        "ROWS": plan.tile // plan.width,
        "WIDTH": plan.width,
        "MASKED": plan.masked,
        "EXACT": plan.exact,
    }
    return Launch(contiguous.resident_backward, problem.programs, arguments, plan.num_warps)


def _channels_last_resident(
    plan: plan_channels_last.Resident,
    call: Call,
    inputs: Inputs,
    dx: Tensor | None,
    sums: Tensor | None,
    means: Tensor,
    shared: dict[str, Any],
) -> Launch:
    problem = call.problem
    arguments = {
        **inputs.arguments,
        **{"dx": dx, "sums": sums, "group_means": means, **call.affine, **call.pre, **shared},
        "bundles": problem.groups // plan.groups,
        "spatial": problem.spatial,
        "SILU": call.activation,
        "TILES": plan.tiles,
        "ROWS": plan.rows,
        "GROUPS": plan.groups,
        "STEPS": plan.steps,
        "VECTOR": plan.vector,
        "MASKED": plan.masked,
    }
    programs = problem.programs // plan.groups
    return Launch(channels_last.resident_backward, programs, arguments, plan.num_warps)


def _split(plan: Plan, call: Call, inputs: Inputs, outputs: dict[str, Any], *, last: bool) -> Launch:
    """The pass for the sums, or the last one, for dx, of the split path."""
    problem = call.problem
    arguments = {
        **inputs.arguments,
        **outputs,
        **call.affine,
        **call.pre,
        "num_groups": problem.groups,
        "group_channels": problem.group_channels,
        "spatial": problem.spatial,
        "SILU": call.activation,
    }
    if isinstance(plan, plan_channels_last.Split):
        rows = plan.apply_rows if last else plan.rows
        row_blocks = ceil_div(problem.spatial, rows)
        column_blocks = ceil_div(problem.channels, plan.columns)
        arguments |= {
            "channel_vectors": problem.channels // plan.vector,
            "row_blocks": row_blocks,
            "column_blocks": column_blocks,
            "ROWS": rows,
            "COLUMNS": plan.columns,
            "VECTOR": plan.vector,
            "MASKED": row_blocks * rows != problem.spatial or column_blocks * plan.columns != problem.channels,
        }
        kernel = channels_last.split_apply if last else channels_last.split_sums
        programs = problem.samples * row_blocks * column_blocks
    else:
        assert isinstance(plan, plan_contiguous.Split)
        segments = ceil_div(problem.spatial, plan.width)
        rows = (plan.apply_tile if last else plan.tile) // plan.width
        row_blocks = ceil_div(problem.channels * segments, rows)
        arguments |= {
            "segments": segments,
            "row_blocks": row_blocks,
            "ROWS": rows,
            "WIDTH": plan.width,
            "EXACT": plan.exact,
            "MASKED": not plan.exact or row_blocks * rows != problem.channels * segments,
        }
        kernel = contiguous.split_apply if last else contiguous.split_sums
        programs = problem.samples * row_blocks
    return Launch(kernel, programs, arguments, plan.apply_warps if last else plan.num_warps)


def _fold(call: Call, sums: Tensor, folded: Tensor, means: Tensor, slots: int, shared: dict[str, Any]) -> Launch:
    problem = call.problem
    columns = min(power_of_two_at_least(problem.group_channels), MERGED_ELEMENTS)
    arguments = {
        **{"sums": sums, "folded": folded, "group_means": means, **call.affine, **shared},
        "folded_plane": problem.samples * problem.channels,
        "num_groups": problem.groups,
        "group_channels": problem.group_channels,
        "spatial": problem.spatial,
        "slots": slots,
        "SLOTS": min(power_of_two_at_least(slots), MERGED_ELEMENTS // columns),
        "COLUMNS": columns,
    }
    return Launch(fold_slots, problem.programs, arguments, 4)


def _parameters(call: Call, inputs: Inputs, gradients: Gradients, folded: Tensor, means: Tensor) -> Launch:
    problem = call.problem
    arguments = {
        **{"folded": folded, "rstd_in": inputs.rstd, "group_means": means, **gradients.of_parameters},
        **{name: call.affine[name] for name in ("weight", "bias", "scale", "scale_stride")},
        "plane": problem.samples * problem.channels,
        "samples": problem.samples,
        "num_groups": problem.groups,
        "group_channels": problem.group_channels,
        "spatial": problem.spatial,
        "ROWS": min(power_of_two_at_least(problem.samples), PARAMETER_ROWS),
        "COLUMNS": PARAMETER_COLUMNS,
    }
    return Launch(parameter_gradients, ceil_div(problem.channels, PARAMETER_COLUMNS), arguments, 4)
