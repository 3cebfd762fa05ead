"""Reads what people give a pipeline: seeds, labels, pictures in every common form, sizes.

This file needs nothing else of ours: saved pipelines carry it (`unetgn.pipelines.pipeline`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

MOST_SIDE = 2**16  # pixels of an image's height or width
GREY_WITHIN = 2  # shades of 255 by which the channels of grey may part


def read_seeds(seeds: Any) -> list[int]:
    """Return seeds as a list, of a number or of anything that lists numbers: Python's, NumPy's or torch's.

    Raises ValueError where there is none, or one that is no seed, and TypeError for what lists nothing.
    """
    wanted = f"seeds are {seeds!r}; give one or more whole numbers from 0 to 2**63 - 1, one image each"
    found = as_python(seeds)
    if not isinstance(found, (int, float)):
        try:
            found = [as_python(seed) for seed in found]
        except TypeError as error:
            raise TypeError(wanted) from error
    numbers = found if isinstance(found, list) else [found]
    wrong = [seed for seed in numbers if isinstance(seed, bool) or not isinstance(seed, int)]
    if wrong or not numbers or not all(0 <= seed < 2**63 for seed in numbers):
        raise ValueError(wanted)
    return numbers


def as_python(value: Any) -> Any:
    """Return the numbers of a tensor, an array or one of their elements as Python has them; else the value itself."""
    return value.tolist() if isinstance(value, (Tensor, np.ndarray, np.generic)) else value


def as_list(values: Any, count: int, name: str) -> list[Any] | None:
    """Return `count` values of one for all or one each; None for None. Raises ValueError for another number of them."""
    if values is None:
        return None
    values = as_python(values)
    if isinstance(values, str) or not isinstance(values, (Sequence, range)):
        return [values] * count
    if len(values) == 1:
        return list(values) * count
    if len(values) != count:
        raise ValueError(f"{name} has {len(values)} entries; {count} seeds take 1 or {count}")
    return list(values)


def image_size(
    height: int | None, width: int | None, sample_size: tuple[int, int] | None, factor: int
) -> tuple[int, int]:
    """Return height and width of the images, by default those of training; `factor` pixels are one latent."""
    sizes = []
    for name, size, trained in zip(("height", "width"), (height, width), sample_size or (None, None), strict=True):
        if size is None and trained is None:
            raise ValueError("this network has no sample_size: give height and width")
        pixels = size if size is not None else (trained or 0) * factor
        if not 1 <= pixels <= MOST_SIDE or pixels % factor:
            multiple = f", and a multiple of the autoencoder's {factor}" if factor > 1 else ""
            raise ValueError(f"{name} is {pixels}; it must be from 1 to {MOST_SIDE}{multiple}")
        sizes.append(pixels)
    return sizes[0], sizes[1]


def read_images(image: Any, size: tuple[int, int], channels: int, count: int) -> Tensor:
    """Return an image for all or one each as (1 or count, C, H, W) in [-1, 1], resized to `size`."""
    if channels not in (1, 3):
        raise ValueError(f"images of {channels} channels cannot be given: the network makes no pictures by itself")
    return 2 * _read(image, size, count, "image", "L" if channels == 1 else "RGB") - 1


def read_mask(mask: Any, size: tuple[int, int], count: int) -> Tensor:
    """Return a mask for all or one each as (1 or count, 1, H, W): 1 where it is white, 0 where it is black.

    Raises ValueError for a palette of colours, whose numbers mean something else, such as classes, and for a mask
    that is black all over.
    """
    for one in mask if isinstance(mask, (list, tuple)) else [mask]:
        if isinstance(one, Image.Image):
            check_palette(one, "mask_image")
    found = (_read(mask, size, count, "mask_image", "L") >= 0.5).float()
    if not found.flatten(1).any(1).all():
        raise ValueError(
            "mask_image is black all over, so that nothing would be drawn: white is where to draw, 255 (or 1.0 of "
            "floats)"
        )
    return found


def check_palette(mask: Image.Image, name: str) -> None:
    """Raise ValueError where a mask, the argument `name`, has a palette of colours."""
    if mask.mode in ("P", "PA") and (np.ptp(np.asarray(mask.convert("RGB"), dtype=int), axis=-1) > GREY_WITHIN).any():
        raise ValueError(
            f"{name} has a palette of colours, in which nothing is white or black: give a grey picture "
            '(mode "L"), white (255) where to draw, such as of the numbers of one class'
        )


def _read(image: Any, size: tuple[int, int], count: int, name: str, mode: str) -> Tensor:
    if isinstance(image, (Tensor, np.ndarray)):
        images: list[Any] = list(image) if image.ndim == 4 else [image]
    else:
        images = list(image) if isinstance(image, (list, tuple)) else [image]
    if len(images) not in (1, count):
        raise ValueError(f"{name} is {len(images)} pictures; {count} seeds take 1 or {count}")
    return torch.stack([_to_tensor(one, size, name, mode) for one in images])


def to_8_bit(picture: Image.Image, name: str) -> Image.Image:
    """Return a picture whose pixels have 16 or 32 bits, which Pillow would cut off at 255, in mode L; any other itself.

    Of 16 bits white is 65535. Integers of 32 bits (mode I) are 8 bits where none is above 255, else 16. Floats (F) are
    in [0, 1] where none is above 1, else in [0, 255]. Raises ValueError for values beyond.
    """
    if not picture.mode.startswith(("I", "F")):
        return picture
    values = np.asarray(picture, dtype=np.float64)
    floats = picture.mode == "F"
    steps = (1.0, 255.0) if floats else (65535.0,) if picture.mode.startswith("I;16") else (255.0, 65535.0)
    white = next((step for step in steps if values.max() <= step), None)
    if white is None or not values.min() >= 0:
        raise ValueError(
            f"{name} has pixels of mode {picture.mode} from {values.min():.3g} to {values.max():.3g}; there they are "
            f"from 0 to {steps[-1]:.0f}"
        )
    return Image.fromarray((values / white * 255).round().astype(np.uint8))


def _to_tensor(image: Any, size: tuple[int, int], name: str, mode: str) -> Tensor:
    """Return one picture as (C, H, W) in [0, 1]."""
    if isinstance(image, Image.Image):
        image = to_8_bit(image, name)
        if "A" in image.getbands() or "transparency" in image.info:  # on white
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        _check_proportions((image.height, image.width), size, name)
        image = image.convert(mode)
        if (image.height, image.width) != size:
            image = image.resize((size[1], size[0]), Image.Resampling.LANCZOS)
        array = np.asarray(image, dtype=np.float32) / 255
        return torch.from_numpy(array if array.ndim == 3 else array[..., None]).permute(2, 0, 1)
    if isinstance(image, np.ndarray):
        white = np.iinfo(image.dtype).max if image.dtype in (np.uint8, np.uint16) else 1
        array = image.astype(np.float32) / white
        pixels = torch.from_numpy(array if array.ndim == 3 else array[..., None]).permute(2, 0, 1)
    elif isinstance(image, Tensor) and not image.is_complex():
        white = torch.iinfo(image.dtype).max if image.dtype in (torch.uint8, torch.uint16) else 1
        pixels = image.float() / white
        pixels = pixels if pixels.ndim == 3 else pixels[None]
    else:
        raise ValueError(
            f"{name} is {type(image).__name__}; give a PIL image, an array (H, W, C) or a tensor (C, H, W)"
        )
    pixels = pixels.detach().cpu()
    if pixels.ndim != 3 or not pixels.isfinite().all() or pixels.min() < 0 or pixels.max() > 1:
        raise ValueError(
            f"{name} has the shape {tuple(image.shape)} and values from {float(image.min()):.3g} to "
            f"{float(image.max()):.3g}; arrays (H, W, C) and tensors (C, H, W) have values in [0, 1] (or are uint8 or "
            "uint16)"
        )
    if pixels.shape[0] != len(mode):
        if pixels.shape[0] == 1:
            pixels = pixels.expand(len(mode), -1, -1)
        else:
            raise ValueError(f"{name} has {pixels.shape[0]} channels; {len(mode)} are needed")
    _check_proportions((pixels.shape[1], pixels.shape[2]), size, name)
    if tuple(pixels.shape[1:]) != size:
        resized = torch.nn.functional.interpolate(pixels[None], size, mode="bilinear", antialias=True)
        pixels = resized[0].clamp(0, 1)
    return pixels.contiguous()


def _check_proportions(given: tuple[int, int], size: tuple[int, int], name: str) -> None:
    if abs(given[0] / given[1] / (size[0] / size[1]) - 1) > 0.02:
        raise ValueError(
            f"{name} is {given[1]}×{given[0]} pixels, and what is made {size[1]}×{size[0]}: crop it to the same "
            "proportions, or give height and width"
        )
