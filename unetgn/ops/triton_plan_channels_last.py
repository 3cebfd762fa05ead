"""Plans for the channels_last layout, where x is (N, spatial, C) in memory."""

import math
from dataclasses import dataclass

from unetgn.ops.triton_device import Device
from unetgn.ops.triton_plan import Problem, ceil_div, power_of_two_at_least, two_waves, warps

FORWARD_RESIDENT = 20480  # elements of a group at 16 bits each; half as many at 32 bits, a quarter at 64
BACKWARD_RESIDENT = 10240  # xhat and dz stay in float32, whatever x is
MOST_VECTORS = 16  # tiles that a resident kernel unrolls
NARROWEST_LOAD = 8  # bytes: groups whose channels allow only narrower loads are split, where loads are full
SECTOR = 32  # bytes of memory that move together
COLUMNS = 64  # channels of a split tile


@dataclass(frozen=True)
class Resident:
    """`groups` neighbouring groups in each program; steps * tiles tiles [rows, groups, vector] in each of `blocks`
    blocks.
    """

    blocks: int
    tiles: int
    rows: int
    groups: int
    steps: int  # steps * vector = channels of a group
    vector: int
    masked: bool  # the last tile of a step is not full
    num_warps: int


@dataclass(frozen=True)
class Split:
    """Tiles [rows, columns] for sums, and [apply_rows, columns] for the second pass."""

    rows: int
    apply_rows: int
    columns: int
    vector: int
    num_warps: int
    apply_warps: int


def plan_forward(problem: Problem, device: Device, clusters: bool) -> Resident | Split:
    """Resident where a group fits a block and its channels allow wide loads; else cluster, if allowed; else split."""
    resident = _resident(problem, device, problem.resident_elements(FORWARD_RESIDENT), clusters)
    if resident is not None:
        return resident
    return _split(
        problem, device, largest=problem.resident_elements(8192), largest_apply=problem.resident_elements(4096)
    )


def plan_backward(problem: Problem, device: Device, clusters: bool) -> Resident | Split:
    """Resident where xhat and dz of a group fit a block in float32; else cluster, if allowed; else split."""
    limit = BACKWARD_RESIDENT if problem.itemsize < 8 else BACKWARD_RESIDENT // 4
    resident = _resident(problem, device, limit, clusters)
    if resident is not None:
        return resident
    largest = 8192 if problem.itemsize < 8 else 2048
    return _split(problem, device, largest=largest, largest_apply=largest // 2)


def _resident(problem: Problem, device: Device, limit: int, clusters: bool) -> Resident | None:
    vector = math.gcd(problem.group_channels, problem.vector)
    if vector * problem.itemsize < NARROWEST_LOAD:
        return None
    if problem.length <= limit:
        return _resident_of(problem, device, vector, limit, 1)
    if clusters:
        for blocks in (2, 4, 8):
            enough = problem.programs * blocks >= device.multiprocessors or blocks == device.largest_cluster
            fits = problem.spatial % blocks == 0 and problem.length // blocks <= limit
            if blocks <= device.largest_cluster and fits and enough:
                return _resident_of(problem, device, vector, limit, blocks)
    return None


def _resident_of(problem: Problem, device: Device, vector: int, limit: int, blocks: int) -> Resident | None:
    """The plan for that many blocks; None where a group's channels are too many to unroll."""
    steps = problem.group_channels // vector
    if steps > MOST_VECTORS:
        return None
    groups = 1
    while (
        groups * problem.group_channels * problem.itemsize < SECTOR
        and problem.groups % (2 * groups) == 0
        and 2 * groups * problem.length // blocks <= limit
    ):
        groups *= 2
    share = problem.spatial // blocks
    choices = [(tiles, power_of_two_at_least(ceil_div(share, tiles))) for tiles in range(1, MOST_VECTORS // steps + 1)]
    tiles, rows = min(choices, key=lambda choice: (choice[0] * choice[1], choice[0]))
    tiles = ceil_div(share, rows)
    return Resident(
        blocks=blocks,
        tiles=tiles,
        rows=rows,
        groups=groups,
        steps=steps,
        vector=vector,
        masked=tiles * rows != share,
        num_warps=warps(rows * groups * vector, problem, device),
    )


def _split(problem: Problem, device: Device, *, largest: int, largest_apply: int) -> Split:
    columns = min(COLUMNS, power_of_two_at_least(problem.channels))
    tile = two_waves(problem, device, smallest=1024, largest=largest)
    apply_tile = min(tile, largest_apply)
    return Split(
        rows=max(1, tile // columns),
        apply_rows=max(1, apply_tile // columns),
        columns=columns,
        vector=math.gcd(problem.channels, problem.vector),
        num_warps=min(8, warps(tile, problem, device)),
        apply_warps=min(4, warps(apply_tile, problem, device)),
    )
