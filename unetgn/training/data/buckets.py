"""Sorts pictures into sizes of about the same area and several proportions, so that each batch has one of them.

Pictures then keep more of themselves than the square in their middle. The order of a bucketed epoch is a function of
(seed, epoch) as any other: each size's images in an order of its own, in whole batches, and the batches mixed.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

MOST = 2.0  # a side is at most so many times as long as the other
UNUSED = -1  # the bucket of an image that cannot be read

Size = tuple[int, int]  # height, width


def list_sizes(side: int, step: int) -> tuple[Size, ...]:
    """List sizes in multiples of `step` with as many pixels as a square of `side` has, or a little fewer.

    The flattest first. `side` is a multiple of `step`.
    """
    pairs = [(low, side * side // low // step * step) for low in range(step, side + 1, step)]
    kept = {pair for pair in pairs if pair[1] <= MOST * pair[0]}
    return tuple(sorted(kept | {(long, low) for low, long in kept}, key=lambda size: (size[0] / size[1], size)))


def nearest(sizes: Sequence[Size], width: int, height: int) -> int:
    """Return the number of the size whose proportions are closest to a picture's, by the ratio of the two."""
    return min(range(len(sizes)), key=lambda n: abs(math.log(sizes[n][1] * height / (sizes[n][0] * width))))


@dataclass(frozen=True, eq=False)
class Buckets:
    """Says which size each image is cut to, and arranges epochs in batches of one size."""

    sizes: tuple[Size, ...]
    of_image: np.ndarray
    """The number of its size, by the number of the image; UNUSED where it cannot be read."""
    batch_size: int

    def size_of(self, index: int) -> Size:
        """Return the height and width of an image."""
        return self.sizes[self.of_image[index]]

    def arrange(self, random: np.random.Generator, indices: np.ndarray) -> np.ndarray:
        """Put images into the order of an epoch. The last batch of each size is filled up with images of its first."""
        batches = []
        for number in range(len(self.sizes)):
            order = random.permutation(indices[self.of_image[indices] == number])
            batches.append(np.resize(order, -(-len(order) // self.batch_size) * self.batch_size))
        rows = np.concatenate(batches).reshape(-1, self.batch_size)
        return rows[random.permutation(len(rows))].ravel()

    def length(self, indices: np.ndarray) -> int:
        """Count the samples of an epoch."""
        counts = np.bincount(self.of_image[indices], minlength=len(self.sizes))
        return int(sum(-(-counts // self.batch_size)) * self.batch_size)

    def fingerprint(self, images: str) -> str:
        """Compute a sha256 of these images' fingerprint, their sizes and the batches that their order is made of."""
        total = hashlib.sha256(f"{images} {self.sizes} {self.batch_size}".encode())
        total.update(self.of_image.astype("<i2").tobytes())
        return total.hexdigest()

    def describe(self, indices: np.ndarray) -> str:
        """Say how many of these images have which size, width × height as everywhere in messages."""
        counts = Counter(self.of_image[indices].tolist())
        named = [f"{width}×{height} ({counts[n]:,})" for n, (height, width) in enumerate(self.sizes) if counts[n]]
        return f"{len(named)} sizes, each batch of one: {', '.join(named)}"
