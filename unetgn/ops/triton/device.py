"""Holds what the plans must know of a device, and the switch for clusters of blocks."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache

import torch
import triton

_VARIABLE = "UNETGN_TRITON_CLUSTERS"


@dataclass(frozen=True)
class Device:
    """Holds the properties that the heuristic reads."""

    multiprocessors: int
    warp_size: int = 32
    nvidia: bool = True  # inline PTX assembly is to be had
    largest_cluster: int = 1  # blocks that may share a group on chip in one launch; every cluster device grants 8
    interpreted: bool = False  # Triton's interpreter: no assembly, and a cluster is one program

    @property
    def cluster_sizes(self) -> list[int]:
        """List the numbers of blocks that a cluster may have, smallest first."""
        return [blocks for blocks in (2, 4, 8) if blocks <= self.largest_cluster]


# The interpreter plans as an H100 or H200 would, so that its tests take the paths that those take.
INTERPRETER = Device(multiprocessors=132, nvidia=False, largest_cluster=8, interpreted=True)


def device_of(device: torch.device) -> Device:
    """Return the properties of a torch device; asked once for each device."""
    if device.type != "cuda":
        return INTERPRETER
    return _cuda_device(torch.cuda.current_device() if device.index is None else device.index)


@cache
def _cuda_device(index: int) -> Device:
    if triton.knobs.runtime.interpret:
        return INTERPRETER
    properties = torch.cuda.get_device_properties(index)
    nvidia = torch.version.hip is None
    return Device(
        multiprocessors=properties.multi_processor_count,
        warp_size=32 if nvidia else properties.warp_size,
        nvidia=nvidia,
        largest_cluster=8 if nvidia and properties.major in (9, 10) else 1,
    )


def _from_environment() -> bool:
    value = os.environ.get(_VARIABLE, "0")
    if value not in ("0", "1"):
        raise ValueError(
            f"{_VARIABLE} is {value!r}: it must be 1 (use clusters where a device has them) or 0 (the default)"
        )
    return value == "1"


_default = _from_environment()
_clusters = ContextVar(_VARIABLE, default=_default)


def clusters_chosen() -> bool:
    """Return True where groups too large for one block may be held on chip by a cluster."""
    return _clusters.get()


@contextmanager
def clusters(use: bool) -> Iterator[None]:
    """Let clusters of blocks hold large groups on chip in what the `with` block runs, or not.

    Off by default, and UNETGN_TRITON_CLUSTERS=1 turns it on for a process: the kernels have been compiled for sm_90 and
    sm_100 and proven under the interpreter, but no GPU has run them with more than one block yet. Devices without
    clusters plan without them either way, and so do calls with maps, and backward passes in channels_last of more than
    16 bits an element.
    """
    token = _clusters.set(use)
    try:
        yield
    finally:
        _clusters.reset(token)
