"""Defines what training asks of numbered images; opens the digits, and folders of files."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Protocol

import numpy as np

from unetgn.messages import plain
from unetgn.training.data.folders import fold, list_endings
from unetgn.training.data.looking import Tally, look_at_all
from unetgn.training.data.pictures import IMAGE_SUFFIXES, Facts
from unetgn.training.data.pixels import Framing, held
from unetgn.training.data.places import end_of, open_place
from unetgn.training.data.splits import check_class_folders
from unetgn.training.errors import Misfit

# The keys that speak of classes, as they are where there are none.
NO_CLASSES = {"model.num_classes": None, "objective.label_dropout": 0}
WITHOUT_CLASSES = "set model.num_classes=null objective.label_dropout=0"
PARTS, DIGITS = 2**16, 12  # digests of images, one for each or at most so many, and their hexadecimal digits
LOOKED_INTO = 256  # files that a fingerprint looks into


class Images(Protocol):
    """Numbers images of one shape, each with a class or none, and maybe with a text."""

    shape: tuple[int, int, int]  # (C, H, W)
    class_names: list[str] | None  # None: the images have no classes, or classes without names
    left_out: Mapping[str, int] = MappingProxyType({})  # of the files that are no images, how many by ending
    tally: Tally | None = None  # what `usable` found the pictures to be
    without: Mapping[int, str] = MappingProxyType({})  # of the images that are left out by name, number and name
    absent: Sequence[str] = ()  # of these names those that no image has any more

    def __len__(self) -> int: ...

    def image(self, index: int, random: np.random.Generator | None = None) -> np.ndarray:
        """Return (C, H, W) float32, pixels in [-1, 1].

        Random crops and the like are drawn from `random`, the generator of one training sample. Without it the image is
        the same every time.
        """
        ...

    def label(self, index: int) -> int:
        """Return the number of the class, -1 where there is none."""
        ...

    def name(self, index: int) -> str:
        """Return what messages call the image."""
        ...

    def text(self, index: int) -> np.ndarray | None:
        """Return the embedded caption, (tokens, width) float32; None where the images have no texts."""
        return None

    def key(self, index: int) -> str | None:
        """Return the name that data.without has for an image; None where it has none."""
        return None

    def fact(self, index: int) -> str:
        """Return what tells an image's file from others, beside its name; "" where it has none of its own."""
        return ""

    def usable(self) -> np.ndarray:
        """Read every image; return the numbers of those that can be read and are not left out by name.

        Warns of those that cannot be read, or raises ValueError.
        """
        ...

    def fingerprint(self) -> str:
        """Return a text that these images keep wherever they are moved to, and that no other images have."""
        ...

    def common_fingerprint(self) -> str:
        """Return the part of it that is of all images at once, beside the sizes and names of files."""
        return self.fingerprint()

    def why_no_classes(self) -> str:
        """Say why no image has a class, and what would do."""
        return f"the images have no classes: {WITHOUT_CLASSES}"

    def why_no_class(self, index: int) -> str:
        """Say why an image has no class, and what would do."""
        return "remove it, or give it one"


class Digits(Images):
    """Reads scikit-learn's handwritten digits: 1,797 grey images of 8×8 pixels in 17 shades, ten classes.

    Alpaydin and Kaynak 1998, "Optical Recognition of Handwritten Digits", UCI Machine Learning Repository (test part).
    """

    def __init__(self) -> None:
        from sklearn.datasets import load_digits

        data = load_digits()
        self._images = (data.images[:, None] / 8 - 1).astype(np.float32)  # 0 .. 16 -> [-1, 1]
        self._labels = data.target
        self.shape = (1, 8, 8)
        self.class_names = [str(name) for name in data.target_names]

    def __len__(self) -> int:
        return len(self._images)

    def image(self, index: int, random: np.random.Generator | None = None) -> np.ndarray:
        """Return (1, 8, 8) float32 in [-1, 1]."""
        return self._images[index]

    def label(self, index: int) -> int:
        """Return the digit."""
        return int(self._labels[index])

    def name(self, index: int) -> str:
        return f"digit {index}"

    def fingerprint(self) -> str:
        return "digits"

    def usable(self) -> np.ndarray:
        """Return the numbers of all images."""
        size = self.shape[1], self.shape[2]
        self.tally = Tally(len(self), smallest=size, largest=size)
        return np.arange(len(self))


