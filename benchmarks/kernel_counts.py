"""Counts what the compiler made of each kernel, for sm_90, without a GPU: `python -m benchmarks.kernel_counts`.

Compiles the launches of the benchmark's cases (bf16, both layouts) and reads from their machine code: instructions an
element, registers, spills. A loop counts as often as it turns. `kernel_model` predicts times from them, and bounds
those of torch.compile's kernels. Writes `results/kernel_counts.json`, with the plans, and with what clusters of blocks
change of them, and prints it as a table. `--shape 8x320x64x64` prints the launches of some shapes only and writes
nothing, and so do `--clusters` and `--shortcut`; the latter prints the backward pass with a shortcut's gradient, added
to dx in the kernel that writes it, and by a kernel of its own. All times in it are predicted, none is measured.
"""

from __future__ import annotations

from unetgn.programs import last_words  # noqa: F401  # the first of all: Ctrl-C and missing packages in one line

# isort: split
import argparse
import json
import math
import re
import subprocess
import tempfile
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import triton

from benchmarks.gpu import paths
from benchmarks.gpu.builds import Build, of_case
from benchmarks.gpu.checks import name_of
from benchmarks.gpu.prepare import believed, target_of
from benchmarks.group_norm_silu.cases import LAYOUTS, SHAPES, Case
from benchmarks.kernel_model import (
    CARDS,
    GAP,
    LATENCY,
    MULTIPROCESSORS,
    Card,
    Work,
    at_best,
    cached,
    nanoseconds,
    resident_programs,
)
from benchmarks.result_file import result_file
from unetgn.ops.triton import backward, forward
from unetgn.ops.triton.device import Device
from unetgn.ops.triton.problem import ceil_div

RESULTS = Path(__file__).parent / "results" / "kernel_counts.json"
DEVICE = Device(MULTIPROCESSORS, largest_cluster=8)
TOOL = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
LARGE = {"x": "read", "dy": "read", "y": "written", "dx": "written"}
CLUSTERS = " clusters"  # behind the name of a case
Row = dict[str, Any]

_INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]+)(.*)", re.MULTILINE)


