"""Runs `tests/ops/interpreted`, the proof of the Triton kernels on CPU tensors, in processes that interpret."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent / "interpreted"
FILES = sorted(path.name for path in FOLDER.glob("test_*.py"))

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")


def run_interpreted(name: str, marker: str) -> None:
    command = [sys.executable, "-m", "pytest", str(FOLDER / name), "-m", marker, "-p", "no:cacheprovider"]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    environment.pop("PYTEST_XDIST_WORKER", None)
    done = subprocess.run(command, cwd=FOLDER.parents[2], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


@pytest.mark.parametrize("name", FILES)
def test_kernels_are_right_under_the_interpreter(name: str) -> None:
    run_interpreted(name, "not slow")


@pytest.mark.slow
def test_kernels_are_right_under_the_interpreter_over_the_whole_cross_product() -> None:
    run_interpreted("test_kernels_against_the_definition.py", "slow")
