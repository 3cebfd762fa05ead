"""train.py in which FAILS_AT, a place of tests/training/failures.py, fails with FAILS_WITH on rank FAILS_ON.

After FAILS_AFTER steps, once. The place "a worker is killed" kills a worker of the
loader at one image, as often as FAILS_OFTEN says; "stdout is closed" and the like are what they say.
"""

import os
import signal
import sys
from multiprocessing import parent_process
from pathlib import Path
from typing import Any

import torch

from tests.training.failures import KINDS, fail
from unetgn.training.data.samples import IndexedSamples
from unetgn.training.loop import Loop
from unetgn.training.step import TrainState
from unetgn.training.train import main

place, step = os.environ["FAILS_AT"], int(os.environ["FAILS_AFTER"])
loops: list[Loop] = []
original_init, original_item = Loop.__init__, IndexedSamples.__getitem__


def remember(loop: Loop, *arguments: Any) -> None:
    original_init(loop, *arguments)
    loops.append(loop)


def kill_worker(samples: IndexedSamples, counter: int) -> dict[str, torch.Tensor]:
    """Kill the worker that makes a certain sample, the first so many times."""
    marks = Path(os.environ["FAILS_MARKS"])
    killed = len(list(marks.iterdir()))
    if counter == step * 8 and parent_process() is not None and killed < int(os.environ["FAILS_OFTEN"]):
        (marks / str(os.getpid())).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return original_item(samples, counter)


def close_later(stream: str) -> None:
    """Have a standard stream be a pipe that nobody reads any more once there are so many steps."""
    read, write = os.pipe()
    descriptor = {"stdout": 1, "stderr": 2}[stream]
    os.dup2(write, descriptor)
    setattr(sys, stream, os.fdopen(descriptor, "w", buffering=1 if descriptor == 2 else -1, closefd=False))
    original = TrainState.run_step

    def run_step(state: TrainState, batches: Any) -> Any:
        if state.step == step:
            os.close(read)
        return original(state, batches)

    TrainState.run_step = run_step  # type: ignore[method-assign]


def kill_itself() -> BaseException:
    """End this process as the system does for lack of memory."""
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("it is still there")


Loop.__init__ = remember  # type: ignore[method-assign]
KINDS["SIGKILL"] = kill_itself
if place == "a worker is killed":
    IndexedSamples.__getitem__ = kill_worker  # type: ignore[method-assign]
elif place.endswith(" is closed"):
    close_later(place.split()[0])
elif place == "no descriptor is open":
    for descriptor in range(3):
        os.close(descriptor)
    sys.stdout = sys.stderr = None  # as Python has it then
elif os.environ.get("RANK", "0") == os.environ["FAILS_ON"]:
    fail(setattr, place, os.environ["FAILS_WITH"], lambda: loops[0], step=step, once=True)
sys.exit(main())
