"""Writes what shows the way: from noise to image, and from one seed to another."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from unetgn.pipelines.pictures import tile_pixels, to_grid
from unetgn.pipelines.strips import Moments, noise_between, write_animation
from unetgn.sampling.folder import Subject
from unetgn.training.files import write_png, writing

SHOWN, MOMENTS, FRAMES = 4, 10, 60  # images of a strip, pictures of each in a strip, and in an animation at most
COLUMNS = 16  # pictures of each way in an interpolation's strip at most

Draw = Any  # of sampling.sample, which imports this module


def write_strip(draw: Draw, subjects: dict[int, Subject], out: Path, *, ending: str) -> None:
    """Write denoise.png, an image a row from noise to the end, and denoise.gif or .webp of the same images."""
    seeds = list(subjects)[:SHOWN]
    moments = Moments(len(seeds), draw.shape, seeds if draw.image is None else [])
    draw(seeds, [subjects[seed] for seed in seeds], output_type="latent", callback_on_step_end=moments)
    decode = draw.pipeline.decode if draw.pipeline.vae is not None else lambda images: images
    strip, columns = moments.strip(MOMENTS)
    write_png(out / "denoise.png", to_grid(decode(strip), columns))
    strip, frames = moments.strip(FRAMES)
    images = decode(strip).unflatten(0, (len(seeds), frames))
    write_frames(out / f"denoise.{ending}", [to_grid(images[:, frame], len(seeds)) for frame in range(frames)])


def write_interpolation(
    draw: Draw, subjects: dict[int, Subject], out: Path, frames: int, *, batch: int, ending: str
) -> None:
    """Write interpolation.png, a row from each seed to the next, and .gif or .webp, with the subject of the first."""
    seeds = list(subjects)
    ways = [noise_between(one, other, frames, draw.shape) for one, other in itertools.pairwise(seeds)]
    noise = torch.cat([ways[0], *(way[1:] for way in ways[1:])])
    pictures: list[Image.Image] = []
    for part in noise.split(batch):
        pictures += draw([seeds[0]] * len(part), [subjects[seeds[0]]] * len(part), latents=part)
    pixels = torch.stack([pixels_of(picture) for picture in pictures])
    columns = min(COLUMNS, frames)
    of_way = torch.linspace(0, frames - 1, columns).round().long()
    # A row has both of its ends: the picture of a seed ends one, and begins the next.
    rows = torch.cat([way * (frames - 1) + of_way for way in range(len(ways))])
    write_png(out / "interpolation.png", tile_pixels(pixels[rows], columns))
    write_frames(out / f"interpolation.{ending}", [tile_pixels(one[None], 1) for one in pixels])


def write_frames(path: Path, pictures: Sequence[Image.Image]) -> None:
    """Write an animation, whole or not at all."""
    with writing(path) as unfinished:
        write_animation(unfinished, pictures, format=path.suffix[1:].upper())


def pixels_of(picture: Image.Image) -> torch.Tensor:
    """Return a picture as (H, W, C) uint8."""
    array = np.array(picture)
    return torch.from_numpy(array if array.ndim == 3 else array[..., None])
