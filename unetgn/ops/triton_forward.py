"""Forward: from a call to the launches that compute it."""

from torch import Tensor

from unetgn.ops import triton_forward_channels_last as channels_last
from unetgn.ops import triton_forward_contiguous as contiguous
from unetgn.ops import triton_plan_channels_last as plan_channels_last
from unetgn.ops import triton_plan_contiguous as plan_contiguous
from unetgn.ops.triton_launch import Call, Launch
from unetgn.ops.triton_plan import INT32_POSITIONS, ceil_div, power_of_two_at_least

Plan = plan_contiguous.Resident | plan_contiguous.Split | plan_channels_last.Resident | plan_channels_last.Split

MANY_CHUNKS = 256  # more partial statistics than this are merged once, by a kernel of their own
MERGED_ELEMENTS = 1024  # that a merging program holds at a time


def plan_forward(call: Call, clusters: bool) -> Plan:
    """The heuristic's plan for a call.

    Clusters never take pre_bias: Triton's planner of cluster layouts fails on some of those builds (3.7.1).
    """
    plans = plan_channels_last if call.channels_last else plan_contiguous
    return plans.plan_forward(call.problem, call.device, clusters and call.pre_bias is None)


def forward_launches(
    plan: Plan, call: Call, x: Tensor, y: Tensor, mean: Tensor, rstd: Tensor, eps: float
) -> list[Launch]:
    """The launches that fill y like x, and mean and rstd (N, G)."""
    if isinstance(plan, plan_contiguous.Resident):
        return [_contiguous_resident(plan, call, x, y, mean, rstd, eps)]
    if isinstance(plan, plan_contiguous.Split):
        return _contiguous_split(plan, call, x, y, mean, rstd, eps)
    if isinstance(plan, plan_channels_last.Resident):
        return [_channels_last_resident(plan, call, x, y, mean, rstd, eps)]
    return _channels_last_split(plan, call, x, y, mean, rstd, eps)


def _contiguous_resident(
    plan: plan_contiguous.Resident, call: Call, x: Tensor, y: Tensor, mean: Tensor, rstd: Tensor, eps: float
) -> Launch:
    problem = call.problem
    exchange = mean.new_empty(problem.programs * 2 * plan.blocks) if plan.blocks > 1 else None
    arguments = {
        **{"x": x, "y": y, "mean_out": mean, "rstd_out": rstd, "exchange": exchange, **call.affine, **call.pre},
        "num_groups": problem.groups,
        "group_channels": problem.group_channels,
        "segments": problem.spatial // plan.width,
        "eps": eps,
        "SILU": call.activation,
        "BLOCKS": plan.blocks,
        "TILES": plan.tiles,
        "TILE": plan.tile,
        "VECTOR": min(plan.width, problem.vector),
        "WIDTH": plan.width,
        "MASKED": plan.masked,
        "HOLD": call.hold,
        "CLUSTER_SYNC": plan.blocks > 1 and not call.device.interpreted,
    }
    return Launch(contiguous.resident_forward, problem.programs, arguments, plan.num_warps, plan.blocks)


def _contiguous_split(
    plan: plan_contiguous.Split, call: Call, x: Tensor, y: Tensor, mean: Tensor, rstd: Tensor, eps: float
) -> list[Launch]:
    problem = call.problem
    chunks = ceil_div(problem.length, plan.tile)
    pieces = ceil_div(problem.length, plan.apply_tile)
    partials = mean.new_empty((problem.programs, chunks, 2))
    slots = min(power_of_two_at_least(chunks), MERGED_ELEMENTS)
    merge = chunks <= MANY_CHUNKS
    shape = {
        "num_groups": problem.groups,
        "group_channels": problem.group_channels,
        "segments": problem.spatial // plan.width,
        "VECTOR": min(plan.width, problem.vector),
        "WIDTH": plan.width,
        "WIDE": problem.spatial >= INT32_POSITIONS,
    }
    statistics = {
        **{"x": x, "partials": partials, **call.pre, **shape, "chunks": chunks},
        **{"TILES": 1, "TILE": plan.tile, "MASKED": chunks * plan.tile != problem.length, "HOLD": False},
    }
    merging = {"eps": eps, "CHUNK": plan.tile, "SLOTS": slots}
    results = {"partials": partials, "mean_out": mean, "rstd_out": rstd, "chunks": chunks, "length": problem.length}
    apply = {
        **{"x": x, "y": y, **results, **call.affine, **call.pre, **shape, **merging, "pieces": pieces, "MERGE": merge},
        **{"SILU": call.activation, "TILE": plan.apply_tile, "MASKED": pieces * plan.apply_tile != problem.length},
    }
    launches = [Launch(contiguous.split_statistics, problem.programs * chunks, statistics, plan.num_warps)]
    if not merge:
        launches.append(Launch(contiguous.merge_statistics, problem.programs, {**results, **merging}, 4))
    return [*launches, Launch(contiguous.split_apply, problem.programs * pieces, apply, plan.apply_warps)]


