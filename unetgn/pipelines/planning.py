"""Checks what a pipeline is asked for against its network, all of it before the first step.

This file needs nothing of ours but the files beside it: saved pipelines carry it (`unetgn.pipelines.pipeline`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .arguments import check_number, check_pair, check_tensor, check_texts, check_whole
from .inputs import as_list, image_size, read_images, read_mask
from .levels import shares_of
from .networks import NetworkFacts
from .sampling import Guidance
from .schedulers import begin_later, set_to_steps

OUTPUTS = ("pil", "np", "pt", "latent")
STEPS = 50
STRENGTH, MASKED_STRENGTH = 0.8, 1.0  # where none is given


@dataclass(frozen=True, eq=False)
class Settings:
    """Holds what decides on the images beside their seeds; `UNetPipeline.__call__` says what each is.

    Raises TypeError for what is of another kind, and ValueError for a number or noise that is not finite.
    """

    class_labels: int | Sequence[int] | Tensor | None = None
    prompt: str | Sequence[str] | None = None
    prompt_embeds: Tensor | None = None
    negative_prompt: str | None = None
    negative_prompt_embeds: Tensor | None = None
    guidance_scale: float = 1.0
    guidance_interval: tuple[float, float] | None = None
    guidance_rescale: float = 0.0
    num_inference_steps: int = STEPS
    image: Any = None
    strength: float | None = None
    mask_image: Any = None
    latents: Tensor | None = None
    height: int | None = None
    width: int | None = None
    output_type: str = "pil"

    def __post_init__(self) -> None:
        for name in ("guidance_scale", "guidance_rescale", "strength"):
            check_number(name, getattr(self, name), optional=name == "strength")
        for name in ("num_inference_steps", "height", "width"):
            check_whole(name, getattr(self, name), optional=name != "num_inference_steps")
        check_pair("guidance_interval", self.guidance_interval)
        for name in ("prompt_embeds", "negative_prompt_embeds", "latents"):
            check_tensor(name, getattr(self, name))
        check_texts("prompt", self.prompt)
        check_texts("negative_prompt", self.negative_prompt, several=False)


@dataclass(frozen=True, eq=False)
class Plan:
    """Holds the same, checked, as `unetgn.pipelines.sampling.sample` takes it."""

    seeds: list[int]
    shape: tuple[int, int, int]
    """(C, H, W) of what the network makes."""
    scheduler: Any
    """Set to its steps."""
    class_labels: list[int] | None
    null_class: int | None
    texts: Tensor | None
    empty_text: Tensor | None
    guidance: Guidance
    noise: Tensor | None
    """To begin with in the place of the seeds'."""
    pixels: Tensor | None
    """(N or 1, C, H, W): the image to begin with."""
    mask: Tensor | None
    """(N or 1, 1, H, W) of its pixels."""


