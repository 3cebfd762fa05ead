"""Keeps a run's folder: whose it is, what it says of itself, and the numbers that it logs."""

from __future__ import annotations

import contextlib
import csv
import errno
import fcntl
import io
import math
import os
import re
import secrets
import shutil
import stat
import time
from pathlib import Path
from typing import IO, Any

from unetgn.programs.paths import check_folder
from unetgn.training.checkpoint import CHECKPOINTS, CONFIG, LEFT, list_checkpoints
from unetgn.training.errors import RunDirectoryError
from unetgn.training.files import delete, delete_unfinished, lines_within, write_json, write_text, writing
from unetgn.training.power_averages import AVERAGES, delete_snapshots_aside

LEVELS = tuple(f"level_{number}" for number in range(1, 11))  # ranges of noise levels, equally probable in training

OF_FEATURES = ("fid", "kid", "precision", "recall")  # figures that an extractor's features are compared by
COLUMNS = {
    "metrics.csv": (
        "step",
        "epoch",
        "loss",
        "learning_rate",
        "gradient_norm",
        "images_per_second",
        "share_of_peak",
        "noise_scale",
    ),
    "validation.csv": ("step", "loss"),
    "levels.csv": ("step", "loss", *LEVELS),
    "evaluation.csv": ("step", *OF_FEATURES),
}

LONGEST_ROW = 1000  # characters

AS_FILE = os.O_NOFOLLOW | os.O_NONBLOCK  # no link, no waiting for a pipe
TAKEN = (errno.EACCES, errno.EAGAIN)  # of a lock that another process has
OWN = (CHECKPOINTS, "samples", "denoise", AVERAGES, "pipeline", "lora", "tb", "profile")  # folders that a run writes
LOCK, STATUS, TRACKER_ID = ".lock", "status.json", "tracker_id"
TRACKER_ID_IS = re.compile("[0-9a-f]{16}")


