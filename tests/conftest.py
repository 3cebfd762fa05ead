"""What tests of several parts share."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch reads it: bits depend on it, and tests run side by side

# isort: split
import json
from collections.abc import Iterator

import pytest
import torch

from tests.structure.quick import DURATIONS, ROOT, UNKNOWN

OF_THE_HUB = ("HF_", "GRADIO_", "no_proxy", "NO_PROXY")


@pytest.fixture
def one_thread() -> Iterator[None]:
    """One thread while the test runs: what is small is not faster with more, and tests may run side by side."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def its_own_threads() -> Iterator[None]:
    """What a test, or a program that it runs, sets of threads holds for that test alone: bits depend on them."""
    threads = torch.get_num_threads()
    yield
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def its_own_hub() -> Iterator[None]:
    """What a test tells libraries about the hub and proxies, as the page does, holds for that test alone."""
    before = {name: value for name, value in os.environ.items() if name.startswith(OF_THE_HUB)}
    yield
    for name in [name for name in os.environ if name.startswith(OF_THE_HUB)]:
        del os.environ[name]
    os.environ.update(before)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the files that take longest first, so that no worker is left with one of them when the others are done."""
    known = json.loads(DURATIONS.read_text())
    seconds = {str(ROOT / name): figures["seconds"] for name, figures in known.items()}
    items.sort(key=lambda item: -seconds.get(str(item.path), UNKNOWN))  # stable: a file's tests stay together
