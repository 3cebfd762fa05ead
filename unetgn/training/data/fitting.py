"""Finds in the data what a configuration leaves open: the size of images, their channels, their classes."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from tqdm import tqdm

from unetgn.training.data.config import EMBEDDED, DataConfig, open_images
from unetgn.training.data.hugging_face import HuggingFaceImages
from unetgn.training.data.images import NO_CLASSES, ImageFolder, Images
from unetgn.training.data.latents import Latents
from unetgn.training.data.looking import look
from unetgn.training.data.pictures import Facts

CHANNELS = ("model.in_channels", "model.out_channels")
# The keys that may be left to the data, by the word that does so. (Of classes null says that there are none.)
OPEN = {"data.image_size": "null", **dict.fromkeys(CHANNELS, "null"), "model.num_classes": "auto"}


def fit(config: DataConfig, open_keys: Collection[str], step: int) -> dict[str, int | None]:
    """Find values of the open keys, and of those that speak of classes where the data have none.

    data.image_size: the shorter side of the smallest image, in multiples of `step`; model.in_channels and
    .out_channels: 3 where an image is in colour, else 1; model.num_classes: the classes of the data. For size and
    channels every image is looked at.

    Raises ValueError for streams, whose images come in sequence, and where there are no images.
    """
    if config.name == "stream":
        raise ValueError(f"{' and '.join(sorted(open_keys))} cannot be left open for a stream, which nobody has seen "
                         "the end of: give values")  # fmt: skip
    images = open_as_they_are(config)
    found: dict[str, int | None] = {}
    if "model.num_classes" in open_keys:
        found = {"model.num_classes": len(images.class_names)} if images.class_names else dict(NO_CLASSES)
    if of_pictures := {"data.image_size", *CHANNELS} & set(open_keys):
        channels, height, _ = measure(images, config, step)
        found |= {key: height if key == "data.image_size" else channels for key in sorted(of_pictures)}
    return found


def open_as_they_are(config: DataConfig) -> Images:
    """Open images, of whatever size and channels they are."""
    if config.name in EMBEDDED:
        return EMBEDDED[config.name][0]()
    if config.name == "latents":
        assert config.path is not None  # DataConfig sees to it
        return Latents(config.path)
    return open_images(replace(config, to_grey=False, buckets=0), channels=3)


def measure(images: Images, config: DataConfig, step: int) -> tuple[int, int, int]:
    """Return the largest (C, H, W) that all images have. Raises ValueError where none can be read."""
    if not isinstance(images, (ImageFolder, HuggingFaceImages)):
        return images.shape
    shortest, colour = None, False
    for facts in tqdm(look(images, images.without), "looking at images", len(images), disable=None):
        if isinstance(facts, Facts):  # what cannot be read is said when the run begins
            shortest, colour = min([*facts.size, shortest or facts.size[0]]), colour or facts.colour
    if shortest is None:
        raise ValueError(f"data.path {config.path!r} holds no image that can be read")
    side = int(shortest / config.crop_scale)
    side = side // step * step or side
    return 3 if colour and not config.to_grey else 1, side, side
