"""Reads a pass over shards through a buffer that mixes their rows, and begins in the middle of one where it has to.

Which row comes next depends on the numbers of rows alone. So where a reader stands is a few numbers, and going there
takes neither the rows that are behind nor a state of random numbers: the mixing is repeated with numbers in the place
of rows, and then the rows that would be in the buffer are read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, count, islice
from typing import TypeVar

import numpy as np

from unetgn.training.data.rows import Row, Wanted, weight
from unetgn.training.errors import DataError

BUFFERED = 2**32  # bytes that a reader's buffer may hold

T = TypeVar("T")


@dataclass(frozen=True)
class Standing:
    """Says where a reader stands."""

    begun: int
    """Step at which its passes began, of which their orders are functions."""
    number: int = 0
    """Passes that are behind it."""
    taken: int = 0
    """Rows of this pass that came out of the buffer."""
    finished: tuple[int, ...] = ()
    """Rows of the shards that were read to their end in this pass, in their order."""


@dataclass(frozen=True)
class Place:
    """Names a row that was read before, and takes its place."""

    shard: int
    number: int


class Pass:
    """Gives the rows of shards, in the order of these, mixed: those that come after `standing`."""

    def __init__(
        self,
        shards: Sequence[int],
        read: Callable[[int, Wanted], Iterator[Row]],
        standing: Standing,
        *,
        size: int,
        random: np.random.Generator,
    ) -> None:
        self.shards, self.read, self.size, self.random = shards, read, size, random
        self.taken, self.finished = standing.taken, list(standing.finished)
        self.held = 0  # bytes in the buffer

    def __iter__(self) -> Iterator[Row]:
        buffer: list[Row | Place] = []
        rows: Iterator[Row | Place] = chain(self._places(), self._rows(buffer))
        mixed = mix(rows, buffer, self.size, self.random)
        for _ in range(self.taken):
            next(mixed)
        for row in mixed:
            assert isinstance(row, Row)  # _rows has filled the buffer
            self.taken += 1
            self.held -= weight(row)
            yield row

    def _read_before(self) -> tuple[int, int]:
        """Count the rows that were read before: all, and those of the shard that was not read to its end."""
        if len(self.finished) == len(self.shards) or not self.taken:
            return sum(self.finished), 0
        total = self.taken + self.size - 1
        return total, total - sum(self.finished)

    def _places(self) -> Iterator[Place]:
        """List the rows that were read before."""
        total, _ = self._read_before()
        counts = chain((range(rows) for rows in self.finished), [count()])
        yield from islice(
            (Place(shard, number) for shard, numbers in zip(self.shards, counts, strict=False) for number in numbers),
            total,
        )

    def _rows(self, buffer: list[Row | Place]) -> Iterator[Row]:
        """Fill the buffer, and read on."""
        _, first = self._read_before()
        self._fill(buffer)
        for shard in self.shards[len(self.finished) :]:
            rows = first
            for row in self.read(shard, lambda number, key, first=first: number >= first):  # type: ignore[misc]
                rows = row.number + 1
                self._hold(row)
                yield row
            self.finished.append(rows)
            first = 0

    def _fill(self, buffer: list[Row | Place]) -> None:
        """Read the rows whose places are in the buffer. Raises DataError where one is not there."""
        missing: dict[int, dict[int, int]] = {}
        for index, place in enumerate(buffer):
            if isinstance(place, Place):
                missing.setdefault(place.shard, {})[place.number] = index
        for shard, numbers in missing.items():
            rows = self.read(shard, lambda number, key, numbers=numbers: number in numbers)  # type: ignore[misc]
            for row in islice(rows, len(numbers)):
                self._hold(row)
                buffer[numbers[row.number]] = row
        if lost := [place for place in buffer if isinstance(place, Place)]:
            raise DataError(f"row {lost[0].number + 1} of shard {lost[0].shard + 1} was read before the checkpoint, "
                            "and is not there any more: put the shard back as it was")  # fmt: skip

    def _hold(self, row: Row) -> None:
        self.held += weight(row)
        if self.held > BUFFERED:
            raise DataError(f"the buffer of a reader holds more than {BUFFERED:,} bytes: lower data.shuffle_buffer, "
                            f"which is {self.size}")  # fmt: skip


def mix(rows: Iterable[T], buffer: list[T], size: int, random: np.random.Generator) -> Iterator[T]:
    """Give all rows, each drawn from a buffer of the `size` next ones."""
    for row in rows:
        buffer.append(row)
        if len(buffer) == size:
            chosen = int(random.integers(size))
            buffer[chosen], buffer[-1] = buffer[-1], buffer[chosen]
            yield buffer.pop()
    yield from (buffer[i] for i in random.permutation(len(buffer)))
