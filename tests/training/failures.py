"""Makes a run fail: at a place of the loop, with a kind of error, from a step on."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import GeneralTracker

from unetgn.training import looks as looks_module
from unetgn.training import loop as loop_module
from unetgn.training import run_directory
from unetgn.training.bars import Bar
from unetgn.training.checkpoint import Checkpoint
from unetgn.training.data.samples import IndexedSamples
from unetgn.training.loop import Loop
from unetgn.training.objective import Objective
from unetgn.training.run_directory import RunDirectory
from unetgn.training.step import TrainState
from unetgn.training.throughput import Window

KINDS: dict[str, Callable[[], BaseException]] = {
    "full disk": lambda: OSError(errno.ENOSPC, "No space left on device"),
    "device": lambda: OSError(errno.EIO, "Input/output error"),
    "pipe": lambda: BrokenPipeError(errno.EPIPE, "Broken pipe"),
    "bug": lambda: RuntimeError("a bug"),
    "memory": MemoryError,
    "Ctrl-C": KeyboardInterrupt,
    "exit": lambda: SystemExit(3),
}
SAVED, ASIDE = "ends, and the last step is saved", "goes on with a warning, but for Ctrl-C and exits"


class Tracker(GeneralTracker):
    """Keeps what it is told."""

    name, requires_logging_directory, tracker = "kept", False, None  # type: ignore[assignment]

    def __init__(self) -> None:
        super().__init__()
        self.told: list[int | None] = []

    def store_init_configuration(self, values: dict) -> None:
        """Keep nothing of it."""

    def log(self, values: dict, step: int | None = None, **_: Any) -> None:
        self.told.append(step)

    def log_images(self, values: dict, step: int | None = None) -> None:
        """Keep nothing of it."""


# By the call in unetgn/training/loop.py: who is to fail, and what becomes of the run.
PLACES: dict[str, tuple[Any, str, str]] = {
    "next": (IndexedSamples, "__getitem__", SAVED),
    "self.samples.loader": (IndexedSamples, "loader", SAVED),
    "self.state.run_step": (TrainState, "run_step", SAVED),
    "the forward pass": (Objective, "losses", SAVED),
    "the backward pass": (Accelerator, "backward", SAVED),
    "to the device": (TrainState, "to_device", SAVED),
    "self.window.add": (Window, "add", SAVED),
    "self.window.close": (Window, "close", SAVED),
    "self.samples.progress": (IndexedSamples, "progress", SAVED),
    "learning_rate": (loop_module, "learning_rate", SAVED),
    "Bar": (loop_module, "Bar", SAVED),
    "bar.update": (Bar, "update", SAVED),
    "bar.set_postfix_str": (Bar, "set_postfix_str", SAVED),
    "self.run.log": (run_directory, "append", ASIDE),
    "tracker.log": (Tracker, "log", ASIDE),
    "held_out_loss": (looks_module, "held_out_loss", SAVED),
    "draw_preview": (looks_module, "draw_preview", ASIDE),
    "draw_loss": (looks_module, "draw_loss", ASIDE),
    "draw_levels": (looks_module, "draw_levels", ASIDE),
    "show_picture": (looks_module, "show_picture", ASIDE),
    "self.run.rows": (RunDirectory, "rows", ASIDE),
    "self.run.losses": (RunDirectory, "losses", ASIDE),
    "self.window.all_sums": (Window, "all_sums", SAVED),
    "self.state.tensors": (TrainState, "tensors", SAVED),
    "self.run.write_rows": (RunDirectory, "write_rows", ASIDE),
    "not_finite": (loop_module, "not_finite", SAVED),
    "self.samples.fingerprint": (IndexedSamples, "fingerprint", SAVED),
    "self.samples.state": (IndexedSamples, "state", SAVED),
    "checkpoint.write": (Checkpoint, "write", SAVED),
    "delete_old": (loop_module, "delete_old", ASIDE),
    "self.run.delete_left": (RunDirectory, "delete_left", ASIDE),
    "self.run.write_status": (RunDirectory, "write_status", ASIDE),
    "self.state.averaged": (TrainState, "averaged", SAVED),
    "what is due": (Loop, "report", SAVED),
}


def fail(
    patch: Callable[[Any, str, Any], object], place: str, kind: str, loop: Callable[[], Loop], *, step: int, once: bool
) -> None:
    """Have the place fail while the loop is after `step` steps, `once` or whenever it is called again."""
    owner, name, _ = PLACES[place]
    original = getattr(owner, name)
    failed: list[str] = []

    def failing(*arguments: Any, **more: Any) -> Any:
        if loop().state.step == step and not (once and failed):
            failed.append(place)
            raise KINDS[kind]()
        return original(*arguments, **more)

    patch(owner, name, failing)
