"""Tells all that a GPU can tell about this library in a few minutes.

    python -m benchmarks.gpu --out DIR --seconds 450

Needs torch and Triton; what compares with diffusers is left out where that is not installed. Each unit is one line of
JSON in DIR/units.jsonl, the most valuable units first. The same command again goes on with the units that are missing.

`python -m benchmarks.gpu prepare --out CACHE --arch sm_90`, on any machine, compiles the kernels beforehand: give the
folder to the run as `--cache CACHE`, with the same versions of Triton and Python. `--rehearse` runs every unit at a
tiny size on the CPU, to find mistakes.

Exit code: 0, also where the time was up before the end; 1 where a result is wrong or a unit failed; 2 where it cannot
run here.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu.journal import FAILED
from benchmarks.gpu.summary import summary
from benchmarks.gpu.supervisor import Refused, Supervisor

FOR_THE_SUMMARY = 4.0  # seconds
REHEARSAL = {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}


def path_of(text: str) -> Path:
    """Return the path that a user wrote: ~ is the home folder."""
    return Path(os.path.expanduser(text))


def part_of(text: str) -> tuple[int, int]:
    """Read a part such as 2/3: (2, 3)."""
    k, _, n = text.partition("/")
    return int(k), int(n)


def parser() -> argparse.ArgumentParser:
    """Make the parser of the options."""
    made = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--out", type=path_of, help="folder of the results; new, or of an earlier run")
    made.add_argument("--seconds", type=float, default=450.0, help="the run ends before so many have passed (450)")
    made.add_argument("--cache", type=path_of, help="folder of kernels that `prepare` made")
    made.add_argument("--only", action="append", default=[], metavar="KIND", help="units of this kind only: check, …")
    made.add_argument("--again", action="store_true", help="run once more what has failed in an earlier run")
    made.add_argument("--commit", help="of the code, where git cannot tell; or the variable UNETGN_COMMIT")
    made.add_argument("--rehearse", action="store_true", help="tiny sizes on the CPU, under Triton's interpreter")
    commands = made.add_subparsers(dest="command")
    beforehand = commands.add_parser("prepare", help="compile the kernels beforehand")
    beforehand.add_argument("--out", type=path_of, required=True, help="folder of the kernels")
    beforehand.add_argument("--arch", default="sm_90", help="sm_90 (H100, H200; the default), sm_80, sm_100, gfx942, …")
    beforehand.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes (as many as processors)")
    beforehand.add_argument("--first", type=int, help="the first so many calls of the list only")
    beforehand.add_argument("--part", type=part_of, help=argparse.SUPPRESS)
    worker = commands.add_parser("worker")  # what the supervisor starts
    worker.add_argument("--rehearse", action="store_true")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, and return the exit code. `arguments`: the command line's where None."""
    began = time.monotonic()
    options = parser().parse_args(arguments)
    if options.command == "worker":
        return work(rehearse=options.rehearse)
    if options.command == "prepare":
        return prepare_cache(options)
    if options.out is None:
        return refuse("--out is missing: the folder that results are written to")
    if wrong := make_folder(options.out):
        return refuse(wrong)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as `timeout` sends it: end as after Ctrl-C
    command = [sys.executable, "-m", "benchmarks.gpu", "worker", *["--rehearse"][: options.rehearse]]
    deadline = began + options.seconds - FOR_THE_SUMMARY
    supervisor = Supervisor(
        command, options.out, deadline, variables(options), again=options.again, only=options.only, began=began
    )
    try:
        started = supervisor.run()
    except Refused as error:
        return refuse(str(error))
    except KeyboardInterrupt:
        print("interrupted; the same command goes on", file=sys.stderr)
        started = True
    print(summary(options.out))
    if not started:
        return refuse(f"no worker could be started; see {options.out / 'worker.log'}")
    latest = supervisor.journal.latest().values() if supervisor.journal else ()
    return int(any(one["status"] in ("wrong", *FAILED) for one in latest))


def variables(options: argparse.Namespace) -> dict[str, str]:
    """Return the environment of the workers."""
    found = {**os.environ, "PYTHONUNBUFFERED": "1"}
    if options.commit:
        found["UNETGN_COMMIT"] = options.commit
    if options.cache:
        from benchmarks.gpu.prepare import settle

        settle(options.cache)
        found["TRITON_CACHE_DIR"] = str(options.cache.absolute())
    return {**found, **REHEARSAL} if options.rehearse else found


def work(*, rehearse: bool) -> int:
    """Run the units of this machine for the supervisor."""
    from benchmarks.gpu.worker import Worker

    worker = Worker()
    try:
        from benchmarks.gpu.serve import serve
    except ImportError as error:
        worker.say({"refused": f"{error}; this needs torch and triton"})
        return 2
    return serve(worker, rehearse=rehearse)


def prepare_cache(options: argparse.Namespace) -> int:
    """Compile beforehand, in as many processes as asked for or in this one."""
    import json

    from benchmarks.gpu import prepare

    if options.part is not None:
        found: dict[str, Any] = prepare.compile_part(options.arch, options.part, options.first)
        print(json.dumps(found))
        return 0
    try:
        prepare.target_of(options.arch)
    except ValueError as error:
        return refuse(str(error))
    if wrong := make_folder(options.out):
        return refuse(wrong)
    found = prepare.prepare(options.out, options.arch, options.jobs, options.first)
    prepare.shrink(options.out)
    print(", ".join(f"{count} {what}" for what, count in found.items()) + f"; in {options.out}")
    return int("failed" in found or "processes that failed" in found)


def make_folder(out: Path) -> str:
    """Make the folder of results; return what is wrong with it, "" where nothing is.

    `unetgn.programs.paths` would import torch, which the workers alone do.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        return f"--out {out} is no folder: {error.strerror}"
    return "" if os.access(out, os.W_OK | os.X_OK) else f"--out {out} cannot be written: it permits it not"


def refuse(reason: str) -> int:
    """Say why it cannot run, and return the exit code."""
    print(reason, file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
