"""train.py in which the rank SIGNAL_ON gets SIGUSR1, as a scheduler sends it, at SIGNAL_AT, one of PLACES.

Each is in the last step or after it; steps are three.
"""

import os
import signal
import sys
from typing import Any

from unetgn.training import train
from unetgn.training.loop import Loop
from unetgn.training.step import TrainState
from unetgn.training.throughput import Window

PLACES: dict[str, tuple[Any, str]] = {
    "the last step": (TrainState, "run_step"),
    "its row": (Window, "close"),
    "the last save": (Window, "all_sums"),
    "the pipeline": (train, "write_pipeline"),
    "the end": (train, "end_training"),
    "the last status": (Loop, "write_status"),
}


def signalling(original: Any, place: str) -> Any:
    def call(*arguments: Any, **more: Any) -> Any:
        step = {"the last step": 2}.get(place, 3)
        at_it = loops and loops[0].state.step == step and (place != "the last status" or arguments[1] == "completed")
        if at_it and os.environ["RANK"] == os.environ["SIGNAL_ON"]:
            os.kill(os.getpid(), signal.SIGUSR1)
        return original(*arguments, **more)

    return call


if __name__ == "__main__":
    loops: list[Loop] = []
    original_init = Loop.__init__

    def remember(loop: Loop, *arguments: Any) -> None:
        original_init(loop, *arguments)
        loops.append(loop)

    Loop.__init__ = remember  # type: ignore[method-assign]
    owner, name = PLACES[os.environ["SIGNAL_AT"]]
    setattr(owner, name, signalling(getattr(owner, name), os.environ["SIGNAL_AT"]))
    sys.exit(train.main())