def turns(arguments: dict[str, Any]) -> tuple[int, ...]:
    """Return how often the loops of a launch turn, inner ones first, from its arguments."""
    if "TILE_ROWS" in arguments:
        return (arguments["ROWS"] // (arguments["TILES"] * arguments["TILE_ROWS"]),)
    for many, at_once in (("slots", "SLOTS"), ("chunks", "SLOTS"), ("samples", "SAMPLES")):
        if {many, at_once} <= arguments.keys() and arguments.get("MERGE", True):
            return (ceil_div(arguments[many], arguments[at_once]), arguments.get("COLUMN_TILES", 1))
    return ()


def instructions(code: str, loops: tuple[int, ...]) -> list[tuple[str, int]]:
    """List the instructions of a thread in order, each with how often it is carried out.

    What stands behind the exit are slow paths for rare numbers. A branch back is a loop; one around another turns as
    often as the second of `loops`, the inner ones as often as the first.
    """
    found = [(int(place, 16), operation, rest) for place, operation, rest in _INSTRUCTION.findall(code)]
    exits = [place for place, operation, _ in found if operation == "EXIT"]
    found = [one for one in found if one[0] <= max(exits)]
    back = []
    for place, operation, rest in found:
        target = re.search(r"0x([0-9a-f]+)", rest) if operation.startswith("BRA") else None
        if target and int(target[1], 16) < place:
            back.append((int(target[1], 16), place))
    counted = []
    for place, operation, _ in found:
        times, around = 1, sorted((end - begin for begin, end in back if begin <= place <= end))
        for depth in range(len(around)):
            times *= loops[min(depth, len(loops) - 1)] if loops else 1
        counted.append((operation, times))
    return counted


def count(kernel: Any, arguments: dict[str, Any], programs: int) -> Row:
    """Read a compiled kernel: what one of its programs takes."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        code, usage = (
            subprocess.run([TOOL, flag, file.name], capture_output=True, text=True, check=True).stdout
            for flag in ("-sass", "-res-usage")
        )
    loops = turns(arguments)
    counted = instructions(code, loops)
    total = sum(times for _, times in counted)
    last_barrier = max((place for place, (name, _) in enumerate(counted) if name.startswith("BAR")), default=-1)
    before = sum(times for _, times in counted[: last_barrier + 1]) if last_barrier >= 0 else total
    registers, stack = (re.search(rf"{word}:(\d+)", usage) for word in ("REG", "STACK"))
    assert registers is not None, usage
    assert stack is not None, usage
    num_warps = kernel.metadata.num_warps
    row = {
        "kernel": kernel.metadata.name,
        "pass": "forward" if {"y", "partials"} & arguments.keys() and "dy" not in arguments else "backward",
        "programs": programs,
        "num_warps": num_warps,
        "registers": int(registers[1]),
        "spills": int(stack[1]),
        "resident": resident_programs(int(registers[1]), num_warps, kernel.metadata.shared),
        "turns": loops[0] if "TILE_ROWS" in arguments else 1,
        "before": before,
        "after": total - before,
        "barriers": sum(times for name, times in counted if name.startswith("BAR")),
        "exchanges": sum(times for name, times in counted if name.startswith("UCGABAR_WAIT")),
        "shuffles": sum(times for name, times in counted if name.startswith("SHFL")),
        "special": sum(times for name, times in counted if name.startswith("MUFU")),
        "loads": _widths(counted, "LDG"),
        "stores": _widths(counted, "STG"),
    }
    shortcut = arguments.get("dshortcut")
    if shortcut is not None:
        row["read_anew"] = shortcut.nbytes
    for word in ("read", "written"):
        large = [arguments.get(name) for name, kind in LARGE.items() if kind == word]
        row[word] = sum(tensor.nbytes for tensor in large if tensor is not None)
    return row


def _widths(counted: Iterable[tuple[str, int]], kind: str) -> dict[str, int]:
    found: dict[str, int] = {}
    for name, times in counted:
        if name.startswith(kind):
            width = re.search(r"\.[US]?(8|16|64|128)\b", name)
            bits = width[1] if width else "32"
            found[bits] = found.get(bits, 0) + times
    return found


def launches(build: Build) -> list[Row]:
    """Compile the launches of a forward and a backward pass and count them."""
    found: list[Row] = []

    def compiled(recipe: Any, *given: Any) -> None:
        operands = recipe.operands(*given)
        for launch in recipe.launches:
            values = launch.values(operands)
            kernel = launch.kernel.warmup(*values, grid=(launch.programs,), **launch.options)
            arguments = dict(zip(launch.kernel.arg_names, values, strict=True))
            blocks = launch.options.get("num_ctas", 1)
            found.append(count(kernel, arguments, launch.programs * blocks) | {"blocks": blocks})

    active = triton.runtime.driver._active
    triton.runtime.driver.set_active(believed(target_of("sm_90")))
    try:
        with paths.instead_of_running(compiled):
            build.run(DEVICE)
    finally:
        triton.runtime.driver._active = active
    elements = math.prod(build.shape)
    for row in found:
        threads = row["programs"] * row["num_warps"] * 32
        row["instructions"] = round((row["before"] + row["after"]) * threads / elements, 2)
    return found


def predict(rows: list[Row], card: Card) -> float:
    """Return the predicted microseconds of the launches of one pass, in order."""
    total, again = 0.0, False
    for row in rows:
        loaded = (cached(row["read"], card) if again else row["read"]) + row.get("read_anew", 0)
        again = again or row["read"] > 0
        total += GAP if total else 0.0
        total += nanoseconds(work_of(row, loaded), card)
    return total / 1000


def work_of(row: Row, loaded: float) -> Work:
    """Return what the model must know of a launch that loads so many bytes from memory."""
    warps = row["num_warps"]
    return Work(
        programs=row["programs"],
        num_warps=warps,
        resident=row["resident"],
        turns=row["turns"],
        loaded=loaded / row["programs"],
        stored=row["written"] / row["programs"],
        before=row["before"] * warps,
        after=row["after"] * warps,
        barriers=row["barriers"],
        special=row["special"] * warps,
        exchanges=row["exchanges"],
    )


def table(case: Case, *, predicted: bool = True, clusters: bool = False) -> list[Row]:
    """Count both passes of a case, and predict their times where that is wanted (it takes longer)."""
    found = launches(replace(of_case(case), clusters=clusters))
    size, last = case.elements * case.itemsize, case.layout == "channels_last"
    plans = {
        "forward": forward.plan_forward(paths.problem(case), last, DEVICE, clusters),
        "backward": backward.plan_backward(paths.problem(case), last, DEVICE, clusters),
    }
    rows = []
    for which, plan in plans.items():
        own = [row for row in found if row["pass"] == which]
        least = case.bytes_moved(which, clusters=any(row["blocks"] > 1 for row in own))
        times = {name: predict(own, card) for name, card in CARDS.items()} if predicted else {}
        said = {
            name: {
                "us": round(us, 1),
                "share_of_copy": round(least / CARDS[name].copy / us / 1000, 3),
                "compiled_at_best_us": round(at_best(size, which, CARDS[name]) / 1000, 1),
            }
            for name, us in times.items()
        }
        name = f"{name_of(case)}{CLUSTERS}" if clusters else name_of(case)
        rows.append(
            {"case": name, "pass": which, "plan": str(plan), "bytes": least, "predicted": said, "launches": own}
        )
    return rows


def shortcut_line(case: Case) -> str:
    """Predict the backward pass with a shortcut's gradient in both ways; autograd's kernel is a copy of 3 tensors."""
    build, tensor = of_case(case), case.elements * case.itemsize
    plain, within = (
        [row for row in launches(one) if row["pass"] == "backward"] for one in (build, replace(build, shortcut=True))
    )
    words = []
    for name, card in CARDS.items():
        apart = predict(plain, card) + (GAP + LATENCY + 3 * tensor / card.copy) / 1000
        together = predict(within, card)
        words.append(f"{name} {together:.1f} us in the kernel, {apart:.1f} apart ({together / apart:.2f})")
    spills = max(row["spills"] for row in within)
    return f"{name_of(case)}: predicted {', '.join(words)}; {spills} B of spills"


def with_clusters(case: Case) -> list[Row]:
    """List the passes that clusters change, as they are with them."""
    return [row for row in table(case, clusters=True) if any(one["blocks"] > 1 for one in row["launches"])]


def lines(rows: Iterable[Row]) -> Iterable[str]:
    """Write rows as lines for a reader."""
    for row in rows:
        words = [
            f"{card} {of['us']} us ({of['share_of_copy']:.0%} of copy; compiled at best {of['compiled_at_best_us']})"
            for card, of in row["predicted"].items()
        ]
        yield f"{row['case']} {row['pass']}: predicted {', '.join(words)}"
        yield f"    {row['plan']}"
        for one in row["launches"]:
            yield (
                f"    {one['kernel']:20s} {one['instructions']:6.2f} instructions an element, {one['registers']:3d} "
                f"registers, {one['spills']} B of spills; {one['programs']} programs of {one['num_warps']} warps"
                f"{', ' + str(one['blocks']) + ' in a cluster' if one['blocks'] > 1 else ''}, "
                f"{one['resident']} at a time, {one['turns']} turns, {one['barriers']} barriers, {one['shuffles']} "
                f"shuffles; loads {one['loads']}"
            )


def main(arguments: list[str] | None = None) -> None:
    """Count, print, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", action="append", help="such as 8x320x64x64: print the launches of this shape alone")
    parser.add_argument("--layout", choices=LAYOUTS)
    parser.add_argument("--shortcut", action="store_true", help="the backward pass with a shortcut's gradient")
    parser.add_argument("--clusters", action="store_true", help="print what clusters of blocks change; write nothing")
    given = parser.parse_args(arguments)
    part = given.shape or given.layout or given.shortcut or given.clusters
    out = None if part else result_file(parser, None, RESULTS.name)
    shapes = [tuple(map(int, shape.split("x"))) for shape in given.shape or ()] or SHAPES
    layouts = [given.layout] if given.layout else list(LAYOUTS)
    found = []
    for shape in shapes:
        for layout in layouts:
            case = Case(shape, "bfloat16", layout)  # type: ignore[arg-type]
            if given.shortcut:
                print(shortcut_line(case), flush=True)
                continue
            clustered = with_clusters(case) if given.clusters or out is not None else []
            changed = {row["pass"] for row in clustered}
            rows = [] if given.clusters and not changed else table(case)
            rows = [row for row in rows if not given.clusters or row["pass"] in changed] + clustered
            for line in lines(rows):
                print(line, flush=True)
            found += rows
    if out is not None:
        out.write_text(json.dumps({"triton": triton.__version__, "target": "sm_90", "rows": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
