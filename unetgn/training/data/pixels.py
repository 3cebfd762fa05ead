"""Turns pictures into the arrays that are trained on: channels, size, crop."""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

from unetgn.training.data.buckets import Size, list_sizes, nearest
from unetgn.training.data.pictures import MAX_PIXELS, Facts, is_colour, normalize, open_picture


class TooSmall(ValueError):
    """Says that an image has fewer pixels than the run asks for; `most` is the largest (height, width) that it has."""

    def __init__(self, words: str, most: tuple[int, int]) -> None:
        super().__init__(words)
        self.most = most


class InColour(ValueError):
    """Says that an image is in colour, and the network's images are grey."""


class Room:
    """Lets threads hold so much at a time, and what is larger alone: memory does not grow with threads."""

    def __init__(self, size: int) -> None:
        self.size, self.taken, self.changed = size, 0, threading.Condition()

    @contextlib.contextmanager
    def take(self, amount: int) -> Iterator[None]:
        """Wait until there is room for so much, and hold it for the block."""
        with self.changed:
            self.changed.wait_for(lambda: not self.taken or self.taken + amount <= self.size)
            self.taken += amount
        try:
            yield
        finally:
            with self.changed:
                self.taken -= amount
                self.changed.notify_all()


SPARE = 3  # pixels on each side that a decoder leaves for every one that is cut out: the filter makes the difference
ROOM = Room(2**25)  # pixels: three photographs of a telephone, a tenth of a gibibyte with three bytes each
CONTENTS = Room(2**25)  # bytes of encoded pictures that are in memory, as those of archives are
READING = threading.Lock()


@contextlib.contextmanager
def held(read: Callable[[], Path | bytes]) -> Iterator[Path | bytes]:
    """Read what is to be looked at, one at a time, since its size is not known before, and once there is room."""
    with contextlib.ExitStack() as room:
        with READING:
            source = read()
            room.enter_context(CONTENTS.take(len(source) if isinstance(source, bytes) else 0))
        yield source


