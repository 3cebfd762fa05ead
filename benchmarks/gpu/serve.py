"""Finds the machine and serves the supervisor with its units: what a worker does once torch is imported."""

from __future__ import annotations

import gc

import torch

from benchmarks.gpu.machine import Card, Place, Rehearsal, describe
from benchmarks.gpu.units import units
from benchmarks.gpu.worker import Worker


def serve(worker: Worker, *, rehearse: bool) -> int:
    """Run the units that the supervisor asks for, and return the exit code."""
    machine: Place
    if rehearse:
        machine = Rehearsal(torch.device("cpu"))
        torch.set_num_threads(1)
    elif torch.cuda.is_available():
        machine = Card(torch.device("cuda", torch.cuda.current_device()))
    else:
        worker.say(
            {"refused": "No CUDA or ROCm device: device time is measured, and a CPU has none. --rehearse runs without."}
        )
        return 2
    from torch._functorch import config

    # A backward pass is repeated on one graph; a compiled one would otherwise reuse the buffers that it saved.
    config.donated_buffer = False

    def is_alive() -> bool:
        gc.collect()
        if not machine.is_alive():
            return False
        machine.empty_cache()
        return True

    worker.serve(describe(machine), list(units(machine)), is_alive)
    return 0
