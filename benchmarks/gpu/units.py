"""Puts the units in order: the most valuable first, so that a run that is cut short has those."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from benchmarks.gpu import checks, launches, networks, prepare, rest, shortcut, speed
from benchmarks.gpu.machine import Card, Place, arch
from benchmarks.gpu.worker import Data, Unit

SECONDS = 60.0  # that may go into compiling before anything else
SECONDS_OF_A_CALL = 0.8  # the kernels of a forward and a backward pass, with one processor


def units(machine: Place) -> Iterator[Unit]:
    """List all units: is it right, how fast, host time, shortcuts, launches alone, networks, clusters (they may hang),
    the rest.

    Before them all, kernels are compiled by all processors, where that was not done elsewhere.
    """
    if isinstance(machine, Card):
        yield Unit("builds", "builds", 5.0, 120.0, partial(compiled, machine))
    yield from checks.units(machine)
    yield from speed.units(machine)
    yield from speed.host_units(machine)
    yield from shortcut.units(machine)
    yield from launches.units(machine)
    yield from networks.units(machine)
    yield from checks.odd_units(machine)
    yield from checks.cluster_units(machine)
    yield from rest.units(machine)


def compiled(machine: Card) -> Data:
    """Compile what all units need into Triton's cache; with few processors, what the first of them need."""
    import triton

    cache, target = Path(triton.knobs.cache.dir), arch(machine.device)
    if prepare.is_prepared(cache, target):
        return {"prepared": str(cache)}
    cache.mkdir(parents=True, exist_ok=True)
    jobs = os.cpu_count() or 1
    first = int(SECONDS * jobs / SECONDS_OF_A_CALL)
    return {"jobs": jobs, **prepare.prepare(cache, target, jobs, first)}
