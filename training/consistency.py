"""What one part of a configuration demands of another, and of the images that were found."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from training.objective import make_scheduler
from unetgn import UNetConfig
from unetgn.pipelines.sampling import make_sampling_scheduler

if TYPE_CHECKING:
    from training.config import RunConfig


def check_config(config: RunConfig) -> None:
    """Raise ValueError where keys of different groups contradict each other."""
    if not 0 <= config.seed < 2**63:
        raise ValueError(f"seed is {config.seed}; it must be at least 0 and below 2**63")
    check_finite(asdict(config))
    check_model(config)
    check_guidance(config)
    if config.train.validate_every > 0 and config.data.held_out == 0:
        raise ValueError(
            "train.validate_every needs images that are not trained on: set data.held_out, or leave it at 0"
        )
    if config.data.name == "latents" and config.objective.clip_sample:
        raise ValueError(
            "objective.clip_sample is true, but latents are not confined to [-1, 1] as pixels are: set it to false"
        )
    try:
        scheduler = make_scheduler(config.objective)
        make_sampling_scheduler(config.preview.scheduler, scheduler, config.preview.steps)
    except ValueError as error:
        raise ValueError(f"preview.scheduler and preview.steps do not fit the objective: {error}") from error


def check_finite(keys: dict[str, Any], prefix: str = "") -> None:
    """Raise ValueError where a number is infinite or none."""
    for key, value in keys.items():
        if isinstance(value, dict):
            check_finite(value, f"{prefix}{key}.")
        elif isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{prefix}{key} is {value}; it must be a finite number")


def check_model(config: RunConfig) -> None:
    """Raise ValueError where the network is not one for these data, or waits for what training does not give."""
    model, data = config.model, config.data
    if model.spatial_dims != 2:
        raise ValueError(f"model.spatial_dims is {model.spatial_dims}, but images have 2 axes: set it to 2")
    if model.out_channels != model.in_channels:
        raise ValueError(
            f"model.out_channels is {model.out_channels} and model.in_channels is {model.in_channels}: "
            "the objective predicts something of the image's shape, so set both alike"
        )
    if model.sample_size not in (None, data.image_size):
        raise ValueError(
            f"model.sample_size is {model.sample_size} and data.image_size is {data.image_size}: "
            "set both alike, or leave model.sample_size out"
        )
    if context_dims(model) and data.name != "latents":
        raise ValueError(
            f"model.transformer is set with context_dim {model.transformer and model.transformer.context_dim}, but "
            f"data.name {data.name} has no text for it to read: leave it out, or cache latents with captions "
            "(training/cache_latents.py --text-encoder) and train on those"
        )
    for name, value in (("condition.vector_dim", model.condition.vector_dim),
                        ("condition.augment_dim", model.condition.augment_dim),
                        ("time_cond_proj_dim", model.time_cond_proj_dim)):  # fmt: skip
        if value is not None:
            raise ValueError(f"model.{name} is {value}, but training has nothing to feed into it: leave it out")


def check_guidance(config: RunConfig) -> None:
    """Raise ValueError where conditions are to be dropped, or guided by, that are not there."""
    model, dropped, scale = config.model, config.objective.label_dropout, config.preview.guidance_scale
    if dropped > 0 and model.num_classes is None and not context_dims(model):
        raise ValueError(
            f"objective.label_dropout is {dropped}, but model.num_classes is not set, nor does the network read text: "
            "there is nothing to drop; set one or remove the other"
        )
    if dropped > 0 and model.num_classes is not None and not model.condition.null_class:
        raise ValueError(
            f"objective.label_dropout is {dropped}, but model.condition.null_class is false: there is no class for the "
            "dropped labels; set it to true, or objective.label_dropout to 0"
        )
    if scale != 1 and dropped == 0:
        raise ValueError(
            f"preview.guidance_scale is {scale}, but guidance needs a network that was trained without labels or text "
            "too: set objective.label_dropout above 0, and model.num_classes or text, or leave it out"
        )


def check_texts(model: UNetConfig, text_width: int | None) -> None:
    """Raise ValueError where the network reads other texts than the images have; None: they have none."""
    wanted = context_dims(model)
    if text_width is None and wanted:
        raise ValueError(
            f"model.transformer.context_dim is {sorted(wanted)[0]}, but these latents were cached without captions: "
            "cache them with training/cache_latents.py --text-encoder, or set model.transformer to null"
        )
    if text_width is not None and wanted != {text_width}:
        read = f"reads texts {sorted(wanted)} wide" if wanted else "reads no text"
        raise ValueError(
            f"these latents were cached with captions {text_width} wide, but the network {read}: set "
            f"model.transformer.context_dim to {text_width}, or cache them with another --text-encoder, or without"
        )


def context_dims(model: UNetConfig) -> set[int]:
    """Widths of the texts that the network's levels read; empty where it reads none."""
    dims = None if model.transformer is None else model.transformer.context_dim
    return set() if dims is None else {dims} if isinstance(dims, int) else set(dims)
