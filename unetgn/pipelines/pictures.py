"""Makes pictures of tensors: single ones and grids."""

from __future__ import annotations

import math

import torch
from PIL import Image
from torch import Tensor

WIDEST = 16  # classes in a row of a grid at most
READABLE = 64  # pixels: an image in a grid is enlarged by a whole factor to about this size


def to_uint8(images: Tensor) -> Tensor:
    """Convert (N, C, H, W) in [-1, 1] -> (N, H, W, C) uint8, rounded to the nearest of 256 shades."""
    return ((images.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def to_picture(pixels: Tensor) -> Image.Image:
    """Make of (H, W, C) uint8 with C = 1 or 3 a grey or RGB picture. Raises ValueError for other C."""
    if pixels.shape[-1] not in (1, 3):
        raise ValueError(f"an image of {pixels.shape[-1]} channels is no picture; 1 (grey) and 3 (RGB) are")
    array = pixels.cpu().numpy()
    return Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array)


def columns_in_turn(count: int, num_classes: int | None) -> int | None:
    """Return the images in a row of a grid of classes in turn: a class a column where they fit; None, about square."""
    return num_classes if num_classes is not None and 1 < num_classes <= min(count, WIDEST) else None


def to_grid(images: Tensor, columns: int | None = None) -> Image.Image:
    """Lay (N, C, H, W) in [-1, 1] out as one picture, `columns` a row (default: about square); enlarge small images."""
    return tile_pixels(to_uint8(images), columns)


def tile_pixels(pixels: Tensor, columns: int | None = None) -> Image.Image:
    """Lay (N, H, W, C) uint8 out as one picture, as `to_grid` does."""
    count = len(pixels)
    columns = columns or math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    factor = max(1, READABLE // max(pixels.shape[1:3]))
    pixels = pixels.repeat_interleave(factor, 1).repeat_interleave(factor, 2)
    pixels = torch.nn.functional.pad(pixels, (0, 0, 1, 1, 1, 1), value=255)  # a white line between two images
    empty = pixels.new_full((rows * columns - count, *pixels.shape[1:]), 255)
    tiles = torch.cat([pixels, empty]).unflatten(0, (rows, columns))
    return to_picture(tiles.transpose(1, 2).flatten(2, 3).flatten(0, 1))
