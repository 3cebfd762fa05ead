"""Reads images in sequence, for data that outgrow a disk: Parquet, Arrow or WebDataset shards, here or on the hub.

Shards are dealt out to the readers (loader workers of all ranks) anew in each pass; a reader mixes the rows of its
shards in a buffer, and then leaves out those that are held out, named by data.without, or broken: whatever these are,
the order of the others stays. Shard order and mixing are functions of (seed, step at which the passes began, pass,
reader), noise and all else that is drawn are functions of (seed, sample counter) as ever. A checkpoint says where each
reader stood (unetgn/training/data/mixing.py), and the same number of readers goes on exactly; another number begins a
new pass, in an order of its own.
"""

from __future__ import annotations

import json
import logging
from collections import deque
from collections.abc import Iterator
from itertools import chain, islice
from typing import Any

from unetgn.messages import plain, said
from unetgn.training.data.config import DataConfig, make_framing
from unetgn.training.data.decoding import READ_BEFORE_JUDGING, RowDecoder, Source
from unetgn.training.data.folders import few
from unetgn.training.data.hugging_face import fingerprint_shards
from unetgn.training.data.images import check_count
from unetgn.training.data.looking import Tally
from unetgn.training.data.mixing import Standing
from unetgn.training.data.readers import ShardReader, deal
from unetgn.training.data.rows import BROKEN, CutShort, Row, Wanted
from unetgn.training.data.samples import Batch, Draws, Samples, StepBatches, load_batches
from unetgn.training.data.shards import open_shards
from unetgn.training.data.standing import RankState, standings_of, to_json
from unetgn.training.errors import CheckpointError, DataError, reason

logger = logging.getLogger(__name__)


