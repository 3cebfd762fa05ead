"""Writes a finished network as a folder that diffusers loads, with its scheduler and what makes pictures of latents."""

from __future__ import annotations

import logging
from pathlib import Path

from diffusers import DDPMPipeline, DDPMScheduler, LDMPipeline

from training.data.autoencoder import load_autoencoder
from training.data.text import TextEncoder, context_dims
from training.files import writing
from unetgn import UNet, interop
from unetgn.pipelines.sampling import NO_SIGNAL, loses_the_image, without_pure_noise

logger = logging.getLogger(__name__)


def save_pipeline(unet: UNet, scheduler: DDPMScheduler, folder: Path, *, cache: Path | None) -> None:
    """Write the pipeline for `unet`, whole or not at all, in the place of one that is there.

    It is DDPMPipeline for pixels, LDMPipeline for the latents of `cache`, and with captions StableDiffusionPipeline. In
    the last one the network is of diffusers' own class, and needs nothing of ours.
    """
    with writing(folder) as unfinished:
        if cache is None:
            DDPMPipeline(unet=unet, scheduler=scheduler).save_pretrained(unfinished)
        else:
            save_latent_pipeline(unet, scheduler, unfinished, cache)
    if not (folder / "model_index.json").is_file():
        logger.warning("%s: its parts only, since no pipeline of diffusers for them undoes the autoencoder's "
                       "shift_factor; sampling/sample.py does", folder)  # fmt: skip


def save_latent_pipeline(unet: UNet, scheduler: DDPMScheduler, folder: Path, cache: Path) -> None:
    """Write the pipeline of a network of latents; its parts alone where the autoencoder has a shift_factor."""
    autoencoder = load_autoencoder(cache)
    if loses_the_image(scheduler) and scheduler.alphas_cumprod[-1] < NO_SIGNAL:
        scheduler = without_pure_noise(scheduler)  # diffusers' pipelines begin at the last level
    if autoencoder.shift_factor:
        parts = {"unet": unet, "scheduler": scheduler, "vae": autoencoder.model}
        for name, part in parts.items():
            part.save_pretrained(folder / name)
    elif not context_dims(unet.unet_config):
        LDMPipeline(vqvae=autoencoder.model, unet=unet, scheduler=scheduler).save_pretrained(folder)
    else:
        from diffusers import StableDiffusionPipeline  # here: it brings networks of transformers that few runs need

        text_encoder = TextEncoder(cache)
        StableDiffusionPipeline(
            vae=autoencoder.model,
            text_encoder=text_encoder.model,
            tokenizer=text_encoder.tokenizer,
            unet=interop.to_diffusers(unet),
            # The pipeline complains of another offset, which counts for "leading" timesteps alone; ours are "trailing".
            scheduler=DDPMScheduler.from_config(scheduler.config, steps_offset=1),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        ).save_pretrained(folder)
