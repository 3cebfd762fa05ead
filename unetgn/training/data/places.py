"""Reads the files of a folder, or of a zip archive of one (unetgn/training/data/zips.py), by their path in it."""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from unetgn.messages import LONGEST_PATH, plain
from unetgn.training.data.folders import open_file, walk
from unetgn.training.data.zips import ZipFolder

END = 64 * 1024  # bytes at the end of a file, which tell it from others


class Place(Protocol):
    """Holds files by their path."""

    def files(self, left_out: Counter[str]) -> Iterator[tuple[Path, int]]:
        """List the files with their sizes in bytes; what is no file is counted in `left_out`. Raises ValueError."""
        ...

    def source(self, file: Path) -> Path | bytes:
        """Return where the contents of a file are, or these. Raises OSError."""
        ...

    def end(self, file: Path) -> bytes:
        """Return what tells the contents of a file from others of its size; nothing where it cannot be read."""
        ...

    def name(self, file: Path) -> str:
        """Return what messages call a file."""
        ...


class PlainFolder(Place):
    """Reads the files in a folder and below it."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def files(self, left_out: Counter[str]) -> Iterator[tuple[Path, int]]:
        for entry in walk(self.root, left_out):
            yield Path(entry.path).relative_to(self.root), entry.stat().st_size

    def source(self, file: Path) -> Path:
        return self.root / file

    def end(self, file: Path) -> bytes:
        return end_of(self.root / file)

    def name(self, file: Path) -> str:
        return plain(str(self.root / file), most=LONGEST_PATH)


def end_of(file: Path) -> bytes:
    """Read the end of a file; nothing of one that cannot be read, which is said elsewhere."""
    with contextlib.suppress(OSError), open_file(file) as contents:
        contents.seek(max(0, os.fstat(contents.fileno()).st_size - END))
        return contents.read()
    return b""


def open_place(path: Path) -> Place:
    """Open a folder or a zip archive. Raises ValueError where it is neither."""
    if path.is_dir():
        return PlainFolder(path)
    if path.is_file():
        return ZipFolder(path)
    raise ValueError(f"data.path {str(path)!r} is not a folder; give one that holds images, or a zip archive of one")
