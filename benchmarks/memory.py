"""Measures the memory of a training step against batch and resolution: `python -m benchmarks.memory`.

For each grade of recomputation of ours (`UNet.set_checkpointing`), and diffusers' without and with its gradient
checkpointing, on CIFAR-10's network: the most memory that a process holds which makes two steps and nothing else, less
what a process holds before its first step (packages, weights, inputs); and the bytes kept for the backward pass.
`python -m benchmarks.tables` draws the plot. Then the page faults of a step, before and after the programs'
`keep_freed_memory`.
"""

from unetgn.programs import last_words  # noqa: F401  # the first of all: Ctrl-C and missing packages in one line

# isort: split
import argparse
import resource
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.contenders import kept_bytes, make_step
from benchmarks.fresh import call, forget_peak, held_bytes
from benchmarks.networks import NETWORKS, network_of
from benchmarks.record import add_out, head, out_path, write
from unetgn.programs.allocator import keep_freed_memory

CONTENDERS = ("diffusers", "diffusers, checkpointed", "ours", "ours, activations", "ours, blocks")
POINTS = ((1, 32), (4, 32), (8, 32), (1, 64), (1, 128))  # (batch, height and width)
PACKAGES = ("diffusers",)


def two_steps(name: str, network: str, batch: int, size: int) -> dict[str, int]:
    """Make two steps in a process of its own, and return what it held before and after them, in bytes.

    And what the forward pass keeps, and the page faults of further steps.
    """
    step = make_step(name, network_of(network).at(batch=batch, size=size), layout="contiguous", dtype=torch.float32)
    answer = {"before_bytes": forget_peak()}  # to build a network has taken more: ours is made of diffusers'
    step()
    step()
    answer |= {"held_bytes": held_bytes(), "kept_bytes": kept_bytes(step), "page_faults": page_faults(step)}
    keep_freed_memory("cpu")
    step()
    return answer | {"page_faults_when_kept": page_faults(step)}


def page_faults(step: Callable[[], object]) -> int:
    """Count the pages that a step had to ask the system for."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    step()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def measure(name: str, network: str, batch: int, size: int, threads: int) -> dict[str, Any]:
    """Return one row."""
    point: dict[str, Any] = {"network": network, "batch": batch, "size": size}
    answer = call("benchmarks.memory", "two_steps", {"name": name, **point}, threads=threads)
    figures = {key: answer[key] for key in ("kept_bytes", "before_bytes", "page_faults", "page_faults_when_kept")}
    peak = answer["held_bytes"]
    return {"contender": name, **point, **figures, "peak_bytes": peak, "step_bytes": peak - answer["before_bytes"]}


def main(given: list[str] | None = None) -> None:
    """Measure, print, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=[*NETWORKS, "tiny"], default="cifar10")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="a tiny network, one size: to see that all of it works")
    add_out(parser)
    arguments = parser.parse_args(given)
    out = out_path(parser, arguments.out, "memory")
    network, points = ("tiny", ((1, 8),)) if arguments.quick else (arguments.network, POINTS)
    torch.set_num_threads(arguments.threads)
    result = {**head("memory", packages=PACKAGES), "rows": []}
    for batch, size in points:
        for name in CONTENDERS:
            row = measure(name, network, batch, size, arguments.threads)
            result["rows"].append(row)
            print(f"{batch:3} of {size}×{size} {name:24} {row['step_bytes'] / 2**20:8.0f} MiB for the step, "
                  f"{row['kept_bytes'] / 2**20:8.0f} kept; {row['page_faults']} page faults, then "
                  f"{row['page_faults_when_kept']}", flush=True)  # fmt: skip
    write(out, result)


if __name__ == "__main__":
    main()
