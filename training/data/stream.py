"""Reads images in sequence, for data that outgrow a disk: Parquet, Arrow or WebDataset shards, here or on the hub.

Shards are dealt out to the readers (loader workers of all ranks) anew in each pass; a reader mixes the images of its
shards in a buffer. Shard order and mixing are functions of (seed, first step, pass), noise and all else that is drawn
are functions of (seed, sample counter) as ever. What is not exact is a resume: where a reader stood is not saved, so a
resumed run begins a new pass, in an order of its own.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import count, islice
from typing import TypeVar

import numpy as np
from PIL import Image
from torch.utils.data import IterableDataset, default_collate, get_worker_info

from training.data.config import DataConfig, make_framing
from training.data.hugging_face import fingerprint_shards, number_of
from training.data.images import check_count, shorten
from training.data.looking import BROKEN_AT_MOST, REFUSED, Tally
from training.data.samples import Batch, Draws, Purpose, Samples, StepBatches, load_batches, random_generator
from training.data.shards import BROKEN, Row, open_shards
from training.errors import DataError, reason

logger = logging.getLogger(__name__)

READ_BEFORE_JUDGING = 100  # images, before a share of broken ones is too large
T = TypeVar("T")


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

    def __str__(self) -> str:
        return f"a stream of {len(self.shards)} shards"

    def progress(self, samples: int) -> dict[str, float]:
        return {}

    def fingerprint(self) -> str:
        return fingerprint_shards(self.shards.files)

    def loader(self, batches: StepBatches, *, num_workers: int, pin_memory: bool) -> Iterator[Batch]:
        """Load batches as Samples says. Raises DataError while reading.

        Where a run goes on, warn that it meets other images than the unbroken run.
        """
        if batches.first_step > 0 and batches.rank == 0:
            logger.warning(
                "data.name stream resumes approximately: step %d begins a new pass over the shards, in an order of its "
                "own; noise, noise levels and dropped labels are those of the unbroken run, the images are not",
                batches.first_step + 1,
            )
        return load_batches(ShardReader(self, batches), None, num_workers=num_workers, pin_memory=pin_memory)

    def check(self, ranks: int, num_workers: int) -> None:
        """Count the shards, decode the first images, warn where some readers have more shards than others.

        Raises ValueError where a reader would have no shard, DataError where the images are unfit.
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
        self.check_texts()
        self.tally = Tally()
        if not sum(1 for _ in RowDecoder(self, self.tally).pictures(self.first_rows())):
            raise DataError(
                f"data.path {self.config.path!r}: none of the first {READ_BEFORE_JUDGING} images is readable"
                f"; the first: {self.tally.first_broken}"
            )

    def first_rows(self) -> Iterator[tuple[str, Row]]:
        """Read the rows that are looked at before the start."""
        rows = (row for shard in range(len(self.shards)) for row in self.read_shard(shard))
        return islice(rows, READ_BEFORE_JUDGING)

    def check_texts(self) -> None:
        """Raise ValueError where labels are texts, whose numbers nobody has said."""
        if self.num_classes is None or self.class_names is not None:
            return
        labels = (self.shards.columns.label_of(row) for _, row in self.first_rows())
        if texts := sorted({label for label in labels if isinstance(label, str)}):
            raise ValueError(
                f"the labels of data.path {self.config.path!r} are texts, and a stream does not know them all before: "
                f"name them in the order of their numbers, as in 'data.class_names={json.dumps(texts)}' (these are "
                f"in the first {READ_BEFORE_JUDGING} images), or, for Parquet and Arrow on this disk, set "
                "data.name=datasets, which finds them by itself"
            )

    def rows(self, order: np.random.Generator, reader: int, readers: int) -> Iterator[tuple[str, Row]]:
        """Read the mixed rows, with their names, of the shards that `reader` of `readers` has in this order's pass."""
        shards = order.permutation(len(self.shards))[reader::readers]
        rows = (row for shard in shards for row in self.read_shard(int(shard)))
        return mix(rows, self.config.shuffle_buffer, order)

    def read_shard(self, shard: int) -> Iterator[tuple[str, Row]]:
        """Read the rows of a shard, with their names. Raises DataError, naming the shard, where it is broken."""
        try:
            yield from self.shards.rows(shard)
        except (*BROKEN, ValueError) as error:
            file = self.shards.files[shard]
            raise DataError(
                f"the shards of data.path {self.config.path!r} cannot be read: {file}: {reason(error)}"
            ) from error


def mix(rows: Iterable[T], size: int, random: np.random.Generator) -> Iterator[T]:
    """Give all rows, each drawn from a buffer of the `size` next ones."""
    buffer: list[T] = []
    for row in rows:
        buffer.append(row)
        if len(buffer) == size:
            chosen = int(random.integers(size))
            buffer[chosen], buffer[-1] = buffer[-1], buffer[chosen]
            yield buffer.pop()
    yield from (buffer[i] for i in random.permutation(len(buffer)))


