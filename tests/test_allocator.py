"""What is freed stays with the process, for the next tensors."""

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from unetgn.programs import allocator
from unetgn.programs.allocator import keep_freed_memory

COUNT = """
import json, resource, sys
import numpy as np
sys.path.insert(0, sys.argv[2])
from allocator import keep_freed_memory  # by itself: PyTorch takes seconds to import
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    some = [np.ones(2**17) for _ in range(40)]  # 1 MiB each
    one = np.ones(5 * 2**20)  # more than the 32 MiB that glibc keeps at most by itself
    del some, one
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
for _ in range(3): faults()
before = faults()
keep_freed_memory(sys.argv[1])
faults()
print(json.dumps([before, faults()]))
"""


def count(device, **variables):
    """Count the page faults of a step before and after, in a process of its own."""
    environment = os.environ | variables
    line = [sys.executable, "-c", COUNT, device, str(Path(allocator.__file__).parent)]
    done = subprocess.run(line, env=environment, capture_output=True, text=True, check=True, timeout=120)
    return json.loads(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_a_step_finds_the_memory_of_the_last_one():
    before, after = count("cpu")
    assert before > 10_000  # 40 MiB of pages of 4 KiB
    assert after < 100


@pytest.mark.parametrize(
    ("device", "variables"), [("cuda", {}), ("cpu", {"MALLOC_TRIM_THRESHOLD_": "131072"})], ids=["a GPU", "told"]
)
def test_elsewhere_glibc_does_what_it_does(device, variables):
    before, after = count(device, **variables)
    assert after > 0.5 * before > 5_000


def test_another_libc_is_left_alone(monkeypatch):
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    monkeypatch.setattr("ctypes.CDLL", lambda *_: pytest.fail("looked for mallopt"))
    keep_freed_memory("cpu")


def test_an_older_glibc_that_refuses_gets_the_most_that_it_takes(monkeypatch):
    asked = []

    class Older:
        def mallopt(self, which, value):
            asked.append((which, value))
            return which != -3 or value <= 2**25

    monkeypatch.delenv("MALLOC_TRIM_THRESHOLD_", raising=False)
    monkeypatch.setattr(platform, "libc_ver", lambda: ("glibc", "2.31"))
    monkeypatch.setattr("ctypes.CDLL", lambda *_: Older())
    keep_freed_memory("cpu")
    assert asked == [(-1, 2**31 - 1), (-3, 2**31 - 1), (-3, 2**25)]
