"""Reads images out of a zip archive, which may be anybody's, as out of a folder: nothing is unpacked to the disk."""

from __future__ import annotations

import os
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from unetgn.messages import LONGEST_PATH, plain, said
from unetgn.training.data.folders import check_ordinary
from unetgn.training.data.rows import LARGEST

WINDOWS = 0  # where an archive was written (section 4.4.2)
ENCRYPTED = 0x1  # bit of a member's flags (APPNOTE.TXT of PKWARE, section 4.4.4)
METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # what cameras, telephones and systems write


class ZipFolder:
    """Gives the files in a zip archive by their path in it, in any order, to any number of threads and processes.

    Hidden files and those of macOS's own folder are left out, and so is what leads out of the archive.
    Raises ValueError where it is no zip archive.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._opened: tuple[int, zipfile.ZipFile] | None = None  # by which process
        check_ordinary(path)
        try:
            infos = self._archive().infolist()
        except (zipfile.BadZipFile, NotImplementedError, OSError, ValueError) as error:
            raise ValueError(f"data.path {str(path)!r} cannot be read as a zip archive: {said(error)}") from error
        self._infos = {Path(path_of(info)): info for info in infos if is_file_below(info)}

    def files(self, left_out: Counter[str]) -> Iterator[tuple[Path, int]]:
        """List the files with their sizes in bytes; nothing else is there to be counted."""
        return ((file, info.file_size) for file, info in self._infos.items())

    def source(self, file: Path) -> bytes:
        """Return the contents of a file. Raises OSError where it cannot be read, or would take all memory."""
        info = self._infos[file]  # of the files that data.without names, none is read
        if info.flag_bits & ENCRYPTED:
            raise OSError("it is encrypted: unpack the archive")
        if info.compress_type not in METHODS:
            raise OSError(f"it is compressed by method {info.compress_type}, not by deflate: unpack the archive")
        if info.file_size > LARGEST:
            raise OSError(f"it unpacks to {info.file_size} bytes, and at most {LARGEST} are read")
        try:
            with self._archive().open(info) as contents:
                return contents.read(info.file_size)  # and no more, whatever is packed there
        except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, ValueError) as error:
            raise OSError(f"damaged in its archive: {said(error)}") from error

    def end(self, file: Path) -> bytes:
        """Return the checksum of a file that the archive has, in the place of its end."""
        info = self._infos.get(file)
        return b"" if info is None else f"{info.CRC:08x}".encode()

    def name(self, file: Path) -> str:
        """Return what messages call a file."""
        return plain(f"{file} in {self.path}", most=2 * LONGEST_PATH)

    def _archive(self) -> zipfile.ZipFile:
        if self._opened is None or self._opened[0] != os.getpid():  # whoever is forked has its own place in the file
            self._opened = os.getpid(), zipfile.ZipFile(self.path)
        return self._opened[1]

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_opened": None}


def path_of(info: zipfile.ZipInfo) -> str:
    """Return the path of a file; some programs of Windows, PowerShell 5 among them, write \\ in the place of /."""
    return info.filename.replace("\\", "/") if info.create_system == WINDOWS else info.filename


def is_file_below(info: zipfile.ZipInfo) -> bool:
    """Return True for a file that lies in the archive, and is not hidden."""
    path = PurePosixPath(path_of(info))
    parts = path.parts
    below = bool(parts) and not path.is_absolute() and ".." not in parts
    return (
        below
        and not path_of(info).endswith("/")
        and not any(part.startswith(".") or part == "__MACOSX" for part in parts)
    )
