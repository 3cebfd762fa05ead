"""Lists what is asked once all else is known: other types, fused extras, the tests that need a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from importlib.util import find_spec

from benchmarks.gpu.checks import TINY, name_of
from benchmarks.gpu.machine import Place
from benchmarks.gpu.source import ROOT
from benchmarks.gpu.speed import check_and_speed
from benchmarks.gpu.worker import Absent, Data, Unit
from benchmarks.group_norm_silu.cases import Case, cases

TESTS = "tests/ops/test_triton_gpu.py"
CHOSEN = "graph or 31 or hidden or current"  # those that no other unit asks


def units(machine: Place) -> Iterator[Unit]:
    """List float32 and float16 and the extras, then the tests."""
    for case in other_cases(machine.tiny):
        yield Unit(f"rest {name_of(case)}", "rest", 2.5, 60.0, partial(check_and_speed, case, machine))
    yield Unit("pytest", "pytest", 40.0, 150.0, partial(tests, machine))


def other_cases(tiny: bool) -> list[Case]:
    """List the cases of the benchmark that `check` and `eager` do not have."""
    if tiny:
        return [replace(TINY[0], dtype="float32"), replace(TINY[1], extras="scale_shift")]
    return [case for case in cases() if case.dtype != "bfloat16" or case.extras != "none"]


def tests(machine: Place) -> Data:
    """Run the tests of captured graphs, of more than 2^31 elements, of hidden copies, of a second device."""
    if find_spec("pytest") is None or machine.tiny:
        raise Absent("pytest is not installed" if not machine.tiny else "a rehearsal has no GPU to test")
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-k", CHOSEN, "-p", "no:cacheprovider", TESTS]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    output = (done.stdout + done.stderr)[-3000:]
    return {"exit_code": done.returncode, "output": output, "faults": [output[-600:]] if done.returncode else []}