class ImageFolder(Images):
    """Reads image files of a folder: `path/CLASS/*.png` with classes in alphabetic order, or `path/*.png` without.

    The path may be a zip archive of such a folder, too. Links to folders and files are followed. Files that `without`
    names are numbered, there or not, and never read.
    Raises ValueError where the folder is missing, holds no image, has images both in it and in subfolders, or
    subfolders that are splits of a data set.
    """

    def __init__(self, path: str, framing: Framing, without: Sequence[str] = ()) -> None:
        self.root, self.framing, self.shape = Path(path), framing, framing.shape
        self.place = open_place(self.root)
        sizes: dict[Path, int] = {}
        left_out: Counter[str] = Counter()
        for file, size in self.place.files(left_out):
            if file.suffix.lower() in IMAGE_SUFFIXES:
                sizes[file] = size
            else:
                left_out[file.suffix.lower() or "no ending"] += 1
        named = {file_below(name): name for name in without}
        self.absent = [name for file, name in named.items() if file not in sizes]
        sizes |= {file: -1 for file in named if file not in sizes}
        self.files, self.left_out = sorted(sizes), fold(left_out)
        self.without = {number: named[file] for number, file in enumerate(self.files) if file in named}
        if not self.files:
            known, found = ", ".join(sorted(IMAGE_SUFFIXES)), list_endings(self.left_out) or "nothing"
            raise ValueError(
                f"data.path {path!r} holds no images; files with these endings would be read: {known}; found {found}"
            )
        loose = sum(len(file.parts) == 1 for file in self.files)
        if 0 < loose < len(self.files):
            raise ValueError(
                f"data.path {path!r} holds {loose} images itself and {len(self.files) - loose} in subfolders: put all "
                "into subfolders, one a class, or all into the folder itself"
            )
        check_class_folders(self.root, self.files)
        self.class_names = None if loose else sorted({file.parts[0] for file in self.files})
        number = {name: i for i, name in enumerate(self.class_names or [])}
        self._labels = [number.get(file.parts[0], -1) for file in self.files]
        self._sizes = [sizes[file] for file in self.files]
        facts = [(file.as_posix(), sizes[file]) for file in self.files]
        self._fingerprint = fingerprint_files(facts, self.files, self.place.end)

    def __len__(self) -> int:
        return len(self.files)

    def image(self, index: int, random: np.random.Generator | None = None) -> np.ndarray:
        return self.framing.read(self.place.source(self.files[index]), random)

    def look(self, index: int) -> Facts:
        """Read an image, and say what it is."""
        with held(lambda: self.place.source(self.files[index])) as source:
            return self.framing.facts(source)

    def label(self, index: int) -> int:
        return self._labels[index]

    def name(self, index: int) -> str:
        return self.place.name(self.files[index])

    def key(self, index: int) -> str:
        return self.files[index].as_posix()

    def fact(self, index: int) -> str:
        end = self.place.end(self.files[index]) if index % looked_into(len(self)) == 0 else None
        return f"{self._sizes[index]} {'' if end is None else hashlib.sha256(end).hexdigest()}"

    def usable(self) -> np.ndarray:
        framing = self.framing
        sort = framing.bucket if framing.sizes else None
        numbers, self.tally = look_at_all(self, self.without, self.key, unfit=framing.unfit, sort=sort)
        return numbers

    def common_fingerprint(self) -> str:
        return ""

    def fingerprint(self) -> str:
        """Compute a sha256 of the files, with their names within the folder."""
        return self._fingerprint

    def why_no_classes(self) -> str:
        return f"{super().why_no_classes()}, or put the images of each class into a subfolder of {self.root}"


def file_below(name: str) -> Path:
    """Return the path, below data.path, of an image that data.without names. Raises ValueError for no such name."""
    file = Path(name)
    if file.is_absolute() or ".." in file.parts or file.suffix.lower() not in IMAGE_SUFFIXES:
        raise ValueError(f"data.without names {name!r}, which is no image file below data.path, such as cat/01.png")
    return file


