"""Reads Hugging Face data sets: finds the files of a path, the columns of images and labels, and images by number."""

from __future__ import annotations

import glob
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from unetgn.json_files import read_object
from unetgn.messages import path_text, plain, said, short
from unetgn.programs.last_words import what_brings
from unetgn.training.data.folders import SPECIAL, check_ordinary, fold, list_endings, walk
from unetgn.training.data.images import WITHOUT_CLASSES, Images, fingerprint_files
from unetgn.training.data.looking import look_at_all
from unetgn.training.data.pictures import Facts
from unetgn.training.data.pixels import Framing, held
from unetgn.training.data.splits import splits_among, word_end
from unetgn.training.errors import reason

FORMATS = {
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".tar": "webdataset",
    ".tar.gz": "webdataset",
    ".tgz": "webdataset",
}


def import_datasets() -> Any:
    """Import the package `datasets`. Raises ValueError where it is not installed."""
    try:
        import datasets
    except ModuleNotFoundError as error:
        if error.name != "datasets":  # one of those that it needs: its own message says which
            raise
        raise ValueError(
            f"data.name datasets and stream need a package: pip install {what_brings('[train,data]')}"
        ) from error
    return datasets


@dataclass(frozen=True)
class Files:
    """Holds the files of a data set."""

    kind: str
    """The builder of `datasets` that reads them: "parquet", "arrow" or "webdataset"."""
    paths: list[str]
    left_out: Mapping[str, int]
    """Of files beside them, how many by ending."""
    names: list[str]
    """Of the paths, below the folder that all of them are in."""


def find_files(path: str) -> Files:
    """Find the sorted files of a folder, a file or a glob, and their format.

    Of a folder that `save_to_disk` wrote these are its Arrow files. Raises ValueError where there are none, or files of
    several formats or splits.
    """
    root = Path(path)
    if (root / "dataset_dict.json").is_file():
        parts = sorted(part.name for part in root.iterdir() if part.is_dir())
        raise ValueError(
            f"data.path {path!r} holds several splits: give one, for example data.path={path_text(root / parts[0])}"
        )
    if (root / "state.json").is_file():
        return Files("arrow", [str(file) for file in saved_files(root)], {}, [file.name for file in saved_files(root)])
    special: Counter[str] = Counter()
    found = {file for part in ([root] if root.is_dir() else match(path)) for file in files_in(part, special)}
    files = sorted(str(file) for file in found if format_of(file.name) and not file.name.startswith("."))
    formats = {format_of(file) or "" for file in files}
    endings = Counter(file.suffix or "no ending" for file in found if not format_of(file.name))
    if len(formats) != 1:
        all_endings = fold(special + Counter(file.suffix or "no ending" for file in found))
        raise ValueError(
            f"data.path {path!r} should be a folder that save_to_disk wrote, or a folder or glob of files that are all "
            f"*.parquet, all *.arrow or, streamed, all *.tar; found {list_endings(all_endings) or 'no file'} (for "
            "plain image files: data.name=folder)"
        )
    check_one_split(path, files)
    common = os.path.commonpath([str(Path(file).parent) for file in files])
    names = [os.path.relpath(file, common) for file in files]
    return Files(formats.pop(), files, fold(endings + special), names)


def saved_files(root: Path) -> list[Path]:
    """List the files that `save_to_disk` says it wrote into a folder.

    Raises ValueError where it does not, or where one of them, or of what describes them, is not there.
    """
    saved = read_object(root / "state.json").get("_data_files")
    items = saved if isinstance(saved, list) and all(isinstance(item, dict) for item in saved) else []
    names = [str(item.get("filename")) for item in items]
    if not names or any(name != Path(name).name for name in names):
        raise ValueError(f"{root / 'state.json'} is not as save_to_disk writes it: it names no files of its folder")
    for name in (*names, "dataset_info.json"):
        try:
            check_ordinary(root / name)
        except OSError as error:
            raise ValueError(
                f"{root / 'state.json'} speaks of {plain(name)}, which cannot be read: {said(error)}"
            ) from error
    return [root / name for name in names]


def files_in(path: Path, left_out: Counter[str]) -> list[Path]:
    """List the files of a folder and of all below it; a file is itself, and what is neither is counted."""
    if path.is_dir():
        return [Path(entry.path) for entry in walk(path, left_out)]
    if path.is_file():
        return [path]
    left_out[SPECIAL] += 1
    return []


def match(pattern: str) -> list[Path]:
    """List the files and folders that a glob means. What is there under the very name that is given is no pattern."""
    path = Path(pattern)
    there = next((part for part in (path, *path.parents) if os.path.lexists(part)), Path())
    rest = os.path.relpath(path, there) if there != path else ""
    return [Path(file) for file in glob.glob(os.path.join(glob.escape(str(there)), rest).rstrip("/"), recursive=True)]


def format_of(name: str) -> str | None:
    """Return the builder of `datasets` that reads files of this name, None where there is none."""
    return next((kind for ending, kind in FORMATS.items() if name.endswith(ending)), None)


