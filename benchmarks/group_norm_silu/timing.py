"""Measures device time by CUDA events, with the queue kept full; host time apart."""

import statistics
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

ROUNDS = 15
LAUNCHES = 32  # calls between two events: the queue takes about a thousand kernels
CYCLES_A_SECOND = 2.0e9  # more than any device runs at, so that a sleep is never too short
COPIED = 2**30  # bytes
Calls = Sequence[Callable[[], Any]]
Results = deque[Any]  # of the latest calls, one for each set of inputs


class Machine(Protocol):
    """Says what the benchmark asks of the device that it measures; times are in microseconds."""

    @property
    def device(self) -> torch.device: ...
    @property
    def implementation(self) -> str: ...  # which one of ours
    def name(self) -> str: ...
    def cache_bytes(self) -> int: ...
    def copy_bandwidth(self) -> float: ...
    def device_us(self, calls: Calls) -> float: ...
    def host_us(self, call: Callable[[], Any]) -> float: ...
    def is_alive(self) -> bool: ...
    def empty_cache(self) -> None: ...


@dataclass(frozen=True)
class Gpu:
    """Measures on a CUDA or ROCm device."""

    device: torch.device
    implementation: str = "triton"

    def name(self) -> str:
        return torch.cuda.get_device_name(self.device)

    def cache_bytes(self) -> int:
        """Return the size of the L2 cache."""
        return int(torch.cuda.get_device_properties(self.device).L2_cache_size)

    def copy_bandwidth(self) -> float:
        """Return the bytes a second, read and written together, of a device-to-device copy."""
        source = torch.empty(COPIED, dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        return 2 * COPIED / (self.device_us([lambda: target.copy_(source)]) * 1e-6)

    def device_us(self, calls: Calls) -> float:
        """Return the median over rounds of the microseconds that the device needs for one call.

        A round queues LAUNCHES calls, taking `calls` in turn, behind a kernel that sleeps until all of them are queued:
        the host's time is then hidden, and the gaps between kernels are those of a busy queue.
        """
        kept: Results = deque(maxlen=len(calls))
        for _ in range(2):  # the second time, memory for all results is there
            began = time.perf_counter()
            queue(calls, kept)
            queued = time.perf_counter() - began
            torch.cuda.synchronize()
        times = []
        for _ in range(ROUNDS):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            torch.cuda._sleep(int(1.5 * queued * CYCLES_A_SECOND))
            start.record()
            queue(calls, kept)
            end.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(end) * 1e3 / LAUNCHES)
        return statistics.median(times)

    def host_us(self, call: Callable[[], Any]) -> float:
        """Return the median over rounds of the microseconds that the host needs to issue one call."""
        times = []
        for _ in range(ROUNDS):
            torch.cuda.synchronize()
            began = time.perf_counter()
            for _ in range(LAUNCHES):
                call()
            times.append((time.perf_counter() - began) * 1e6 / LAUNCHES)
        torch.cuda.synchronize()
        return statistics.median(times)

    def is_alive(self) -> bool:
        """Return False once a kernel has broken the process's context, after which every call fails."""
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            return False
        return True

    def empty_cache(self) -> None:
        torch.cuda.empty_cache()


def queue(calls: Calls, kept: Results) -> None:
    """Make LAUNCHES calls, taking `calls` in turn, and keep the latest results.

    Where each result were freed at once, the allocator would hand all calls the same memory, and what they write would
    stay in the cache: no call of a network has it so.
    """
    for index in range(LAUNCHES):
        kept.append(calls[index % len(calls)]())


def find_gpu() -> Gpu | None:
    """Return the current CUDA or ROCm device, where there is one."""
    return Gpu(torch.device("cuda", torch.cuda.current_device())) if torch.cuda.is_available() else None


def rotations(bytes_read: int, cache_bytes: int) -> int:
    """Return how many sets of inputs together exceed the L2 cache three times; at least 2, at most LAUNCHES.

    What is written comes on top: as many results are kept as there are sets (`queue`).
    """
    return max(2, min(LAUNCHES, -(-3 * cache_bytes // max(1, bytes_read))))
