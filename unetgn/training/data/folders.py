"""Walks through folders that may be anybody's, and opens ordinary files only: reading a pipe would wait for ever."""

from __future__ import annotations

import os
import stat
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO

from unetgn.messages import path_text, plain

NAMED = 3  # of the things of one kind, so many are named in a message
SPECIAL = "no file behind the name (pipes, sockets, devices)"  # in the place of an ending, where files are counted
LISTED = 20  # endings that are told apart
AGAIN = 1000  # folders that links may lead to once more: twenty links upon links would be a million


def walk(root: Path, left_out: Counter[str]) -> Iterator[os.DirEntry[str]]:
    """List the files in a folder and in all below it; follow links, leave out hidden files and hidden folders.

    Pipes, sockets and devices are counted in `left_out` and never opened. Raises ValueError for a link to nothing, or
    to a folder that it is in, for folders that cannot be read, and for links that lead to the same folders again and
    again; once all has been seen, naming the first of them.
    """
    nothing: list[str] = []
    unreadable: list[str] = []
    seen: set[tuple[int, int]] = set()
    again = 0
    pending: list[tuple[str, frozenset[tuple[int, int]]]] = [(str(root), frozenset())]
    while pending:
        folder, above = pending.pop()
        try:
            found = os.stat(folder)
            here = found.st_dev, found.st_ino
            if here in above:
                raise ValueError(f"{path_text(folder)} is a link to a folder that it is in itself: remove it")
            with os.scandir(folder) as entries:
                listed = [entry for entry in entries if not entry.name.startswith(".")]
        except OSError as error:
            unreadable.append(f"{folder} ({error.strerror})")
            continue
        again += here in seen
        if again > AGAIN:
            raise ValueError(f"links below {root} lead to the same folders more than {AGAIN} times, the last is "
                             f"{path_text(folder)}: remove them")  # fmt: skip
        seen.add(here)
        for entry in listed:
            try:
                mode = entry.stat().st_mode
            except OSError:
                nothing.append(entry.path)
                continue
            if stat.S_ISDIR(mode):
                pending.append((entry.path, above | {here}))
            elif stat.S_ISREG(mode):
                yield entry
            else:
                left_out[SPECIAL] += 1
    if nothing:
        others = f" (and {len(nothing) - 1:,} others)" if len(nothing) > 1 else ""
        raise ValueError(f"{path_text(min(nothing))} is a link to nothing: mend or remove it{others}")
    if unreadable:
        raise ValueError(f"{few(unreadable)} cannot be read: let yourself read it (chmod), or put it elsewhere")


def few(names: Sequence[str]) -> str:
    """List the first of some names, and say how many more there are."""
    more = f" and {len(names) - NAMED:,} more" if len(names) > NAMED else ""
    return ", ".join(map(path_text, names[:NAMED])) + more


def list_endings(counts: Mapping[str, int]) -> str:
    """List files by ending: '3 with .svg, 1 with .txt'."""
    return ", ".join(f"{count:,} with {plain(ending)}" for ending, count in sorted(counts.items()))


def fold(counts: Mapping[str, int]) -> dict[str, int]:
    """Keep the commonest endings, and add the others up."""
    common = Counter(counts).most_common(LISTED)
    others = sum(counts.values()) - sum(count for _, count in common)
    return dict(common) | ({f"{len(counts) - LISTED:,} other endings": others} if others else {})


def check_ordinary(path: Path | str) -> None:
    """Raise OSError where there is no file, or no ordinary one: opening a pipe would wait for ever."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError(f"{path_text(path)} is no ordinary file")


def open_file(path: Path | str) -> IO[bytes]:
    """Open an ordinary file to read it. Raises OSError where it is none."""
    check_ordinary(path)
    return open(path, "rb")


def file_size(path: Path | str) -> int:
    """Return the size of an ordinary file in bytes. Raises OSError where it is none."""
    check_ordinary(path)
    return os.stat(path).st_size
