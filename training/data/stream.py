"""Reads images in sequence, for data that outgrow a disk: Parquet, Arrow or WebDataset shards, here or on the hub.

Shards are dealt out to the readers (loader workers of all ranks) anew in each pass; a reader mixes the images of its
shards in a buffer. Shard order and mixing are functions of (seed, first step, pass), noise and all else that is drawn
are functions of (seed, sample counter) as ever. What is not exact is a resume: where a reader stood is not saved, so a
resumed run begins a new pass, in an order of its own.
"""

from __future__ import annotations

import logging
import re
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from PIL import Image
from torch.utils.data import IterableDataset, default_collate, get_worker_info

from training.data.config import DataConfig, make_framing
from training.data.hugging_face import (
    as_encoded_images,
    find_columns,
    find_endings,
    find_files,
    fingerprint_shards,
    import_datasets,
)
from training.data.images import BROKEN_AT_MOST, check_count, reason
from training.data.samples import Batch, Draws, Purpose, Samples, StepBatches, load_batches, random_generator
from training.errors import DataError

logger = logging.getLogger(__name__)

READ_BEFORE_JUDGING = 100  # images, before a share of broken ones is too large
Row = dict[str, Any]
T = TypeVar("T")


class ShardStream(Samples):
    """Reads training samples out of shards, without end.

    Raises ValueError where the path holds no shards, or where their columns or classes are not those of the run.
    """

    def __init__(self, config: DataConfig, channels: int, num_classes: int | None, seed: int) -> None:
        assert config.path is not None  # DataConfig sees to it
        self.config, self.num_classes, self.seed = config, num_classes, seed
        self.framing, self.draws = make_framing(config, channels), Draws(seed, config.random_flip)
        self._files, data = open_shards(config)
        find = find_endings if "__key__" in data.features else find_columns
        self.columns = find(config.path, data.features, config.image_column, config.label_column)
        names = self.columns.class_names(data.features)
        if names or not self.columns.label:  # else the labels are numbers, and each is checked when it is read
            check_count(num_classes, len(names or []))
        self._data = as_encoded_images(data, config.path, self.columns.image)

    def __str__(self) -> str:
        return f"a stream of {self._data.num_shards} shards"

    def progress(self, samples: int) -> dict[str, float]:
        return {}

    def fingerprint(self) -> str:
        return fingerprint_shards(self._files)

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
        shards, readers = self._data.num_shards, ranks * workers
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
        rows = (row for shard in range(shards) for row in self.read_shard(shard))
        if not sum(1 for _ in RowDecoder(self).pictures(islice(rows, READ_BEFORE_JUDGING))):
            raise DataError(
                f"data.path {self.config.path!r}: none of the first {READ_BEFORE_JUDGING} images is readable"
            )

    def rows(self, order: np.random.Generator, reader: int, readers: int) -> Iterator[tuple[str, Row]]:
        """Read the mixed rows, with their names, of the shards that `reader` of `readers` has in this order's pass."""
        shards = order.permutation(self._data.num_shards)[reader::readers]
        rows = (row for shard in shards for row in self.read_shard(int(shard)))
        return mix(rows, self.config.shuffle_buffer, order)

    def read_shard(self, shard: int) -> Iterator[tuple[str, Row]]:
        """Read the rows of a shard, images encoded, and what messages call them."""
        one = self._data.shard(num_shards=self._data.num_shards, index=shard)
        # In a loader's worker, iter(one) would leave out what it takes for the other workers'; one.iter does not. Of
        # several rows it makes a table, for which datasets 4.0 does not order the columns of tar shards alike.
        for number, columns in enumerate(one.iter(batch_size=1), start=1):
            row = {key: values[0] for key, values in columns.items()}
            yield f"{row.get('__key__', f'row {number}')} of {self._files[shard]}", row


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


def open_shards(config: DataConfig) -> tuple[list[str], Any]:
    """Open what data.path means, on this disk or on the hub: its files and its `datasets.IterableDataset`.

    Raises ValueError where it means nothing, or where a data set on the hub cannot be had, or not as it was asked for.
    """
    datasets, path = import_datasets(), config.path or ""
    # Where the first part of a/b is a folder here, b is a mistake and no data set on the hub.
    on_hub = re.fullmatch(r"[\w-]+/[\w.-]+", path) and not Path(path).parent.exists()
    if not on_hub and (config.subset is not None or config.split != "train"):
        raise ValueError(
            f"data.subset and data.split are for a data set on the hub: remove them for data.path {path!r}"
        )
    name, files = (path, None) if on_hub else find_files(path)
    try:
        builder = datasets.load_dataset_builder(name, config.subset, data_files=files)
        data = builder.as_streaming_dataset(split=config.split)
    except (OSError, ValueError, tarfile.TarError, datasets.exceptions.DatasetsError) as error:
        missing = isinstance(error, (OSError, datasets.exceptions.DatasetNotFoundError))
        where = "is neither here nor to be had on the hub" if missing else (
            "is on the hub, but not as data.subset and data.split have it")  # fmt: skip
        raise ValueError(f"data.path {path!r} {where if on_hub else 'cannot be read'}: {reason(error)}") from error
    return [str(file) for file in builder.config.data_files[config.split]], data


@dataclass(frozen=True)
class Picture:
    """Holds a row, decoded and checked."""

    image: Image.Image
    label: int


class RowDecoder:
    """Decodes rows, leaves out what is broken or too small, and judges how much that is."""

    def __init__(self, stream: ShardStream) -> None:
        self.stream, self.decoder = stream, import_datasets().Image()
        self.read = self.broken = 0

    def pictures(self, rows: Iterable[tuple[str, Row]]) -> Iterator[Picture]:
        """Decode the pictures of the named rows; warn of each that is left out.

        Raises DataError where that is more than 1 % of at least a hundred rows, and for a label that is no class.
        """
        for name, row in rows:
            self.read += 1
            label = self.label(name, row)
            try:
                image = self.stream.framing.check(self.decoder.decode_example(row[self.stream.columns.image]))
            except Exception as error:  # decoders raise anything, from SyntaxError to struct.error
                self.broken += 1
                logger.warning("skipping a broken image: %s (%s)", name, reason(error))
                if self.read >= READ_BEFORE_JUDGING and self.broken > BROKEN_AT_MOST * self.read:
                    raise DataError(
                        f"{self.broken} of {self.read} images of {self.stream.config.path!r} are broken or too small, "
                        f"more than {BROKEN_AT_MOST:.0%}; the last is {name} ({reason(error)}): mend the "
                        "shards, or ask for a smaller data.image_size"
                    ) from error
            else:
                yield Picture(image, label)

    def label(self, name: str, row: Row) -> int:
        """Return the class of a row, -1 for a network without classes."""
        classes = self.stream.num_classes
        if classes is None:
            return -1
        label = self.stream.columns.label_of(row)
        if not isinstance(label, int) or not 0 <= label < classes:
            raise DataError(
                f"{name} has the label {label!r}, but with model.num_classes {classes} they are numbers from "
                f"0 to {classes - 1}: set it, or name the right data.label_column"
            )
        return label


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
        except (OSError, ValueError, tarfile.TarError) as error:
            yield DataError(f"the shards of data.path {self.stream.config.path!r} cannot be read: {reason(error)}")

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