def fingerprint_files(
    facts: list[tuple[str, int]], files: Sequence[Path], end: Callable[[Path], bytes] = end_of
) -> str:
    """Compute a sha256 of (name, size) of all files, and of the ends of 256 of them or more, evenly spread.

    Quick for a million files, and enough to notice that a data set is another one.
    """
    total = hashlib.sha256(repr(facts).encode())
    for file in files[:: looked_into(len(files))]:
        total.update(end(file))
    return total.hexdigest()


def looked_into(count: int) -> int:
    """Return of how many of the files one is looked into."""
    return max(1, count // LOOKED_INTO)


def fingerprint(images: Images, indices: np.ndarray, left_out: Collection[int] = ()) -> str:
    """Compute a sha256 of which images these are, which of them are taken and left out, and their labels."""
    labels = np.array([images.label(int(index)) for index in indices], dtype="<i8")
    total = hashlib.sha256(images.fingerprint().encode())
    total.update(indices.astype("<i8").tobytes())
    total.update(labels.tobytes())
    total.update(np.array(sorted(left_out), dtype="<i8").tobytes())
    return total.hexdigest()


def fingerprint_parts(images: Images, indices: np.ndarray, left_out: Collection[int]) -> list[str]:
    """Compute digests of images, whether they are taken or left out, and their labels: one for each, up to 2^16.

    Of more images each digest is of several that follow each other. With these, images can be compared but for some
    that have changed: `part_of` says which digests are of those.
    """
    common, left_out = images.common_fingerprint().encode() + indices.astype("<i8").tobytes(), set(left_out)
    parts = [hashlib.sha256(common) for _ in range(count_parts(len(images)))]
    for index in range(len(images)):
        fact = (images.key(index), images.fact(index), images.label(index), index in left_out)
        parts[part_of(index, len(images))].update(repr(fact).encode("utf-8", "surrogatepass"))
    return [part.hexdigest()[:DIGITS] for part in parts]


def part_of(index: int, count: int) -> int:
    """Return the number of the digest that image `index` of `count` is part of."""
    return index // -(-count // PARTS)


def count_parts(count: int) -> int:
    """Count the digests of so many images."""
    return part_of(count - 1, count) + 1 if count else 0


def check_classes(num_classes: int | None, images: Images, indices: np.ndarray) -> None:
    """Raise Misfit where images have other classes than the network. One without classes reads no labels."""
    if num_classes is None:
        return
    labels = [images.label(int(index)) for index in indices]
    if max(labels) < 0:
        raise Misfit(f"model.num_classes is {num_classes}, but {images.why_no_classes()}", NO_CLASSES)
    if images.class_names is not None:
        check_count(num_classes, images.class_names)
    if min(labels) < 0:
        index = int(indices[labels.index(min(labels))])
        raise Misfit(
            f"{images.name(index)} has no class number, but with model.num_classes {num_classes} classes are numbers "
            f"from 0 to {num_classes - 1}: {images.why_no_class(index)}",
            {},
        )
    if max(labels) >= num_classes:
        raise Misfit(
            f"{images.name(int(indices[labels.index(max(labels))]))} has the class {max(labels)}, but with "
            f"model.num_classes {num_classes} classes are numbers from 0 to {num_classes - 1}: set model.num_classes="
            f"{max(labels) + 1}, or name the right data.label_column",
            {"model.num_classes": max(labels) + 1},
        )


def check_count(num_classes: int, names: Sequence[str]) -> None:
    """Raise Misfit where the network's number of classes is not that of the images."""
    if num_classes != len(names):
        raise Misfit(
            f"model.num_classes is {num_classes}, but the images have {len(names)} classes ({shorten(names)}): set "
            f"model.num_classes={len(names)}",
            {"model.num_classes": len(names)},
        )


def shorten(names: Sequence[str], shown: int = 10) -> str:
    """List names, the first and the last of many."""
    return ", ".join(map(plain, names if len(names) <= shown else [*names[: shown - 1], "…", names[-1]]))
