"""Opens sets of images to be judged: folders, one NPZ, tar shards; each image is read when it is asked for."""

from __future__ import annotations

import csv
import os
import tarfile
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
import torch

from unetgn.messages import path_text, plain, said, short
from unetgn.programs.paths import lacking
from unetgn.sampling.folder import read_pixels
from unetgn.training.data.folders import walk
from unetgn.training.data.pictures import IMAGE_SUFFIXES, normalize, open_picture
from unetgn.training.data.tars import Member
from unetgn.training.errors import reason
from unetgn.training.files import lines_within

LONGEST_REASON = 200  # characters: a damaged file's fields may have any number
LONGEST_NAME = 1000  # of a file in a folder, with those of folders between
LONGEST_LINE = 2**17  # and of a table: a prompt is in it
LARGEST = 32  # pixels: height and width that images are compared at where the pixels themselves are


class EvaluationError(Exception):
    """Says that the samples cannot be judged, and why."""


@dataclass(frozen=True)
class Pictures:
    """Gives images as vectors (D,) in [0, 1], each read when it is asked for."""

    read: Callable[[int], np.ndarray]
    """Reads image n as (C, H, W) in [0, 1]."""
    numbers: Sequence[int] | np.ndarray
    named: Callable[[int], str] = "image {}".format
    """Says which image n is, for messages."""

    def __len__(self) -> int:
        return len(self.numbers)

    def __iter__(self) -> Iterator[np.ndarray]:
        for number in self.numbers:
            image = torch.from_numpy(np.ascontiguousarray(self.read(int(number)), dtype=np.float64))
            size = min(image.shape[1], LARGEST), min(image.shape[2], LARGEST)
            yield torch.nn.functional.adaptive_avg_pool2d(image, size).permute(1, 2, 0).numpy().ravel()

    def bytes_of(self, number: int) -> np.ndarray:
        """Read image `number` as a file of 8 bits has it, (C, H, W) uint8."""
        return (np.asarray(self.read(number)) * 255).round().clip(0, 255).astype(np.uint8)

    def part(self, places: slice | np.ndarray) -> Pictures:
        """Return those of the images that stand at these places."""
        return Pictures(self.read, np.asarray(self.numbers)[places], self.named)


def open_samples(path: Path) -> tuple[Pictures, np.ndarray]:
    """Open a set with the classes of its images (N,), -1 without: a folder, an NPZ, a tar shard or a folder of them.

    A folder has a samples.csv, as sampling/sample.py writes it, or else every image in it and below it is taken.
    Raises EvaluationError where it holds no set of images.
    """
    if path.suffix == ".npz":
        pictures, labels = open_archive(path)
    elif path.suffix == ".tar" or (path.is_dir() and any(path.glob("*.tar"))):
        pictures, labels = open_tars(sorted(path.glob("*.tar")) if path.is_dir() else [path])
    elif path.is_file():
        raise EvaluationError(f"{path} is a file: give a folder of images, an NPZ file, or tar shards")
    elif (path / "samples.csv").is_file():
        pictures, labels = open_listed(path)
    else:
        pictures, labels = open_folder(path)
    if len(pictures) < 2:
        raise EvaluationError(f"{path} holds {len(pictures)} sample(s); a distribution needs several")
    return pictures, labels


