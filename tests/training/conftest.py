"""What every test of training needs."""

import pytest
from accelerate.state import AcceleratorState


@pytest.fixture(autouse=True)
def fresh_accelerate_state() -> None:
    """Accelerate remembers the first precision of a process; here one process runs many trainings."""
    AcceleratorState._reset_state(reset_partial_state=True)
