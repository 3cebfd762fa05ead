"""Writes what a run has made: a network as a folder that draws, with diffusers alone or with ours, and adapters."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusers import DDPMScheduler

from unetgn import UNet, interop
from unetgn.pipelines import UNetPipeline
from unetgn.pipelines.card import HEADER, HERE, NAME, WHERE
from unetgn.pipelines.networks import facts_of
from unetgn.pipelines.schedulers import NO_SIGNAL, loses_the_image, without_pure_noise
from unetgn.training.card import carry_over
from unetgn.training.data.autoencoder import load_autoencoder
from unetgn.training.data.text import TextEncoder, context_dims
from unetgn.training.files import writing
from unetgn.training.lora import ADAPTER, WEIGHTS, trained_state

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


def save_adapter(network: UNet, folder: Path, base: str | None) -> None:
    """Write the adapter of a network for `load_lora_weights` of diffusers' pipelines, and our `load_lora_adapter`.

    Whole or not at all, in the place of one that is there, with a README.md. `base` is where the network lies.
    """
    from diffusers.loaders import StableDiffusionLoraLoaderMixin  # it imports transformers

    layers = {name.replace(f".{ADAPTER}.", "."): t.detach().to("cpu", copy=True).contiguous()
              for name, t in trained_state(network).items()}  # fmt: skip
    # diffusers leaves the dropout of an adapter that it loads at work in pipelines too, though their networks are in
    # evaluation mode: they would draw something else each time.
    config = described(network.peft_config[ADAPTER].to_dict()) | {"lora_dropout": 0.0}
    with writing(folder) as unfinished:
        StableDiffusionLoraLoaderMixin.save_lora_weights(
            unfinished, unet_lora_layers=layers, unet_lora_adapter_metadata=config
        )
        text = adapter_card(Path(base or "").name, rank=network.peft_config[ADAPTER].r)
        (unfinished / NAME).write_text(text, encoding="utf-8")
        with contextlib.suppress(OSError):  # no card is worth the adapter
            carry_over(folder / NAME, unfinished / NAME)


def adapter_card(base: str, *, rank: int) -> str:
    """Write the README.md of an adapter for the network in a folder called `base`."""
    return f"""{HEADER}# An adapter (LoRA) of a diffusion U-Net

It changes the network in `{base}`, and does nothing without it: {WEIGHTS} has factors of rank {rank} for some of
its layers.

```python
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained("BASE")
pipeline.load_lora_weights({HERE})
```

BASE is the pipeline that the network in `{base}` is of: its folder, or its name on the hub. {WHERE}diffusers needs
the packages transformers and peft for it. `unetgn.UNet.from_diffusers(…)` takes it by
`load_lora_adapter({HERE}, prefix="unet")`.
"""


def described(config: Mapping[str, object]) -> dict[str, object]:
    """Return PEFT's configuration as JSON takes it, always alike: its sets are lists in order."""
    return {key: sorted(value) if isinstance(value, (set, frozenset)) else value for key, value in config.items()}
