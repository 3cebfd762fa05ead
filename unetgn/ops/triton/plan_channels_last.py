"""Makes plans for the channels_last layout, where x is (N, spatial, C) in memory."""

import math
from dataclasses import dataclass

from unetgn.ops.triton.device import Device
from unetgn.ops.triton.problem import (
    INT32_POSITIONS,
    MOST_THREADS,
    MOST_TILES,
    SHORT,
    VECTOR_BYTES,
    Problem,
    ceil_div,
    power_of_two_at_least,
    power_of_two_divisor,
    warps,
)

FORWARD_RESIDENT = 20480  # elements of a group at 16 bits each; half as many at 32 bits, a quarter at 64
# By bytes of an element of x: xhat and dz (scaled) stay in float32 whatever x is, x and dy wait beside them.
BACKWARD_RESIDENT = {2: 10240, 4: 8192, 8: 2560}
BACKWARD_SHARE = 8192  # of a block in a cluster, at 16 bits: with more, a build spilled
FEWEST_ROWS = 16  # of its tiles: Triton's planner of clusters splits those of 8 along another axis
FORWARD_PER_THREAD = 96  # elements that a thread may hold at 16 bits
BACKWARD_PER_THREAD = 40
BACKWARD_ROOMY = {2: 40, 4: 16, 8: 8}  # by bytes; above this many a block gets twice the warps, and narrower loads
MOST_VECTORS = 16  # tiles that a resident kernel unrolls
MOST_STEPS = 4  # of a long group in the backward pass, where groups are many
WIDEST = 64  # channels of a resident tile
NARROWEST_LOAD = 8  # bytes
SECTOR = 32  # bytes of memory that move together
COLUMNS = 64  # channels of a strip
LONGEST_STRIP = 32768  # elements
PROGRAMS = 2  # of a multiprocessor, for which strips are cut short
LOADS_AT_ONCE = 4  # of each thread, in a turn of the loop along a strip


