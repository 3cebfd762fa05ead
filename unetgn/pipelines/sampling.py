"""Samples images from noise with any of diffusers' schedulers. Image n depends on the network and seed n alone.

This file needs diffusers and nothing else of ours: saved pipelines carry it (`unetgn.pipelines.pipeline`).
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .levels import levels_of, mix
from .schedulers import MOST_SIGNAL, SCHEDULERS, make_sampling_scheduler

__all__ = ["SCHEDULERS", "Guidance", "Start", "draw_noise", "make_sampling_scheduler", "sample", "slerp"]


@dataclass(frozen=True)
class Guidance:
    """Says how a prediction is drawn away from the one without class or text: uncond + scale·(cond - uncond).

    Raises ValueError for what is out of range, and for an interval or rescaling without guidance.
    """

    scale: float = 1.0
    """1 is off and costs nothing (Ho & Salimans 2022, arXiv 2207.12598, equation 6, whose w is one less)."""
    interval: tuple[float, float] | None = None
    """Noise levels with guidance: low < sigma <= high, where sigma = sqrt((1 - share) / share) is the noise for each
    unit of image; elsewhere it is off (Kynkäänniemi et al. 2024, arXiv 2404.07724)."""
    rescale: float = 0.0
    """Share, 0 to 1, of the guided prediction that gets the spread of the unguided one (Lin et al. 2023, arXiv
    2305.08891, section 3.4)."""

    def __post_init__(self) -> None:
        if not math.isfinite(self.scale):
            raise ValueError(f"guidance_scale is {self.scale}; it must be a finite number (1 is off)")
        if self.interval is not None and not 0 <= self.interval[0] < self.interval[1]:
            raise ValueError(
                f"guidance_interval is {self.interval}; it is two noise levels sigma, 0 <= low < high, such as "
                "(0.3, 3) (float('inf') is the highest)"
            )
        if not 0 <= self.rescale <= 1:
            raise ValueError(f"guidance_rescale is {self.rescale}; it is a share from 0 to 1")
        if self.scale == 1 and (self.interval is not None or self.rescale):
            raise ValueError(
                "guidance_interval or guidance_rescale was given, but guidance_scale is 1, which is no guidance: give "
                "another guidance_scale, or leave them out"
            )

    def at(self, share: Tensor) -> bool:
        """Return True where guidance is on at a level with `share` of the image's variance."""
        if self.scale == 1 or self.interval is None:
            return self.scale != 1
        low, high = self.interval
        return low < float(((1 - share) / share).sqrt()) <= high

    def __call__(self, conditional: Tensor, unconditional: Tensor) -> Tensor:
        """Return the guided prediction of two (N, C, *spatial)."""
        guided = unconditional + self.scale * (conditional - unconditional)
        if not self.rescale:
            return guided
        axes = tuple(range(1, guided.ndim))
        factor = conditional.float().std(axes, keepdim=True) / guided.float().std(axes, keepdim=True)
        return guided * (self.rescale * factor + 1 - self.rescale)


@dataclass(frozen=True)
class Start:
    """Says what to begin with in the place of pure noise: images, of which a mask may keep a part.

    They get as much noise as the scheduler's first step has (Meng et al. 2022, arXiv 2108.01073), which `begin_later`
    sets.
    With a mask, the part that is kept is put in place at every noise level (Lugmayr et al. 2022, arXiv 2201.09865,
    equation 8, without resampling), and is in the result exactly.
    """

    image: Tensor
    """(N or 1, C, H, W): clean images, or latents as the network has them."""
    mask: Tensor | None = None
    """(N or 1, 1, H, W): 1 where to draw, 0 where to keep; None: draw all."""

    def to(self, device: torch.device) -> Start:
        """Return the same on a device, in float32."""
        mask = None if self.mask is None else self.mask.to(device, torch.float32)
        return Start(self.image.to(device, torch.float32), mask)

    def keep(self, made: Tensor, kept: Tensor) -> Tensor:
        """Return `made` with `kept` where the mask says so."""
        return made if self.mask is None else self.mask * made + (1 - self.mask) * kept


