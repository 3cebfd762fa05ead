"""Reads the rows of shards in sequence: tables (Parquet, Arrow) and tar files here, and whatever the hub has."""

from __future__ import annotations

import contextlib
import json
import re
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any, Protocol

from training.data.hugging_face import Columns, Files, find_columns, find_files, import_datasets
from training.data.images import WITHOUT_CLASSES
from training.data.pictures import IMAGE_SUFFIXES
from training.errors import reason

Row = dict[str, Any]
BROKEN = (OSError, EOFError, zlib.error, tarfile.TarError)  # how a shard says that it is no whole one
BATCH = 16  # rows of a table that are read at a time


class RowColumns(Protocol):
    """Finds image and label in a row."""

    @property
    def class_names(self) -> list[str] | None:
        """Holds the names of the classes where the data set has them."""
        ...

    def image_of(self, row: Row) -> bytes:
        """Return the contents of a row's image. Raises ValueError where there are none."""
        ...

    def label_of(self, row: Row) -> Any:
        """Return the label of a row, whatever stands there; None where nothing does."""
        ...

    def why_no_labels(self) -> str:
        """Say why there are no labels, and what would do."""
        ...


class Shards(Protocol):
    """Numbers the shards of a data set, and knows their columns."""

    files: list[str]
    left_out: dict[str, int]
    columns: RowColumns
    labelled: bool
    """False where the first row has no label."""

    def __len__(self) -> int: ...

    def rows(self, shard: int) -> Iterator[tuple[str, Row]]:
        """Read the rows of a shard, images encoded, and what messages call them."""
        ...


class TableShards(Shards):
    """Reads Parquet or Arrow files of this disk, of which only the columns of images and labels are read."""

    def __init__(self, path: str, files: Files, image_column: str, label_column: str) -> None:
        self.files, self.left_out, self.kind = files.paths, dict(files.left_out), files.kind
        features = import_datasets().Features.from_arrow_schema(self._schema(self.files[0]))
        self.columns: Columns = find_columns(path, features, image_column, label_column)
        self.labelled = self.columns.label is not None

    def __len__(self) -> int:
        return len(self.files)

    def rows(self, shard: int) -> Iterator[tuple[str, Row]]:
        file = self.files[shard]
        names = [name for name in (self.columns.image, self.columns.label) if name is not None]
        number = 0
        for batch in self._batches(file, names):
            for row in batch.to_pylist():
                number += 1
                yield f"row {number} of {file}", row

    def _schema(self, file: str) -> Any:
        import pyarrow.parquet

        if self.kind == "parquet":
            return pyarrow.parquet.read_schema(file)
        with open_arrow(file) as reader:
            return reader.schema

    def _batches(self, file: str, names: Sequence[str]) -> Iterator[Any]:
        import pyarrow.parquet

        if self.kind == "parquet":
            with pyarrow.parquet.ParquetFile(file) as table:
                # Without threads: those of the process that a loader's worker is forked from are not there.
                yield from table.iter_batches(BATCH, columns=list(names), use_threads=False)
            return
        with open_arrow(file) as reader:
            for batch in reader:
                for start in range(0, len(batch), BATCH):
                    yield batch.select(names).slice(start, BATCH)


@contextlib.contextmanager
def open_arrow(file: str) -> Iterator[Any]:
    """Open an Arrow file, as a stream, which `datasets` writes, or as what Arrow calls a file: a reader of batches."""
    import pyarrow

    with pyarrow.memory_map(file) as source:
        if source.read_at(6, 0) != b"ARROW1":
            yield pyarrow.ipc.open_stream(source)
            return
        whole = pyarrow.ipc.open_file(source)
        batches = (whole.get_batch(number) for number in range(whole.num_record_batches))
        yield pyarrow.RecordBatchReader.from_batches(whole.schema, batches)


class TarColumns:
    """Finds image and label among the files of a sample, by their endings, which need not be alike in all samples.

    `image` and `label`, the defaults, mean any ending of an image, and `cls` or a key of that name in `json`.
    Raises ValueError where the first sample has no image, or several.
    """

    class_names: list[str] | None = None

    def __init__(self, path: str, first: Row, image_column: str, label_column: str) -> None:
        self.image, self.label, self.first = image_column, label_column, first
        endings = [name for name in first if not name.startswith("__")]
        if image_column == "image" and "image" not in first:
            images = self._images(first)
            if len(images) != 1:
                raise ValueError(
                    f"data.path {path!r}: of the endings {endings} in the shards {len(images)} are of images; name one "
                    "as data.image_column"
                )
        elif image_column not in first:
            raise ValueError(f"data.image_column {image_column!r} is not in {path!r}; its columns: {endings}")

    def image_of(self, row: Row) -> bytes:
        if self.image in row:
            return row[self.image]
        images = self._images(row) if self.image == "image" else []
        if len(images) == 1:
            return row[images[0]]
        endings = ", ".join(name for name in row if not name.startswith("__"))
        raise ValueError(f"{len(images)} images in a sample of the endings {endings}; name one as data.image_column")

    def label_of(self, row: Row) -> Any:
        for ending in (self.label, "cls") if self.label == "label" else (self.label,):
            if ending in row:
                text = row[ending].decode("utf-8", "replace").strip()
                return int(text) if re.fullmatch(r"-?\d+", text) else text
        return self._json(row).get(self.label)

    def why_no_labels(self) -> str:
        could = [name for name in self.first if name not in self._images(self.first) and not name.startswith("__")]
        could = sorted(self._json(self.first)) + [name for name in could if name != "json"]
        missing = f"the images have no classes: no file of the first sample is {self.label!r}, nor a key in its json"
        if not could:
            return f"{missing}: {WITHOUT_CLASSES}"
        return f"{missing}; it has {', '.join(could)}: set data.label_column={could[0]}"

    @staticmethod
    def _images(row: Row) -> list[str]:
        return [name for name in row if f".{name.rpartition('.')[2]}" in IMAGE_SUFFIXES]

    @staticmethod
    def _json(row: Row) -> Row:
        read = json.loads(row["json"]) if "json" in row else {}
        return read if isinstance(read, dict) else {}


