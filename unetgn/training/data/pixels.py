"""Turns pictures into the arrays that are trained on: channels, size, crop."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from unetgn.training.data.pictures import MAX_PIXELS, Facts, is_colour, normalize, open_picture


class TooSmall(ValueError):
    """Says that an image has fewer pixels than the run asks for, and the largest data.image_size that it has."""

    def __init__(self, words: str, most: int) -> None:
        super().__init__(words)
        self.most = most


class InColour(ValueError):
    """Says that an image is in colour, and the network's images are grey."""


class Room:
    """Lets threads decode so many pixels at a time, and a larger picture alone: memory does not grow with threads."""

    def __init__(self, pixels: int) -> None:
        self.pixels, self.taken, self.changed = pixels, 0, threading.Condition()

    @contextlib.contextmanager
    def take(self, pixels: int) -> Iterator[None]:
        """Wait until there is room for a picture, and hold it for the block."""
        with self.changed:
            self.changed.wait_for(lambda: not self.taken or self.taken + pixels <= self.pixels)
            self.taken += pixels
        try:
            yield
        finally:
            with self.changed:
                self.taken -= pixels
                self.changed.notify_all()


ROOM = Room(2**25)  # pixels: three photographs of a telephone, a tenth of a gibibyte with three bytes each


@dataclass(frozen=True)
class Framing:
    """Turns pictures of any size and mode into squares of `size` pixels with 1 (grey) or 3 (RGB) channels.

    Without `random_crop` the shorter side is resized to `size` and the longer one cropped centrally. With it the
    shorter side is resized to `size` × `crop_scale`, and the square is cut out of that at a place that is drawn.
    """

    size: int
    channels: int
    random_crop: bool = False
    crop_scale: float = 1.0
    to_grey: bool = False  # else pictures in colour are refused where there is one channel
    max_pixels: int = MAX_PIXELS  # of a picture, before it is decoded
    enlarge: bool = False  # else pictures smaller than what is cut out of them are refused

    @property
    def shape(self) -> tuple[int, int, int]:
        """Return (C, H, W) of the arrays."""
        return self.channels, self.size, self.size

    def __call__(self, picture: Image.Image, random: np.random.Generator | None = None) -> np.ndarray:
        """Turn any picture into an array of `shape`, float32 in [-1, 1]: `check` it, then `cut`."""
        return self.cut(self.check(picture), random)

    def read(self, source: Path | bytes, random: np.random.Generator | None = None) -> np.ndarray:
        """Read the picture in a file, or in its contents, as an array."""
        return self.cut(self.open(source), random)

    def open(self, source: Path | bytes) -> Image.Image:
        """Open and `check` the picture in a file, or in its contents."""
        with open_picture(source, self.max_pixels) as picture:
            return self.check(picture)

    def facts(self, source: Path | bytes) -> Facts:
        """Decode a picture, fit or not, and say what it was found to be."""
        with open_picture(source, self.max_pixels) as picture, ROOM.take(picture.width * picture.height):
            whole, profile = normalize(picture)
            return Facts(whole.size, is_colour(whole), profile)

    def unfit(self, facts: Facts) -> list[TooSmall | InColour]:
        """List why a picture is not one to be cut."""
        (width, height), needed = facts.size, round(self.size * self.crop_scale)
        found: list[TooSmall | InColour] = []
        if min(width, height) < needed and not self.enlarge:
            words = f"{width}×{height} pixels, where {needed}×{needed} are needed"
            found.append(TooSmall(words, int(min(width, height) / self.crop_scale)))
        if facts.colour and self.channels == 1 and not self.to_grey:
            found.append(InColour("in colour, but model.in_channels is 1"))
        return found

    def check(self, picture: Image.Image) -> Image.Image:
        """Return the picture upright and in the channels asked for. What can be wrong with a picture comes up here.

        Raises TooSmall where a side is shorter than it would be resized to: enlarging would teach the model blur.
        Raises InColour where colours would be lost unasked.
        """
        for misfit in self.unfit(Facts(picture.size, colour=False, profile="none")):
            raise misfit  # before it is decoded
        whole, profile = normalize(picture)
        grey_only = self.channels == 1 and not self.to_grey
        for misfit in self.unfit(Facts(whole.size, grey_only and is_colour(whole), profile)):
            raise misfit
        return whole.convert("L" if self.channels == 1 else "RGB")

    def cut(self, picture: Image.Image, random: np.random.Generator | None = None) -> np.ndarray:
        """Cut the square out of a checked picture: at a place drawn from `random`, or without that in the middle."""
        if self.random_crop and random is not None:
            picture = random_square(picture, round(self.size * self.crop_scale), self.size, random)
        else:
            picture = central_square(picture, self.size)
        pixels = np.asarray(picture, dtype=np.float32).reshape(self.size, self.size, self.channels)
        return pixels.transpose(2, 0, 1) / 127.5 - 1


def central_square(picture: Image.Image, size: int) -> Image.Image:
    """Return the largest square in the middle, resized to `size`."""
    width, height = picture.size
    if (width, height) == (size, size):
        return picture
    shorter = min(width, height)
    left, top = (width - shorter) // 2, (height - shorter) // 2
    box = (left, top, left + shorter, top + shorter)
    return picture.resize((size, size), Image.Resampling.LANCZOS, box=box)


def random_square(picture: Image.Image, shorter: int, size: int, random: np.random.Generator) -> Image.Image:
    """Resize the shorter side to `shorter`, and cut a square of `size` out, each place equally likely."""
    factor = shorter / min(picture.size)
    if factor != 1:
        width, height = (round(side * factor) for side in picture.size)
        picture = picture.resize((width, height), Image.Resampling.LANCZOS)
    left, top = (int(random.integers(side - size + 1)) for side in picture.size)
    return picture.crop((left, top, left + size, top + size))