class ShardStream(Samples):
    """Reads training samples out of shards, without end.

    Raises ValueError where the path holds no shards, or where their columns or classes are not those of the run.
    """

    def __init__(self, config: DataConfig, channels: int, num_classes: int | None, seed: int) -> None:
        assert config.path is not None  # DataConfig sees to it
        self.config, self.num_classes, self.seed = config, num_classes, seed
        self.framing, self.draws = make_framing(config, channels), Draws(seed, config.random_flip)
        self.shards = open_shards(
            config.path,
            image_column=config.image_column,
            label_column=config.label_column,
            subset=config.subset,
            split=config.split,
        )
        self.tally: Tally | None = None
        self.class_names = self.shards.columns.class_names or list(config.class_names or []) or None
        if num_classes is not None:
            if not self.shards.labelled:
                raise ValueError(f"model.num_classes is {num_classes}, but {self.shards.columns.why_no_labels()}")
            if self.class_names is not None:  # else the labels are numbers, and each is checked when it is read
                check_count(num_classes, self.class_names)
        if unknown := [name for name in config.without if name.rpartition(" of ")[2] not in self.shards.names]:
            raise ValueError(
                f"data.without names {few(unknown)}, but data.path {config.path!r} holds {few(self.shards.names)}: "
                f"name images as in 'row 18 of {self.shards.names[0]}'"
            )
        if config.without:
            logger.warning("data.without leaves %d images out: %s", len(config.without), few(config.without))
        self.source = Source(config, self.shards, self.framing, num_classes, self.class_names)
        self.cut: set[int] = set()  # shards that were found to be cut short
        self.saved: tuple[int, list[RankState]] | None = None  # a step, and where the readers of all ranks stood
        self.behind: list[deque[tuple[int, Standing]]] = []  # of each reader here the last batches, and what came after
        self.accumulation = 1

    def __str__(self) -> str:
        return f"a stream of {len(self.shards)} shards"

    def progress(self, samples: int) -> dict[str, float]:
        return {}

    def fingerprint(self) -> str:
        return fingerprint_shards(self.shards.files)

    def state(self, step: int, *, main: bool = True) -> RankState:
        """Say where this rank's readers stand after a step, of which the loader has given all batches, maybe more."""
        end = step * self.accumulation
        return to_json([[standing for number, standing in behind if number < end][-1] for behind in self.behind])

    def restore(self, step: int, states: list[RankState]) -> None:
        self.saved = step, states

    def check_restore(self, states: list[RankState]) -> None:
        """Raise CheckpointError where the readers are said to have read more rows than their shards can have."""
        ranks = [standings_of(state) for state in states]
        readers, most = sum(map(len, ranks)), dict[int, int]()
        if readers > len(self.shards):
            raise CheckpointError(f"it has {readers} readers of {len(self.shards)} shards")
        for number, standing in enumerate(chain.from_iterable(ranks)):
            shards, _ = deal(self.seed, len(self.shards), standing, reader=number, readers=readers)
            for shard, count in zip(shards, self._rows_read(standing, len(shards)), strict=False):
                if shard not in most:
                    most[shard] = self._most_rows(shard)
                if count > most[shard]:
                    raise CheckpointError(f"{count} rows of {self.shards.files[shard]} are said to have been read, "
                                          f"which cannot have more than {most[shard]}")  # fmt: skip

    def _rows_read(self, standing: Standing, shards: int) -> list[int]:
        """Count the rows of each shard that a reader, which has so many, has read. Raises CheckpointError."""
        counts, before = list(standing.finished), sum(standing.finished)
        if standing.taken and len(counts) < shards:
            counts.append(standing.taken + self.config.shuffle_buffer - 1 - before)
        if len(counts) > shards or standing.taken > sum(counts) or min(counts, default=0) < 0:
            raise CheckpointError(f"a reader is said to have read more than its {shards} shards, or less than nothing")
        return counts

    def _most_rows(self, shard: int) -> int:
        try:
            return self.shards.most_rows(shard)
        except CutShort:
            return 0  # it gives none
        except BROKEN as error:
            raise DataError(f"{self.shards.files[shard]} cannot be read: {reason(error)}") from error

    def loader(self, batches: StepBatches, *, num_workers: int, pin_memory: bool) -> Iterator[Batch]:
        """Load batches as Samples says. Raises DataError while reading.

        Where a run goes on with other readers than before, warn that it meets other images than the unbroken run.
        """
        workers, first = max(1, num_workers), batches.first_step * batches.accumulation
        standings = self._standings(batches, workers)
        self.accumulation = batches.accumulation
        self.behind = [deque([(first - 1, one)], maxlen=batches.accumulation + 2) for one in standings]
        reader = ShardReader(self.source, self.read_shard, self.draws, batches, standings)
        loaded = load_batches(reader, None, num_workers=num_workers, pin_memory=pin_memory)
        return self._noting(loaded, first)

    def _noting(self, loaded: Iterator[Any], first: int) -> Iterator[Batch]:
        for number, (batch, standing) in enumerate(loaded, start=first):
            self.behind[number % len(self.behind)].append((number, standing))
            yield batch

    def _standings(self, batches: StepBatches, workers: int) -> list[Standing]:
        """Find where the readers of this rank begin: where they stood, or at the beginning of a new pass."""
        step, why = batches.first_step, "it is not known where the readers stood"
        if self.saved is not None and self.saved[0] == step:
            states = self.saved[1]
            readers = [len(state.get("readers", [])) for state in states]
            if readers == [workers] * batches.ranks:
                return standings_of(states[batches.rank])
            if all(readers):
                why = f"{sum(readers)} readers (processes × workers) were at work, and now {batches.ranks * workers}"
        if step > 0 and batches.rank == 0:
            logger.warning(
                "data.name stream resumes approximately: step %d begins a new pass over the shards, in an order of its "
                "own (%s); noise, noise levels and dropped labels are those of the unbroken run, the images are not",
                step + 1,
                why,
            )
        return [Standing(begun=step)] * workers

    def check(self, ranks: int, num_workers: int) -> None:
        """Count the shards, look at their ends, decode the first images, warn where some readers have more shards.

        Raises ValueError where a reader would have no shard, DataError where shards or images are unfit.
        """
        workers = max(1, num_workers)
        shards, readers = len(self.shards), ranks * workers
        if shards < readers:
            raise ValueError(
                f"data.path {self.config.path!r} has {shards} shards for {readers} readers ({ranks} processes × "
                f"{workers} workers), and each needs one: lower data.num_workers, write more and smaller shards or, "
                "for Parquet and Arrow on this disk, set data.name=datasets"
            )
        if shards % readers:
            logger.warning(
                "%d shards for %d readers: those with fewer show their images more often; a multiple would be right",
                shards,
                readers,
            )
        self.check_ends()
        self.check_texts()
        self.tally = Tally()
        if not sum(1 for _ in RowDecoder(self.source, self.tally).pictures(self.first_rows())):
            raise DataError(
                f"data.path {self.config.path!r}: none of the first {READ_BEFORE_JUDGING} images is readable"
                f"; the first: {self.tally.first_broken}"
            )

    def check_ends(self) -> None:
        """Look at the end of each shard. Raises DataError where one is cut short, or warns where those may be read."""
        ends = {shard: why for shard in range(len(self.shards)) if (why := self.shards.cut(shard)) is not None}
        if not ends:
            return
        named = few([f"{self.shards.files[shard]} ({why})" for shard, why in ends.items()])
        what = f"{len(ends)} of {len(self.shards)} shards end early: {named}"
        if self.config.cut_shards == "refuse":
            raise DataError(f"{what}: copy them again, or set data.cut_shards=read to read what they hold before")
        logger.warning("%s; they are read as far as they go (data.cut_shards)", what)
        self.cut |= ends.keys()

    def first_rows(self) -> Iterator[Row]:
        """Read the rows that are looked at before the start."""
        return islice((row for shard in range(len(self.shards)) for row in self.read_shard(shard)), READ_BEFORE_JUDGING)

    def check_texts(self) -> None:
        """Raise ValueError where labels are texts, whose numbers nobody has said."""
        if self.num_classes is None or self.class_names is not None:
            return
        found = set()
        for row in self.first_rows():
            try:
                found.add(str(label) if isinstance(label := self.shards.columns.label_of(row.values), str) else None)
            except ValueError:  # which is said where the row is decoded
                continue
        if texts := sorted(label for label in found if label is not None):
            raise ValueError(
                f"the labels of data.path {self.config.path!r} are texts, and a stream does not know them all before: "
                f"name them in the order of their numbers, as in 'data.class_names={json.dumps(texts)}' (these are "
                f"in the first {READ_BEFORE_JUDGING} images), or, for Parquet and Arrow on this disk, set "
                "data.name=datasets, which finds them by itself"
            )

    def held_out_rows(self, shard: int) -> Iterator[Row]:
        """Read the rows of a shard that are never trained on."""
        return self.read_shard(shard, lambda number, key: self.source.is_held_out(Row(shard, number, key, {})))

    def read_shard(self, shard: int, wanted: Wanted = lambda number, key: True) -> Iterator[Row]:
        """Read the rows of a shard that are wanted.

        Raises DataError, naming the shard and the last row, where it is broken. With data.cut_shards=read one that is
        cut short ends there, which is said once.
        """
        file, last = self.shards.files[shard], "its beginning"
        try:
            for row in self.shards.rows(shard, wanted):
                last = plain(row.key)
                yield row
        except CutShort as error:
            if self.config.cut_shards == "refuse":
                raise DataError(
                    f"the shards of data.path {self.config.path!r} cannot be read: {said(error)}, after {last}; copy "
                    "it again, or set data.cut_shards=read to read what such shards hold before"
                ) from error
            if shard not in self.cut:
                self.cut.add(shard)
                logger.warning("%s ends early, after %s (%s): what is before is read (data.cut_shards)", file, last,
                               error)  # fmt: skip
        except (*BROKEN, ValueError) as error:
            raise DataError(
                f"the shards of data.path {self.config.path!r} cannot be read: {file}, after {last}: {reason(error)}"
            ) from error
