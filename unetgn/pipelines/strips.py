"""Shows the way from noise to image, as a strip of pictures and an animation, and the way from one seed to another."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from unetgn.pipelines.sampling import draw_noise, slerp

ANIMATIONS = {".gif": "GIF", ".webp": "WEBP"}  # ending -> Pillow's name of the format


class Moments:
    """Keeps what the first images of a batch look like after every step, for `callback_on_step_end`.

    Some schedulers keep image + sigma·noise, far outside of what can be shown: each moment is brought to a spread of at
    most 1.
    """

    def __init__(self, count: int, shape: tuple[int, ...], seeds: Sequence[int] | None = None) -> None:
        """Begin with the noise of `seeds`, by default 0, 1, …; of `count` images of `shape` (C, H, W).

        Without any seed begin with what there is after the first step: an image to begin with is not noise.
        """
        self.count = count
        first = range(count) if seeds is None else seeds[:count]
        self.moments = [draw_noise(first, shape)[0]] if len(first) else []

    def add(self, kept: Tensor) -> None:
        """Take what the scheduler keeps (N, C, H, W) after a step."""
        kept = kept[: self.count].float().cpu()
        spread = kept.std(tuple(range(1, kept.ndim)), keepdim=True)
        self.moments.append(kept / spread.clamp(min=1))

    def __call__(self, pipeline: object, step: int, timestep: Tensor, kept: dict[str, Tensor]) -> None:
        """Take part as a pipeline's callback_on_step_end."""
        self.add(kept["latents"])

    def strip(self, at_most: int) -> tuple[Tensor, int]:
        """Return (images · moments, C, H, W), image by image, and how many moments there are, evenly chosen."""
        moments = self.moments
        shown = min(at_most, len(moments))
        chosen = torch.linspace(0, len(moments) - 1, shown).round().long().tolist()
        images = min(len(moment) for moment in moments)
        return torch.stack([moments[i][:images] for i in chosen], dim=1).flatten(0, 1), shown


def noise_between(one: int, other: int, frames: int, shape: tuple[int, ...]) -> Tensor:
    """Return the noise (frames, *shape) on the way from one seed to another, both included; at least 2 frames."""
    if frames < 2:
        raise ValueError(f"frames is {frames}; a way from one seed to another has at least 2")
    (first, last), _ = draw_noise((one, other), shape)
    return torch.stack([slerp(first, last, frame / (frames - 1)) for frame in range(frames)])


def draws_noise(scheduler: Any) -> bool:
    """Return True where a scheduler that is set to its steps draws noise between them: two seeds then part."""
    if "generator" not in inspect.signature(scheduler.step).parameters:
        return False
    copies = [copy.deepcopy(scheduler), copy.deepcopy(scheduler)]
    generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    kept = [torch.zeros(1, 1, 1, 1)] * 2
    for timestep in scheduler.timesteps:
        for which, (one, generator) in enumerate(zip(copies, generators, strict=True)):
            one.scale_model_input(kept[which], timestep)
            kept[which] = one.step(torch.zeros(1, 1, 1, 1), timestep, kept[which], generator=generator).prev_sample
        if kept[0] != kept[1]:
            return True
    return False


def write_animation(path: Path, pictures: Sequence[Image.Image], *, milliseconds: int = 100, format: str) -> None:
    """Write pictures as an endless GIF or lossless WebP; the last one stays for a second.

    `format` is "GIF" or "WEBP". Raises ValueError where there is no picture.
    """
    if not pictures:
        raise ValueError("an animation has at least one picture")
    durations = [milliseconds] * (len(pictures) - 1) + [1000]
    more = {"lossless": True} if format == "WEBP" else {"optimize": False}
    pictures[0].save(path, format, save_all=True, append_images=pictures[1:], duration=durations, loop=0, **more)
