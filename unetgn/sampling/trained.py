"""Loads what a checkpoint has to sample with: the network, what reads prompts, what makes pictures of latents."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from unetgn import UNet
from unetgn.pipelines import UNetPipeline
from unetgn.sampling.folder import SamplingError
from unetgn.training.checkpoint import Checkpoint, TensorFile, run_of
from unetgn.training.config_files import load_config
from unetgn.training.data.autoencoder import Autoencoder, load_autoencoder
from unetgn.training.data.report import read_class_names
from unetgn.training.data.text import TextEncoder, context_dims
from unetgn.training.network import load_checkpoint
from unetgn.training.objective import described_scheduler

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Trained:
    """Holds what a checkpoint has to sample with."""

    unet: UNet
    scheduler: Any
    """The one that it was trained with."""
    unconditional: bool
    """Says whether training met samples without class or text: this run's, or that of its first weights."""
    digest: str
    """The sha256 of the weights."""
    class_names: list[str]
    """Names of its classes in the order of their numbers; [] where they have none."""
    cache: Path | None
    """Folder of the latents that it was trained on; None where it was trained on pixels."""

    @property
    def reads_text(self) -> bool:
        """Return True where the network reads text."""
        return bool(context_dims(self.unet.unet_config))

    def check_guidance(self, scale: float, name: str, *, prompts: Sequence[str] | None = None) -> None:
        """Raise SamplingError where guidance, the option `name`, has nothing to lead away from, or to.

        The former where training met no samples without class or text, the latter where all prompts are empty.
        """
        if scale != 1 and not self.unconditional:
            raise SamplingError(
                f"{name} {scale:g}: guidance needs a network that was trained with classes or texts and without "
                "(objective.label_dropout above 0), and this one was not: leave it out, or at 1"
            )
        classes = self.unet.config.num_classes is not None
        if scale != 1 and prompts is not None and not classes and not any(prompt.strip() for prompt in prompts):
            raise SamplingError(
                f"{name} {scale:g}: guidance leads away from the empty prompt, and no other is given: say what to "
                f"draw, or leave {name} at 1"
            )

    def check_prompts(self, prompts: Sequence[str], name: str) -> None:
        """Raise SamplingError where a prompt, of the option `name`, is empty, and training met no empty ones."""
        if not self.unconditional and not all(prompt.strip() for prompt in prompts):
            raise SamplingError(
                f"{name} has an empty text, but this network was trained with captions only (objective.label_dropout "
                "was 0), so that it draws rubbish without: say what to draw, or train with objective.label_dropout "
                "above 0"
            )


def load_trained(checkpoint: Checkpoint, weights: Literal["ema", "raw"]) -> Trained:
    """Load the network of a checkpoint for evaluation, and what belongs to it. Raises CheckpointError, ConfigError."""
    name: TensorFile = "ema" if weights == "ema" else "model"
    config = load_config(checkpoint.config_file)
    unet = load_checkpoint(checkpoint, name).eval()
    condition = unet.unet_config.condition
    known_before = condition.null_class_trained and (unet.config.num_classes is None or condition.null_class)
    met_before = config.train.initial_weights is not None and known_before
    return Trained(
        unet=unet,
        scheduler=described_scheduler(checkpoint, config.objective),
        unconditional=config.objective.label_dropout > 0 or met_before,
        digest=checkpoint.digest(name),
        class_names=read_class_names(run_of(checkpoint)) or [],
        cache=config.data.cache,
    )


def open_pipeline(
    trained: Trained, autoencoder: Autoencoder | None = None, text_encoder: TextEncoder | None = None
) -> UNetPipeline:
    """Make the pipeline that samples with what a checkpoint has."""
    return UNetPipeline(
        trained.unet,
        trained.scheduler,
        vae=None if autoencoder is None else autoencoder.model,
        text_encoder=None if text_encoder is None else text_encoder.model,
        tokenizer=None if text_encoder is None else text_encoder.tokenizer,
    )


def check_parts(
    cache: Path | None, *, reads_text: bool, autoencoder: Path | None = None, text_encoder: Path | None = None
) -> None:
    """Raise SamplingError where a part is given that a network has no use for; `cache` is as in `Trained`."""
    if autoencoder is not None and cache is None:
        raise SamplingError("--autoencoder was given, but this network was trained on pixels: leave it out")
    if text_encoder is not None and not reads_text:
        raise SamplingError("--text-encoder was given, but this network reads no text: leave it out")


def open_autoencoder(trained: Trained, asked: Path | None) -> Autoencoder | None:
    """Load what makes images of the network's latents, None where it makes images itself. Raises SamplingError."""
    check_parts(trained.cache, reads_text=trained.reads_text, autoencoder=asked)
    if trained.cache is None:
        return None
    try:
        autoencoder = load_autoencoder(asked or trained.cache)
    except ValueError as error:
        found = "" if asked else " (it was looked for where the run had its data.path)"
        raise SamplingError(f"Give the autoencoder of its latents as --autoencoder{found}: {error}") from error
    if autoencoder.latent_channels != trained.unet.config.in_channels:
        raise SamplingError(
            f"the autoencoder in {asked or trained.cache} makes images of latents with {autoencoder.latent_channels} "
            f"channels, but those of the network have {trained.unet.config.in_channels}: give the autoencoder of its "
            "training as --autoencoder"
        )
    return autoencoder


def open_text_encoder(
    trained: Trained, asked: Path | None, prompts: list[str] | None, negative_prompt: str | None = None
) -> TextEncoder | None:
    """Load what reads the prompts, None where the network reads no text. Raises SamplingError."""
    for name, given in (("--prompts", prompts), ("--negative-prompt", negative_prompt)):
        if given is not None and not trained.reads_text:
            raise SamplingError(f"{name} was given, but this network reads no text: leave it out")
    if prompts is None and trained.reads_text:
        raise SamplingError("this network reads text: give --prompts TEXT …")
    if prompts is not None:
        trained.check_prompts(prompts, "--prompts")
    text_encoder = read_text_encoder(trained, asked)
    if prompts is None or text_encoder is None:
        return text_encoder
    if cut := text_encoder.too_long(prompts):
        logger.warning("%d of %d prompts are cut off after %d tokens", cut, len(prompts), text_encoder.tokens)
    if negative_prompt is not None and text_encoder.too_long([negative_prompt]):
        logger.warning("the negative prompt is cut off after %d tokens", text_encoder.tokens)
    return text_encoder


def read_text_encoder(trained: Trained, asked: Path | None) -> TextEncoder | None:
    """Load what reads prompts, whatever they are; None where the network reads no text. Raises SamplingError."""
    check_parts(trained.cache, reads_text=trained.reads_text, text_encoder=asked)
    if not trained.reads_text:
        return None
    try:
        text_encoder = TextEncoder(asked or trained.cache or Path())
    except ValueError as error:
        raise SamplingError(f"Give the text encoder of its training as --text-encoder: {error}") from error
    wanted = context_dims(trained.unet.unet_config)
    if wanted != {text_encoder.width}:
        raise SamplingError(
            f"the text encoder in {asked or trained.cache} makes texts {text_encoder.width} wide, but the network "
            f"reads texts {sorted(wanted)} wide: give the text encoder of its training as --text-encoder"
        )
    return text_encoder
