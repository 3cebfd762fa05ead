"""Measures the memory that work takes, by Python's own count: what the process had or kept before plays no part."""

import tracemalloc
from collections.abc import Callable


def peak_of(work: Callable[[], object]) -> int:
    """Return the bytes that Python and NumPy held at one time for this work; tensors are not seen."""
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
