"""A finished network as a folder that diffusers loads, with its scheduler and what makes pictures of latents."""

from __future__ import annotations

import logging
from pathlib import Path

from diffusers import DDPMPipeline, DDPMScheduler, LDMPipeline, StableDiffusionPipeline

from training.data.autoencoder import load_autoencoder
from training.data.text import TextEncoder
from unetgn import UNet, interop

logger = logging.getLogger(__name__)


def save_pipeline(unet: UNet, scheduler: DDPMScheduler, folder: Path, *, cache: Path | None) -> None:
    """Write the pipeline for `unet`: DDPMPipeline for pixels, LDMPipeline for the latents of `cache`, with captions
    StableDiffusionPipeline. In the last one the network is of diffusers' own class, and needs nothing of ours."""
    if cache is None:
        DDPMPipeline(unet=unet, scheduler=scheduler).save_pretrained(folder)
        return
    autoencoder = load_autoencoder(cache)
    if autoencoder.shift_factor:
        logger.warning("%s: its parts only, since no pipeline of diffusers for them undoes the autoencoder's "
                       "shift_factor; sampling/sample.py does", folder)  # fmt: skip
        parts = {"unet": unet, "scheduler": scheduler, "vae": autoencoder.model}
        for name, part in parts.items():
            part.save_pretrained(folder / name)
    elif unet.unet_config.transformer is None or unet.unet_config.transformer.context_dim is None:
        LDMPipeline(vqvae=autoencoder.model, unet=unet, scheduler=scheduler).save_pretrained(folder)
    else:
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
