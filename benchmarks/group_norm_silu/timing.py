"""Device time by CUDA events, with the queue kept full and the inputs rotated beyond the L2 cache."""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

ROUNDS = 15
LAUNCHES = 32  # calls between two events, at most: the queue takes about a thousand kernels
CYCLES_A_SECOND = 2.0e9  # more than any device runs at, so that a sleep is never too short


def rotations(bytes_of_one: int, device: torch.device) -> int:
    """How many sets of inputs together exceed the L2 cache three times; the device's memory allows all of them."""
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return max(2, min(LAUNCHES, -(-3 * cache // max(1, bytes_of_one))))


def device_us(calls: Sequence[Callable[[], Any]], rounds: int = ROUNDS) -> float:
    """Median over rounds of the microseconds that the device needs for one call.

    A round queues LAUNCHES calls, taking `calls` in turn, behind a kernel that sleeps until all of them are queued: the
    host's time is then hidden, and the gaps between kernels are those of a busy queue.
    """
    for call in calls:
        call()
    torch.cuda.synchronize()
    began = time.perf_counter()
    for index in range(LAUNCHES):
        calls[index % len(calls)]()
    queued = time.perf_counter() - began
    torch.cuda.synchronize()
    times = []
    for _ in range(rounds):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(int(1.5 * queued * CYCLES_A_SECOND))
        start.record()
        for index in range(LAUNCHES):
            calls[index % len(calls)]()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / LAUNCHES)
    return statistics.median(times)


def host_us(call: Callable[[], Any], rounds: int = ROUNDS) -> float:
    """Median over rounds of the microseconds that the host needs to issue one call."""
    times = []
    for _ in range(rounds):
        torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(LAUNCHES):
            call()
        times.append((time.perf_counter() - began) * 1e6 / LAUNCHES)
    torch.cuda.synchronize()
    return statistics.median(times)


def copy_bandwidth(device: torch.device, size: int = 2**30) -> float:
    """Bytes a second, read and written together, of a device-to-device copy of `size` bytes."""
    source = torch.empty(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / (device_us([lambda: target.copy_(source)]) * 1e-6)
