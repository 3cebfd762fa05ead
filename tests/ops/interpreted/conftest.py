"""Runs the Triton kernels on CPU tensors: `TRITON_INTERPRET=1 pytest tests/ops/interpreted`.

Triton decides at import whether it interprets, and the compile tests need it not to: so one process cannot run both.
`tests/ops/test_triton_interpreter.py` runs this folder in a process of its own; elsewhere it is left out.
"""

import os
from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def nan_where_nothing_is_written() -> Iterator[None]:
    """Fill new tensors with NaN, so that an element that a kernel leaves out is noticed."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


INTERPRETS = os.environ.get("TRITON_INTERPRET") == "1"
collect_ignore_glob = [] if INTERPRETS else ["test_*.py"]


def pytest_runtest_setup() -> None:
    """Skip what was named outright, which pytest then collects."""
    if not INTERPRETS:
        pytest.skip("set TRITON_INTERPRET=1, or run tests/ops/test_triton_interpreter.py, which does")
