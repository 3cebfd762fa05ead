"""Reads the rows of tables in sequence: Parquet and Arrow files of this disk."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from unetgn.messages import path_text
from unetgn.training.data.folders import file_size, open_file
from unetgn.training.data.hugging_face import Columns, Files, find_columns, import_datasets
from unetgn.training.data.rows import BROKEN, CutShort, Row, Shards, Wanted, weight
from unetgn.training.data.tars import check_unpacked
from unetgn.training.errors import reason

END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"  # how a stream of Arrow ends
MAGIC = b"ARROW1"  # how what Arrow calls a file begins and ends


class TableShards(Shards):
    """Reads Parquet or Arrow files, of which only the columns of images and labels are read."""

    keyed = False

    def __init__(self, path: str, files: Files, image_column: str, label_column: str) -> None:
        self.files, self.left_out, self.kind, self.names = files.paths, dict(files.left_out), files.kind, files.names
        self.columns: Columns = find_columns(path, features_of(path, self._first_schema()), image_column, label_column)
        self.labelled = self.columns.label is not None

    def __len__(self) -> int:
        return len(self.files)

    def rows(self, shard: int, wanted: Wanted = lambda number, key: True) -> Iterator[Row]:
        names = [name for name in (self.columns.image, self.columns.label) if name is not None]
        file, held = self.files[shard], 0
        with broken_as_cut(file):
            for number, part in self._parts(file, names, wanted):
                (values,) = part.to_pylist()
                row = Row(shard, number, key_of(number), values)
                check_unpacked(
                    file, held := held + weight(row), file_size(file)
                )  # rows may share one value in the file
                yield row

    def most_rows(self, shard: int) -> int:
        import pyarrow.parquet

        with broken_as_cut(self.files[shard]):
            if self.kind == "parquet":
                return pyarrow.parquet.read_metadata(self.files[shard]).num_rows
            with open_arrow(self.files[shard]) as batches:
                return sum(len(batch) for batch in batches)

    def cut(self, shard: int) -> str | None:
        with open_file(self.files[shard]) as file:
            start = file.read(6)
            end = file.seek(0, 2)
            file.seek(max(0, end - 8))
            last = file.read()
        if self.kind == "parquet":
            return None if last[-4:] in (b"PAR1", b"PARE") else "it has no footer"
        if start == MAGIC:
            return None if last.endswith(MAGIC) else "it has no footer"
        return None if last == END_OF_STREAM or not start.startswith(b"\xff") else "it has no end of stream"

    def _first_schema(self) -> Any:
        """Read the schema of the first file that has one."""
        refusal: Exception | None = None
        for file in self.files:
            try:
                with broken_as_cut(file):
                    return self._schema(file)
            except CutShort as error:
                refusal = refusal or error
        assert refusal is not None  # find_files found a file
        raise refusal

    def _schema(self, file: str) -> Any:
        import pyarrow.parquet

        if self.kind == "parquet":
            return pyarrow.parquet.read_schema(file)
        with open_arrow(file) as batches:
            return batches.schema

    def _parts(self, file: str, names: Sequence[str], wanted: Wanted) -> Iterator[tuple[int, Any]]:
        """Read the wanted rows as tables of one row, with their numbers."""
        import pyarrow.parquet

        if self.kind == "parquet":
            with pyarrow.parquet.ParquetFile(file) as table:
                check_unpacked(file, unpacked_size(table.metadata), table.metadata.serialized_size + file_size(file))
                number = 0
                for group in range(table.num_row_groups):
                    end = number + table.metadata.row_group(group).num_rows
                    if any(wanted(row, key_of(row)) for row in range(number, end)):
                        # One at a time, for each may be large, and all the same value of the file's dictionary. Without
                        # threads: those of the process that a loader's worker is forked from are not there.
                        for batch in table.iter_batches(1, row_groups=[group], columns=list(names), use_threads=False):
                            yield from single_rows(batch, number, wanted)
                            number += len(batch)
                    number = end
            return
        number = 0
        with open_arrow(file) as batches:
            for batch in batches:
                yield from single_rows(batch.select(list(names)), number, wanted)
                number += len(batch)


def features_of(path: str, schema: Any) -> Any:
    """Return what `datasets` reads out of a schema, in JSON that is anybody's. Raises ValueError."""
    features = import_datasets().Features
    try:
        return features.from_arrow_schema(schema)
    except Exception as error:  # it raises anything
        raise ValueError(f"data.path {path!r} has a schema that cannot be read: {reason(error)}") from error


def key_of(number: int) -> str:
    """Name a row by its number."""
    return f"row {number + 1}"


def single_rows(batch: Any, first: int, wanted: Wanted) -> Iterator[tuple[int, Any]]:
    """Cut a batch whose first row has the number `first` into rows, those that are wanted.

    Raises pyarrow.ArrowInvalid where its offsets lead beyond its buffers: reading rows would follow them.
    """
    batch.validate(full=True)
    for row in range(len(batch)):
        if wanted(first + row, key_of(first + row)):
            yield first + row, batch.slice(row, 1)


def unpacked_size(metadata: Any) -> int:
    """Add up what the columns of a Parquet file say that they unpack to."""
    return sum(metadata.row_group(group).total_byte_size for group in range(metadata.num_row_groups))


@contextlib.contextmanager
def open_arrow(file: str) -> Iterator[Any]:
    """Open an Arrow file, as a stream, which `datasets` writes, or as what Arrow calls a file: a reader of batches.

    Without its footer such a file is read as the stream that it holds.
    """
    import pyarrow

    with pyarrow.memory_map(file) as source:
        if source.read_at(6, 0) != MAGIC:
            yield pyarrow.ipc.open_stream(source)
        elif source.read_at(6, max(0, source.size() - 6)) != MAGIC:
            source.seek(8)
            yield pyarrow.ipc.open_stream(source)
        else:
            whole = pyarrow.ipc.open_file(source)
            batches = (whole.get_batch(number) for number in range(whole.num_record_batches))
            yield pyarrow.RecordBatchReader.from_batches(whole.schema, batches)


@contextlib.contextmanager
def broken_as_cut(file: str) -> Iterator[None]:
    """Turn what says that a file is no whole one into CutShort; errors of the system stay what they are."""
    import pyarrow

    try:
        yield
    except (*BROKEN, pyarrow.ArrowException, ValueError) as error:
        if isinstance(error, CutShort) or (isinstance(error, OSError) and error.errno):
            raise
        raise CutShort(f"{path_text(file)}: {reason(error)}") from error
