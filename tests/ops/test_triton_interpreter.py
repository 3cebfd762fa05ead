"""Runs the proof of the Triton kernels on CPU tensors in processes that interpret: `tests/ops/interpreted`, and
`tests/ops/test_sizes_of_one.py`, which all implementations share."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent / "interpreted"

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")


def run_interpreted(*arguments: str | Path) -> None:
    command = [sys.executable, "-m", "pytest", *map(str, arguments), "-p", "no:cacheprovider"]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    environment.pop("PYTEST_XDIST_WORKER", None)
    done = subprocess.run(command, cwd=FOLDER.parents[2], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


def test_kernels_are_right_under_the_interpreter() -> None:
    files = "test_kernels_against_the_definition.py", "test_places.py", "test_shortcut.py"
    run_interpreted(*(FOLDER / file for file in files))


@pytest.mark.thorough
def test_kernels_are_right_at_their_edges_under_the_interpreter() -> None:
    those = "not test_sizes_of_one or triton-interpreted and float32 and (1000 or pre_bias or nan)"
    run_interpreted(FOLDER / "test_edges.py", FOLDER.parent / "test_sizes_of_one.py", "-k", those)


@pytest.mark.slow
def test_kernels_are_right_under_the_interpreter_over_the_whole_cross_product() -> None:
    run_interpreted(FOLDER / "test_kernels_against_the_definition.py", FOLDER / "test_edges.py", "-m", "slow")