def make_plan(pipeline: Any, seeds: list[int], settings: Settings) -> Plan:
    """Check what a pipeline is asked for. Raises ValueError where something does not fit; draws nothing."""
    facts, count, factor = pipeline.facts(), len(seeds), pipeline.vae_scale_factor
    check_output(pipeline, facts, settings.output_type)
    guidance = Guidance(settings.guidance_scale, settings.guidance_interval, settings.guidance_rescale)
    labels = facts.check_labels(as_list(settings.class_labels, count, "class_labels"))
    texts, empty = read_texts(pipeline, facts, settings, count)
    facts.check_guidance(guidance.scale, labelled=labels is not None, texts=texts is not None)
    size = image_size(settings.height, settings.width, facts.sample_size, factor)
    channels = facts.channels if pipeline.vae is None else pipeline.vae.config.in_channels
    pixels, mask = read_start(settings, size, channels, count)
    shape = (facts.channels, size[0] // factor, size[1] // factor)
    facts.check_size(*shape[1:])
    if settings.latents is not None and tuple(settings.latents.shape) != (count, *shape):
        raise ValueError(f"latents are {tuple(settings.latents.shape)}; one for each seed is {(count, *shape)}")
    scheduler = fit_scheduler(pipeline, settings)
    check_interval(guidance, scheduler)
    return Plan(
        seeds=seeds,
        shape=shape,
        scheduler=scheduler,
        class_labels=labels,
        null_class=facts.null_class,
        texts=texts,
        empty_text=empty,
        guidance=guidance,
        noise=settings.latents,
        pixels=pixels,
        mask=mask,
    )


def check_output(pipeline: Any, facts: NetworkFacts, output_type: str) -> None:
    """Raise ValueError where there is no such output, or no picture of what the network makes."""
    if output_type not in OUTPUTS:
        raise ValueError(f"output_type is {output_type!r}; there are {', '.join(OUTPUTS)}")
    if output_type == "pil" and pipeline.vae is None and facts.channels not in (1, 3):
        raise ValueError(
            f"the network makes {facts.channels} channels, and pictures have 1 (grey) or 3 (RGB): give the "
            "pipeline the vae of its latents, or output_type='np', 'pt' or 'latent'"
        )


def check_interval(guidance: Guidance, scheduler: Any) -> None:
    """Raise ValueError where guidance is to act in an interval in which no step lies."""
    if guidance.scale == 1 or guidance.interval is None:
        return
    shares = shares_of(scheduler)
    if not any(guidance.at(share) for share in shares):
        most, least = (float(((1 - share) / share).sqrt()) for share in (shares.min(), shares.max()))
        raise ValueError(
            f"guidance_interval is {guidance.interval}, but the steps begin at noise levels sigma from {most:.3g} to "
            f"{least:.3g}, none of them in it: give another guidance_interval, or no guidance"
        )


def fit_scheduler(pipeline: Any, settings: Settings) -> Any:
    """Set the pipeline's scheduler to its steps; with an image to begin with leave the first ones out."""
    own = pipeline.scheduler
    if pipeline.vae is not None and own.config.get("clip_sample"):  # latents are not confined to [-1, 1]
        own = type(own).from_config(own.config, clip_sample=False)
    scheduler = set_to_steps(own, settings.num_inference_steps)
    if settings.image is not None:
        default = STRENGTH if settings.mask_image is None else MASKED_STRENGTH
        begin_later(scheduler, default if settings.strength is None else settings.strength)
    return scheduler


def read_start(
    settings: Settings, size: tuple[int, int], channels: int, count: int
) -> tuple[Tensor | None, Tensor | None]:
    """Read the image to begin with, (1 or count, C, H, W) in [-1, 1], and its mask, (1 or count, 1, H, W)."""
    if settings.image is None:
        for name in ("strength", "mask_image"):
            if getattr(settings, name) is not None:
                raise ValueError(f"{name} was given without an image, which it is for: give image=…, or leave it out")
        return None, None
    mask = None if settings.mask_image is None else read_mask(settings.mask_image, size, count)
    return read_images(settings.image, size, channels, count), mask


def read_texts(
    pipeline: Any, facts: NetworkFacts, settings: Settings, count: int
) -> tuple[Tensor | None, Tensor | None]:
    """Return the texts (count, tokens, width), and the one (tokens, width) that guidance leads away from, if any."""
    prompt, texts = settings.prompt, settings.prompt_embeds
    facts.check_texts(prompt is not None, texts is not None)
    check_negative(facts, settings)
    if not facts.reads_text:
        return None, None
    reader = pipeline.text_encoder is not None and pipeline.tokenizer is not None
    if prompt is not None:
        if not reader:
            raise ValueError("a prompt needs the pipeline's text_encoder and tokenizer, or give prompt_embeds")
        prompts = as_list(prompt, count, "prompt") or []
        facts.check_prompts(prompts)
        texts = pipeline.encode_prompt(prompts)
    assert texts is not None
    if texts.ndim != 3 or len(texts) not in (1, count):
        raise ValueError(
            f"prompt_embeds are {tuple(texts.shape)}; (N, tokens, width) of N texts is needed, and {count} images take "
            f"1 or {count}"
        )
    facts.check_width(texts.shape[-1])
    empty = settings.negative_prompt_embeds
    if empty is None and settings.guidance_scale != 1:
        if not reader:
            raise ValueError("guidance needs negative_prompt_embeds, those of the empty prompt, beside prompt_embeds")
        empty = pipeline.encode_prompt([settings.negative_prompt or ""])
    if empty is not None:
        one = tuple(texts.shape[1:])
        if tuple(empty.shape) not in (one, (1, *one)):
            raise ValueError(
                f"negative_prompt_embeds are {tuple(empty.shape)}; one text like the others is {(1, *one)}"
            )
        empty = empty.reshape(one)
    return texts.expand(count, -1, -1), empty


def check_negative(facts: NetworkFacts, settings: Settings) -> None:
    """Raise ValueError where a text to lead away from is given, and nothing reads it, or leads away."""
    given = [name for name in ("negative_prompt", "negative_prompt_embeds") if getattr(settings, name) is not None]
    if not given:
        return
    if not facts.reads_text:
        raise ValueError(f"{given[0]} was given, but this network reads no text: leave it out")
    if len(given) > 1:
        raise ValueError("negative_prompt and negative_prompt_embeds were both given: leave one of them out")
    if settings.guidance_scale == 1:
        raise ValueError(
            f"{given[0]} was given, but guidance_scale is 1, which is no guidance: give another guidance_scale, or "
            "leave it out"
        )
