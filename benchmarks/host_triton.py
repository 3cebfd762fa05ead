"""Measures the host's share of a call on Triton, with a pretended GPU: `python -m benchmarks.host_triton`.

Kernels are compiled for sm_90 and never run: the driver is pretended, the launch itself left out. What is left is what
Python and PyTorch spend before the driver is called: arguments, the recipe, tensors for results, Triton's way to a
launch. Times are those of the thread's own processor time; of each the fastest twentieth and the median over rounds.
"floor" is the backward pass of an autograd function in Python that saves two tensors and computes nothing.
Needs no GPU; a machine with one times more, the driver too, with `python -m benchmarks.host_overhead --device cuda`.
"""

from unetgn.programs import last_words  # noqa: F401  # the first of all: Ctrl-C and missing packages in one line

# isort: split
import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget

import unetgn
from benchmarks.host_overhead import LAYOUTS
from benchmarks.record import add_out, head, out_path, write
from unetgn.ops import dispatch
from unetgn.ops.triton import backward, entry, forward
from unetgn.ops.triton.device import Device

SHAPES: dict[tuple[int, ...], str] = {(1, 320, 8, 8): "resident", (1, 320, 64, 64): "resident forward, split backward"}
GROUPS = 32


class Driver:
    """Replaces the driver of Triton by one of an H100 that is not there."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def pretend() -> None:
    """Let CPU tensors take the way of an H100 in this process, up to the launch."""
    compiled: Any = triton.compiler.CompiledKernel
    compiled._init_handles = lambda self: None
    compiled.run = property(lambda self: lambda *arguments: None)
    initialize = compiled.__init__

    def loaded(self: Any, *arguments: Any) -> None:
        initialize(self, *arguments)
        self.function = 0

    compiled.__init__ = loaded
    triton.runtime.driver.set_active(Driver())
    device = Device(132, largest_cluster=8)
    for module in (forward, backward):
        module.device_of = lambda _: device  # type: ignore[attr-defined]
    dispatch.resolve = lambda name, x: entry


class Nothing(torch.autograd.Function):
    """Computes nothing."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.gradients = x.detach(), weight.detach(), bias.detach()
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        ctx.saved_tensors  # noqa: B018
        return ctx.gradients


def calls_of(shape: tuple[int, ...], layout: str) -> dict[str, Callable[[], object]]:
    """Return the calls to time."""
    x = torch.randn(shape, dtype=torch.bfloat16).contiguous(memory_format=LAYOUTS[layout])
    weight, bias = (torch.randn(shape[1], dtype=torch.bfloat16) for _ in range(2))
    xr, wr, br = (t.clone(memory_format=torch.preserve_format).requires_grad_() for t in (x, weight, bias))
    leaves, dy = (xr, wr, br), torch.randn_like(x)
    y, nothing = unetgn.group_norm_silu(xr, GROUPS, wr, br), Nothing.apply(*leaves)
    return {
        "inference": lambda: unetgn.group_norm_silu(x, GROUPS, weight, bias),
        "recorded": lambda: unetgn.group_norm_silu(xr, GROUPS, wr, br),
        "backward": lambda: torch.autograd.grad(y, leaves, dy, retain_graph=True),
        "floor": lambda: torch.autograd.grad(nothing, leaves, dy, retain_graph=True),
    }


def measure(shape: tuple[int, ...], layout: str, rounds: int, repeats: int) -> dict[str, Any]:
    """Measure one row: each call in turn, in every round."""
    calls = calls_of(shape, layout)
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            call()
            start = time.thread_time()
            for _ in range(repeats):
                call()
            times[name].append((time.thread_time() - start) / repeats * 1e6)
    row: dict[str, Any] = {"shape": shape, "layout": layout, "plan": SHAPES[shape]}
    for name, values in times.items():
        row[f"{name}_us"] = [round(statistics.quantiles(values, n=20)[0], 1), round(statistics.median(values), 1)]
    return row


def main(given: list[str] | None = None) -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=20)
    add_out(parser)
    arguments = parser.parse_args(given)
    out = out_path(parser, arguments.out, "host_triton")
    torch.set_num_threads(1)
    pretend()
    rows = []
    for shape in SHAPES:
        for layout in LAYOUTS:
            rows.append(measure(shape, layout, arguments.rounds, arguments.repeats))
            figures = "  ".join(f"{name} {rows[-1][f'{name}_us']}" for name in ("inference", "recorded", "backward"))
            print(f"{shape!s:17} {layout:13} {figures}  floor {rows[-1]['floor_us']} µs", flush=True)
    result = {
        **head("host_triton", packages=("triton",)),
        "rows": rows,
    }
    write(out, result)


if __name__ == "__main__":
    main()
