"""train.py in which FAILS_AT, a place of tests/training/failures.py, fails with FAILS_WITH on rank FAILS_ON.

After FAILS_AFTER steps, once. "killed" and "a worker is killed" are SIGKILL, the latter as often as FAILS_OFTEN says.
"""

import os
import signal
import sys
from multiprocessing import parent_process
from pathlib import Path
from typing import Any

import torch

from tests.training.failures import fail
from training.data.samples import IndexedSamples
from training.loop import Loop
from training.train import main

place, step = os.environ["FAILS_AT"], int(os.environ["FAILS_AFTER"])
loops: list[Loop] = []
original_init, original_item = Loop.__init__, IndexedSamples.__getitem__


def remember(loop: Loop, *arguments: Any) -> None:
    original_init(loop, *arguments)
    loops.append(loop)


def kill_worker(samples: IndexedSamples, counter: int) -> dict[str, torch.Tensor]:
    """Kill the worker that makes a certain sample, the first so many times."""
    marks = Path(os.environ["FAILS_MARKS"])
    if (
        counter == step * 8
        and parent_process() is not None
        and len(list(marks.iterdir())) < int(os.environ["FAILS_OFTEN"])
    ):
        (marks / str(os.getpid())).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return original_item(samples, counter)


Loop.__init__ = remember  # type: ignore[method-assign]
if place == "a worker is killed":
    IndexedSamples.__getitem__ = kill_worker  # type: ignore[method-assign]
elif os.environ.get("RANK", "0") == os.environ["FAILS_ON"]:
    fail(setattr, place, os.environ["FAILS_WITH"], lambda: loops[0], step=step, once=True)
sys.exit(main())
