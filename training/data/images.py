"""Numbered sets of images: what training asks of them, the embedded digits, a folder of files."""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image
from tqdm import tqdm

from training.data.pixels import Framing, TooSmall

logger = logging.getLogger(__name__)

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"})
BROKEN_AT_MOST = 0.01  # share of the files that may be unreadable before it is an error


class DataError(Exception):
    """The data turned out to be unfit while they were read."""


class Images(Protocol):
    """A numbered set of images, all of one shape, with a class each or none, and maybe a text each."""

    shape: tuple[int, int, int]  # (C, H, W)
    class_names: list[str] | None  # None: the images have no classes

    def __len__(self) -> int: ...

    def image(self, index: int, random: np.random.Generator | None = None) -> np.ndarray:
        """(C, H, W) float32, pixels in [-1, 1]. What is random about it is drawn from `random`, the generator of one
        training sample; without it there is nothing random: the same image every time."""
        ...

    def label(self, index: int) -> int:
        """Number of the class, -1 where there are none."""
        ...

    def text(self, index: int) -> np.ndarray | None:
        """The caption as its text encoder sees it, (tokens, width) float32; None where the images have no texts."""
        return None

    def usable(self) -> np.ndarray:
        """Numbers of the images that can be read, after reading each; warns of the others, or raises ValueError."""
        ...


class Digits(Images):
    """scikit-learn's handwritten digits: 1,797 grey images of 8×8 pixels in 17 shades, ten classes.

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
        """(1, 8, 8) float32 in [-1, 1]."""
        return self._images[index]

    def label(self, index: int) -> int:
        """The digit."""
        return int(self._labels[index])

    def usable(self) -> np.ndarray:
        """All of them."""
        return np.arange(len(self))


class ImageFolder(Images):
    """Image files in a folder: `path/CLASS/*.png` with classes in alphabetic order, or `path/*.png` without.

    Raises ValueError where the folder is missing, holds no image, or has images both in it and in subfolders.
    """

    def __init__(self, path: str, framing: Framing) -> None:
        self.root, self.framing, self.shape = Path(path), framing, framing.shape
        if not self.root.is_dir():
            raise ValueError(f"data.path {path!r} is not a folder; give one that holds images")
        found = (p.relative_to(self.root) for p in self.root.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
        visible = (p for p in found if not any(part.startswith(".") for part in p.parts))
        self.files = sorted(p for p in visible if (self.root / p).is_file())
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

    def __len__(self) -> int:
        return len(self.files)

    def image(self, index: int, random: np.random.Generator | None = None) -> np.ndarray:
        with Image.open(self.root / self.files[index]) as picture:
            return self.framing(picture, random)

    def label(self, index: int) -> int:
        return self._labels[index]

    def usable(self) -> np.ndarray:
        return read_all(self, lambda index: str(self.root / self.files[index]))


def check_classes(num_classes: int | None, class_names: list[str] | None) -> None:
    """Raise ValueError where the network's number of classes is not that of the images."""
    classes = None if class_names is None else len(class_names)
    if num_classes is not None and num_classes != classes:
        raise ValueError(
            f"model.num_classes is {num_classes}, but the images have {classes or 'no'} classes: "
            f"set model.num_classes to {classes or 'null'}"
        )


def read_all(images: Images, name: Callable[[int], str]) -> np.ndarray:
    """Decode every image once and return the numbers of those that can be read.

    A broken image found now is a line in the log; found in the middle of the night it is a lost run.
    Raises ValueError where an image is too small, or more than 1 % are broken.
    """

    def problem(index: int) -> Exception | None:
        try:
            images.image(index)
        except Exception as error:  # decoders raise anything, from SyntaxError to struct.error
            return error
        return None

    with ThreadPoolExecutor() as pool:
        reading = tqdm(pool.map(problem, range(len(images))), "reading images", len(images), disable=None)
        problems = list(reading)
    small = [(name(i), error) for i, error in enumerate(problems) if isinstance(error, TooSmall)]
    broken = [(name(i), error) for i, error in enumerate(problems) if error and not isinstance(error, TooSmall)]
    if small:
        file, error = small[0]
        raise ValueError(
            f"{len(small)} of {len(images)} images are smaller than data.image_size × data.crop_scale, first {file} "
            f"({error}): remove them or ask for a smaller size"
        )
    for file, reason in broken:
        logger.warning("skipping a broken image: %s (%s: %s)", file, type(reason).__name__, reason)
    if len(broken) > BROKEN_AT_MOST * len(images):
        raise ValueError(
            f"{len(broken)} of {len(images)} images cannot be read, more than {BROKEN_AT_MOST:.0%}; the first is "
            f"{broken[0][0]}: mend or remove them"
        )
    return np.array([i for i, error in enumerate(problems) if error is None])
