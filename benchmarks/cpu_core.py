"""Compares the CPU's own core with what it replaces: `python -m benchmarks.cpu_core`.

Times forward and backward of `unetgn.group_norm_silu` against `F.silu(F.group_norm(...))`, on shapes of U-Nets, in both
layouts, without and with `pre_bias`. The two take turns in one process; figures are medians over rounds, ratios those
of medians, with the quartiles of the ratios of single rounds beside it. Two threads by default (`--threads`), on an
otherwise idle machine. Where there is none, take one: of one thread its own processor time is counted, which others
change less, and the fastest twentieth of the rounds is compared too. The load average is written with the figures.
The allocator is settled first: both sides find their memory as within a network (`settle_allocator`).
"""

from unetgn.programs import last_words  # noqa: F401  # the first of all: Ctrl-C and missing packages in one line

# isort: split
import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import unetgn
from benchmarks.host_overhead import LAYOUTS
from benchmarks.record import add_out, head, out_path, write

GROUPS = 32
SHAPES = [(128, 32, 8, 8), (128, 64, 4, 4), (8, 128, 32, 32), (8, 256, 16, 16), (1, 320, 64, 64), (2, 256, 128, 128)]


def settle_allocator() -> None:
    """Allocate and free 32 MB, as networks do in their first step.

    The largest block that was freed (32 MB at most) tells glibc how much free memory to keep. Before, it gives blocks
    of 4 MB back to the system, and chance decides which side pays for new pages: up to 3,000 faults a call.
    """
    torch.ones(8_000_000)


def competitors(
    shape: tuple[int, ...], layout: str, mean: float, *, pre_bias: bool
) -> dict[str, Callable[[], tuple[float, float]]]:
    """Return the two calls; each makes one forward and one backward pass, and returns the seconds of either."""
    x = (torch.randn(shape) + mean).contiguous(memory_format=LAYOUTS[layout]).requires_grad_()
    weight, bias = torch.randn(shape[1], requires_grad=True), torch.randn(shape[1], requires_grad=True)
    extra = torch.randn(shape[:2], requires_grad=True) if pre_bias else None
    dy = torch.randn_like(x)
    leaves = [t for t in (x, weight, bias, extra) if t is not None]

    def ours() -> Tensor:
        return unetgn.group_norm_silu(x, GROUPS, weight, bias, pre_bias=extra)

    def eager() -> Tensor:
        return F.silu(F.group_norm(x if extra is None else x + extra[..., None, None], GROUPS, weight, bias))

    clock = time.perf_counter if torch.get_num_threads() > 1 else time.thread_time

    def timed(call: Callable[[], Tensor]) -> Callable[[], tuple[float, float]]:
        def run() -> tuple[float, float]:
            start = clock()
            y = call()
            middle = clock()
            torch.autograd.grad(y, leaves, dy)
            return middle - start, clock() - middle

        return run

    return {"ours": timed(ours), "eager": timed(eager)}


def measure(shape: tuple[int, ...], layout: str, mean: float, seconds: float, *, pre_bias: bool) -> dict[str, object]:
    """Let the two take turns for so many seconds, and return one row of figures, in microseconds."""
    calls = competitors(shape, layout, mean, pre_bias=pre_bias)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    for call in [*calls.values()] * 5:
        call()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times["ours"]) < 9:
        for name, call in calls.items():
            times[name].append(call())
    totals = {name: [sum(pair) for pair in pairs] for name, pairs in times.items()}
    ratios = [a / b for a, b in zip(totals["ours"], totals["eager"], strict=True)]
    row: dict[str, object] = {"shape": shape, "layout": layout, "pre_bias": pre_bias, "mean": mean}
    row["rounds"] = len(ratios)
    row["ratio"] = round(statistics.median(totals["ours"]) / statistics.median(totals["eager"]), 3)
    fastest = {name: statistics.quantiles(values, n=20)[0] for name, values in totals.items()}
    row["ratio_of_fastest"] = round(fastest["ours"] / fastest["eager"], 3)
    row["ratio_quartiles"] = [round(q, 3) for q in statistics.quantiles(ratios, n=4)[::2]]
    for name, pairs in times.items():
        for which, values in zip(("forward", "backward"), zip(*pairs, strict=True), strict=True):
            row[f"{name}_{which}_us"] = round(statistics.median(values) * 1e6, 1)
    return row


def described(row: dict[str, object]) -> str:
    """Describe a row in a line: ours / eager."""
    forward, backward = (f"{row[f'ours_{of}_us']} / {row[f'eager_{of}_us']} µs" for of in ("forward", "backward"))
    return (
        f"{row['shape']!s:19} {row['layout']:13} {'pre_bias' if row['pre_bias'] else '':8} ratio {row['ratio']} "
        f"{row['ratio_quartiles']}, fastest {row['ratio_of_fastest']}; forward {forward}, backward {backward}"
    )


def main(given: list[str] | None = None) -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=3.0, help="for each row")
    parser.add_argument("--mean", type=float, default=0.0, help="of x, in standard deviations")
    add_out(parser)
    arguments = parser.parse_args(given)
    out = out_path(parser, arguments.out, "cpu_core")
    torch.set_num_threads(arguments.threads)
    settle_allocator()
    rows = []
    for shape in SHAPES:
        for layout in LAYOUTS:
            for pre_bias in (False, True):
                row = measure(shape, layout, arguments.mean, arguments.seconds, pre_bias=pre_bias)
                rows.append(row)
                print(described(row), flush=True)
    result = {
        **head("cpu_core"),
        "seconds_are": "passed" if arguments.threads > 1 else "of the processor",
        "groups": GROUPS,
        "rows": rows,
    }
    write(out, result)


if __name__ == "__main__":
    main()
