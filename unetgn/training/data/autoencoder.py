"""Wraps the autoencoder of latent diffusion: pixels to the moments of a latent, and latents back to pixels.

Rombach et al. 2022 (arXiv 2112.10752), with diffusers' AutoencoderKL.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from unetgn.json_files import read_object
from unetgn.messages import plain
from unetgn.pickles import refuse_pickles
from unetgn.programs.paths import lacking
from unetgn.training.checkpoint import check_weights
from unetgn.training.data.pixels import size_text
from unetgn.training.errors import reason


class Autoencoder:
    """Runs diffusers' AutoencoderKL in float32 and evaluation mode, and scales its latents for diffusion.

    The encoder gives a mean and a standard deviation; a latent is z = (mean + std·noise - shift_factor)·scaling_factor.
    """

    def __init__(self, model: AutoencoderKL) -> None:
        self.model: Any = model.float().eval().requires_grad_(False)
        self.channels: int = model.config.in_channels
        self.latent_channels: int = model.config.latent_channels
        self.scaling_factor: float = model.config.scaling_factor
        self.shift_factor: float = model.config.shift_factor or 0.0

    def latent_shape(self, size: tuple[int, int]) -> tuple[int, int, int]:
        """Return (C, H, W) of the latent of an image of `size` (H, W).

        Raises ValueError where the encoder would cut its edges.
        """
        factor = 2 ** (len(self.model.config.block_out_channels) - 1)
        if size[0] % factor or size[1] % factor:
            raise ValueError(
                f"data.image_size is {size_text(size)}, but the autoencoder makes one latent of {factor}×{factor} "
                f"pixels: take a multiple of {factor}"
            )
        return self.latent_channels, size[0] // factor, size[1] // factor

    @torch.no_grad()
    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation, unscaled, of the latents of images (N, C, H, W) in [-1, 1]."""
        latents = self.model.encode(images.to(self.model.device)).latent_dist
        return latents.mean, latents.std

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Return images (N, C, H, W) of scaled latents, on their device; one at a time, to save memory."""
        self.model.to(latents.device)
        moments = latents.float() / self.scaling_factor + self.shift_factor
        return torch.cat([self.model.decode(one[None]).sample for one in moments])


def load_autoencoder(folder: Path) -> Autoencoder:
    """Load the autoencoder of a folder, or of its `autoencoder/` (a latent cache) or `vae/` (a diffusers pipeline).

    Raises ValueError where there is none, another kind, or one without safetensors.
    """
    places = [folder, folder / "autoencoder", folder / "vae"]
    found = next((place for place in places if is_autoencoder(place)), None)
    if found is None:
        raise ValueError(
            f"{lacking(folder, 'AutoencoderKL')}: give a folder that diffusers saved one to, a diffusers pipeline, or "
            "one that training/cache_latents.py wrote"
        )
    refuse_pickles(found)
    try:
        model, read = AutoencoderKL.from_pretrained(
            found, use_safetensors=True, local_files_only=True, output_loading_info=True
        )
    except Exception as error:  # of a configuration that is anybody's, diffusers raises anything
        raise ValueError(f"the autoencoder in {found} cannot be read: {reason(error)}") from error
    if wrong := [*read["missing_keys"], *read["unexpected_keys"]]:  # which diffusers makes up, or leaves aside
        raise ValueError(
            f"the autoencoder in {found} has a config.json of another network than its weights are of: {len(wrong)} "
            f"tensors are on one side alone, such as {plain(str(wrong[0]))}; copy both from where they were saved"
        )
    check_weights(model.state_dict(), found)
    if model.config.latents_mean is not None or model.config.latents_std is not None:
        raise ValueError(f"the autoencoder in {found} normalizes each channel (latents_mean), which is not supported")
    model.register_to_config(_name_or_path="")  # saved pipelines would say where it lay on this machine
    return Autoencoder(model)


def is_autoencoder(folder: Path) -> bool:
    """Return True where diffusers saved an AutoencoderKL to this very folder."""
    config = folder / "config.json"
    return config.is_file() and read_object(config).get("_class_name") == "AutoencoderKL"


def digest(model: nn.Module) -> str:
    """Compute a sha256 of a network's weights, whatever files they came from."""
    total = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        total.update(name.encode())
        total.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return total.hexdigest()
