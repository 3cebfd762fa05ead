"""Keeps a run's folder: whose it is, what it says of itself, and the numbers that it logs."""

from __future__ import annotations

import csv
import errno
import fcntl
import os
import time
from pathlib import Path
from typing import IO, Any

from training.checkpoint import CHECKPOINTS, CONFIG, list_checkpoints
from training.errors import RunDirectoryError
from training.files import delete_unfinished, write_json, writing

COLUMNS = {
    "metrics.csv": ("step", "epoch", "loss", "learning_rate", "gradient_norm", "images_per_second", "share_of_peak"),
    "validation.csv": ("step", "loss"),
}

LONGEST_ROW = 1000  # characters

LOCK, STATUS = ".lock", "status.json"


class RunDirectory:
    """Keeps a folder with `config.yaml`, `status.json`, `metrics.csv`, `validation.csv`, `checkpoints/` and pictures.

    Held by one process at a time: the lock is the operating system's, so a killed run leaves none behind.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / CHECKPOINTS
        self._lock: IO[str] | None = None
        self._made = False  # by this process

    def holds_a_run(self) -> bool:
        """Return True where a run was begun here."""
        return (self.path / CONFIG).exists() or bool(list_checkpoints(self.checkpoints))

    def check_writable(self) -> None:
        """Raise RunDirectoryError where the folder could not be made or written. Writes nothing."""
        nearest = next(path for path in (self.path, *self.path.resolve().parents) if path.exists())
        if not nearest.is_dir():
            raise RunDirectoryError(f"{self.path} cannot be a run's folder: {nearest} is a file; give another folder")
        if not os.access(nearest, os.W_OK | os.X_OK):
            raise RunDirectoryError(f"{self.path} cannot be written: {nearest} permits it not; give another folder")

    def lock(self) -> None:
        """Take the folder, making it where it is not there, and delete what a killed process left half-written.

        Raises RunDirectoryError where a living process has it.
        """
        self.check_writable()
        self._made = not self.path.exists()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = (self.path / LOCK).open("w")
        except OSError as error:
            raise RunDirectoryError(f"{self.path} cannot be written ({error}); give another folder") from error
        try:
            # A record lock belongs to this process alone: the loader's forked workers do not inherit it.
            fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise RunDirectoryError(
                    f"{self.path} is in use by another run; wait for it, or give another folder"
                ) from error
            self.unlock()
            raise RunDirectoryError(
                f"{self.path} cannot be locked, which keeps two runs out of one folder: its file system answers "
                f"'{error.strerror}'. Give a folder on another file system, such as a local disk (some network file "
                "systems lock once they are mounted for it)"
            ) from error
        delete_unfinished(self.path)

    def unlock(self) -> None:
        """Give the folder back where it is taken, and leave none where `lock` made it."""
        if self._lock is None:
            return
        if self._made:
            (self.path / LOCK).unlink()
            self.path.rmdir()
        self._lock.close()
        self._lock = None

    def write_status(self, state: str, step: int, **facts: Any) -> None:
        """Replace status.json: state is running, completed, preempted, diverged or failed."""
        status = {
            "state": state,
            "step": step,
            "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "pid": os.getpid(),
            **facts,
        }
        write_json(self.path / STATUS, status)

    def resume_logs(self, step: int) -> None:
        """Keep the logged rows up to `step`: those after it will be logged again."""
        for name, columns in COLUMNS.items():
            rows = [row for row in self.rows(name) if int(row["step"]) <= step]
            with writing(self.path / name) as unfinished, unfinished.open("w", newline="") as lines:
                writer = csv.DictWriter(lines, columns)
                writer.writeheader()
                writer.writerows(rows)

    def rows_after(self, name: str, step: int) -> int:
        """Count the logged rows after `step`, which `resume_logs` deletes."""
        return sum(int(row["step"]) > step for row in self.rows(name))

    def rows(self, name: str) -> list[dict[str, str]]:
        """Read the rows of a log that were written to their end; none where there is no log yet."""
        file, columns = self.path / name, COLUMNS[name]
        if not file.is_file():
            return []
        with file.open(newline="", errors="replace") as lines:
            # Not by csv: numbers have no quotes, and one that a bad disk makes would take in all that follows.
            whole = [line.replace("\0", "").strip().split(",") for line in lines if len(line) < LONGEST_ROW]
        header = tuple(whole[0]) if whole else columns  # of an older version a shorter one; of a damaged file, anything
        names = header if "loss" in header and header == columns[: len(header)] else columns
        rows = [dict(zip(names, values, strict=True)) for values in whole if len(values) == len(names)]
        return [row for row in rows if is_whole(row)]

    def log(self, name: str, row: dict[str, float]) -> None:
        """Append a row to metrics.csv or validation.csv; its keys are COLUMNS."""
        with (self.path / name).open("a", newline="") as lines:
            csv.DictWriter(lines, COLUMNS[name]).writerow({key: repr(value) for key, value in row.items()})

    def losses(self, name: str) -> tuple[list[int], list[float]]:
        """Read the steps and losses logged so far."""
        rows = self.rows(name)
        return [int(row["step"]) for row in rows], [float(row["loss"]) for row in rows]


def is_whole(row: dict[str, str]) -> bool:
    """Return True where a logged row was written to its end; the last one may be cut: a full disk, a loss of power."""
    try:
        int(row["step"]), float(row["loss"])
    except (TypeError, ValueError):
        return False
    return None not in row.values()
