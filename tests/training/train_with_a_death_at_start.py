"""train.py in which the rank DIES_ON ends at DIES_AT, one of PLACES, by a signal or by an error that nobody expects.

The others wait seconds for it, where a run waits minutes. With "nowhere" the main process takes longer than that to
read the images, and nobody dies.
"""

import os
import signal
import sys
import time
from datetime import timedelta
from typing import Any

import torch.distributed

from unetgn.training import meeting, prepare, signals, train
from unetgn.training.checkpoint import Checkpoint
from unetgn.training.data.samples import IndexedSamples
from unetgn.training.loop import Loop
from unetgn.training.step import TrainState
from unetgn.training.throughput import Window

PLACES: dict[str, tuple[Any, str]] = {
    "the meeting": (meeting, "meet"),
    "the process group": (torch.distributed, "init_process_group"),
    "the group over the CPUs": (signals, "connect_over_cpus"),
    "the data": (train, "prepare_samples"),
    "the scan": (prepare, "read_all"),
    "the folder": (train, "take_output"),
    "the network": (train, "make_network"),
    "the average": (train, "TrainState"),
    "the loop": (Loop, "__init__"),
    "the beginning": (train, "write_beginning"),
    "the trackers": (train, "start_trackers"),
    "the first batch": (IndexedSamples, "loader"),
    "the first step": (TrainState, "run_step"),
    "the first save": (Window, "all_sums"),
    "the first checkpoint": (Checkpoint, "write"),
}
BY_MAIN = ("the scan", "the folder", "the beginning", "the first checkpoint")  # the others do none of these
SECONDS = timedelta(seconds=3)


def die(*_: Any, **__: Any) -> None:
    if os.environ["DIES_BY"] == "SIGKILL":
        os.kill(os.getpid(), signal.SIGKILL)
    raise RuntimeError("can't start new thread")


def slowly(*arguments: Any) -> Any:
    time.sleep(2 * SECONDS.total_seconds())
    return read_all(*arguments)


if __name__ == "__main__":
    meeting.LONGEST_MEETING = meeting.LONGEST_CONNECTION = SECONDS
    meeting.SILENT = SECONDS / 3
    read_all = prepare.read_all
    if os.environ["DIES_AT"] == "nowhere":
        prepare.read_all = slowly
    elif os.environ["RANK"] == os.environ["DIES_ON"]:
        setattr(*PLACES[os.environ["DIES_AT"]], die)
    sys.exit(train.main())
