"""Makes the batches of one reader of a stream: a loader's worker, or the training process itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice

import numpy as np
from torch.utils.data import IterableDataset, default_collate, get_worker_info

from unetgn.training.data.decoding import Picture, RowDecoder, Source
from unetgn.training.data.mixing import Pass, Standing
from unetgn.training.data.rows import Row, Wanted
from unetgn.training.data.samples import Batch, Draws, Purpose, StepBatches, random_generator
from unetgn.training.errors import DataError


def deal(
    seed: int, shards: int, standing: Standing, *, reader: int, readers: int
) -> tuple[list[int], np.random.Generator]:
    """Return the shards that one of the readers has in the standing's pass, and the generator that mixes their rows."""
    random = random_generator(seed, Purpose.ORDER, standing.begun, standing.number)
    return random.permutation(shards)[reader::readers].tolist(), random


class ShardReader(IterableDataset):
    """Reads the batches of one worker, each with where the reader stands after it.

    Batch b of a rank, counted from the run's first step, is of reader b % workers: worker w of a run that goes on at
    batch b is the reader that has it. In the place of a batch that could not be made there is a DataError.
    """

    def __init__(
        self,
        source: Source,
        read: Callable[[int, Wanted], Iterator[Row]],
        draws: Draws,
        batches: StepBatches,
        standings: list[Standing],
    ) -> None:
        self.source, self.read, self.draws, self.batches, self.standings = source, read, draws, batches, standings

    def __iter__(self) -> Iterator[tuple[Batch, Standing] | DataError]:
        info = get_worker_info()
        worker, workers = (0, 1) if info is None else (info.id, info.num_workers)
        reader = (self.batches.first_step * self.batches.accumulation + worker) % workers
        pictures = self.pictures(
            self.standings[reader], self.batches.rank * workers + reader, self.batches.ranks * workers
        )
        try:
            for counters in islice(self.batches, worker, None, workers):
                batch = default_collate([self.sample(counter, next(pictures)) for counter in counters])
                yield batch, self.standing()
        except DataError as error:
            yield error

    def standing(self) -> Standing:
        """Say where the reader stands."""
        return replace(self.at, taken=self.rows.taken, finished=tuple(self.rows.finished))

    def pictures(self, standing: Standing, reader: int, readers: int) -> Iterator[Picture]:
        """Decode pass after pass over this reader's shards, from its standing on.

        Raises DataError where a whole pass has nothing to give.
        """
        source, decoder = self.source, RowDecoder(self.source)
        self.at = standing
        while True:
            shards, random = deal(self.draws.seed, len(source.shards), self.at, reader=reader, readers=readers)
            self.rows = Pass(shards, self.read, self.at, size=source.config.shuffle_buffer, random=random)
            given = 0
            for picture in decoder.pictures(row for row in self.rows if not source.is_held_out(row)):
                given += 1
                yield picture
            if not given and not self.at.taken:
                raise DataError(f"a reader's shards of data.path {source.config.path!r} hold no readable image")
            decoder.sum_up()
            self.at = Standing(self.at.begun, self.at.number + 1)

    def sample(self, counter: int, picture: Picture) -> Batch:
        """Make sample `counter` of the run, with this picture."""
        framing = self.source.framing
        return self.draws.sample(
            counter, lambda random: framing.cut(picture.image, random), shape=framing.shape, label=picture.label
        )