def draw_noise(seeds: Sequence[int], shape: tuple[int, ...]) -> tuple[Tensor, list[torch.Generator]]:
    """Draw the noise (len(seeds), *shape) that images begin with, and return the generators that go on from there."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return torch.stack([torch.randn(shape, generator=generator) for generator in generators]), generators


def slerp(one: Tensor, other: Tensor, share: float) -> Tensor:
    """Compute what lies between two noises, on the sphere that both lie near, and so is as likely as they are.

    sin((1 - t)·angle)/sin(angle)·one + sin(t·angle)/sin(angle)·other (Shoemake 1985, Proc. SIGGRAPH 19, 245-254).
    """
    if share in (0, 1):
        return other if share else one
    cosine = (one * other).sum() / (one.norm() * other.norm())
    angle = torch.acos(cosine.clamp(-1, 1)).double()
    if angle.sin() < 1e-6:  # the same noise twice
        return one + share * (other - one)
    weights = ((1 - share) * angle).sin() / angle.sin(), (share * angle).sin() / angle.sin()
    return (weights[0] * one + weights[1] * other).to(one.dtype)


def plain(unet: Any) -> Any:
    """Return the network itself of one that torch.compile wraps."""
    return getattr(unet, "_orig_mod", unet)


def takes_texts(unet: Any) -> bool:
    """Return True where a network has a place for texts, whether it reads them or not."""
    return "encoder_hidden_states" in inspect.signature(type(plain(unet)).forward).parameters


@torch.no_grad()
def sample(
    unet: Any,
    scheduler: Any,
    seeds: Sequence[int],
    shape: tuple[int, ...],
    *,
    class_labels: Sequence[int] | None = None,
    null_class: int | None = None,
    texts: Tensor | None = None,
    empty_text: Tensor | None = None,
    guidance_scale: float = 1.0,
    guidance_interval: tuple[float, float] | None = None,
    guidance_rescale: float = 0.0,
    clip: bool = True,
    start: Start | None = None,
    noise: Tensor | None = None,
    device: torch.device | None = None,
    on_step: Callable[[Tensor], None] | None = None,
    on_step_end: Callable[[int, Tensor, Tensor], Tensor] | None = None,
    interrupted: Callable[[], bool] | None = None,
) -> Tensor:
    """Sample one image of `shape` (C, H, W) for each seed: (len(seeds), C, H, W) float32, on the CPU.

    `scheduler` is one of `unetgn.pipelines.schedulers` that is set to its steps, at levels that the network was trained
    on; its config says what the network predicts. It is not changed. With `clip`, which is for pixels and not for
    latents, values end in [-1, 1], and so does the image that is predicted at each step (unless the scheduler's
    config.clip_sample is false), from which the prediction is derived again.

    All noise of image n, at the start and between steps, comes from a CPU generator seeded with seeds[n]. The image
    depends neither on the device nor on the other images. `noise` (len(seeds), C, H, W), unit normal, takes the place
    of that at the start. Guidance is that of `Guidance`. `texts` (len(seeds), tokens, width) is for networks that read
    text, `empty_text` (tokens, width) is what they read for uncond. A network of diffusers' own classes has
    `null_class` for its label of no class; one of ours takes no label for that. `on_step` is
    shown the noisy images before every step, and the final ones. `on_step_end` gets the step's number, its
    timestep and what the scheduler keeps after it, and returns what it goes on with. Where `interrupted` returns True
    after a step, the others are left out.

    Raises ValueError where an image that is not clipped would be looked for in pure noise.
    """
    device, dtype = device or unet.device, unet.dtype
    guidance = Guidance(guidance_scale, guidance_interval, guidance_rescale)
    limit = (
        scheduler.config.get("clip_sample_range", 1.0) if clip and scheduler.config.get("clip_sample", True) else None
    )
    scheduler = copy.deepcopy(scheduler)  # it keeps predictions of earlier steps
    levels = levels_of(scheduler)
    if limit is None and (first := levels.lost_at_first()) is not None:
        raise ValueError(
            f"sampling would begin with {first:.1g} of the image's variance, in which a prediction of the noise finds "
            "no image: clip (for pixels), or take a scheduler of make_sampling_scheduler for clip_sample=False"
        )
    drawn, generators = draw_noise(seeds, shape)
    noise = (drawn if noise is None else noise).to(device, torch.float32)
    images = noise * scheduler.init_noise_sigma
    if start is not None:
        start, share = start.to(device), levels.at(0, scheduler.timesteps[0])
        if start.mask is None or share > MOST_SIGNAL:  # else what is behind the mask would shine through
            images = mix(start.image, noise, share) / levels.scale(share)

    labels = None if class_labels is None else torch.tensor(class_labels, device=device)
    no_labels = None if null_class is None else torch.full((len(seeds),), null_class, device=device)
    texts = None if texts is None else texts.to(device, dtype)
    no_texts = None if texts is None or empty_text is None else empty_text.to(device, dtype).expand_as(texts)
    has_texts = texts is not None or takes_texts(unet)

    def predict(noisy: Tensor, timestep: Tensor, texts: Tensor | None, labels: Tensor | None) -> Tensor:
        given = {} if labels is None else {"class_labels": labels}
        return unet(noisy.to(dtype), timestep, *([texts] if has_texts else []), **given).sample

    extra = {"generator": generators} if "generator" in inspect.signature(scheduler.step).parameters else {}
    for index, timestep in enumerate(scheduler.timesteps):
        alpha = levels.at(index, timestep)
        if start is not None and start.mask is not None:
            images = start.keep(images, mix(start.image, noise, alpha) / levels.scale(alpha))
        noisy = scheduler.scale_model_input(images, timestep)
        if on_step:
            on_step(noisy)
        prediction = predict(noisy, timestep, texts, no_labels if labels is None else labels)
        if guidance.at(alpha):
            prediction = guidance(prediction, predict(noisy, timestep, no_texts, no_labels))
        image = levels.image_of(prediction.float(), images, noisy, alpha)
        if limit is not None:
            image = image.clamp(-limit, limit)
        if start is not None:
            image = start.keep(image, start.image)
        prediction = levels.prediction_of(image, images, noisy, alpha)
        images = scheduler.step(prediction, timestep, images, **extra).prev_sample
        if on_step_end:
            images = on_step_end(index, timestep, images)
        if interrupted and interrupted():
            break
    if not images.isfinite().all():  # as pictures they would be black, without a word
        raise ValueError(
            "the network's images are not finite: its weights, the precision or the guidance scale are not fit for it"
        )
    images = images.clamp(-1, 1) if clip else images
    if start is not None:
        images = start.keep(images, start.image)
    if on_step:
        on_step(images)
    return images.cpu()
