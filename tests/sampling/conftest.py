"""Lets every test of sampling train in a process that has trained before, and keep features in a folder of its own."""

from pathlib import Path

import pytest
from accelerate.state import AcceleratorState


@pytest.fixture(autouse=True, scope="module")
def fresh_accelerate_state() -> None:
    """Forget the precision of earlier runs, which Accelerate remembers for a whole process."""
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(autouse=True)
def kept_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Keep features of real images where the test is."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "unetgn" / "features"
