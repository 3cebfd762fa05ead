"""Shows how many images all processes have made, how many a second, and the time that is left."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType

from accelerate import Accelerator

from unetgn.training.bars import Bar
from unetgn.training.files import TEMPORARY, delete


class Progress:
    """Counts the images of every process: each writes its number to a small file, and the main one shows their sum."""

    def __init__(self, out: Path, total: int, accelerator: Accelerator) -> None:
        self.mine, self.main, self.several = 0, accelerator.is_main_process, accelerator.num_processes > 1
        self.files = [out / f"{TEMPORARY}made-{rank}" for rank in range(accelerator.num_processes)]
        self.file = self.files[accelerator.process_index]
        self.bar = Bar(total=total, unit="image", disable=not self.main, smoothing=0)

    def __enter__(self) -> Progress:
        delete(self.file)
        return self

    def add(self, images: int) -> None:
        """Count images of this process."""
        self.mine += images
        if self.several:
            self.file.write_text(str(self.mine))
        if self.main:
            self.show()

    def show(self) -> None:
        """Draw the bar, of what all have made so far."""
        made = [_read(file) for file in self.files if file != self.file]
        self.bar.update(self.mine + sum(made) - self.bar.n)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.main:
            self.show()
            if kind is None:
                for file in self.files:
                    delete(file)
        self.bar.close()


def _read(file: Path) -> int:
    try:
        return int(file.read_text() or 0)
    except (OSError, ValueError):  # not there yet, or being written
        return 0