def read_samples(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Read samples (N, D) in [0, 1] and their classes (N,), -1 without, all at once: as many as the memory holds."""
    pictures, labels = open_samples(path)
    return np.stack(list(pictures)), labels


def open_listed(folder: Path) -> tuple[Pictures, np.ndarray]:
    """Open the images that a samples.csv lists."""
    listing = folder / "samples.csv"
    try:
        with listing.open(newline="") as lines:
            table = csv.DictReader(short_lines(lines))
            rows = [(file_below(row["file"]), number_of(row["class_label"] or "-1")) for row in table]
    except (KeyError, ValueError, TypeError, csv.Error) as error:
        why = f"{type(error).__name__}: {reason(error)}"[:LONGEST_REASON]
        raise EvaluationError(f"{listing} is not as sampling/sample.py writes it ({why})") from error

    def read(number: int) -> np.ndarray:
        file = folder / rows[number][0]
        try:
            image = read_pixels(file).transpose(2, 0, 1) / 255
        except Exception as error:  # of a damaged picture Pillow raises anything
            raise EvaluationError(
                f"{path_text(file)}, which {listing} names, cannot be read: {reason(error)}"
            ) from error
        return image

    def named(number: int) -> str:
        return str(folder / rows[number][0])

    return Pictures(read, range(len(rows)), named), np.array([label for _, label in rows])


def file_below(name: str) -> str:
    """Return the name of a file in the folder or below. Raises ValueError for any other, which is not opened."""
    if len(name) > LONGEST_NAME or Path(name).is_absolute() or ".." in Path(name).parts:
        raise ValueError(f"{short(name)} is no file below the folder")
    return name


def number_of(text: str | bytes) -> int:
    """Read the number of a class. Raises ValueError for what is none."""
    number = int(text)
    if not -1 <= number < 2**63:
        raise ValueError(f"{short(text)} is no number of a class")
    return number


def short_lines(file: IO[str]) -> Iterator[str]:
    """List the lines of a table. Raises ValueError for one that is too long to be of one."""
    for line in lines_within(file, LONGEST_LINE):
        if line is None:
            raise ValueError(f"a line has more than {LONGEST_LINE:,} characters")
        yield line


def open_folder(folder: Path) -> tuple[Pictures, np.ndarray]:
    """Open every image in a folder and below it, by name."""
    try:
        files = sorted(Path(entry.path) for entry in walk(folder, Counter())) if folder.is_dir() else []
    except ValueError as error:
        raise EvaluationError(str(error)) from error
    files = [file for file in files if file.suffix.lower() in IMAGE_SUFFIXES]
    if not files:
        raise EvaluationError(
            f"{lacking(folder, 'samples.csv')}: make samples with sampling/sample.py --out {folder}, or give a folder "
            "of images, which are taken as they are"
        )

    def read(number: int) -> np.ndarray:
        return decode(files[number], files[number])

    def named(number: int) -> str:
        return plain(str(files[number]))

    return Pictures(read, range(len(files)), named), without_labels(len(files))


def open_archive(file: Path) -> tuple[Pictures, np.ndarray]:
    """Open an NPZ with arr_0 (N, H, W, C) uint8 and, it may be, labels (N,), as evaluation suites have them."""
    try:
        with np.load(file, allow_pickle=False) as archive:
            images = archive["arr_0"]
            labels = archive["labels"] if "labels" in archive.files else without_labels(len(images))
    except (OSError, ValueError, KeyError, MemoryError, zipfile.BadZipFile) as error:
        raise EvaluationError(
            f"{file} cannot be read: {said(error)}; it should hold arr_0 (N, H, W, C) uint8"
        ) from error
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] not in (1, 3):
        raise EvaluationError(
            f"arr_0 in {file} is {images.dtype} of the shape {images.shape}; it should be uint8 (N, H, W, C), C 1 or 3"
        )
    if labels.shape != images.shape[:1] or not np.issubdtype(labels.dtype, np.integer):
        raise EvaluationError(f"labels in {file} are {labels.dtype} of the shape {labels.shape}, not a number an image")
    return Pictures(lambda number: images[number].transpose(2, 0, 1) / 255, range(len(images))), labels


def open_tars(files: Sequence[Path]) -> tuple[Pictures, np.ndarray]:
    """Open the images of WebDataset shards, with the class in NAME.cls where there is one."""
    members: list[tuple[Path, int, int, str]] = []  # file, where in it the image begins, its length, its name
    classes: dict[str, int] = {}
    for file in files:
        try:
            with tarfile.open(file, "r:", tarinfo=Member) as shard:
                for member in shard:
                    stem, ending = os.path.splitext(member.name)
                    if ending.lower() in IMAGE_SUFFIXES and member.isfile() and not member.issparse():
                        members.append((file, member.offset_data, member.size, f"{file}:{stem}"))
                    elif ending == ".cls" and (contents := shard.extractfile(member)) is not None:
                        classes[f"{file}:{stem}"] = number_of(contents.read(32))
        except (tarfile.TarError, OSError, ValueError) as error:
            raise EvaluationError(f"{file} is no tar shard of images: {said(error)}") from error

    def read(number: int) -> np.ndarray:
        file, start, length, name = members[number]
        with file.open("rb") as shard:
            shard.seek(start)
            return decode(shard.read(length), name)

    def named(number: int) -> str:
        return plain(members[number][3])

    labels = np.array([classes.get(name, -1) for *_, name in members], dtype=int)
    return Pictures(read, range(len(members)), named), labels


def decode(source: Path | bytes, name: object) -> np.ndarray:
    """Decode a picture, upright and in sRGB, as (C, H, W) in [0, 1]. Raises EvaluationError, naming it."""
    try:
        array = np.asarray(normalize(open_picture(source))[0])
    except Exception as error:  # of a damaged picture Pillow raises anything
        raise EvaluationError(f"{plain(str(name))} cannot be read: {reason(error)}") from error
    return (array if array.ndim == 3 else array[..., None]).transpose(2, 0, 1) / 255


def without_labels(count: int) -> np.ndarray:
    """Return the labels of images that have none."""
    return np.full(count, -1)


def shape_of(pictures: Pictures) -> tuple[int, ...]:
    """Return the shape (C, H, W) of the first of the pictures."""
    return pictures.read(int(pictures.numbers[0])).shape


def check_shape(what: str, shape: tuple[int, ...], real: tuple[int, ...]) -> None:
    """Raise EvaluationError where `what` has another shape (C, H, W) than real images."""
    if shape != real:
        raise EvaluationError(f"{what} has the shape (C, H, W) {shape}, the real images have {real}")


def check_shapes(pictures: Pictures, shape: tuple[int, ...]) -> Pictures:
    """Return `pictures` so that reading one of another shape than real images have, `shape`, is an EvaluationError."""

    def read(number: int) -> np.ndarray:
        image = pictures.read(number)
        check_shape(pictures.named(number), image.shape, shape)
        return image

    return Pictures(read, pictures.numbers, pictures.named)
