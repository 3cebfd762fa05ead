"""What tests of several parts share."""

import json
from collections.abc import Iterator

import pytest
import torch

from tests.structure.quick import DURATIONS, ROOT, UNKNOWN


@pytest.fixture
def one_thread() -> Iterator[None]:
    """One thread while the test runs: what is small is not faster with more, and tests may run side by side."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the files that take longest first, so that no worker is left with one of them when the others are done."""
    known = json.loads(DURATIONS.read_text())
    seconds = {str(ROOT / name): figures["seconds"] for name, figures in known.items()}
    items.sort(key=lambda item: -seconds.get(str(item.path), UNKNOWN))  # stable: a file's tests stay together
