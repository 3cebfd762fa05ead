"""Holds the sizes of a call, and what the plans of both layouts share.

A plan is the path that a call takes, and its tile sizes. `plan_contiguous` and `plan_channels_last` make it, from the
sizes and the properties of the device. There are three paths:

    resident   a group, or a bundle of neighbouring ones, stays in the registers of one block: x is read once
    cluster    the blocks of a cluster share the group: the same forward kernel with blocks > 1, a backward kernel for
               them alone
    split      partial statistics of chunks, then a second pass over x

The figures are from an offline study: registers and spills of the compiled kernels for sm_90, and a time model that no
GPU has confirmed. Several equal tiles of which only the last is masked beat one wide masked tile, which is held in
twice the registers, masked or not.
"""

import math
from dataclasses import dataclass

import torch

from unetgn.ops.triton.device import Device

VECTOR_BYTES = 16  # the widest load of a thread
MOST_THREADS = 512  # of a block: 128 registers each
MOST_TILES = 8
SHORT = 8192  # elements of a group at 16 bits that one block finishes sooner than a second launch begins
INT32_POSITIONS = 2**31 - 2**17  # from here on positions are counted in 64 bits


@dataclass(frozen=True)
class Problem:
    """Holds the sizes of one call: x is (samples, channels, spatial) in either layout; `itemsize` in bytes."""

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
        """Scale what fits a block's registers at 16 bits an element to this element size."""
        return at_16_bits * 2 // self.itemsize


def problem_of(shape: torch.Size, num_groups: int, dtype: torch.dtype) -> Problem:
    """Return the sizes of a call on x of that shape and dtype."""
    return Problem(shape[0], shape[1], num_groups, math.prod(shape[2:]), dtype.itemsize)


def power_of_two_at_least(value: int) -> int:
    return 1 << max(0, value - 1).bit_length()


def power_of_two_divisor(value: int) -> int:
    """Return the largest power of two that divides value."""
    return value & -value


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def warps(tile: int, problem: Problem, device: Device) -> int:
    """Return the warps of a block that loads a tile with one full-width load a thread; at most MOST_THREADS threads."""
    wanted = tile // (device.warp_size * problem.vector)
    return max(1, min(wanted, MOST_THREADS // device.warp_size))


def two_waves(problem: Problem, device: Device, smallest: int, largest: int) -> int:
    """Return the elements of a split tile, a power of two between the limits.

    It is small enough for two programs a multiprocessor, where there is the work.
    """
    wanted = problem.elements // (2 * device.multiprocessors)
    return max(smallest, min(largest, power_of_two_at_least(wanted + 1) // 2))
