"""Checks, measures, writes: `python -m benchmarks.group_norm_silu`. Needs a CUDA or ROCm GPU.

Exit code: 0, also where the time was up before the end (the next run goes on); 1 where a result is wrong (that case is
not timed, the others are); 2 where it cannot run; 3 where a kernel broke the device's context (the next run goes on);
4 where a case could not be checked or timed (out of memory, a hang); the next run tries it again unless it hung.
"""

from unetgn.programs import last_words  # noqa: F401  # the first of all: Ctrl-C and missing packages in one line

# isort: split
import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.group_norm_silu.cases import DTYPES, SHAPES, Shape, cases
from benchmarks.group_norm_silu.record import OtherResults, Record, commit_of, environment
from benchmarks.group_norm_silu.run import CANNOT_RUN, measure_clusters, measure_plain, measure_with_clusters
from benchmarks.group_norm_silu.timing import find_gpu
from unetgn.programs.paths import check_file, folder_to_write

RESULTS = Path(__file__).parents[1] / "results"
COMMIT_VARIABLE = "UNETGN_COMMIT"


def shape_of(text: str) -> Shape:
    """Read a shape such as 8x320x64x64: (8, 320, 64, 64)."""
    found = [shape for shape in SHAPES if "x".join(map(str, shape)) == text]
    if not found:
        known = ", ".join("x".join(map(str, shape)) for shape in SHAPES)
        raise argparse.ArgumentTypeError(f"{text} is none of the shapes: {known}")
    return found[0]


def part_of(text: str) -> tuple[int, int]:
    """Read a part such as 2/3: (2, 3)."""
    first, _, parts = text.partition("/")
    if not (first.isdigit() and parts.isdigit() and 1 <= int(first) <= int(parts)):
        raise argparse.ArgumentTypeError(f"{text} is no part; write k/n with 1 <= k <= n, such as 1/3")
    return int(first), int(parts)


def parser() -> argparse.ArgumentParser:
    """Make the parser of the options."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--quick", action="store_true", help="three shapes in bf16 instead of all")
    made.add_argument("--dtype", action="append", choices=DTYPES, help="this dtype only; may be given several times")
    made.add_argument("--shape", action="append", type=shape_of, help="this shape only; may be given several times")
    made.add_argument("--part", type=part_of, default=(1, 1), help="k/n: every n-th case from the k-th on")
    made.add_argument("--seconds", type=float, help="stop before a case that would likely not be done by then")
    made.add_argument("--clusters", action="store_true", help="then check and time clusters, in a process of their own")
    made.add_argument("--clusters-alone", action="store_true", help="check and time clusters in this process, no more")
    made.add_argument("--commit", help=f"of the code, where git cannot tell; or the variable {COMMIT_VARIABLE}")
    made.add_argument(
        "--output", type=folder_to_write, default=RESULTS, help="folder for the JSON (benchmarks/results)"
    )
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, and return the exit code. `arguments`: the command line's where None."""
    began = time.monotonic()
    given = sys.argv[1:] if arguments is None else list(arguments)
    options = parser().parse_args(given)
    commit = options.commit or os.environ.get(COMMIT_VARIABLE) or commit_of(RESULTS.parent)
    if not commit:
        return _refusal(f"git knows no commit here, and results name theirs: give --commit or set {COMMIT_VARIABLE}")
    machine = find_gpu()
    if machine is None:
        return _refusal("No CUDA or ROCm device: this benchmark measures device time, and a CPU has none.")
    found = environment(machine.name(), commit)
    suffix = "" if options.part == (1, 1) else "_part{}of{}".format(*options.part)
    path = options.output / f"group_norm_silu_{found['device'].lower().replace(' ', '_')}{suffix}.json"
    try:
        check_file(path)
        record = Record.open(path, found)
    except OtherResults as error:
        return _refusal(str(error))
    except OSError as error:
        return _refusal(f"--output: {error}")
    todo = cases(
        quick=options.quick, dtypes=options.dtype or tuple(DTYPES), shapes=options.shape or SHAPES, part=options.part
    )
    deadline = None if options.seconds is None else began + options.seconds
    if options.clusters_alone:
        return measure_clusters(todo, record, machine, deadline)
    if options.clusters:
        return measure_with_clusters(todo, record, machine, deadline, given)
    return measure_plain(todo, record, machine, deadline)


def _refusal(reason: str) -> int:
    print(reason, file=sys.stderr)
    return CANNOT_RUN


if __name__ == "__main__":
    sys.exit(main())
