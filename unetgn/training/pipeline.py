"""Writes a finished network as a folder that draws: with diffusers alone, or with `unetgn.pipelines.UNetPipeline`."""

from __future__ import annotations

import contextlib
import logging
from pathlib import Path
from typing import Any

from diffusers import DDPMScheduler

from unetgn import UNet, interop
from unetgn.pipelines import UNetPipeline
from unetgn.pipelines.card import NAME
from unetgn.pipelines.networks import facts_of
from unetgn.pipelines.schedulers import NO_SIGNAL, loses_the_image, without_pure_noise
from unetgn.training.card import carry_over
from unetgn.training.data.autoencoder import load_autoencoder
from unetgn.training.data.text import TextEncoder, context_dims
from unetgn.training.files import writing

logger = logging.getLogger(__name__)


def save_pipeline(unet: UNet, scheduler: Any, folder: Path, *, cache: Path | None) -> None:
    """Write the pipeline for `unet`, whole or not at all, in the place of one that is there.

    `cache` is the folder of the latents that it was trained on, which has what makes pictures of them and reads
    captions. The network is saved as one of diffusers' own class, which needs nothing of ours, where there is one.
    """
    with writing(folder) as unfinished:
        make_pipeline(unet, scheduler, cache).save_pretrained(unfinished)
        with contextlib.suppress(OSError):  # no card is worth the pipeline
            carry_over(folder / NAME, unfinished / NAME)


def make_pipeline(unet: UNet, scheduler: Any, cache: Path | None) -> UNetPipeline:
    """Make the pipeline that is saved."""
    condition = unet.unet_config.condition
    has_null = condition.null_class and condition.null_class_trained
    network, null_class = unet, unet.config.num_classes if has_null else None
    try:
        theirs = interop.to_diffusers(unet)
        facts = facts_of(theirs, null_class)
        if facts.sample_size is not None:
            facts.check_size(*facts.sample_size)
        network = theirs
    except ValueError as error:
        null_class = None
        logger.warning("the pipeline needs unetgn where it is loaded, since %s", error)
    if cache is None:
        return UNetPipeline(network, scheduler, null_class=null_class)
    of_schedule = isinstance(scheduler, DDPMScheduler)
    if of_schedule and loses_the_image(scheduler) and scheduler.alphas_cumprod[-1] < NO_SIGNAL:
        scheduler = without_pure_noise(scheduler)  # diffusers' pipelines begin at the last level
    parts = {}
    if context_dims(unet.unet_config):
        text_encoder = TextEncoder(cache)
        parts = {"text_encoder": text_encoder.model, "tokenizer": text_encoder.tokenizer}
        if of_schedule:
            # StableDiffusionPipeline complains of another one, of "leading" timesteps; ours are "trailing".
            scheduler = DDPMScheduler.from_config(scheduler.config, steps_offset=1)
    return UNetPipeline(network, scheduler, vae=load_autoencoder(cache).model, null_class=null_class, **parts)
