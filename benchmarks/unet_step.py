"""Measures training steps of U-Nets: `python -m benchmarks.unet_step`.

Ours, diffusers', diffusers' after `unetgn.fuse`, and MONAI's, on four networks, in both layouts, in float32 and bf16:

- time of forward and backward: contenders take turns, a ratio is that of one round, the figure their median;
- bytes kept for the backward pass: what saved-tensor hooks see, each storage once, parameters not counted;
- peak memory: of a process of its own that makes two steps (float32, contiguous);
- a step's time by parts, beside what the machine's own matrix product could do at best (float32, contiguous).

`--compiled` compares what torch.compile makes of them instead, of CIFAR-10's network by default: each takes a minute or
more to compile. Use an otherwise idle machine; the load average is written too. MONAI takes part where it is installed
(`pip install -e ".[train,peers]"`).
"""

from unetgn.programs import last_words  # noqa: F401  # the first of all: Ctrl-C and missing packages in one line

# isort: split
import argparse
import time
from typing import Any

import torch

from benchmarks.breakdown import breakdown, operations_per_second
from benchmarks.contenders import BASE, COMPARED, COMPILED, Absent, Step, kept_bytes, make_step
from benchmarks.fresh import call
from benchmarks.host_overhead import LAYOUTS
from benchmarks.networks import NETWORKS, network_of
from benchmarks.record import add_out, head, out_path, write
from benchmarks.turns import summary, take_turns, timed

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
FIRST = {"layout": "contiguous", "dtype": "float32"}  # the case that has peaks of memory and parts, too
BROKEN_DOWN = (BASE, "diffusers, fused", "ours")
COMPILED_ONES = (BASE, *(f"{name}{COMPILED}" for name in (BASE, "diffusers, fused", "ours", "MONAI")))
PACKAGES = ("diffusers", "monai")
Row = dict[str, Any]


def measure(case: dict[str, str], arguments: argparse.Namespace) -> list[Row]:
    """Measure one case: a row for each contender, with the reason in the place of figures where it is absent."""
    steps: dict[str, Step] = {}
    absent: list[Row] = []
    for name in COMPILED_ONES if arguments.compiled else COMPARED:
        try:
            steps[name] = make_step(name, network_of(case["network"]), layout=case["layout"],
                                    dtype=DTYPES[case["dtype"]], device=arguments.device)  # fmt: skip
        except Absent as reason:
            absent.append({**case, "contender": name, "absent": str(reason)})
    for step in steps.values():
        step()  # a compiler traces in the first one, and what it saves then is no memory
    kept = {name: kept_bytes(step) for name, step in steps.items()}
    wait = torch.cuda.synchronize if arguments.device == "cuda" else None
    calls = {name: timed(step, wait) for name, step in steps.items()}
    figures = summary(take_turns(calls, seconds=arguments.seconds, at_least=arguments.rounds), BASE)
    network = network_of(case["network"])
    rows: list[Row] = [{**case, "batch": network.batch, "contender": name, **figures[name]} for name in steps]
    for row in rows:
        if row["contender"] in kept:
            row["kept_bytes"] = kept[row["contender"]]
            row["kept_ratio"] = round(row["kept_bytes"] / kept[BASE], 4)
        if row["contender"] == "MONAI" and network.monai_differs:
            row["differs"] = network.monai_differs
    return rows + absent


def peak(name: str, network: str, layout: str, dtype: str) -> dict[str, int]:
    """Make two steps, in a process of its own; how much memory that takes is seen by `benchmarks.fresh`."""
    step = make_step(name, network_of(network), layout=layout, dtype=DTYPES[dtype])
    step()
    step()
    return {}


def parts_of(case: dict[str, str], rate: float) -> list[Row]:
    """Measure the parts of a step of those contenders that keep to one kernel a layer."""
    rows = []
    for name in BROKEN_DOWN:
        step = make_step(name, network_of(case["network"]), layout=case["layout"], dtype=DTYPES[case["dtype"]])
        rows.append({**case, "contender": name, "parts": breakdown(step, rate)})
    return rows


def add_peaks(rows: list[Row], case: dict[str, str], threads: int) -> None:
    """Add to the rows of a case the most memory that a process with this contender alone holds."""
    for row in rows:
        if "absent" not in row:
            answer = call("benchmarks.unet_step", "peak", {"name": row["contender"], **case}, threads=threads)
            row["peak_bytes"] = answer["peak_bytes"]


def described(row: Row) -> str:
    """Describe a row in a line."""
    what = f"{row['network']:14} {row['layout']:13} {row['dtype']:8} {row['contender']:22}"
    if "absent" in row:
        return f"{what} absent: {row['absent']}"
    kept = f", {row['kept_bytes'] / 1e6:.0f} MB kept ({row['kept_ratio']:.2f})" if "kept_bytes" in row else ""
    return f"{what} {row['seconds']:.3f} s ({row['ratio']:.3f} {row['ratio_quartiles']}){kept}"


def cases(arguments: argparse.Namespace) -> list[dict[str, str]]:
    """List the cases that are asked for."""
    return [
        {"network": network, "layout": layout, "dtype": dtype}
        for network in arguments.networks
        for dtype in arguments.dtypes
        for layout in arguments.layouts
    ]


def make_parser() -> argparse.ArgumentParser:
    """Make the parser of the options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [*NETWORKS, "tiny"]
    parser.add_argument("--networks", nargs="+", choices=names, help="default: all; with --compiled, cifar10")
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, help="default: both; with --compiled, contiguous")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, help="default: both; with --compiled, float32")
    parser.add_argument("--compiled", action="store_true", help="compare what torch.compile makes of them")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="peaks and parts are a CPU's alone")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=6.0, help="for each case")
    parser.add_argument("--rounds", type=int, default=3, help="for each case at least")
    parser.add_argument("--quick", action="store_true", help="a tiny network, a round: to see that all of it works")
    add_out(parser)
    return parser


def main(given: list[str] | None = None) -> None:
    """Measure, print, write JSON."""
    parser = make_parser()
    arguments = parser.parse_args(given)
    if arguments.quick:
        arguments.networks, arguments.seconds, arguments.rounds = arguments.networks or ["tiny"], 0.0, 1
    arguments.networks = arguments.networks or (["cifar10"] if arguments.compiled else list(NETWORKS))
    arguments.layouts = arguments.layouts or (["contiguous"] if arguments.compiled else list(LAYOUTS))
    arguments.dtypes = arguments.dtypes or (["float32"] if arguments.compiled else list(DTYPES))
    out = out_path(parser, arguments.out, "unet_step_compiled" if arguments.compiled else "unet_step", arguments.device)
    torch.set_num_threads(arguments.threads)
    result = {**head("unet_step", arguments.device, packages=PACKAGES), "rows": [], "parts": []}
    if with_parts := arguments.device == "cpu" and not arguments.compiled:
        size, seconds = (64, 0.0) if arguments.quick else (1536, 1.0)
        result["operations_per_second"] = operations_per_second(torch.float32, size=size, seconds=seconds)
    for case in cases(arguments):
        start = time.perf_counter()
        rows = measure(case, arguments)
        if with_parts and case == {"network": case["network"], **FIRST}:
            add_peaks(rows, case, arguments.threads)
            result["parts"] += parts_of(case, result["operations_per_second"])
        result["rows"] += rows
        print("\n".join(map(described, rows)), f"\n{time.perf_counter() - start:.0f} s", flush=True)
    write(out, result)


if __name__ == "__main__":
    main()
