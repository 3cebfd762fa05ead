"""Calls a function in a process of its own, which has done nothing before: for peaks of memory, and for starts.

`python -m benchmarks.fresh MODULE FUNCTION ARGUMENTS` is what that process runs; ARGUMENTS are JSON.
"""

from unetgn.programs import last_words  # noqa: F401  # the first of all: Ctrl-C and missing packages in one line

# isort: split
import ctypes
import gc
import importlib
import json
import os
import platform
import resource
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
MARK = "benchmarks.fresh: "  # before the line that is the answer; libraries print as well
STATUS = Path("/proc/self/status")  # Linux
FORGET = STATUS.with_name("clear_refs")  # 5 resets the peak (proc(5))


class Failed(RuntimeError):
    """Says what a process printed that failed."""


def run(arguments: list[str], *, threads: int) -> str:
    """Run Python with these arguments, from the root of the repository, and return what it prints.

    Raises Failed with its last words where it fails. What it imports is kept compiled, as a user's Python does it,
    also where this one is told not to.
    """
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONWARNINGS": "ignore"}
    environment["PYTHONDONTWRITEBYTECODE"] = ""
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    line = [sys.executable, *arguments]
    done = subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise Failed(f"python {' '.join(arguments)} ended with {done.returncode}: {done.stderr.strip()[-2000:]}")
    return done.stdout


def call(module: str, function: str, arguments: dict[str, Any], *, threads: int) -> dict[str, Any]:
    """Return what `function(**arguments)` of a module returns in a new process, a dictionary that JSON can hold.

    Added to it are `process_seconds`, from before the process began to its end, and `peak_bytes`, the most memory that
    it held (resident). Raises Failed where it ends without an answer.
    """
    start = time.perf_counter()
    printed = run(["-m", "benchmarks.fresh", module, function, json.dumps(arguments)], threads=threads)
    seconds = time.perf_counter() - start
    answers = [text for text in printed.splitlines() if text.startswith(MARK)]
    if not answers:
        raise Failed(f"{module}.{function} ended without an answer: {printed[-1000:]}")
    answer: dict[str, Any] = json.loads(answers[-1].removeprefix(MARK))
    return {**answer, "process_seconds": seconds}


def forget_peak() -> int:
    """Count the most memory anew from here on, and return what the process holds now, in bytes.

    What has been freed is given back to the system before. Where the system cannot count anew, the old peak stays.
    """
    gc.collect()
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)
    with suppress(OSError):
        FORGET.write_text("5")
    return held_bytes()


def held_bytes() -> int:
    """Return the most memory that this process has held so far, or since `forget_peak`.

    On Linux `getrusage` counts what the process that started this one held; the process's own status does not.
    """
    if STATUS.is_file():
        (line,) = (line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # there in bytes, elsewhere in KiB


def main() -> None:
    """Call, and print the answer."""
    module, function, arguments = sys.argv[1:]
    answer = getattr(importlib.import_module(module), function)(**json.loads(arguments))
    print(MARK + json.dumps({**(answer or {}), "peak_bytes": held_bytes()}), flush=True)


if __name__ == "__main__":
    main()
