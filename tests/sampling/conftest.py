"""Lets every test of sampling train in a process that has trained before."""

import pytest
from accelerate.state import AcceleratorState


@pytest.fixture(autouse=True, scope="module")
def fresh_accelerate_state() -> None:
    """Forget the precision of earlier runs, which Accelerate remembers for a whole process."""
    AcceleratorState._reset_state(reset_partial_state=True)
