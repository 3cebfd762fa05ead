"""Defines what streaming asks of shards: their rows in order, some of them without reading the others."""

from __future__ import annotations

import tarfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

Values = dict[str, Any]
Wanted = Callable[[int, str], bool]  # of a row's number in its shard, and its key

BROKEN = (OSError, EOFError, zlib.error, tarfile.TarError)  # how a shard says that it is no whole one
LARGEST = 2**28  # bytes of an encoded image, or of another file of a sample that is read


class CutShort(ValueError):
    """Says that a shard ends before its end, or is damaged so that nothing behind can be read."""


@dataclass(frozen=True)
class Row:
    """Holds one row of a shard, its image encoded."""

    shard: int
    number: int
    """Counts the rows of the shard, from 0."""
    key: str
    """Names the row within its shard."""
    values: Values


def weight(row: Row) -> int:
    """Count the bytes of a row: of its contents, its texts and its name."""
    parts = (part for value in row.values.values() for part in (value.values() if isinstance(value, dict) else [value]))
    return len(row.key) + sum(len(part) for part in parts if isinstance(part, (bytes, str)))


class RowColumns(Protocol):
    """Finds image and label in a row."""

    @property
    def class_names(self) -> list[str] | None:
        """Holds the names of the classes where the data set has them."""
        ...

    def image_of(self, row: Values) -> bytes:
        """Return the contents of a row's image. Raises ValueError where there are none."""
        ...

    def label_of(self, row: Values) -> Any:
        """Return the label of a row, whatever stands there; None where nothing does. Raises ValueError."""
        ...

    def why_no_labels(self) -> str:
        """Say why there are no labels, and what would do."""
        ...


class Shards(Protocol):
    """Numbers the shards of a data set, and knows their columns."""

    files: list[str]
    names: list[str]
    """Of the files, below the folder that all of them are in."""
    left_out: dict[str, int]
    columns: RowColumns
    labelled: bool
    """False where the first row has no label."""
    keyed: bool
    """True where the keys of rows come with the data; else they are their numbers."""

    def __len__(self) -> int: ...

    def rows(self, shard: int, wanted: Wanted = lambda number, key: True) -> Iterator[Row]:
        """Read the rows of a shard that are wanted, in order; of the others as little as the format allows.

        Raises CutShort where there is no more to be had; of OSError those that are the system's.
        """
        ...

    def most_rows(self, shard: int) -> int:
        """Return a number of rows that the shard cannot have more of. Raises OSError or CutShort."""
        ...

    def cut(self, shard: int) -> str | None:
        """Say how the shard's end shows that it is cut short; None where it does not. Nothing else is read."""
        ...