class TarShards(Shards):
    """Reads WebDataset shards: the files of a tar archive that are named alike up to the first dot are a sample.

    Nothing in them is decoded but an image, a label's text and json: what is a pickle stays closed.
    """

    def __init__(self, path: str, files: Files, image_column: str, label_column: str) -> None:
        self.files, self.left_out = files.paths, dict(files.left_out)
        rows = (row for shard in range(len(self)) for _, row in self.rows(shard))
        first = next(rows, None)
        if first is None:
            raise ValueError(f"data.path {path!r} holds no files in its tar shards")
        self.columns = TarColumns(path, first, image_column, label_column)
        self.labelled = self.columns.label_of(first) is not None

    def __len__(self) -> int:
        return len(self.files)

    def rows(self, shard: int) -> Iterator[tuple[str, Row]]:
        file = self.files[shard]
        with open_anywhere(file) as source, tarfile.open(fileobj=source, mode="r|*") as tar:
            row: Row = {}
            for member in tar:
                folder, _, name = member.name.rpartition("/")
                start, dot, ending = name.partition(".")
                if not member.isfile() or not start or not dot or name.startswith("__"):
                    continue
                key, ending = f"{folder}/{start}" if folder else start, ending.lower()
                if row and row["__key__"] != key:
                    yield f"{row['__key__']} of {file}", row
                    row = {}
                if ending in row:
                    raise ValueError(f"{file} holds {key}.{ending} twice")
                row["__key__"] = key
                contents = tar.extractfile(member)
                row[ending] = b"" if contents is None else contents.read()
            if row:
                yield f"{row['__key__']} of {file}", row


def open_anywhere(file: str) -> IO[bytes]:
    """Open a file of this disk, or of the hub, whose names begin with hf://."""
    if "://" not in file or Path(file).exists():
        return Path(file).open("rb")
    import fsspec

    return fsspec.open(file, "rb").open()


class HubShards(Shards):
    """Reads a data set on the hub as `datasets` streams it."""

    def __init__(self, path: str, data: Any, files: list[str], image_column: str, label_column: str) -> None:
        self.files, self.left_out = files, {}
        self.columns: Columns = find_columns(path, data.features, image_column, label_column)
        self.labelled = self.columns.label is not None
        self._data = data.cast_column(image_column, import_datasets().Image(decode=False))

    def __len__(self) -> int:
        return self._data.num_shards

    def rows(self, shard: int) -> Iterator[tuple[str, Row]]:
        one = self._data.shard(num_shards=len(self), index=shard)
        # In a loader's worker, iter(one) would leave out what it takes for the other workers'; one.iter does not.
        for number, columns in enumerate(one.iter(batch_size=1), start=1):
            yield f"row {number} of {self.files[shard]}", {key: values[0] for key, values in columns.items()}


def open_shards(
    path: str, *, image_column: str, label_column: str, subset: str | None = None, split: str = "train"
) -> Shards:
    """Open what data.path means, on this disk or on the hub.

    Raises ValueError where it means nothing, or where a data set on the hub cannot be had, or not as it was asked for.
    """
    # Where the first part of a/b is a folder here, b is a mistake and no data set on the hub.
    if re.fullmatch(r"[\w-]+/[\w.-]+", path) and not Path(path).parent.exists():
        return open_on_hub(path, image_column, label_column, subset, split)
    if subset is not None or split != "train":
        raise ValueError(
            f"data.subset and data.split are for a data set on the hub: remove them for data.path {path!r}"
        )
    files = find_files(path)
    if any(Path(file).stat().st_size == 0 for file in files.paths):
        empty = next(file for file in files.paths if Path(file).stat().st_size == 0)
        raise ValueError(f"data.path {path!r} cannot be read: {empty} is empty; remove it, or copy it again")
    kind = TarShards if files.kind == "webdataset" else TableShards
    import_datasets()
    import pyarrow

    try:
        return kind(path, files, image_column, label_column)
    except (*BROKEN, pyarrow.ArrowException) as error:
        raise ValueError(f"data.path {path!r} cannot be read: {reason(error)}") from error


def open_on_hub(path: str, image_column: str, label_column: str, subset: str | None, split: str) -> Shards:
    """Open a data set on the hub; tar shards are read as those of this disk."""
    datasets = import_datasets()
    from datasets.packaged_modules.webdataset.webdataset import WebDataset

    try:
        builder = datasets.load_dataset_builder(path, subset)
        data = builder.as_streaming_dataset(split=split)
    except (FileNotFoundError, datasets.exceptions.DatasetNotFoundError) as error:
        raise ValueError(f"data.path {path!r} is neither here nor to be had on the hub: {reason(error)}") from error
    except OSError as error:
        raise ValueError(
            f"data.path {path!r} is not here, and the hub cannot be reached: {reason(error)}: connect this machine, or "
            "download the data set elsewhere and give its folder"
        ) from error
    except (ValueError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(
            f"data.path {path!r} is on the hub, but not as data.subset and data.split have it: {reason(error)}"
        ) from error
    files = [str(file) for file in builder.config.data_files[split]]
    if isinstance(builder, WebDataset):
        return TarShards(path, Files("webdataset", files, {}), image_column, label_column)
    return HubShards(path, data, files, image_column, label_column)
