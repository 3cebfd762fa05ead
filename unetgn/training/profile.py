"""Records what some steps of a run do on the host and on the device, by accelerator.profile."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import ProfileKwargs

from unetgn.training.files import writing

AFTER = 3  # steps of a process, in which memory is taken and kernels are chosen or compiled


class Profile:
    """Records the `steps` after the first `AFTER` of this process, and writes them to `folder`, a file for each rank.

    The files are for Perfetto (https://ui.perfetto.dev) and chrome://tracing.
    """

    def __init__(self, accelerator: Accelerator, steps: int, folder: Path) -> None:
        self.accelerator, self.steps, self.done = accelerator, steps, 0
        self.file = folder / f"rank-{accelerator.process_index}.json"
        self._open = contextlib.ExitStack()
        self._profiler: Any = None

    def before_step(self) -> None:
        """Begin or end the record, where it is time."""
        if self.steps and self.done == AFTER:
            self._profiler = self._open.enter_context(self.accelerator.profile(ProfileKwargs()))
        if self.done == AFTER + self.steps:
            self.close()
        self.done += 1

    def close(self) -> None:
        """Stop the record and write it, where there is one."""
        profiler, self._profiler = self._profiler, None
        self._open.close()
        if profiler is not None:
            with writing(self.file) as unfinished:
                profiler.export_chrome_trace(str(unfinished))