class RunDirectory:
    """Keeps a folder with `config.yaml`, `status.json`, logs (`COLUMNS`), `checkpoints/` and pictures.

    Held by one process at a time: the lock is the operating system's, so a killed run leaves none behind.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / CHECKPOINTS
        self._lock: IO[bytes] | None = None
        self._made: list[Path] = []  # by `lock`, the outermost first: folders, and at last the lock
        self._waiting: list[tuple[str, dict[str, float]]] = []  # rows that are to be written to their logs

    def holds_a_run(self) -> bool:
        """Return True where a run was begun here."""
        return (self.path / CONFIG).exists() or bool(list_checkpoints(self.checkpoints))

    def owns(self, path: Path) -> bool:
        """Return True where a path is the folder of the run here, or one that a run writes, or below such a one."""
        parts = path.resolve().relative_to(self.path.resolve()).parts
        return self.holds_a_run() and (not parts or parts[0] in OWN)

    def tracker_id(self, *, new: bool) -> str:
        """Return the name that a tracker on a server knows the run by: another one where the run begins anew."""
        file = self.path / TRACKER_ID
        with contextlib.suppress(OSError, UnicodeDecodeError):
            if not new and file.is_file() and TRACKER_ID_IS.fullmatch(known := file.open(encoding="utf-8").read(17)):
                return known
        found = secrets.token_hex(8)
        write_text(file, found)
        return found

    def check_writable(self) -> None:
        """Raise RunDirectoryError where the folder, or that of its checkpoints, could not be made or written.

        Writes nothing.
        """
        for folder in (self.path, self.checkpoints):
            try:
                check_folder(folder)
            except FileNotFoundError as error:
                raise RunDirectoryError(str(error)) from error
            except OSError as error:
                raise RunDirectoryError(f"{error}; give another folder") from error

    def lock(self) -> None:
        """Take the folder, making it where it is not there, and delete what a killed process left half-written.

        Raises RunDirectoryError where a living process has it.
        """
        self.check_writable()
        lock = self.path / LOCK
        self._made = [path for path in (*reversed(self.path.parents), self.path, lock) if not path.exists()]
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            flags = os.O_RDWR | os.O_CREAT | AS_FILE
            self._lock = open(lock, "r+b", opener=lambda path, _: os.open(path, flags, 0o666))  # noqa: SIM115
            if not stat.S_ISREG(os.fstat(self._lock.fileno()).st_mode):
                raise OSError(f"{lock} is no file")
        except OSError as error:
            self.unlock()
            wrong = os.path.lexists(lock) and (lock.is_symlink() or not lock.is_file())
            remedy = (
                f"remove {lock}, which has to be a file, or give another folder" if wrong else "give another folder"
            )
            raise RunDirectoryError(f"{self.path} cannot be written ({error}); {remedy}") from error
        try:
            # A record lock belongs to this process alone: the loader's forked workers do not inherit it.
            fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in TAKEN:
                self._lock, self._made = None, []  # they are the other's
                raise RunDirectoryError(
                    f"{self.path} is in use by another run; wait for it, or give another folder"
                ) from error
            self.unlock()
            raise RunDirectoryError(
                f"{self.path} cannot be locked, which keeps two runs out of one folder: its file system answers "
                f"'{error.strerror}'. Give a folder on another file system, such as a local disk (some network file "
                "systems lock once they are mounted for it)"
            ) from error
        if not is_still(lock, self._lock):  # a start that was refused has taken it away meanwhile
            self._lock.close()
            return self.lock()
        delete_unfinished(self.path)

    def is_held(self) -> bool | None:
        """Return True where a living process has the folder; None where that cannot be known. Writes nothing.

        Of the processes of all machines, where the file system locks for them. Not for the process that has it itself:
        it would lose it.
        """
        try:
            lock = os.open(self.path / LOCK, os.O_RDONLY | AS_FILE)
        except OSError:
            return None
        try:  # shared: two that look are not in each other's way, and what is taken goes with the file
            fcntl.lockf(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError as error:
            return True if error.errno in TAKEN else None
        finally:
            os.close(lock)
        return False

    def unlock(self) -> None:
        """Give the folder back where it is taken, and leave of what `lock` made nothing that is empty."""
        for path in reversed(self._made):
            with contextlib.suppress(OSError):  # it holds something, or is gone
                path.unlink() if path.name == LOCK else path.rmdir()
        self._made = []
        if self._lock is not None:
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
        """Keep the logged rows up to `step`: those after it will be logged again.

        Until `delete_left` a log that has others is still there beside it, as LOG.left.
        """
        validated = {row["step"] for row in self.rows("validation.csv")}
        for name, columns in COLUMNS.items():
            rows = self.rows(name)
            kept = [row for row in rows if int(row["step"]) <= step]
            if name == "levels.csv":  # what was killed after its row, and before that of validation.csv, comes again
                kept = [row for row in kept if row["step"] in validated]
            if len(kept) < len(rows):
                with contextlib.suppress(FileExistsError):  # what was left at another time, by a run that did not save
                    link_or_copy(self.path / name, self.path / f"{name}.{LEFT}")
            with writing(self.path / name) as unfinished, unfinished.open("w", encoding="utf-8", newline="") as lines:
                writer = csv.DictWriter(lines, columns)
                writer.writeheader()
                writer.writerows(kept)

    def delete_left(self, upto: int | None = None) -> None:
        """Delete what a resume left of logs and of snapshots of averages, once the run has saved anew.

        Where it was at its last step already, `upto`, only what that has made anew.
        """
        for name in COLUMNS:
            left = f"{name}.{LEFT}"
            if upto is None or not self.rows_after(name, upto, self.path / left):
                delete(self.path / left)
        delete_snapshots_aside(self.path / AVERAGES, upto)

    def rows_after(self, name: str, step: int, file: Path | None = None) -> int:
        """Count the logged rows after `step`, which `resume_logs` leaves out."""
        return sum(int(row["step"]) > step for row in self.rows(name, file))

    def rows(self, name: str, file: Path | None = None) -> list[dict[str, str]]:
        """Read the rows of a log (or of another `file` of its kind) that were written to their end; none without it."""
        file, columns = file or self.path / name, COLUMNS[name]
        if not file.is_file():
            return []
        rows, names = [], columns
        with file.open(encoding="utf-8", newline="", errors="replace") as text:
            for number, line in enumerate(lines_within(text, LONGEST_ROW)):
                # Not by csv: numbers have no quotes, and one that a bad disk makes would take in all that follows.
                values = (line or "").replace("\0", "").strip().split(",")
                header = tuple(values)  # of an older version a shorter one; of a damaged file, anything
                if number == 0 and {"loss", "fid"} & {*header} and header == columns[: len(header)]:
                    names = header
                elif len(values) == len(names) and is_whole(row := dict(zip(names, values, strict=True))):
                    rows.append(row)
        return rows

    def log(self, name: str, row: dict[str, float]) -> None:
        """Append a row to one of the logs; its keys are COLUMNS. Where that fails, the row waits.

        Raises OSError.
        """
        self._waiting.append((name, row))
        self.write_rows()

    def write_rows(self) -> None:
        """Append the rows that wait to their logs. Raises OSError, and then each waits or is written whole."""
        while self._waiting:
            name, row = self._waiting[0]
            line = io.StringIO(newline="")
            csv.DictWriter(line, COLUMNS[name]).writerow({key: repr(value) for key, value in row.items()})
            append(self.path / name, line.getvalue().encode())
            del self._waiting[0]

    def losses(self, name: str) -> tuple[list[int], list[float]]:
        """Read the steps and losses logged so far."""
        rows = self.rows(name)
        return [int(row["step"]) for row in rows], [float(row["loss"]) for row in rows]

    def judged(self, metric: str) -> list[int]:
        """List the steps that were judged, the one with the least of a metric first, of equals the earliest."""
        figures = [(figure_of(row, metric), int(row["step"])) for row in self.rows("evaluation.csv")]
        return [step for figure, step in sorted(figures) if math.isfinite(figure)]


def is_whole(row: dict[str, str]) -> bool:
    """Return True where a logged row was written to its end; the last one may be cut: a full disk, a loss of power."""
    try:
        int(row["step"]), float(row["loss" if "loss" in row else "fid"])
    except (TypeError, ValueError):
        return False
    return None not in row.values()


def figure_of(row: dict[str, str], name: str) -> float:
    """Return a figure of a logged row; what is none, as a bad disk leaves it, is infinite."""
    try:
        return float(row[name])
    except (KeyError, ValueError):
        return math.inf


def append(file: Path, text: bytes) -> None:
    """Append to a file, all of it or nothing. Raises OSError."""
    with file.open("ab", buffering=0) as lines:
        end = lines.seek(0, os.SEEK_END)
        try:
            while text:
                text = text[lines.write(text) or 0 :]
        except OSError:
            with contextlib.suppress(OSError):
                lines.truncate(end)
            raise


def link_or_copy(file: Path, other: Path) -> None:
    """Give a file a second name; a copy, where the disk has no such names. Raises FileExistsError where it is taken."""
    if os.path.lexists(other):
        raise FileExistsError(f"{other} is there")
    try:
        os.link(file, other)
    except OSError:
        with writing(other) as unfinished:
            shutil.copyfile(file, unfinished)


def is_still(path: Path, file: IO[bytes]) -> bool:
    """Return True where the file that is open is the one of that name."""
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False
