"""Defines EDM's objective: noise levels without a schedule, and a network between factors that depend on them.

Karras et al. 2022 (arXiv 2206.00364), section 5 and table 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from diffusers import EDMDPMSolverMultistepScheduler
from torch import Tensor

LEAST_TIME = 2.0**-54  # in the place of 0, which would be a sigma of 0: half of the next number that is drawn


@dataclass(frozen=True)
class EDMConfig:
    """Configures EDM's objective. The defaults are the paper's."""

    sigma_data: float = 0.5
    """Standard deviation of the training data in [-1, 1], or of latents as they are cached; above 0."""
    p_mean: float = -1.2
    """Mean of ln(sigma) in training."""
    p_std: float = 1.2
    """Standard deviation of ln(sigma) in training; above 0."""
    sigma_min: float = 0.002
    """Noise level with which sampling ends, before the image without any; above 0."""
    sigma_max: float = 80.0
    """Noise level with which sampling begins: at least 10 sigma_data, which is noise and no image."""

    def __post_init__(self) -> None:
        for name in ("sigma_data", "p_std", "sigma_min"):
            if not getattr(self, name) > 0:
                raise ValueError(f"objective.edm.{name} is {getattr(self, name)}; it must be above 0")
        if not self.sigma_min < self.sigma_max:
            raise ValueError(
                f"objective.edm.sigma_min is {self.sigma_min} and objective.edm.sigma_max {self.sigma_max}; sampling "
                "goes down from the one to the other, so sigma_max must be larger"
            )
        if not self.sigma_max >= 10 * self.sigma_data:
            raise ValueError(
                f"objective.edm.sigma_max is {self.sigma_max}, where images have a spread (objective.edm.sigma_data) "
                f"of {self.sigma_data}, but sampling begins in pure noise: give {10 * self.sigma_data:g} or more"
            )


def make_edm_scheduler(config: EDMConfig, *, clip_sample: bool) -> Any:
    """Make diffusers' scheduler for networks with EDM's preconditioning, which has its factors and its noise levels."""
    scheduler = EDMDPMSolverMultistepScheduler(
        sigma_min=config.sigma_min, sigma_max=config.sigma_max, sigma_data=config.sigma_data
    )
    if not clip_sample:  # a key that it does not know, and sampling here does
        scheduler.register_to_config(clip_sample=False)
    return scheduler


def draw_sigma(time: Tensor, config: EDMConfig) -> Tensor:
    """Return the noise level of each sample, ln(sigma) ~ N(p_mean, p_std²), from numbers uniform in [0, 1): float32."""
    normal = torch.special.ndtri(time.double().clamp(min=LEAST_TIME))
    return (config.p_mean + config.p_std * normal).exp().float()


def precondition(image: Tensor, noise: Tensor, sigma: Tensor, config: EDMConfig) -> tuple[Tensor, Tensor, Tensor]:
    """Return what the network F sees, c_in·(image + sigma·noise), its timestep c_noise, and what it is asked for.

    The denoiser is D(x) = c_skip·x + c_out·F(c_in·x, c_noise) with c_skip = sigma_data² / r², c_out = sigma·sigma_data
    / r, c_in = 1 / r and c_noise = ln(sigma) / 4, where r² = sigma² + sigma_data². The loss lambda(sigma)·|D - image|²
    with lambda = r² / (sigma·sigma_data)² is |F - target|², since lambda·c_out² = 1 (equation 8), with the target
    (image - c_skip·x) / c_out = (sigma/sigma_data·image - sigma_data·noise) / r, here without the difference of x and
    image, which loses digits where sigma is small.
    """
    each = sigma.view(-1, *[1] * (image.ndim - 1))
    r, data = (each.square() + config.sigma_data**2).sqrt(), config.sigma_data
    return (image + each * noise) / r, sigma.log() / 4, (each / data * image - data * noise) / r
