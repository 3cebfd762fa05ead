"""Reads WebDataset shards in sequence: tar archives, plain or compressed by gzip, that may be anybody's."""

from __future__ import annotations

import contextlib
import gzip
import itertools
import logging
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from unetgn.json_files import parse
from unetgn.messages import plain, said, short
from unetgn.training.data.folders import open_file
from unetgn.training.data.hugging_face import Files
from unetgn.training.data.images import WITHOUT_CLASSES
from unetgn.training.data.pictures import IMAGE_SUFFIXES
from unetgn.training.data.rows import BROKEN, LARGEST, CutShort, Row, Shards, Values, Wanted
from unetgn.training.errors import reason

logger = logging.getLogger(__name__)

LONG_HEADERS = (
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
)
LONGEST_HEADER = 2**14  # bytes: tarfile's search in them takes time with the square
BLOCK = 512  # bytes: members of an archive begin at multiples
UNPACKED, TIMES = 2**30, 64  # bytes that any shard may unpack to, and how many times its size beyond that
CHUNK, BEHIND = 2**16, 2**10  # bytes, and so many times these, that are read behind the end of what is not compressed
IN_A_ROW = 2**16  # links, folders, devices and files of no sample that may follow each other
COMPRESSED = {b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}  # which is not read, by how it begins
LONGEST_JSON = 2**22  # bytes
KEY = "__key__"  # of a sample, where values have it


class TarColumns:
    """Finds image and label among the files of a sample, by their endings, which need not be alike in all samples.

    `image` and `label`, the defaults, mean any ending of an image, and `cls` or a key of that name in `json`.
    Raises ValueError where the first sample has no image, or several.
    """

    class_names: list[str] | None = None

    def __init__(self, path: str, first: Values, image_column: str, label_column: str) -> None:
        self.image, self.label, self.first = image_column, label_column, first
        endings = [name for name in first if name != KEY]
        if image_column == "image" and "image" not in first:
            images = images_among(first)
            if len(images) != 1:
                raise ValueError(
                    f"data.path {path!r}: of the endings {short(endings)} in the shards {len(images)} are of images; "
                    "name one as data.image_column"
                )
        elif image_column not in first:
            raise ValueError(f"data.image_column {image_column!r} is not in {path!r}; its columns: {short(endings)}")

    def image_of(self, row: Values) -> bytes:
        if self.image in row:
            return row[self.image]
        images = images_among(row) if self.image == "image" else []
        if len(images) == 1:
            return row[images[0]]
        endings = plain(", ".join(name for name in row if name != KEY))
        raise ValueError(f"{len(images)} images in a sample of the endings {endings}; name one as data.image_column")

    def label_of(self, row: Values) -> Any:
        for ending in (self.label, "cls") if self.label == "label" else (self.label,):
            if ending in row:
                text = row[ending].decode("utf-8", "replace").strip()
                return int(text) if re.fullmatch(r"-?\d{1,18}", text) else text
        return read_json(row).get(self.label)

    def why_no_labels(self) -> str:
        could = [name for name in self.first if name not in images_among(self.first) and name != KEY]
        could = sorted(read_json(self.first)) + [name for name in could if name != "json"]
        missing = f"the images have no classes: no file of the first sample is {self.label!r}, nor a key in its json"
        if not could:
            return f"{missing}: {WITHOUT_CLASSES}"
        return f"{missing}; it has {plain(', '.join(could))}: set data.label_column={plain(could[0])}"


def images_among(row: Values) -> list[str]:
    """List the endings of a sample that are of images."""
    return [name for name in row if is_image(name)]


def is_image(ending: str) -> bool:
    """Return True for an ending of images, with whatever stands before its last dot."""
    return f".{ending.rpartition('.')[2]}" in IMAGE_SUFFIXES


def read_json(row: Values) -> Values:
    """Read the JSON object of a sample, {} where there is none. Raises ValueError where it cannot be read."""
    read = parse(row["json"], "its json", limit=LONGEST_JSON, finite=False) if "json" in row else {}
    return read if isinstance(read, dict) else {}


