"""Defines what training asks of numbered images; opens the digits, and folders of files."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np
from PIL import Image
from tqdm import tqdm

from training.data.pixels import Framing, TooSmall

logger = logging.getLogger(__name__)

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"})
BROKEN_AT_MOST = 0.01  # share of the files that may be unreadable before it is an error
AHEAD = 256  # images that wait to be read, or to be asked for
LOOKED_INTO, END = 256, 64 * 1024  # files that a fingerprint looks into, and bytes at the end of each

T = TypeVar("T")


class Images(Protocol):
    """Numbers images of one shape, each with a class or none, and maybe with a text."""

    shape: tuple[int, int, int]  # (C, H, W)
    class_names: list[str] | None  # None: the images have no classes, or classes without names

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

    def usable(self) -> np.ndarray:
        """Read every image; return the numbers of those that can be read. Warns of others, or raises ValueError."""
        ...

    def fingerprint(self) -> str:
        """Return a text that these images keep wherever they are moved to, and that no other images have."""
        ...


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
        return np.arange(len(self))


class ImageFolder(Images):
    """Reads image files of a folder: `path/CLASS/*.png` with classes in alphabetic order, or `path/*.png` without.

    Links to folders and files are followed. Raises ValueError where the folder is missing, holds no image, or has
    images both in it and in subfolders.
    """

    def __init__(self, path: str, framing: Framing) -> None:
        self.root, self.framing, self.shape = Path(path), framing, framing.shape
        if not self.root.is_dir():
            raise ValueError(f"data.path {path!r} is not a folder; give one that holds images")
        sizes = {
            Path(entry.path).relative_to(self.root): entry.stat().st_size
            for entry in walk(self.root)
            if Path(entry.name).suffix.lower() in IMAGE_SUFFIXES
        }
        self.files = sorted(sizes)
        if not self.files:
            known = ", ".join(sorted(IMAGE_SUFFIXES))
            raise ValueError(f"data.path {path!r} holds no images; files with these endings would be read: {known}")
        loose = sum(len(file.parts) == 1 for file in self.files)
        if 0 < loose < len(self.files):
            raise ValueError(
                f"data.path {path!r} holds {loose} images itself and {len(self.files) - loose} in subfolders: put all "
                "into subfolders, one a class, or all into the folder itself"
            )
        self.class_names = None if loose else sorted({file.parts[0] for file in self.files})
        number = {name: i for i, name in enumerate(self.class_names or [])}
        self._labels = [number.get(file.parts[0], -1) for file in self.files]
        facts = [(file.as_posix(), sizes[file]) for file in self.files]
        self._fingerprint = fingerprint_files(facts, [self.root / file for file in self.files])

    def __len__(self) -> int:
        return len(self.files)

    def image(self, index: int, random: np.random.Generator | None = None) -> np.ndarray:
        with Image.open(self.root / self.files[index]) as picture:
            return self.framing(picture, random)

    def label(self, index: int) -> int:
        return self._labels[index]

    def name(self, index: int) -> str:
        return str(self.root / self.files[index])

    def usable(self) -> np.ndarray:
        return read_all(self)

    def fingerprint(self) -> str:
        """Compute a sha256 of the files, with their names within the folder."""
        return self._fingerprint


def walk(folder: Path, above: tuple[Path, ...] = ()) -> Iterator[os.DirEntry[str]]:
    """List the files in a folder and in all below it; follow links, leave out hidden files and hidden folders.

    Raises ValueError for a link to nothing, or to a folder that it is in.
    """
    here = folder.resolve()
    if here in above:
        raise ValueError(f"{folder} is a link to a folder that it is in itself: remove it")
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                yield from walk(Path(entry.path), (*above, here))
            elif entry.is_file():
                yield entry
            elif entry.is_symlink():
                raise ValueError(f"{entry.path} is a link to nothing: mend or remove it")


def fingerprint_files(facts: list[tuple[str, int]], files: Sequence[Path]) -> str:
    """Compute a sha256 of (name, size) of all files, and of the ends of 256 of them or more, evenly spread.

    Quick for a million files, and enough to notice that a data set is another one.
    """
    total = hashlib.sha256(repr(facts).encode())
    for file in files[:: max(1, len(files) // LOOKED_INTO)]:
        with contextlib.suppress(OSError), file.open("rb") as contents:  # what cannot be read is said elsewhere
            contents.seek(max(0, file.stat().st_size - END))
            total.update(contents.read())
    return total.hexdigest()


def fingerprint(images: Images, indices: np.ndarray) -> str:
    """Compute a sha256 of which images these are, which of them are taken, and their labels."""
    labels = np.array([images.label(int(index)) for index in indices], dtype="<i8")
    total = hashlib.sha256(images.fingerprint().encode())
    total.update(indices.astype("<i8").tobytes())
    total.update(labels.tobytes())
    return total.hexdigest()


def check_classes(num_classes: int | None, images: Images, indices: np.ndarray) -> None:
    """Raise ValueError where images have other classes than the network. One without classes reads no labels."""
    if num_classes is None:
        return
    if images.class_names is not None:
        check_count(num_classes, len(images.class_names))
    labels = [images.label(int(index)) for index in indices]
    if max(labels) < 0:
        check_count(num_classes, 0)
    wrong = next((place for place, label in enumerate(labels) if not 0 <= label < num_classes), None)
    if wrong is not None:
        what = "no class number" if labels[wrong] < 0 else f"the class {labels[wrong]}"
        raise ValueError(
            f"{images.name(int(indices[wrong]))} has {what}, but with model.num_classes {num_classes} classes are "
            f"numbers from 0 to {num_classes - 1}: set it, or name the right data.label_column"
        )


def check_count(num_classes: int | None, classes: int) -> None:
    """Raise ValueError where the network's number of classes is not that of the images."""
    if num_classes is not None and num_classes != classes:
        raise ValueError(
            f"model.num_classes is {num_classes}, but the images have {classes or 'no'} classes: "
            f"set model.num_classes to {classes or 'null'}"
        )


