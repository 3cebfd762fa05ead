"""Reads the paths that a user writes, and says before the work begins where nothing could be written at them."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

LONGEST = 230  # bytes of a file's name: while it is written it has 20 more, and disks take 255


class EmptyPathError(argparse.ArgumentTypeError, ValueError):
    """Says that a path is empty: argparse shows the words of the one, and others catch the other."""


def user_path(text: str) -> Path:
    """Return the path that a user wrote: ~ is the home folder, ~name somebody else's.

    Raises ValueError for an empty one, which would be the current folder.
    """
    if not text:
        raise EmptyPathError("the path is empty; the current folder is .")
    return Path(os.path.expanduser(text))


def lacking(folder: Path, what: str) -> str:
    """Say of a folder that was given to be read that it holds no `what`, or else that it is none, or not there."""
    if folder.is_dir():
        return f"{folder} holds no {what}"
    return f"{folder} is no folder" if folder.exists() else f"{folder}: there is no such folder"


def file_to_write(text: str) -> Path:
    """Parse the file that a program is to write. Raises argparse.ArgumentTypeError where none can be written there."""
    try:
        check_file(path := user_path(text))
    except (OSError, ValueError) as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return path


def folder_to_write(text: str) -> Path:
    """Parse the folder that a program is to write in. Raises argparse.ArgumentTypeError where it cannot be."""
    try:
        check_folder(path := user_path(text))
    except (OSError, ValueError) as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return path


def check_file(path: Path) -> None:
    """Raise OSError, with what would do, where no file could be written at `path`. Writes nothing."""
    if (length := len(os.fsencode(path.name))) > LONGEST:
        raise OSError(f"{path.name[:20]}… is a name of {length} bytes: give one of {LONGEST} at most")
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder: give the name of a file")
    if path.exists():
        if not path.is_file():  # a device, a pipe: a whole file would take its place
            raise FileExistsError(f"{path} is no file: give the name of one")
        if not os.access(path, os.W_OK):
            raise PermissionError(f"{path} cannot be written: it permits it not")
    check_folder(path.parent, path)


def check_folder(folder: Path, path: Path | None = None) -> None:
    """Raise OSError, with what would do, where a folder could not be made or written in, for `path` (default: itself).

    Writes nothing.
    """
    path = path or folder
    if folder.is_symlink() and not folder.exists():
        raise FileNotFoundError(
            f"{folder} is a link to {os.readlink(folder)}, which is not there: mount or make it, or remove the link"
        )
    nearest = next(parent for parent in (folder, *folder.resolve().parents) if parent.exists())
    if not nearest.is_dir():
        raise NotADirectoryError(f"{path} cannot be written: {nearest} is a file")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise PermissionError(f"{path} cannot be written: {nearest} permits it not")