class TarShards(Shards):
    """Reads WebDataset shards: the files of a tar archive that are named alike up to the first dot are a sample.

    Of its files only the image, the label and json are read; what else there is, pickles among it, stays closed.
    """

    keyed = True

    def __init__(self, path: str, files: Files, image_column: str, label_column: str) -> None:
        self.files, self.names, self.left_out = files.paths, files.names, dict(files.left_out)
        self._read = {image_column, label_column, "json", *(["cls"] if label_column == "label" else [])}
        self._image_column, self._said = image_column, False
        first = self._first()
        if first is None:
            raise ValueError(f"data.path {path!r} holds no files in its tar shards")
        self.columns = TarColumns(path, first.values, image_column, label_column)
        try:
            self.labelled = self.columns.label_of(first.values) is not None
        except ValueError as error:
            raise ValueError(
                f"{plain(first.key)} of {self.files[first.shard]}: {said(error)}; mend it, or remove it"
            ) from error

    def __len__(self) -> int:
        return len(self.files)

    def rows(self, shard: int, wanted: Wanted = lambda number, key: True) -> Iterator[Row]:
        number, values = -1, Values()
        try:
            for key, ending, contents in self._members(self.files[shard]):
                if values.get(KEY) != key:
                    if values and wanted(number, values[KEY]):
                        yield Row(shard, number, values[KEY], values)
                    number, values = number + 1, {KEY: key}
                if ending in values:
                    raise CutShort(f"{plain(f'{key}.{ending}')} is there twice")
                values[ending] = contents() if self._is_read(ending) and wanted(number, key) else b""
            if values and wanted(number, values[KEY]):
                yield Row(shard, number, values[KEY], values)
        except (*BROKEN, ValueError, OverflowError, RecursionError) as error:
            if isinstance(error, OSError) and error.errno:  # of the system
                raise
            where = f"in {plain(values[KEY])}: " if values else ""
            raise CutShort(f"{self.files[shard]}: {where}{reason(error)}") from error

    def most_rows(self, shard: int) -> int:
        with open_anywhere(self.files[shard]) as file:
            return Archive(file).limit // BLOCK

    def cut(self, shard: int) -> str | None:
        if "://" in self.files[shard] and not Path(self.files[shard]).exists():
            return None  # which would be a request for each
        with open_file(self.files[shard]) as file:
            if file.read(2) == b"\x1f\x8b":
                return None  # what is compressed shows it when it is read
            size = file.seek(0, 2)
            file.seek(max(0, size - BLOCK))
            return None if size % BLOCK == 0 and not any(file.read()) else "it has no end-of-archive mark"

    def _first(self) -> Row | None:
        """Read the first sample of the first shard that has one. Raises CutShort where none has, and one is broken."""
        refusal: CutShort | None = None
        for shard in range(len(self)):
            try:
                if (row := next(self.rows(shard), None)) is not None:
                    return row
            except CutShort as error:
                refusal = refusal or error
        if refusal is not None:
            raise refusal
        return None

    def _is_read(self, ending: str) -> bool:
        return ending in self._read or (self._image_column == "image" and is_image(ending))

    def _members(self, file: str) -> Iterator[tuple[str, str, Any]]:
        """List the files of samples: key, ending, and what reads their contents."""
        others = special = 0
        with open_anywhere(file) as source:
            archive = Archive(source)
            with tarfile.TarFile(fileobj=archive, mode="r", tarinfo=Member) as tar:  # type: ignore[arg-type]
                while (member := tar.next()) is not None:
                    # Else all of them would be kept.
                    tar.members.clear()  # type: ignore[attr-defined]
                    folder, _, name = member.name.rpartition("/")
                    start, dot, ending = name.partition(".")
                    if not member.isreg() or member.issparse() or not start or not dot or name.startswith("__"):
                        others += 1
                        special += not member.isdir() and (member.issparse() or not member.isreg())
                        if others > IN_A_ROW:
                            raise CutShort(f"more than {IN_A_ROW:,} entries follow each other that are of no sample "
                                           "(links, folders, devices): remove them")  # fmt: skip
                        continue
                    others = 0
                    yield f"{folder}/{start}" if folder else start, ending.lower(), lambda m=member: read(tar, m)
            archive.finish()
        if special and not self._said:
            self._said = True
            logger.warning("%s holds %s links, pipes, devices or sparse files, which are not read; what other shards "
                           "hold of these is not said", file, f"{special:,}")  # fmt: skip