def check_one_split(path: str, files: Sequence[str]) -> None:
    """Raise ValueError where names of files or folders say that some are for training and others for testing."""
    common = os.path.commonpath([str(Path(file).parent) for file in files])
    parts = {part for file in files for part in Path(os.path.relpath(file, common)).parts}
    if splits := splits_among(parts):
        name = splits.get("train", min(splits.values()))
        file = next(Path(file) for file in files if name in Path(os.path.relpath(file, common)).parts)
        above = next((folder for folder in file.parents if folder.name == name), None)
        # A folder of its own, or what the files are called up to the word that means the split.
        one = above or f"{file.parent}/{glob.escape(name[: word_end(name)])}*"
        raise ValueError(
            f"data.path {path!r} holds files of the splits {plain(', '.join(sorted(splits)))}: give those of one, by "
            f"its folder or by a glob, data.path={path_text(one)}"
        )


@dataclass(frozen=True)
class Columns:
    """Says which columns of a table hold the image and the label; None: there are no labels."""

    image: str
    label: str | None
    features: Mapping[str, Any]
    """Of each column, what `datasets` takes it for."""
    wanted_label: str
    """Holds what data.label_column says."""

    @property
    def class_names(self) -> list[str] | None:
        """Holds the names of the classes where the data set has them."""
        return None if self.label is None else getattr(self.features[self.label], "names", None)

    def image_of(self, row: dict[str, Any]) -> bytes:
        """Return the contents of a row's image. Raises ValueError where there are none."""
        return contents(row.get(self.image), self.image)

    def label_of(self, row: dict[str, Any]) -> Any:
        """Return the label of a row, whatever stands there; None where nothing does."""
        return None if self.label is None else row.get(self.label)

    def why_no_labels(self) -> str:
        """Say why there are no labels, and what would do: another column, where one could be of labels."""
        there = self.features.get(self.wanted_label)
        why = "there is no column" if there is None else f"{type(there).__name__} is no label, in the column"
        missing = f"the images have no classes: {why} {self.wanted_label!r}"
        others = [name for name in self.features if name not in (self.image, self.label)]
        could = sorted((kind, name) for name in others if (kind := kind_of(self.features[name])) is not None)
        if not could:
            return f"{missing} beside {self.image!r}: {WITHOUT_CLASSES}"
        listed = ", ".join(f"{plain(name)} ({what})" for (_, what), name in could)
        return f"{missing}; these could be of labels: {listed}: set data.label_column={plain(could[0][1])}"


def kind_of(feature: Any) -> tuple[int, str] | None:
    """Say what labels a column could hold, likely ones first; None where it can hold none."""
    if getattr(feature, "names", None):
        return 0, f"{len(feature.names)} classes"
    dtype = str(getattr(feature, "dtype", ""))
    return (1, "numbers") if re.match("u?int", dtype) else (2, "text") if "string" in dtype else None


def find_columns(path: str, features: Mapping[str, Any], image_column: str, label_column: str) -> Columns:
    """Find the columns of a table. Raises ValueError where that of images is missing or holds none; labels may be."""
    datasets = import_datasets()
    if image_column not in features:
        images = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
        remedy = f"; set data.image_column={plain(images[0])}" if images else ""
        raise ValueError(
            f"data.image_column {image_column!r} is not in {path!r}; its columns: {short(list(features))}{remedy}"
        )
    feature = features[image_column]
    binary = getattr(feature, "dtype", None) in ("binary", "large_binary")
    encoded = isinstance(feature, dict) and {"bytes", "path"} == set(feature)
    if not (binary or encoded or isinstance(feature, datasets.Image)):
        raise ValueError(f"data.image_column {image_column!r} of {path!r} holds no images but {short(feature)}")
    labelled = isinstance(features.get(label_column), (datasets.Value, datasets.ClassLabel))  # others may be decoded
    return Columns(image_column, label_column if labelled else None, features, label_column)


def contents(value: Any, column: str) -> bytes:
    """Return the contents of an image, as a column holds it. Raises ValueError where it holds none."""
    held = value.get("bytes") if isinstance(value, dict) else value
    if isinstance(held, bytes):
        return held
    named = value.get("path") if isinstance(value, dict) else None
    if named is None:
        raise ValueError(f"no image: its {column!r} is empty; remove the row, or name another data.image_column")
    raise ValueError(
        f"its {column!r} only names a file, {short(named)}, and what a data set names is not opened: save the data set "
        "with save_to_disk, which puts the files into it"
    )


def number_of(label: Any) -> int:
    """Return the class that a label means by its number, -1 where it means none."""
    if isinstance(label, float) and label.is_integer():  # as tables have it where some labels are missing
        return int(label)
    return int(label) if isinstance(label, int) and label >= 0 else -1


