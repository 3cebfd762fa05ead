"""Writes files and folders whole or not at all: a file that exists is a file that was written to its end.

What is written lies under a temporary name in the same folder, is flushed to the disk, and only then gets its name.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from PIL import Image

logger = logging.getLogger(__name__)

TEMPORARY = ".tmp-"  # how the names of unfinished files and folders begin
IN_THE_WAY = "in-the-way"  # how those end that had to make way


@contextmanager
def writing(path: Path) -> Iterator[Path]:
    """Lend a temporary path to write a file or a folder to; it becomes `path`, which it replaces, after the block.

    The folder of `path` is made where it is not there. Where the block raises, or the disk is full, `path` is as it was
    before and nothing is left behind. What is of another kind, such as a folder in the place of a file or of a link, is
    put aside. A killed process leaves the temporary file: `delete_unfinished` removes it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{TEMPORARY}{os.getpid()}-{path.name}")
    delete(unfinished)
    try:
        yield unfinished
        flush_all(unfinished)
        if path.is_symlink():
            delete(path)
        elif path.exists() and (unfinished.is_symlink() or path.is_dir() != unfinished.is_dir()):  # not written here
            path.rename(named := free_name(path, IN_THE_WAY))
            logger.warning("%s was %s, in the way of what is written: it is now %s", path,
                           "a folder" if named.is_dir() else "a file", named.name)  # fmt: skip
        elif path.is_dir():
            delete(path)  # no folder can be renamed to one that holds something
        unfinished.replace(path)
    except BaseException:
        delete(unfinished)
        raise
    flush(path.parent)


def write_text(path: Path, text: str) -> None:
    """Replace a text file as a whole."""
    with writing(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


def write_json(path: Path, value: object) -> None:
    """Replace a JSON file as a whole."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def write_png(path: Path, picture: Image.Image) -> None:
    """Replace a picture as a whole."""
    with writing(path) as unfinished:
        picture.save(unfinished, format="PNG")


def free_name(path: Path, why: str) -> Path:
    """Return a name that nothing has yet for what has to make way: `path`, and why."""
    names = (path.with_name(f"{path.name}.{why}{number or ''}") for number in itertools.count())
    return next(name for name in names if not os.path.lexists(name))


def lines_within(file: IO[str], longest: int) -> Iterator[str | None]:
    """List the lines of a file; in the place of one that has more than `longest` characters, which never ends, None."""
    while line := file.readline(longest + 1):
        if len(line) <= longest:
            yield line
            continue
        while line and not line.endswith("\n"):
            line = file.readline(longest)
        yield None


def delete_unfinished(folder: Path) -> None:
    """Delete what a killed process left half-written in the folder; only for the one process that may write there."""
    for path in folder.glob(f"{TEMPORARY}*"):
        delete(path)


def delete(path: Path) -> None:
    """Delete a file, a link or a folder, if it is there. A folder is renamed first: half of it is never seen as one."""
    if path.is_symlink() or not path.is_dir():  # of a link to a folder, the link: what lies elsewhere is not ours
        path.unlink(missing_ok=True)
        return
    condemned = path
    if not path.name.startswith(TEMPORARY):
        condemned = path.with_name(f"{TEMPORARY}{os.getpid()}-deleted-{path.name}")
        delete(condemned)
        path.rename(condemned)
    shutil.rmtree(condemned, ignore_errors=True)


def sha256(path: Path) -> str:
    """Compute the hexadecimal sha256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def flush_all(path: Path) -> None:
    """Have the disk, not its cache, hold a file, or a folder with all that is in it."""
    if path.is_dir():
        for inner in path.iterdir():
            flush_all(inner)
    flush(path)


def flush(path: Path) -> None:
    """Have the disk, not its cache, hold a file's contents or a folder's list of names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
