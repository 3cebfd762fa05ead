"""Describes the machine that units run on: a GPU; or, for a rehearsal, the CPU with Triton's interpreter."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from benchmarks.gpu.source import ROOT, source
from benchmarks.group_norm_silu.measure import Row
from benchmarks.group_norm_silu.record import commit_of, environment
from benchmarks.group_norm_silu.timing import Calls, Gpu

COMMIT_VARIABLE = "UNETGN_COMMIT"
Function = Callable[..., Any]


@dataclass(frozen=True)
class Card(Gpu):
    """Measures on a CUDA or ROCm device."""

    tiny = False

    @cached_property
    def bandwidth(self) -> float:
        """Bytes a second of a copy on the device, read and written, measured once a process."""
        return self.copy_bandwidth()

    def facts(self) -> Row:
        """Return what a reader of the figures must know of the device."""
        properties = torch.cuda.get_device_properties(self.device)
        return {
            "arch": arch(self.device),
            "multiprocessors": properties.multi_processor_count,
            "cache_bytes": self.cache_bytes(),
            "memory_bytes": properties.total_memory,
            "cuda": torch.version.cuda,
            "hip": torch.version.hip,
        }

    def compile(self, function: Function) -> Function:
        """Compile a function or module for the shapes that it will be called with."""
        torch._dynamo.reset()
        return torch.compile(function, dynamic=False)

    def step(self, step: Callable[[], Any], rounds: int = 9) -> Row:
        """Measure a whole step, warmed up: milliseconds by the clock and of the host alone, and the most memory."""
        for _ in range(3):
            step()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        wall, host = [], []
        for _ in range(rounds):
            began = time.perf_counter()
            step()
            issued = time.perf_counter()
            torch.cuda.synchronize()
            host.append(1e3 * (issued - began))
            wall.append(1e3 * (time.perf_counter() - began))
        return summary_of_steps(wall, host) | {"peak_bytes": torch.cuda.max_memory_allocated()}


@dataclass(frozen=True)
class Rehearsal:
    """Runs each call once on the CPU, at tiny sizes: to find mistakes in the units, not to measure."""

    device: torch.device
    implementation: str = "triton"
    tiny = True
    bandwidth = 1e9

    def name(self) -> str:
        return "rehearsal"

    def facts(self) -> Row:
        return {}

    def cache_bytes(self) -> int:
        return 1

    def copy_bandwidth(self) -> float:
        return self.bandwidth

    def device_us(self, calls: Calls) -> float:
        return self.host_us(calls[0])

    def host_us(self, call: Callable[[], Any]) -> float:
        began = time.perf_counter()
        call()
        return 1e6 * (time.perf_counter() - began)

    def compile(self, function: Function) -> Function:
        return function

    def step(self, step: Callable[[], Any], rounds: int = 1) -> Row:
        milliseconds = self.host_us(step) / 1e3
        return summary_of_steps([milliseconds], [milliseconds])

    def is_alive(self) -> bool:
        return True

    def empty_cache(self) -> None: ...


Place = Card | Rehearsal


def summary_of_steps(wall: list[float], host: list[float]) -> Row:
    """Return medians, and the figures that they are of."""
    raw = {"wall_ms": [round(one, 3) for one in wall], "host_ms": [round(one, 3) for one in host]}
    return {"step_ms": round(statistics.median(wall), 3), "host_step_ms": round(statistics.median(host), 3), **raw}


def arch(device: torch.device) -> str:
    """Name the target that kernels for the device are compiled for: sm_90, gfx942."""
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        return str(properties.gcnArchName).partition(":")[0]
    return f"sm_{properties.major}{properties.minor}"


def describe(machine: Place) -> Row:
    """Say where figures come from: the device, versions, the commit where it is known, and the source in any case."""
    commit = os.environ.get(COMMIT_VARIABLE) or commit_of(ROOT)
    return {**environment(machine.name(), commit or ""), "python": platform.python_version(), "source": source()} | (
        machine.facts()
    )