class Member(tarfile.TarInfo):
    """Holds an entry of an archive, read so that only an end-of-archive mark is an end."""

    def _proc_member(self, tar: tarfile.TarFile) -> Member:
        """Read what a header announces. Raises ReadError for sizes that lead back, and for very long headers."""
        if self.size < 0 or (self.type in LONG_HEADERS and self.size > LONGEST_HEADER):
            raise tarfile.ReadError(f"a header of {self.size:,} bytes of the type {self.type!r} is none")
        try:
            return super()._proc_member(tar)  # type: ignore[misc]
        except (IndexError, ValueError) as error:
            raise tarfile.ReadError(f"a header is damaged ({said(error)})") from None

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> Member:
        """Read the next entry. Raises ReadError where tarfile would take damage or the end of the file for the end."""
        try:
            return super().fromtarfile(tar)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            raise  # the mark
        except tarfile.HeaderError as error:
            place = tar.fileobj.tell() if tar.fileobj else 0
            raise tarfile.ReadError(f"it ends early or is damaged at byte {place:,} ({said(error)})") from None


def read(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    """Read a file of an archive. Raises ReadError where it is too large, or not there to its end."""
    if member.size > LARGEST:
        raise tarfile.ReadError(f"{plain(member.name)} has {member.size:,} bytes; at most {LARGEST:,} are read")
    opened = tar.extractfile(member)
    contents = b"" if opened is None else opened.read()
    if len(contents) != member.size:
        raise tarfile.ReadError(
            f"{plain(member.name)} ends early: {len(contents):,} of {member.size:,} bytes are there"
        )
    return contents


class Archive:
    """Reads what a tar file holds, unpacked, forward only: never much in one piece, nor much more than its size."""

    def __init__(self, file: IO[bytes]) -> None:
        self.packed, begins = file, file.read(8)
        self.size = file.seek(0, 2)
        file.seek(0)
        for start, name in COMPRESSED.items():
            if begins.startswith(start):
                raise tarfile.ReadError(f"it is compressed by {name}: unpack it, or compress it by gzip")
        self.file = gzip.GzipFile(fileobj=file) if begins.startswith(b"\x1f\x8b") else file
        self.limit = self.size if self.file is file else max(UNPACKED, TIMES * self.size)

    def read(self, count: int) -> bytes:
        """Read `count` bytes, or those that are left. Raises ReadError where they are too many."""
        if count > LARGEST:
            raise tarfile.ReadError(f"an entry takes {count:,} bytes at once; at most {LARGEST:,} are read")
        self._check(self.file.tell() + count)
        return self.file.read(count)

    def seek(self, place: int) -> int:
        """Go forward to a place. Raises ReadError where it is too far."""
        self._check(place)
        return self.file.seek(place)

    def tell(self) -> int:
        """Return the place of the next byte."""
        return self.file.tell()

    def finish(self) -> None:
        """Read on behind the end-of-archive mark, where zeros are, and last what tells gzip whether all was right.

        Raises ReadError where anything else stands there.
        """
        for count in itertools.count():
            if not (block := self.read(CHUNK)) or (count > BEHIND and self.file is self.packed):
                return
            if any(block):
                raise tarfile.ReadError(f"behind its end-of-archive mark, before byte {self.tell():,}, there is more: "
                                        "another archive, or damage")  # fmt: skip

    def _check(self, place: int) -> None:
        if isinstance(self.file, gzip.GzipFile):
            check_unpacked("it", place, self.size)


def check_unpacked(what: str, unpacked: int, packed: int) -> None:
    """Raise ReadError where so many bytes, unpacked, are too many to come of so few."""
    if unpacked > max(UNPACKED, TIMES * packed):
        raise tarfile.ReadError(
            f"{what} unpacks to {unpacked:,} bytes or more, from {packed:,}; beyond {UNPACKED:,} at most {TIMES} times "
            "its size is read"
        )


@contextlib.contextmanager
def open_anywhere(file: str) -> Iterator[IO[bytes]]:
    """Open a file of this disk, or of the hub, whose names begin with hf://."""
    if "://" not in file or Path(file).exists():
        with open_file(file) as opened:
            yield opened
        return
    import fsspec

    with fsspec.open(file, "rb") as opened:
        yield opened