@dataclass(frozen=True)
class Resident:
    """Holds a bundle of `groups` groups in each program, in each of `blocks` blocks.

    A block has steps * tiles tiles [rows, groups, vector].
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
class Cluster:
    """Holds a group in a backward cluster of `blocks` blocks, each of which has steps * tiles tiles [rows, vector]."""

    blocks: int
    tiles: int
    rows: int
    steps: int  # steps * vector = channels of a group
    vector: int
    num_warps: int


@dataclass(frozen=True)
class Split:
    """Takes x in strips of `rows` rows for statistics or sums, of `apply_rows` in the second pass.

    A program goes along its strip in tiles [tile_rows, columns], a few at a time.
    """

    rows: int
    apply_rows: int
    tile_rows: int
    columns: int
    vector: int
    num_warps: int

    def tiles_at_once(self, rows: int, tensors: int) -> dict[str, int]:
        """Return how a strip of that many rows is cut, where each tile is loaded of that many tensors."""
        tile_rows = min(self.tile_rows, rows)
        tiles = min(max(1, LOADS_AT_ONCE // tensors), rows // tile_rows)
        return {"ROWS": rows, "TILE_ROWS": tile_rows, "TILES": tiles}


def plan_forward(problem: Problem, device: Device, clusters: bool) -> Resident | Split:
    """Plan resident where a group fits a block and its channels allow wide loads, else cluster or split."""
    limit, per_thread = (problem.resident_elements(n) for n in (FORWARD_RESIDENT, FORWARD_PER_THREAD))
    resident = _resident(problem, device, limit, per_thread, clusters)
    if resident is not None:
        return resident
    return split(problem, device)


def plan_backward(problem: Problem, device: Device, clusters: bool) -> Resident | Cluster | Split:
    """Plan resident where xhat and dz of a group fit a block in float32, else cluster or split."""
    shrink = 1 if problem.itemsize < 8 else 4
    limit, per_thread = BACKWARD_RESIDENT[problem.itemsize], BACKWARD_PER_THREAD // shrink
    resident = _resident(problem, device, limit, per_thread, False, roomy=BACKWARD_ROOMY[problem.itemsize])
    if resident is not None and not _is_slow(resident, problem, device):
        return resident
    shared = backward_cluster(problem, device) if clusters else None
    return split(problem, device) if shared is None else shared


def backward_cluster(problem: Problem, device: Device) -> Cluster | None:
    """Plan the most blocks that hold a group, for many small ones of a multiprocessor came out ahead; None for none."""
    plans = (cluster_of(problem, device, blocks) for blocks in reversed(device.cluster_sizes))
    return next((plan for plan in plans if plan is not None), None)


def cluster_of(problem: Problem, device: Device, blocks: int) -> Cluster | None:
    """Plan that many blocks; None where they cannot share a group or a thread would hold too much.

    For 16 bits an element, whole vectors of channels and whole tiles of rows: other builds are not known to work.
    """
    whole = math.gcd(problem.group_channels, problem.vector) == problem.vector and problem.spatial % blocks == 0
    too_many = problem.length // blocks > BACKWARD_SHARE or problem.channels * problem.spatial >= INT32_POSITIONS
    if problem.itemsize > 2 or not whole or too_many:
        return None
    roomy = BACKWARD_ROOMY[problem.itemsize]
    plan = resident_of(problem, device, BACKWARD_SHARE, BACKWARD_PER_THREAD, blocks, roomy=roomy, bundled=False)
    if plan is None or plan.rows < FEWEST_ROWS or plan.masked:
        return None
    return Cluster(blocks, plan.tiles, plan.rows, plan.steps, plan.vector, plan.num_warps)


def _is_slow(plan: Resident, problem: Problem, device: Device) -> bool:
    """Return True where groups fill the device and each is long and of many steps: every step sums over rows again."""
    filled = problem.programs // plan.groups >= device.multiprocessors
    return filled and problem.length > problem.resident_elements(SHORT) and plan.steps > MOST_STEPS


def _resident(
    problem: Problem, device: Device, limit: int, per_thread: int, clusters: bool, *, roomy: int | None = None
) -> Resident | None:
    """Plan the fewest blocks that hold a group and fill the device; None where there is no such plan.

    Where the channels of a group allow no full-width loads, only short groups are planned so, or few: they gain most
    from one launch.
    """
    if problem.channels * problem.spatial >= INT32_POSITIONS:
        return None  # these kernels count the elements of a sample in 32 bits
    load = math.gcd(problem.group_channels, problem.vector) * problem.itemsize
    if problem.length <= limit:
        short = problem.length <= problem.resident_elements(SHORT) or problem.programs < device.multiprocessors
        if load >= (NARROWEST_LOAD if short else VECTOR_BYTES):
            return resident_of(problem, device, limit, per_thread, 1, roomy=roomy)
    elif clusters and load >= VECTOR_BYTES:
        for blocks in device.cluster_sizes:
            enough = problem.programs * blocks >= device.multiprocessors or blocks == device.largest_cluster
            if problem.spatial % blocks == 0 and problem.length // blocks <= limit and enough:
                return resident_of(problem, device, limit, per_thread, blocks)
    return None


def resident_of(
    problem: Problem,
    device: Device,
    limit: int,
    per_thread: int,
    blocks: int,
    *,
    roomy: int | None = None,
    bundled: bool = True,
) -> Resident | None:
    """Plan that many blocks; None where a thread would have to unroll too much or hold more than `per_thread` elements.

    Above `roomy` elements a thread, a block gets twice the warps. Narrow groups share a block, where `bundled`.
    """
    roomy = roomy or per_thread
    vector = min(power_of_two_divisor(problem.group_channels), WIDEST)
    steps = problem.group_channels // vector
    if steps > MOST_VECTORS:
        return None
    groups = 1
    while (
        bundled
        and groups * problem.group_channels * problem.itemsize < SECTOR
        and problem.groups % (2 * groups) == 0
        and 2 * groups * problem.length // blocks <= limit
    ):
        groups *= 2
    share = problem.spatial // blocks

    def waste_and_tiles(tiles: int) -> tuple[int, int]:
        return tiles * power_of_two_at_least(ceil_div(share, tiles)), abs(steps * tiles - MOST_TILES // 2)

    tiles = min(range(1, max(1, MOST_TILES // steps) + 1), key=waste_and_tiles)
    rows = power_of_two_at_least(ceil_div(share, tiles))
    tiles = ceil_div(share, rows)
    tile = rows * groups * vector
    num_warps = warps(tile, problem, device)
    if steps * tiles * tile > per_thread * num_warps * device.warp_size:
        return None
    if steps * tiles * tile > roomy * num_warps * device.warp_size and 2 * num_warps * device.warp_size <= MOST_THREADS:
        num_warps *= 2
    return Resident(
        blocks=blocks,
        tiles=tiles,
        rows=rows,
        groups=groups,
        steps=steps,
        vector=vector,
        masked=tiles * rows != share,
        num_warps=num_warps,
    )


def split(problem: Problem, device: Device) -> Split:
    """Plan strips of COLUMNS channels: long ones, as what belongs to a channel is read once a strip, but many enough.

    A tile is one full-width load of each thread.
    """
    columns = min(COLUMNS, power_of_two_at_least(problem.channels))
    num_warps = 4
    tile_rows = max(1, num_warps * device.warp_size * problem.vector // columns)
    wanted = problem.elements // (PROGRAMS * device.multiprocessors * columns)
    longest = min(LONGEST_STRIP // columns, power_of_two_at_least(problem.spatial))
    rows = max(tile_rows, min(longest, power_of_two_at_least(wanted + 1) // 2))
    return Split(
        rows=rows,
        apply_rows=rows,
        tile_rows=tile_rows,
        columns=columns,
        vector=math.gcd(problem.channels, problem.vector),
        num_warps=num_warps,
    )