def reason(error: BaseException) -> str:
    """Return what the innermost of a chain of errors says."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {error}"


def read_all(images: Images) -> np.ndarray:
    """Decode every image once and return the numbers of those that can be read.

    A broken image found now is a line in the log; found in the middle of the night it is a lost run.
    Raises ValueError where an image is too small, or more than 1 % are broken.
    """

    small: dict[int, str] = {}
    broken: dict[int, str] = {}

    def look(index: int) -> None:
        try:
            images.image(index)
        except TooSmall as error:
            small[index] = str(error)
        except Exception as error:  # decoders raise anything, from SyntaxError to struct.error
            broken[index] = reason(error)  # not the error itself: it would hold the image

    with ThreadPoolExecutor() as pool:
        for _ in tqdm(map_in_order(pool, look, range(len(images))), "reading images", len(images), disable=None):
            pass
    if small:
        first = min(small)
        raise ValueError(
            f"{len(small)} of {len(images)} images are smaller than data.image_size × data.crop_scale, first "
            f"{images.name(first)} ({small[first]}): remove them or ask for a smaller size"
        )
    for index in sorted(broken):
        logger.warning("skipping a broken image: %s (%s)", images.name(index), broken[index])
    if len(broken) > BROKEN_AT_MOST * len(images):
        raise ValueError(
            f"{len(broken)} of {len(images)} images cannot be read, more than {BROKEN_AT_MOST:.0%}; the first is "
            f"{images.name(min(broken))}: mend or remove them"
        )
    return np.array([i for i in range(len(images)) if i not in broken])


def map_in_order(pool: Executor, function: Callable[[int], T], items: Iterable[int]) -> Iterator[T]:
    """Give the results in order, as `pool.map` does, which would queue all items at once; here some wait."""
    waiting: deque[Future[T]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > AHEAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:  # after Ctrl-C the pool would finish them first
            future.cancel()
