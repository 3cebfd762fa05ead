"""Saves the last whole step of a run whose loop fails: with all ranks, or alone where they cannot be reached."""

from __future__ import annotations

import contextlib
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path

from accelerate import Accelerator
from torch import Tensor

from unetgn.training.checkpoint import CONFIG, TensorFile, checkpoint_path
from unetgn.training.data.standing import RankState
from unetgn.training.errors import Diverged, Failed, Preempted, one_line
from unetgn.training.files import TEMPORARY
from unetgn.training.run_directory import RunDirectory
from unetgn.training.signals import StopSignals
from unetgn.training.step import Numbers, TrainState
from unetgn.training.throughput import Window

LONGEST_SAVE = 60.0  # seconds that ranks wait for the one that writes a checkpoint alone


class Rescue(ABC):
    """Says what becomes of a loop that fails."""

    state: TrainState
    run: RunDirectory
    signals: StopSignals
    accelerator: Accelerator
    ranks: int
    window: Window
    saved_step: int
    unread: list[Numbers]
    unlogged: list[Numbers]

    @abstractmethod
    def save(self) -> None:
        """Write a checkpoint; every rank has to come."""

    @abstractmethod
    def write(
        self,
        tensors: dict[TensorFile, dict[str, Tensor]],
        sums: list[list[float]],
        steps: int,
        samples: list[RankState] | None,
    ) -> None:
        """Write a checkpoint of these tensors."""

    @contextlib.contextmanager
    def rescuing(self) -> Iterator[None]:
        """Save the last whole step where the block fails. Raises Failed, which says what failed and what was saved."""
        try:
            yield
        except (Diverged, Preempted):
            raise
        except Failed as error:  # on all ranks
            raise Failed(self.rescue(str(error), self.save)) from (error.__cause__ or error)
        except BaseException as error:
            words = one_line(error)
            if self.ranks == 1:
                raise Failed(self.rescue(words, self.save)) from error
            words = f"rank {self.accelerator.process_index}: {words}"
            raise Failed(self.rescue(self.signals.leave_word(words), self.save_alone)) from error

    def rescue(self, words: str, save: Callable[[], None]) -> str:
        """Save what has not been saved; add to the words, which say what failed, what became of it."""
        step = self.state.step
        self.signals.failure = None
        if not step:
            return f"{words}; no step had been made"
        try:
            if not self.state.between_steps:
                raise Failed("it came in the middle of the next step's update, which left neither state whole")
            if self.saved_step < step:
                save()
        except BaseException as error:
            why = one_line(error)
            also = "" if why in words else f" ({why})"
            return f"{words}; what was saved before is as it was, and step {step} could not be saved{also}"
        return f"{words}; step {step} was saved, go on with --resume auto"

    def save_alone(self) -> None:
        """Write a checkpoint of what all ranks have alike; for a rank that cannot reach the others any more.

        It lacks the sums since the last row of the log, so that the next row is of fewer steps, and where the readers
        of a stream stood, so that this goes on approximately. Those of a row of this step, which the main process may
        not have written, every rank has: a run that goes on writes it where it is missing.
        """
        path = checkpoint_path(self.run.checkpoints, self.state.step)
        if self.state.sharded:
            raise Failed("with FSDP2 each process has a part of it, and another one has gone")
        if not all(numbers.usable() for numbers in self.unread):
            raise Failed("its loss, gradient or weights are not finite")
        if not self.accelerator.is_main_process and not (self.run.path / CONFIG).is_file():
            raise Failed("only the main process has the run's folder")
        if not may_write(path):
            raise Failed("another rank was about to save it, and has not")
        if not path.is_dir():  # by another rank
            sums, steps = self.sums_of_row()
            self.write(self.state.tensors(), [sums] * self.ranks if steps else [], steps, None)

    def sums_of_row(self) -> tuple[list[float], int]:
        """Return each rank's share of the sums of this step's row, and of how many steps; of none where none is due."""
        if self.unlogged or self.window.steps or self.window.closed is None:
            return [], 0
        return self.window.closed


def may_write(path: Path) -> bool:
    """Return True on the first rank that asks to write a checkpoint alone, and on others once it is there.

    Several ranks may have lost the others at once; two that write one folder would take it from each other.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.close(os.open(path.with_name(f"{TEMPORARY}claim-{path.name}"), os.O_CREAT | os.O_EXCL | os.O_WRONLY))
    except FileExistsError:
        end = time.monotonic() + LONGEST_SAVE
        while not path.is_dir() and time.monotonic() < end:
            time.sleep(0.05)
        return path.is_dir()
    return True
