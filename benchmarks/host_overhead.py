"""Measures what a call costs on the host, before any arithmetic: `python -m benchmarks.host_overhead`.

Times `unetgn.group_norm_silu` and the module `GroupNormSiLU` on small tensors, where arithmetic is next to nothing,
against `F.silu(F.group_norm(...))` and `nn.GroupNorm`, without and with gradients, in both layouts. Competitors take
turns in one run; a figure is the median over many short rounds, most of which fit between two switches of a busy
processor to another process. The spread of each figure (its lower and upper quartile) and the load average are written
beside it: use one thread (`OMP_NUM_THREADS=1`) and an otherwise idle machine where there is one.
"""

from unetgn.programs import last_words  # noqa: F401  # the first of all: Ctrl-C and missing packages in one line

# isort: split
import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

import unetgn
from benchmarks.record import add_out, head, out_path, write

SHAPE = (1, 32, 4, 4)
GROUPS = 8
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def competitors(layout: str, passes: str, device: str) -> dict[str, Callable[[], object]]:
    """Return the calls to compare.

    `passes`: "forward" without gradients, "recorded" forward for a backward pass, "both".
    """
    x = torch.randn(SHAPE, device=device).contiguous(memory_format=LAYOUTS[layout])
    dy = torch.randn_like(x)
    recorded = passes != "forward"
    x.requires_grad_(recorded)
    ours = unetgn.GroupNormSiLU(GROUPS, SHAPE[1], device=device).requires_grad_(recorded)
    theirs = torch.nn.GroupNorm(GROUPS, SHAPE[1], device=device).requires_grad_(recorded)
    calls: dict[str, Callable[[], torch.Tensor]] = {
        "function": lambda: unetgn.group_norm_silu(x, GROUPS, ours.weight, ours.bias),
        "eager_function": lambda: F.silu(F.group_norm(x, GROUPS, theirs.weight, theirs.bias)),
        "module": lambda: ours(x),
        "eager_module": lambda: F.silu(theirs(x)),
    }
    if passes != "both":
        return dict(calls)
    leaves = {name: [x, *(theirs if name.startswith("eager") else ours).parameters()] for name in calls}

    def with_backward(name: str) -> Callable[[], object]:
        return lambda: torch.autograd.grad(calls[name](), leaves[name], dy)

    return {name: with_backward(name) for name in calls}


def alternate(calls: dict[str, Callable[[], object]], rounds: int, repeats: int) -> dict[str, list[float]]:
    """Return the microseconds a call, for each round: in each round every competitor runs `repeats` times."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        for _ in range(300):
            call()
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            for _ in range(repeats):
                call()
            times[name].append((time.perf_counter() - start) / repeats * 1e6)
            if torch.cuda.is_available():
                torch.cuda.synchronize()  # the queue must not fill up and make the host wait
    return times


def measure(device: str, rounds: int, repeats: int) -> list[dict[str, object]]:
    """Measure one row for each layout, pass and pair of competitors."""
    rows: list[dict[str, object]] = []
    for layout in LAYOUTS:
        for passes in ("forward", "recorded", "both"):
            times = alternate(competitors(layout, passes, device), rounds, repeats)
            for ours in ("function", "module"):
                row: dict[str, object] = {"call": ours, "layout": layout, "passes": passes}
                figures = {"ours_us": times[ours], "eager_us": times[f"eager_{ours}"]}
                figures["extra_us"] = [a - b for a, b in zip(*figures.values(), strict=True)]
                for name, values in figures.items():
                    row[name] = round(statistics.median(values), 2)
                    row[f"{name}_quartiles"] = [round(q, 2) for q in statistics.quantiles(values, n=4)[::2]]
                rows.append(row)
    return rows


def main(given: list[str] | None = None) -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda: there the time to enqueue is taken")
    parser.add_argument("--rounds", type=int, default=2001)
    parser.add_argument("--repeats", type=int, default=3)
    add_out(parser)
    arguments = parser.parse_args(given)
    out = out_path(parser, arguments.out, "host_overhead", arguments.device)
    torch.set_num_threads(1)
    rows = measure(arguments.device, arguments.rounds, arguments.repeats)
    result = {
        **head("host_overhead", arguments.device),
        "shape": SHAPE,
        "rows": rows,
    }
    for row in rows:
        print(
            f"{row['call']:9} {row['layout']:14} {row['passes']:9} ours {row['ours_us']:7} µs  eager "
            f"{row['eager_us']:7} µs  extra {row['extra_us']:7} µs {row['extra_us_quartiles']}"
        )
    write(out, result)


if __name__ == "__main__":
    main()