def number_classes(labels: Sequence[Any]) -> tuple[list[int], list[str] | None]:
    """Number labels, -1 for none: as they are numbered, or texts in order, then with the names of the classes."""
    texts = {label for label in labels if isinstance(label, str)}
    if not texts:
        return [number_of(label) for label in labels], None
    names = sorted(texts, key=lambda text: (int(text) if text.isdecimal() else -1, text))
    number = {name: i for i, name in enumerate(names)}
    return [number.get(label, -1) if isinstance(label, str) else -1 for label in labels], names


class HuggingFaceImages(Images):
    """Reads a data set on this disk by number: what `save_to_disk` wrote, or Parquet or Arrow files.

    Such files are first copied into the cache of `datasets` (environment variable HF_DATASETS_CACHE). Labels that are
    texts are the names of the classes, which are numbered in their order.
    """

    def __init__(
        self, path: str, framing: Framing, image_column: str, label_column: str, without: Sequence[str] = ()
    ) -> None:
        datasets = import_datasets()
        self.path, self.framing, self.shape = path, framing, framing.shape
        data, files = open_table(path)
        self._files, self.left_out = files.paths, files.left_out
        self._columns = find_columns(path, data.features, image_column, label_column)
        if not len(data):
            raise ValueError(f"data.path {path!r} holds no rows")
        self.without = {row_number(name, len(data)): name for name in without}
        self._values: list[Any] | None = None if self._columns.label is None else list(data[label_column])
        self._labels, texts = number_classes(self._values or [])
        self.class_names = self._columns.class_names or texts
        encoded = datasets.Image(decode=False)  # decoding is for us to do, and to survive
        self._data = data.select_columns([image_column]).cast_column(image_column, encoded)

    def __len__(self) -> int:
        return len(self._data)

    def image(self, index: int, random: np.random.Generator | None = None) -> np.ndarray:
        return self.framing.read(self._columns.image_of(self._data[index]), random)

    def look(self, index: int) -> Facts:
        """Read an image, and say what it is."""
        with held(lambda: self._columns.image_of(self._data[index])) as source:
            return self.framing.facts(source)

    def label(self, index: int) -> int:
        """Return the number of the class; -1 for what is no number from 0 on and no text."""
        return self._labels[index] if self._labels else -1

    def name(self, index: int) -> str:
        return f"{self.path} row {index}"

    def key(self, index: int) -> str:
        return f"row {index}"

    def usable(self) -> np.ndarray:
        framing = self.framing
        sort = framing.bucket if framing.sizes else None
        numbers, self.tally = look_at_all(self, self.without, self.key, unfit=framing.unfit, sort=sort)
        return numbers

    def fingerprint(self) -> str:
        return fingerprint_shards(self._files)

    def why_no_classes(self) -> str:
        if self._values is None:
            return self._columns.why_no_labels()
        return (
            f"the images have no classes: the column {self._columns.label!r} of {self.path!r} holds neither class "
            f"numbers nor texts, but such as {short(self._values[0])}: name another data.label_column of "
            f"{short(list(self._columns.features))}"
        )

    def why_no_class(self, index: int) -> str:
        value = None if self._values is None else self._values[index]
        return f"its {self._columns.label!r} is {short(value)}; remove the row, or give it one"


def row_number(name: str, count: int) -> int:
    """Return the number of a row that data.without names. Raises ValueError where there is none."""
    number = re.fullmatch(r"row (\d{1,18})", name)
    if number is None or int(number[1]) >= count:
        raise ValueError(
            f"data.without names {short(name)}, which is no row of these, from 'row 0' to 'row {count - 1}'"
        )
    return int(number[1])


def fingerprint_shards(files: Sequence[str]) -> str:
    """Compute a sha256 of the files, wherever they are; on the hub of their addresses, which name a revision."""
    here = [Path(file) for file in files if Path(file).is_file()]
    facts = [(path.name, path.stat().st_size) for path in here]
    return fingerprint_files(facts + [(file, -1) for file in files if not Path(file).is_file()], here)


def open_table(path: str) -> tuple[Any, Files]:
    """Open the `datasets.Dataset` of a path, and find its files. Raises ValueError where it is none."""
    datasets = import_datasets()
    files = find_files(path)
    if files.kind == "webdataset":
        raise ValueError(f"data.path {path!r} holds tar shards, which are read in sequence only: set data.name=stream")
    if any("::" in os.path.abspath(file) for file in files.paths):
        raise ValueError(
            f"data.path {path!r} has '::' in its name, which `datasets` takes for two addresses: rename it, or set "
            "data.name=stream, which reads it as it is"
        )
    try:
        if (Path(path) / "state.json").is_file():
            return datasets.load_from_disk(path), files
        # As a list of its own kind, names are not taken for patterns; the times tell its cache of other contents.
        absolute = [os.path.abspath(file) for file in files.paths]
        times = [(str(os.path.getmtime(file)),) for file in absolute]
        listed = datasets.data_files.DataFilesList(absolute, times)
        return datasets.load_dataset(files.kind, data_files={"train": listed}, split="train"), files
    except Exception as error:  # of what is anybody's, `datasets` raises anything
        raise ValueError(f"data.path {path!r} cannot be read as {files.kind} files: {reason(error)}") from error
