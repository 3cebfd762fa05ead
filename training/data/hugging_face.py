"""Reads Hugging Face data sets: finds the files of a path, the columns of images and labels, and images by number."""

from __future__ import annotations

import glob
import json
import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from training.data.images import Images, fingerprint_files, read_all, reason, walk
from training.data.pixels import Framing

FORMATS = {
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".tar": "webdataset",
    ".tar.gz": "webdataset",
    ".tgz": "webdataset",
}
SPLITS = {"train": "train", "test": "test", "validation": "validation", "valid": "validation", "val": "validation"}


def import_datasets() -> Any:
    """Import the package `datasets`. Raises ValueError where it is not installed."""
    try:
        import datasets
    except ImportError as error:
        raise ValueError('data.name datasets and stream need a package: pip install -e ".[train,data]"') from error
    return datasets


def find_files(path: str) -> tuple[str, list[str]]:
    """Find the format ("parquet", "arrow" or "webdataset") and the sorted files of a folder, a file or a glob.

    Of a folder that `save_to_disk` wrote these are its Arrow files. Raises ValueError where there are none, or files of
    several formats or splits.
    """
    root = Path(path)
    if (root / "dataset_dict.json").is_file():
        parts = sorted(part.name for part in root.iterdir() if part.is_dir())
        raise ValueError(f"data.path {path!r} holds several splits: give one, for example {root / parts[0]}")
    if (root / "state.json").is_file():
        saved = json.loads((root / "state.json").read_text())["_data_files"]
        return "arrow", [str(root / item["filename"]) for item in saved]
    if root.is_dir():
        found = [Path(entry.path) for entry in walk(root)]
    else:
        found = [Path(file) for file in glob.glob(path, recursive=True)]
    files = sorted(str(file) for file in found if format_of(file.name) and not file.name.startswith("."))
    formats = {format_of(file) for file in files}
    if len(formats) != 1:
        endings = Counter(file.suffix or "no ending" for file in found)
        what = ", ".join(f"{count} with {ending}" for ending, count in sorted(endings.items())) or "no file"
        raise ValueError(
            f"data.path {path!r} should be a folder that save_to_disk wrote, or a folder or glob of files that are all "
            f"*.parquet, all *.arrow or, streamed, all *.tar; found {what} (for plain image files: data.name=folder)"
        )
    check_one_split(path, files)
    return formats.pop() or "", files


def format_of(name: str) -> str | None:
    """Return the builder of `datasets` that reads files of this name, None where there is none."""
    return next((kind for ending, kind in FORMATS.items() if name.endswith(ending)), None)


def check_one_split(path: str, files: Sequence[str]) -> None:
    """Raise ValueError where names of files or folders say that some are for training and others for testing."""
    common = os.path.commonpath([str(Path(file).parent) for file in files])
    parts = {part.lower() for file in files for part in Path(os.path.relpath(file, common)).parts}
    words = [re.match(r"[a-z]+", part) for part in parts]
    splits = sorted({SPLITS[word[0]] for word in words if word and word[0] in SPLITS})
    if len(splits) > 1:
        raise ValueError(
            f"data.path {path!r} holds files of the splits {', '.join(splits)}: give those of one, by its folder or by "
            f"a glob such as {common}/train*"
        )


@dataclass(frozen=True)
class Columns:
    """Says which columns of a row hold the image and the label."""

    image: str
    label: tuple[str, ...]  # () without labels; ("json", "label") for a key within a column

    def label_of(self, row: dict[str, Any]) -> Any:
        """Return the label of a row, whatever stands there; None where nothing does."""
        value: Any = row
        for key in self.label:
            value = value.get(key) if isinstance(value, dict) else None
        return value

    def class_names(self, features: Any) -> list[str] | None:
        """Return the names of the classes where the data set has them."""
        return getattr(features[self.label[0]], "names", None) if len(self.label) == 1 else None


def find_columns(path: str, features: Any, image_column: str, label_column: str) -> Columns:
    """Find the columns of a table. Raises ValueError where that of images is missing; labels may be."""
    if image_column not in features:
        raise ValueError(f"data.image_column {image_column!r} is not in {path!r}; its columns: {list(features)}")
    return Columns(image_column, (label_column,) if label_column in features else ())