@dataclass(frozen=True)
class Picture:
    """Holds a row, decoded and checked."""

    image: Image.Image
    label: int


class RowDecoder:
    """Decodes rows, leaves out what is broken or unfit, and judges how much that is."""

    def __init__(self, stream: ShardStream, tally: Tally | None = None) -> None:
        self.stream, self.tally = stream, tally
        self.read = self.broken = 0
        self.last: tuple[str, Exception] = ("", ValueError())  # of the broken ones
        self.numbers: Mapping[str, int] = {name: i for i, name in enumerate(stream.class_names or [])}

    def pictures(self, rows: Iterable[tuple[str, Row]]) -> Iterator[Picture]:
        """Decode the pictures of the named rows; warn of each that is left out.

        Raises DataError where that is more than 1 % of at least a hundred rows, and for a label that is no class.
        """
        framing = self.stream.framing
        for name, row in rows:
            self.read += 1
            label = self.label(name, row)
            try:
                encoded = self.stream.shards.columns.image_of(row)
                image = framing.open(encoded)
                if self.tally is not None:
                    self.tally.add(name, framing.facts(encoded))
            except Exception as error:  # decoders raise anything, from SyntaxError to struct.error
                self.leave_out(name, error)
            else:
                yield Picture(image, label)
            if self.read >= READ_BEFORE_JUDGING and self.broken > BROKEN_AT_MOST * self.read:
                raise self.too_many()

    def leave_out(self, name: str, error: Exception) -> None:
        """Count a picture that is broken or unfit, and say so."""
        self.broken, self.last = self.broken + 1, (name, error)
        logger.warning("skipping a broken image: %s (%s)", name, reason(error))
        if self.tally is not None:
            self.tally.leave_out(name, reason(error))

    def too_many(self) -> DataError:
        """Say that too many are broken, and what would do about the last one."""
        name, error = self.last
        what, remedy = REFUSED.get(type(error), ("are broken or too small", "mend the shards"))
        return DataError(
            f"{self.broken} of {self.read} images of {self.stream.config.path!r} {what}, more than "
            f"{BROKEN_AT_MOST:.0%}; the last is {name} ({reason(error)}): {remedy}"
        )

    def label(self, name: str, row: Row) -> int:
        """Return the class of a row, -1 for a network without classes. Raises DataError where it has none."""
        classes = self.stream.num_classes
        if classes is None:
            return -1
        label = self.stream.shards.columns.label_of(row)
        if label is None:
            raise DataError(f"{name} has no label; remove the row, or give it one")
        if isinstance(label, str):
            if label not in self.numbers:
                known = shorten(list(self.numbers)) or "none"
                raise DataError(
                    f"{name} has the label {label!r}, which is not in data.class_names ({known}): add it, and set "
                    f"model.num_classes to their number"
                )
            return self.numbers[label]
        if not 0 <= number_of(label) < classes:
            raise DataError(
                f"{name} has the label {label!r}, but with model.num_classes {classes} they are numbers from "
                f"0 to {classes - 1}: set it, or name the right data.label_column"
            )
        return number_of(label)


class ShardReader(IterableDataset):
    """Reads the batches of one worker, and gives a DataError in the place of one that could not be made."""

    def __init__(self, stream: ShardStream, batches: StepBatches) -> None:
        self.stream, self.batches = stream, batches

    def __iter__(self) -> Iterator[Batch | DataError]:
        worker = get_worker_info()
        first, workers = (0, 1) if worker is None else (worker.id, worker.num_workers)
        pictures = self.pictures(self.batches.rank * workers + first, self.batches.ranks * workers)
        try:
            for counters in islice(self.batches, first, None, workers):
                yield default_collate([self.sample(counter, next(pictures)) for counter in counters])
        except DataError as error:
            yield error

    def pictures(self, reader: int, readers: int) -> Iterator[Picture]:
        """Decode pass after pass over this reader's shards. Raises DataError where a pass has nothing to give."""
        decoder, seed = RowDecoder(self.stream), self.stream.seed
        for number in count():
            before = decoder.read - decoder.broken
            order = random_generator(seed, Purpose.ORDER, self.batches.first_step, number)
            yield from decoder.pictures(self.stream.rows(order, reader, readers))
            if decoder.read - decoder.broken == before:
                raise DataError(f"a reader's shards of data.path {self.stream.config.path!r} hold no readable image")

    def sample(self, counter: int, picture: Picture) -> Batch:
        """Make sample `counter` of the run, with this picture."""
        framing = self.stream.framing
        return self.stream.draws.sample(
            counter, lambda random: framing.cut(picture.image, random), shape=framing.shape, label=picture.label
        )
