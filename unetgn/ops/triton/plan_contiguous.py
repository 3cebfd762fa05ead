"""Makes plans for the contiguous layout, where a group is one stretch of memory."""

from dataclasses import dataclass

from unetgn.ops.triton.device import Device
from unetgn.ops.triton.problem import (
    MOST_THREADS,
    MOST_TILES,
    SHORT,
    Problem,
    ceil_div,
    power_of_two_at_least,
    power_of_two_divisor,
    two_waves,
    warps,
)

# Elements of a group at 16 bits each; half as many at 32 bits, a quarter at 64.
FORWARD_RESIDENT = 49152  # the most that a block's registers hold
FORWARD_ALONE = 32768  # the most that a block takes where groups are too few to fill the device
FORWARD_SHARE = 20480  # of a block in a cluster: two blocks a multiprocessor overlap their loads and stores
# By bytes of an element of x: xhat and dz (scaled) stay in float32 whatever x is, x and dy wait beside them.
BACKWARD_RESIDENT = {2: 20480, 4: 16384, 8: 5120}
BACKWARD_SHARE = {2: 5120, 4: 4096, 8: 1280}  # of a block in a cluster: four a multiprocessor; in the largest, twice
CLUSTER_PER_THREAD = 40  # elements of 16 bits that a thread of a backward cluster holds, about
LONGEST_MASKED_SEGMENT = 1024
LONGEST_WHOLE_CHANNEL = 4096  # that one tile of a resident backward pass takes


@dataclass(frozen=True)
class Resident:
    """Holds a group in `tiles` tiles of `tile` elements in each of `blocks` blocks, in segments of `width` elements."""

    blocks: int
    tiles: int
    tile: int
    width: int
    exact: bool  # segments fill the channel: width divides the spatial size
    masked: bool  # the last tile is not full
    num_warps: int


@dataclass(frozen=True)
class Cluster:
    """Holds a group in each backward cluster of `blocks` blocks, each of which takes `tiles` segments of `width`."""

    blocks: int
    tiles: int
    width: int
    num_warps: int


@dataclass(frozen=True)
class Split:
    """Takes a group in tiles of `tile` elements for statistics or sums, of `apply_tile` elements in the second pass."""

    tile: int
    apply_tile: int
    width: int
    exact: bool
    num_warps: int
    apply_warps: int


def plan_forward(problem: Problem, device: Device, clusters: bool) -> Resident | Split:
    """Plan resident where a group fits a block and blocks are many or the group short, else cluster or split.

    Clusters are taken where `clusters` allows them. A group that cannot be loaded in whole vectors takes a register an
    element, and is split sooner.
    """
    width = power_of_two_divisor(problem.spatial)
    filled = problem.programs >= device.multiprocessors
    short = problem.length <= problem.resident_elements(SHORT)
    fits = problem.length <= problem.resident_elements(FORWARD_SHARE if width >= problem.vector else SHORT)
    if fits and (filled or short):
        return forward_resident(problem, device, width, 1)
    if clusters:
        for blocks in device.cluster_sizes:
            share = problem.length // blocks
            shared_width = width_in_share(problem, width, blocks)
            enough = problem.programs * blocks >= device.multiprocessors or blocks == device.largest_cluster
            if shared_width >= problem.vector and share <= problem.resident_elements(FORWARD_SHARE) and enough:
                return forward_resident(problem, device, shared_width, blocks)
    alone = FORWARD_RESIDENT if filled else FORWARD_ALONE
    if problem.length <= problem.resident_elements(alone if width >= problem.vector else SHORT):
        return forward_resident(problem, device, width, 1)
    return forward_split(problem, device, width)


def forward_resident(problem: Problem, device: Device, width: int, blocks: int) -> Resident:
    """Plan a group in equal tiles, in segments of `width` elements, a power of two that divides the spatial size."""
    share = problem.length // blocks
    tile = max(device.warp_size * problem.vector, power_of_two_at_least(ceil_div(share, MOST_TILES)))
    tiles = ceil_div(share, tile)
    return Resident(
        blocks=blocks,
        tiles=tiles,
        tile=tile,
        width=width,
        exact=True,
        masked=tiles * tile != share,
        num_warps=warps(tile, problem, device),
    )


def forward_split(problem: Problem, device: Device, width: int) -> Split:
    """Plan chunks for the statistics, smaller tiles for the second pass."""
    tile = two_waves(problem, device, smallest=1024, largest=problem.resident_elements(8192))
    apply_tile = min(tile, problem.resident_elements(4096))
    return Split(
        tile=tile,
        apply_tile=apply_tile,
        width=width,
        exact=True,
        num_warps=min(8, warps(tile, problem, device)),
        apply_warps=min(4, warps(apply_tile, problem, device)),
    )


