"""Launch choices: from shapes and device properties to the path that a call takes and to its tile sizes.

    resident   a group, or a bundle of neighbouring ones, stays in the registers of one block: x is read once
    cluster    the same forward kernel with blocks > 1: the blocks of a cluster share the group
    split      partial sums of chunks, then a second pass over x

The figures are from an offline study (registers and spills of the compiled kernels for sm_90, and a time model that no
GPU has confirmed). Several equal tiles, only the last of them masked, beat one wide masked tile: it would be held,
masked or not, in twice the registers. This file has what both layouts share; `plan_contiguous` and
`plan_channels_last` make the plans.
"""

from dataclasses import dataclass

from unetgn.ops.triton.device import Device

VECTOR_BYTES = 16  # the widest load of a thread
MOST_THREADS = 512  # of a block: 128 registers each
MOST_TILES = 8
SHORT = 8192  # elements of a group at 16 bits that one block finishes sooner than a second launch begins
INT32_POSITIONS = 2**31 - 2**17  # from here on positions are counted in 64 bits


@dataclass(frozen=True)
class Problem:
    """The sizes of one call: x is (samples, channels, spatial) in either layout; `itemsize` in bytes."""

    samples: int
    channels: int
    groups: int
    spatial: int
    itemsize: int

    @property
    def group_channels(self) -> int:
        return self.channels // self.groups

    @property
    def length(self) -> int:
        """Elements of a group."""
        return self.group_channels * self.spatial

    @property
    def programs(self) -> int:
        """Programs of a kernel with one program a group."""
        return self.samples * self.groups

    @property
    def elements(self) -> int:
        return self.samples * self.channels * self.spatial

    @property
    def vector(self) -> int:
        """Elements of the widest load."""
        return VECTOR_BYTES // self.itemsize

    def resident_elements(self, at_16_bits: int) -> int:
        """What fits a block's registers, from what fits at 16 bits an element."""
        return at_16_bits * 2 // self.itemsize


def power_of_two_at_least(value: int) -> int:
    return 1 << max(0, value - 1).bit_length()


def power_of_two_divisor(value: int) -> int:
    """The largest power of two that divides value."""
    return value & -value


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def warps(tile: int, problem: Problem, device: Device) -> int:
    """One full-width load of each thread a tile, and at most MOST_THREADS threads."""
    wanted = tile // (device.warp_size * problem.vector)
    return max(1, min(wanted, MOST_THREADS // device.warp_size))


def two_waves(problem: Problem, device: Device, smallest: int, largest: int) -> int:
    """Elements of a split chunk (a power of two): small enough for two programs a multiprocessor, where there is the
    work.
    """
    wanted = problem.elements // (2 * device.multiprocessors)
    return max(smallest, min(largest, power_of_two_at_least(wanted + 1) // 2))
