"""Opens the shards of a data set that is read in sequence: tables and tar files here, and whatever the hub has."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from unetgn.training.data.folders import few, file_size
from unetgn.training.data.hugging_face import Columns, Files, find_columns, find_files, import_datasets
from unetgn.training.data.rows import BROKEN, CutShort, Row, Shards, Wanted
from unetgn.training.data.tables import TableShards, key_of
from unetgn.training.data.tars import TarShards
from unetgn.training.errors import reason

HUB_ROWS = 10**7  # of a shard of which nothing else is known


class HubShards(Shards):
    """Reads a data set on the hub as `datasets` streams it."""

    keyed = False

    def __init__(self, path: str, data: Any, files: list[str], image_column: str, label_column: str) -> None:
        self.files, self.left_out, self.names = files, {}, [file.rpartition("/")[2] for file in files]
        self.columns: Columns = find_columns(path, data.features, image_column, label_column)
        self.labelled = self.columns.label is not None
        # What a column holds is never decoded here, nor are the others looked at.
        names = [name for name in (self.columns.image, self.columns.label) if name is not None]
        self._data = data.select_columns(names).cast_column(image_column, import_datasets().Image(decode=False))

    def __len__(self) -> int:
        return self._data.num_shards

    def rows(self, shard: int, wanted: Wanted = lambda number, key: True) -> Iterator[Row]:
        one = self._data.shard(num_shards=len(self), index=shard)
        # In a loader's worker, iter(one) would leave out what it takes for the other workers'; one.iter does not.
        for number, columns in enumerate(one.iter(batch_size=1)):
            if wanted(number, key_of(number)):
                yield Row(shard, number, key_of(number), {key: values[0] for key, values in columns.items()})

    def most_rows(self, shard: int) -> int:
        return HUB_ROWS

    def cut(self, shard: int) -> str | None:
        return None  # the hub's library says it when it is read


def open_shards(
    path: str, *, image_column: str, label_column: str, subset: str | None = None, split: str = "train"
) -> Shards:
    """Open what data.path means, on this disk or on the hub.

    Raises ValueError where it means nothing, or where a data set on the hub cannot be had, or not as it was asked for.
    """
    if is_on_hub(path):
        return open_on_hub(path, image_column, label_column, subset, split)
    if subset is not None or split != "train":
        raise ValueError(
            f"data.subset and data.split are for a data set on the hub: remove them for data.path {path!r}"
        )
    files = find_files(path)
    if empty := [file for file in files.paths if not file_size(file)]:
        raise ValueError(f"data.path {path!r} cannot be read: {few(empty)} {'is' if len(empty) == 1 else 'are'} empty; "
                         f"remove {'it' if len(empty) == 1 else 'them'}, or copy again")  # fmt: skip
    kind = TarShards if files.kind == "webdataset" else TableShards
    import_datasets()
    import pyarrow

    try:
        return kind(path, files, image_column, label_column)
    except (*BROKEN, CutShort, pyarrow.ArrowException) as error:
        raise ValueError(f"data.path {path!r} cannot be read: {reason(error)}") from error


def is_on_hub(path: str) -> bool:
    """Return True where data.path names a data set on the hub: as a/b, where nothing here is called a.

    Where the first part is a folder here, b is a mistake and no data set.
    """
    return re.fullmatch(r"[\w-]+/[\w.-]+", path) is not None and not Path(path).parent.exists()


def open_on_hub(path: str, image_column: str, label_column: str, subset: str | None, split: str) -> Shards:
    """Open a data set on the hub; tar shards are read as those of this disk.

    `datasets` would look into these first, and decode whatever is there, pickles too.
    """
    datasets = import_datasets()
    from datasets.packaged_modules.webdataset.webdataset import WebDataset

    try:
        builder = datasets.load_dataset_builder(path, subset)
        splits = builder.config.data_files or {}
        if isinstance(builder, WebDataset) and split not in splits:
            raise ValueError(f"there is no split {split!r}, but {list(splits)}")
        data = None if isinstance(builder, WebDataset) else builder.as_streaming_dataset(split=split)
    except (FileNotFoundError, datasets.exceptions.DatasetNotFoundError) as error:
        raise ValueError(f"data.path {path!r} is neither here nor to be had on the hub: {reason(error)}") from error
    except OSError as error:
        raise ValueError(
            f"data.path {path!r} is not here, and the hub cannot be reached: {reason(error)}: connect this machine, or "
            "download the data set elsewhere and give its folder"
        ) from error
    except Exception as error:  # of what is anybody's, `datasets` raises anything
        raise ValueError(
            f"data.path {path!r} is on the hub, but not as data.subset and data.split have it: {reason(error)}"
        ) from error
    files = [str(file) for file in splits[split]]
    if data is None:
        names = [file.rpartition("/")[2] for file in files]
        return TarShards(
            path,
            Files("webdataset", files, {}, names),
            image_column,
            label_column,
        )
    return HubShards(path, data, files, image_column, label_column)