def _channels_last_resident(
    plan: plan_channels_last.Resident, call: Call, x: Tensor, y: Tensor, mean: Tensor, rstd: Tensor, eps: float
) -> Launch:
    problem = call.problem
    exchange = mean.new_empty(problem.programs * 2 * plan.blocks) if plan.blocks > 1 else None
    arguments = {
        **{"x": x, "y": y, "mean_out": mean, "rstd_out": rstd, "exchange": exchange, **call.affine, **call.pre},
        "bundles": problem.groups // plan.groups,
        "spatial": problem.spatial,
        "eps": eps,
        "SILU": call.activation,
        "BLOCKS": plan.blocks,
        "TILES": plan.tiles,
        "ROWS": plan.rows,
        "GROUPS": plan.groups,
        "STEPS": plan.steps,
        "VECTOR": plan.vector,
        "MASKED": plan.masked,
        "HOLD": call.hold,
        "CLUSTER_SYNC": plan.blocks > 1 and not call.device.interpreted,
    }
    programs = problem.programs // plan.groups
    return Launch(channels_last.resident_forward, programs, arguments, plan.num_warps, plan.blocks)


def _channels_last_split(
    plan: plan_channels_last.Split, call: Call, x: Tensor, y: Tensor, mean: Tensor, rstd: Tensor, eps: float
) -> list[Launch]:
    problem = call.problem
    row_blocks = ceil_div(problem.spatial, plan.rows)
    apply_blocks = ceil_div(problem.spatial, plan.apply_rows)
    column_blocks = ceil_div(problem.channels, plan.columns)
    partials = mean.new_empty((problem.samples, row_blocks, 2, problem.channels))
    ragged = column_blocks * plan.columns != problem.channels
    padded = power_of_two_at_least(problem.group_channels)
    tiles = {
        "spatial": problem.spatial,
        "channel_vectors": problem.channels // plan.vector,
        "column_blocks": column_blocks,
        "COLUMNS": plan.columns,
        "VECTOR": plan.vector,
    }
    groups = {"num_groups": problem.groups, "group_channels": problem.group_channels}
    statistics = {
        **{"x": x, "partials": partials, **tiles, "row_blocks": row_blocks, "ROWS": plan.rows},
        "MASKED": ragged or row_blocks * plan.rows != problem.spatial,
    }
    merge = {
        **{"partials": partials, "mean_out": mean, "rstd_out": rstd, **call.pre, **groups, "spatial": problem.spatial},
        **{"row_blocks": row_blocks, "eps": eps, "ROWS": plan.rows, "PADDED": padded},
        "SLOTS": min(power_of_two_at_least(row_blocks), max(1, MERGED_ELEMENTS // padded)),
    }
    apply = {
        **{"x": x, "y": y, "mean_in": mean, "rstd_in": rstd, **call.affine, **call.pre, **groups, **tiles},
        **{"row_blocks": apply_blocks, "ROWS": plan.apply_rows, "SILU": call.activation},
        "MASKED": ragged or apply_blocks * plan.apply_rows != problem.spatial,
    }
    tiles_of_sample = problem.samples * column_blocks
    return [
        Launch(channels_last.split_statistics, tiles_of_sample * row_blocks, statistics, plan.num_warps),
        Launch(channels_last.merge_statistics, problem.programs, merge, 8),
        Launch(channels_last.split_apply, tiles_of_sample * apply_blocks, apply, plan.apply_warps),
    ]