def plan_backward(problem: Problem, device: Device, clusters: bool) -> Resident | Cluster | Split:
    """Plan resident where xhat and dz of a group fit a block in float32 and blocks overlap, else split.

    Clusters are taken where `clusters` allows them, for all but short groups: xhat and dz of a long one leave room for
    no second block on its multiprocessor.
    """
    width, exact = backward_segment(problem)
    padded = problem.group_channels * ceil_div(problem.spatial, width) * width
    if clusters and exact:
        shared = backward_cluster(problem, device, width)
        if shared is not None:
            return shared
    if padded <= BACKWARD_RESIDENT[problem.itemsize]:
        resident = backward_resident(problem, device, width, exact)
        if not _is_slow(resident, problem, device):
            return resident
    return backward_split(problem, device, width, exact)


def _is_slow(plan: Resident, problem: Problem, device: Device) -> bool:
    """Return True where blocks take turns that are alone on their multiprocessor: none loads while another computes.

    At 16 bits an element; wider ones move twice the bytes in two passes more.
    """
    alone = plan.num_warps * device.warp_size == MOST_THREADS
    return alone and problem.itemsize == 2 and problem.programs > device.multiprocessors


def backward_cluster(problem: Problem, device: Device, width: int) -> Cluster | None:
    """Plan the fewest blocks that hold a group and fill the device; None where one block does as well, or none can."""
    if problem.length <= problem.resident_elements(SHORT):
        return None
    for blocks in device.cluster_sizes:
        largest = blocks == device.largest_cluster
        limit = BACKWARD_SHARE[problem.itemsize] * (2 if largest else 1)
        if problem.length // blocks <= limit and (largest or problem.programs * blocks >= device.multiprocessors):
            return cluster_of(problem, device, width, blocks)
    return None


def cluster_of(problem: Problem, device: Device, width: int, blocks: int) -> Cluster | None:
    """Plan that many blocks, each with a few segments of one channel; None where a thread would hold too much."""
    wanted = power_of_two_at_least(ceil_div(problem.length // blocks, CLUSTER_PER_THREAD // problem.vector))
    shared = width_in_share(problem, min(width, wanted), blocks)
    tiles = problem.length // blocks // max(1, shared)
    if shared < problem.vector or tiles > MOST_TILES:
        return None
    return Cluster(blocks=blocks, tiles=tiles, width=shared, num_warps=warps(shared, problem, device))


def backward_segment(problem: Problem) -> tuple[int, bool]:
    """Return (width, exact): segments that divide the spatial size where those have whole vectors, else masked ones."""
    divisor = power_of_two_divisor(problem.spatial)
    if divisor >= problem.vector or divisor == problem.spatial:
        return divisor, True
    return min(power_of_two_at_least(problem.spatial), LONGEST_MASKED_SEGMENT), False


def backward_split(problem: Problem, device: Device, width: int, exact: bool) -> Split:
    """Plan segments of at most a tile, in tiles small enough to fill the device."""
    tile = two_waves(problem, device, smallest=1024, largest=4096 if problem.itemsize < 8 else 1024)
    num_warps = min(4, warps(tile, problem, device))
    return Split(
        tile=max(tile, width) if not exact else tile,
        apply_tile=max(tile, width) if not exact else tile,
        width=min(width, tile) if exact else width,
        exact=exact,
        num_warps=num_warps,
        apply_warps=num_warps,
    )


def backward_resident(problem: Problem, device: Device, width: int, exact: bool) -> Resident:
    """Plan a group in equal tiles of segments; of whole channels where they are short: their sums need no fold then."""
    padded = problem.group_channels * ceil_div(problem.spatial, width) * width
    tile = max(device.warp_size * problem.vector, power_of_two_at_least(ceil_div(padded, MOST_TILES)))
    if width == problem.spatial <= LONGEST_WHOLE_CHANNEL:
        tile = max(tile, width)
    if exact:
        width = min(width, tile)
    tile = max(tile, width)
    tiles = ceil_div(padded, tile)
    return Resident(
        blocks=1,
        tiles=tiles,
        tile=tile,
        width=width,
        exact=exact,
        masked=tiles * tile != padded,
        num_warps=warps(tile, problem, device),
    )


def width_in_share(problem: Problem, width: int, blocks: int) -> int:
    """Return the width of the longest segments, at most `width`, of which all blocks get equally many; 0 for none."""
    while width and problem.length // width % blocks:
        width //= 2
    return width
