"""Predicts the time of a launch on a GPU that is not there, from what its machine code needs. No GPU has confirmed it.

A fluid model: the programs that fit a multiprocessor share its issue slots, all multiprocessors share the memory.
Bytes are served in the order in which they are asked for. A program waits for memory once (in a loop: once a turn),
computes up to its last barrier, waits for its barriers, computes the rest and stores.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

MULTIPROCESSORS = 132
GIGAHERTZ = 1.755
ISSUED = 4 * 0.80 * GIGAHERTZ  # instructions of warps a nanosecond and multiprocessor: four slots, filled to 80 %
ONE_WARP = 0.6 * GIGAHERTZ  # of them, the most that one warp issues
SPECIAL = 0.5 * GIGAHERTZ  # of the special-function unit: exponentials, reciprocals
ONE_MULTIPROCESSOR = 70.0  # bytes a nanosecond
LATENCY = 1000.0  # ns until the first byte of a program is there
BARRIER = 45 / GIGAHERTZ  # ns
STATISTICS = 450.0  # ns in which a program with barriers waits for what follows from them, and for its affine
EXCHANGE = 1000.0  # ns in which the blocks of a cluster write to the L2 cache, wait for each other and read there
GAP = 1000.0  # ns between launches
STILL_CACHED = 22e6  # bytes of a large tensor that the second pass still finds in the L2 cache


@dataclass(frozen=True)
class Card:
    """Holds the bandwidths of a GPU in bytes a nanosecond: of a copy, and of the L2 cache."""

    copy: float
    cache: float


CARDS = {"H100": Card(3000.0, 5500.0), "H200": Card(4300.0, 6000.0)}


@dataclass(frozen=True)
class Work:
    """Holds what a launch asks of the machine. Instructions are of warps, of one program in all its turns."""

    programs: int
    num_warps: int
    resident: int  # programs that a multiprocessor holds at a time
    turns: int  # of the loop over the large tensors
    loaded: float  # bytes of memory of one program
    stored: float
    before: float  # instructions up to the last barrier
    after: float
    barriers: int
    special: float  # instructions for the special-function unit
    exchanges: int = 0  # barriers of a cluster, whose blocks are counted as programs


@dataclass
class _Share:
    """Holds equally busy multiprocessors: how many they are, and the state of one of them."""

    count: int
    waiting: int  # programs that have not begun
    running: list[list[float]] = field(default_factory=list)  # [stage, what is left of it]
    queue: list[list[float]] = field(default_factory=list)  # bytes asked for


def nanoseconds(work: Work, card: Card, step: float = 8.0) -> float:
    """Return the predicted time of a launch, without the gap before it."""
    programs, loaded, stored = work.programs * work.turns, work.loaded / work.turns, work.stored / work.turns
    slower = max(1.0, work.special / SPECIAL * ISSUED / max(work.before + work.after, 1.0))
    before, after = slower * work.before / work.turns, slower * work.after / work.turns
    barriers = (work.barriers * BARRIER + STATISTICS) / work.turns if work.barriers else 0.0
    barriers += work.exchanges * EXCHANGE
    full, rest = divmod(programs, MULTIPROCESSORS)
    shares = [_Share(rest, full + 1), _Share(MULTIPROCESSORS - rest, full)]
    shares = [share for share in shares if share.count and share.waiting]
    time, begun = 0.0, 0
    while shares:
        asking = sum(share.count for share in shares if share.queue) or 1
        rate = min(ONE_MULTIPROCESSOR, card.copy / asking)
        for share in shares:
            while share.waiting and len(share.running) < work.resident:
                share.running.append([0, LATENCY * (0.9 + 0.2 * (begun * 7919 % 97) / 97)])
                share.waiting -= 1
                begun += 1
            budget = rate * step
            while share.queue and budget > 0:
                served = min(budget, share.queue[0][1])
                share.queue[0][1] -= served
                budget -= served
                if share.queue[0][1] <= 0:
                    share.queue.pop(0)
            computing = sum(one[0] in (2, 4) for one in share.running)
            for one in share.running:
                if one[0] in (2, 4):
                    one[1] -= min(ISSUED / computing, work.num_warps * ONE_WARP) * step
                elif one[0] in (0, 3):
                    one[1] -= step
                while one[0] < 5 and one[1] <= 0:
                    one[0] += 1
                    if one[0] == 5:
                        if stored:
                            share.queue.append([5, stored])
                        break
                    one[1] = (0.0, loaded, before, barriers, after)[int(one[0])]
                    if one[0] == 1:
                        share.queue.append(one)
            share.running = [one for one in share.running if one[0] < 5]
        shares = [share for share in shares if share.waiting or share.running or share.queue]
        time += step
    return time


def at_best(size: float, which: str, card: Card) -> float:
    """Return the least time of a pass over x of so many bytes that is made of two passes over it, in ns.

    So torch.compile makes it: forward a kernel that reads x for the statistics and one that reads it again and writes
    y; backward one that reads x and dy for the sums, one for what is small, and one that reads both again and writes dx
    (each at the bandwidth of a copy, without any time for instructions): a bound, no prediction.
    """
    read = size if which == "forward" else 2 * size
    small = 0.0 if which == "forward" else GAP + LATENCY
    return LATENCY + read / card.copy + small + GAP + LATENCY + (cached(read, card) + size) / card.copy


def resident_programs(registers: int, num_warps: int, shared: int) -> int:
    """Return how many programs a multiprocessor of sm_90 holds: 64K registers, 64 warps, 32 blocks, 227 KB shared."""
    of_a_warp = math.ceil(registers * 32 / 256) * 256
    by_registers = 4 * (16384 // of_a_warp) // num_warps if of_a_warp else 32
    by_shared = 227 * 1024 // (shared + 1024)
    return max(1, min(by_registers, 64 // num_warps, 32, by_shared))


def cached(bytes_read: float, card: Card) -> float:
    """Return the bytes from memory that reading so many for the second time is worth."""
    found = min(bytes_read, STILL_CACHED)
    return bytes_read - found + found * card.copy / card.cache