@dataclass(frozen=True)
class Framing:
    """Turns pictures of any size and mode into rectangles of (height, width) pixels with 1 (grey) or 3 (RGB) channels.

    `size` is height and width, or one number for both. Without `random_crop` the largest rectangle of its proportions
    in the middle is resized to it. With it the picture is resized until it just covers `size` × `crop_scale`, and the
    rectangle is cut out of that at a place that is drawn.
    """

    size: int | tuple[int, int]
    channels: int
    random_crop: bool = False
    crop_scale: float = 1.0
    to_grey: bool = False  # else pictures in colour are refused where there is one channel
    max_pixels: int = MAX_PIXELS  # of a picture, before it is decoded
    sizes: tuple[Size, ...] = ()  # of which a picture takes the one of its proportions, in the place of `size`
    step: int = (
        1  # sizes that are advised are multiples of it: a network halves them, and diffusers' own takes no others
    )
    enlarge: bool = False  # else pictures smaller than what is cut out of them are refused

    @property
    def shape(self) -> tuple[int, int, int]:
        """Return (C, H, W) of the arrays."""
        height, width = (self.size, self.size) if isinstance(self.size, int) else self.size
        return self.channels, height, width

    def bucket(self, facts: Facts) -> int:
        """Return the number of a picture's size in `sizes`."""
        return nearest(self.sizes, *facts.size)

    def size_of(self, width: int, height: int) -> Size:
        """Return (H, W) of what is cut out of a picture."""
        return self.sizes[nearest(self.sizes, width, height)] if self.sizes else (self.shape[1], self.shape[2])

    def covered(self, size: Size) -> Size:
        """Return (H, W) of what a picture has to cover that `size` is cut out of."""
        return round(size[0] * self.crop_scale), round(size[1] * self.crop_scale)

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
        width, height = facts.size
        size = self.size_of(width, height)
        high, wide = self.covered(size)
        found: list[TooSmall | InColour] = []
        if (width < wide or height < high) and not self.enlarge:
            words = f"{width}×{height} pixels, where {wide}×{high} are needed"
            most = (
                self.largest_side(width, height) if self.sizes else largest_within(width, height, size, self.crop_scale)
            )
            high, wide = (side // self.step * self.step or side for side in most)
            found.append(TooSmall(words, (high, wide)))
        if facts.colour and self.channels == 1 and not self.to_grey:
            found.append(InColour("in colour, but model.in_channels is 1"))
        return found

    def largest_side(self, width: int, height: int) -> Size:
        """Return the largest `size` with which a picture covers the one of its proportions; (0, 0) without any."""
        step = math.gcd(*(side for size in self.sizes for side in size))
        for side in range(self.shape[1] - step, 0, -step):
            smaller = replace(self, sizes=list_sizes(side, step))
            high, wide = smaller.covered(smaller.size_of(width, height))
            if len(smaller.sizes) > 1 and high <= height and wide <= width:
                return side, side
        return 0, 0

    def check(self, picture: Image.Image) -> Image.Image:
        """Return the picture upright and in the channels asked for. What can be wrong with a picture comes up here.

        Raises TooSmall where a side is shorter than it would be resized to: enlarging would teach the model blur.
        Raises InColour where colours would be lost unasked.
        """
        lying = self.unfit(Facts(picture.size, colour=False, profile="none"))
        if lying and self.unfit(Facts(picture.size[::-1], colour=False, profile="none")):
            raise lying[0]  # before it is decoded, however it is to be turned
        whole, profile = normalize(self.reduce(picture))
        grey_only = self.channels == 1 and not self.to_grey
        for misfit in self.unfit(Facts(whole.size, grey_only and is_colour(whole), profile)):
            raise misfit
        return whole.convert("L" if self.channels == 1 else "RGB")

    def reduce(self, picture: Image.Image) -> Image.Image:
        """Have a JPEG that is far larger than what is cut out of it decoded at 1/8, 1/4 or 1/2 of its size.

        The decoder leaves out the finer frequencies of each block of 8×8 pixels, so that a photograph of a telephone
        takes an eighth of the time. Both sides have to be divided without a rest: then the same is cut out, within a
        few shades. Other formats are returned as they are.
        """
        width, height = picture.size
        most = SPARE * max(self.covered(self.size_of(width, height)))
        for scale in (8, 4, 2):
            if not (width % scale or height % scale) and min(width, height) >= most * scale:
                picture.draft(None, (width // scale, height // scale))
                break
        return picture

    def cut(self, picture: Image.Image, random: np.random.Generator | None = None) -> np.ndarray:
        """Cut what is asked for out of a checked picture: at a place drawn from `random`, or without in the middle."""
        channels, (height, width) = self.channels, self.size_of(*picture.size)
        if self.random_crop and random is not None:
            picture = cut_at_random(picture, self.covered((height, width)), (height, width), random)
        else:
            picture = cut_in_the_middle(picture, (height, width))
        pixels = np.asarray(picture, dtype=np.float32).reshape(height, width, channels)
        return pixels.transpose(2, 0, 1) / 127.5 - 1


def largest_within(width: int, height: int, shape: tuple[int, int], crop_scale: float) -> tuple[int, int]:
    """Return the largest (H, W) of the proportions of `shape` that a picture covers `crop_scale` times."""
    high, wide = shape
    if width * high <= height * wide:  # it is too narrow before it is too low
        return int(width / crop_scale) * high // wide, int(width / crop_scale)
    return int(height / crop_scale), int(height / crop_scale) * wide // high


def cut_in_the_middle(picture: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Return the largest rectangle of the proportions of `size` (H, W) in the middle, resized to it."""
    (width, height), (high, wide) = picture.size, size
    if (width, height) == (wide, high):
        return picture
    inner_width, inner_height = min(width, height * wide / high), min(height, width * high / wide)
    left, top = (width - inner_width) / 2, (height - inner_height) / 2
    box = (left, top, left + inner_width, top + inner_height)
    return picture.resize((wide, high), Image.Resampling.LANCZOS, box=box)


def cut_at_random(
    picture: Image.Image, covered: tuple[int, int], size: tuple[int, int], random: np.random.Generator
) -> Image.Image:
    """Resize until the picture just covers `covered` (H, W), and cut `size` (H, W) out, each place equally likely."""
    factor = max(covered[1] / picture.width, covered[0] / picture.height)
    if factor != 1:
        width, height = (round(side * factor) for side in picture.size)
        picture = picture.resize((width, height), Image.Resampling.LANCZOS)
    left, top = (int(random.integers(side - part + 1)) for side, part in zip(picture.size, size[::-1], strict=True))
    return picture.crop((left, top, left + size[1], top + size[0]))


def size_text(size: tuple[int, int]) -> str:
    """Write (height, width) as data.image_size takes it."""
    return str(size[0]) if size[0] == size[1] else f"[{size[0]},{size[1]}]"
