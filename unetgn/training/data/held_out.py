"""Holds the images of a stream that are never trained on, as many of them as a held-out loss is of."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from unetgn.training.data.decoding import Picture, RowDecoder
from unetgn.training.data.images import Images
from unetgn.training.data.stream import ShardStream


class HeldOutRows(Images):
    """Numbers held-out images of a stream: the first data.held_out_most of shards in an order that is always the same.

    They stay encoded in memory. Of the other rows of the shards as little is read as their format allows.
    Raises DataError where too many cannot be read.
    """

    def __init__(self, stream: ShardStream) -> None:
        self.framing, self.shape, self.class_names = stream.framing, stream.framing.shape, stream.class_names
        self._source = stream.source
        self.pictures = [(picture.row, picture.label) for picture in self._first(stream, stream.config.held_out_most)]

    def __len__(self) -> int:
        return len(self.pictures)

    def image(self, index: int, random: np.random.Generator | None = None) -> np.ndarray:
        row, _ = self.pictures[index]
        return self.framing.read(self._source.shards.columns.image_of(row.values), random)

    def label(self, index: int) -> int:
        return self.pictures[index][1]

    def name(self, index: int) -> str:
        return self._source.name(self.pictures[index][0])

    def usable(self) -> np.ndarray:
        """Return the numbers of all images, which were decoded when they were found."""
        return np.arange(len(self))

    def fingerprint(self) -> str:
        return repr([self._source.short_name(row) for row, _ in self.pictures])

    @staticmethod
    def _first(stream: ShardStream, most: int) -> Iterator[Picture]:
        """Find so many pictures that are held out."""
        order = np.random.Generator(np.random.Philox(0)).permutation(len(stream.shards))
        rows = (row for shard in order for row in stream.held_out_rows(int(shard)))
        for number, picture in enumerate(RowDecoder(stream.source).pictures(rows), start=1):
            yield picture
            if number == most:
                return