def find_endings(path: str, features: Any, image_column: str, label_column: str) -> Columns:
    """Find the columns of tar shards, which are the endings of the files in them.

    `image` and `label`, the defaults, mean any ending of an image, and `cls` or a key of that name in `json`.
    """
    images = [name for name, feature in features.items() if type(feature).__name__ == "Image"]
    if image_column == "image" and image_column not in features:
        if len(images) != 1:
            endings = [name for name in features if not name.startswith("__")]
            raise ValueError(
                f"data.path {path!r}: of the endings {endings} in the shards {len(images)} are of images; name one as "
                "data.image_column"
            )
        image_column = images[0]
    columns = find_columns(path, features, image_column, label_column)
    if columns.label:
        return columns
    if label_column == "label" and "cls" in features:
        return Columns(image_column, ("cls",))
    inside = "json" in features and label_column in features["json"]
    return Columns(image_column, ("json", label_column) if inside else ())


class HuggingFaceImages(Images):
    """Reads a data set on this disk by number: what `save_to_disk` wrote, or Parquet or Arrow files.

    Such files are first copied into the cache of `datasets` (environment variable HF_DATASETS_CACHE).
    """

    def __init__(self, path: str, framing: Framing, image_column: str, label_column: str) -> None:
        datasets = import_datasets()
        self.path, self.framing, self.shape = path, framing, framing.shape
        data, self._files = open_table(path)
        columns = find_columns(path, data.features, image_column, label_column)
        if not len(data):
            raise ValueError(f"data.path {path!r} holds no rows")
        self._labels: list[Any] | None = list(data[label_column]) if columns.label else None
        self.class_names = columns.class_names(data.features) if columns.label else None
        self._image, self._decoder = image_column, datasets.Image()
        self._data = as_encoded_images(data.select_columns([image_column]), path, image_column)

    def __len__(self) -> int:
        return len(self._data)

    def image(self, index: int, random: np.random.Generator | None = None) -> np.ndarray:
        return self.framing(self._decoder.decode_example(self._data[index][self._image]), random)

    def label(self, index: int) -> int:
        """Return the label as it stands in the data set; -1 for what is no number from 0 on."""
        label = None if self._labels is None else self._labels[index]
        return label if isinstance(label, int) and label >= 0 else -1

    def name(self, index: int) -> str:
        return f"{self.path} row {index}"

    def usable(self) -> np.ndarray:
        return read_all(self)

    def fingerprint(self) -> str:
        return fingerprint_shards(self._files)


def fingerprint_shards(files: Sequence[str]) -> str:
    """Compute a sha256 of the files, wherever they are; on the hub of their addresses, which name a revision."""
    here = [Path(file) for file in files if Path(file).is_file()]
    facts = [(path.name, path.stat().st_size) for path in here]
    return fingerprint_files(facts + [(file, -1) for file in files if not Path(file).is_file()], here)


def open_table(path: str) -> tuple[Any, list[str]]:
    """Open the `datasets.Dataset` of a path, and find its files. Raises ValueError where it is none."""
    datasets = import_datasets()
    kind, files = find_files(path)
    if kind == "webdataset":
        raise ValueError(f"data.path {path!r} holds tar shards, which are read in sequence only: set data.name=stream")
    try:
        if (Path(path) / "state.json").is_file():
            return datasets.load_from_disk(path), files
        return datasets.load_dataset(kind, data_files=files, split="train"), files
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(f"data.path {path!r} cannot be read as {kind} files: {reason(error)}") from error


def as_encoded_images(data: Any, path: str, column: str) -> Any:
    """Have the column of images read as {"bytes": …, "path": …}: decoding is for us to do, and to survive.

    Raises ValueError where the column holds something else.
    """
    datasets = import_datasets()
    feature = data.features[column]
    plain = getattr(feature, "dtype", None) in ("binary", "large_binary")
    encoded = isinstance(feature, dict) and {"bytes", "path"} == set(feature)
    if not (plain or encoded or isinstance(feature, datasets.Image)):
        raise ValueError(f"data.image_column {column!r} of {path!r} holds no images but {feature}")
    return data.cast_column(column, datasets.Image(decode=False))
