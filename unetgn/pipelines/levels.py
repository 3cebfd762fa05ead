"""Tells how much noise there is at a scheduler's steps, and goes between a network's predictions and images.

This file needs diffusers and nothing else of ours: saved pipelines carry it (`unetgn.pipelines.pipeline`).
"""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from torch import Tensor

EDM = ("EDMEulerScheduler", "EDMDPMSolverMultistepScheduler")
NO_SIGNAL = 1e-5  # a schedule that ends below it ends without any: linear betas (Ho et al. 2020) end with 4e-5


def predicted_image(prediction: Tensor, noisy: Tensor, alpha: Tensor, prediction_type: str) -> Tensor:
    """Return the clean image of noisy = sqrt(alpha)·image + sqrt(1 - alpha)·noise, as a network's prediction has it.

    The prediction is the image itself (sample), the noise (epsilon), or the velocity sqrt(alpha)·noise -
    sqrt(1 - alpha)·image (v_prediction; Salimans & Ho 2022, arXiv 2202.00512, appendix D).
    """
    if prediction_type == "sample":
        return prediction
    if prediction_type == "epsilon":
        return (noisy - (1 - alpha).sqrt() * prediction) / alpha.sqrt()
    return alpha.sqrt() * noisy - (1 - alpha).sqrt() * prediction


def noise_of(image: Tensor, noisy: Tensor, alpha: Tensor) -> Tensor:
    """Return the noise that is left of noisy = sqrt(alpha)·image + sqrt(1 - alpha)·noise without the image."""
    return (noisy - alpha.sqrt() * image) / (1 - alpha).sqrt()


def velocity_of(image: Tensor, noisy: Tensor, alpha: Tensor) -> Tensor:
    """Return the velocity, of which a scheduler finds the image again without dividing by sqrt(alpha), near 0."""
    return (alpha.sqrt() * noisy - image) / (1 - alpha).sqrt()


def mix(image: Tensor, noise: Tensor, alpha: Tensor) -> Tensor:
    """Return sqrt(alpha)·image + sqrt(1 - alpha)·noise."""
    return alpha.sqrt() * image + (1 - alpha).sqrt() * noise


class NoiseLevels:
    """Tells the share of the image's variance, alphas_cumprod, at each step of a scheduler that is set to its steps.

    Of what the scheduler keeps, x, the network sees x · scale = sqrt(share)·image + sqrt(1 - share)·noise, where scale
    is 1 but for those that keep image + sigma·noise. From here on the scheduler is given velocities, but for PNDM,
    which is a linear multistep method for the noise.
    """

    def __init__(self, scheduler: Any) -> None:
        self.scheduler, self.prediction_type = scheduler, scheduler.config.prediction_type
        self.scales = type(scheduler).__name__.endswith("DiscreteScheduler")
        self.by_noise = isinstance(scheduler, diffusers.PNDMScheduler)
        scheduler.register_to_config(prediction_type="epsilon" if self.by_noise else "v_prediction")

    def lost_at_first(self) -> float | None:
        """Return the share at the first step, where a prediction of the noise finds no image in it; else None."""
        first = self.scheduler.alphas_cumprod[int(self.scheduler.timesteps[0])].item()
        return first if self.prediction_type == "epsilon" and first < NO_SIGNAL else None

    def at(self, index: int, timestep: Tensor) -> Tensor:
        """Return the share at step `index`, whose timestep is `timestep`, as the next thing that the scheduler does."""
        scheduler = self.scheduler
        if self.scales:
            return scheduler.scale_model_input(torch.ones((), dtype=torch.float64), timestep).square().float()
        if hasattr(scheduler, "sigmas"):
            return 1 / (1 + scheduler.sigmas[index] ** 2)
        return scheduler.alphas_cumprod[int(timestep)]

    def scale(self, share: Tensor) -> Tensor:
        """Return the factor from what the scheduler keeps to what the network sees, where `share` is of the image."""
        return share.sqrt() if self.scales else torch.ones(())

    def image_of(self, prediction: Tensor, kept: Tensor, noisy: Tensor, share: Tensor) -> Tensor:
        """Return the image that a network predicts, which saw `noisy`, of what the scheduler keeps."""
        return predicted_image(prediction, noisy, share, self.prediction_type)

    def prediction_of(self, image: Tensor, kept: Tensor, noisy: Tensor, share: Tensor) -> Tensor:
        """Return what the scheduler is given, so that it finds `image`."""
        return noise_of(image, noisy, share) if self.by_noise else velocity_of(image, noisy, share)


class EDMLevels(NoiseLevels):
    """Does the same for networks F with EDM's preconditioning, whose image is c_skip·x + c_out·F(c_in·x, ln(sigma)/4).

    The scheduler keeps x = image + sigma·noise, and knows the factors (Karras et al. 2022, arXiv 2206.00364, table 1).
    """

    def __init__(self, scheduler: Any) -> None:
        self.scheduler, self.scales = scheduler, True

    def lost_at_first(self) -> float | None:
        """Return None: c_out is at most sigma_data, whatever the noise."""
        return None

    def at(self, index: int, timestep: Tensor) -> Tensor:
        """Return the share at step `index`, in float64: beside small noise it rounds to 1 in float32."""
        return 1 / (1 + self.scheduler.sigmas[index].double() ** 2)

    def _factors(self, share: Tensor) -> tuple[Tensor, Tensor]:
        one, none, sigma = torch.ones(()), torch.zeros(()), ((1 - share) / share).sqrt().float()
        denoise = self.scheduler.precondition_outputs
        return denoise(one, none, sigma), denoise(none, one, sigma)

    def image_of(self, prediction: Tensor, kept: Tensor, noisy: Tensor, share: Tensor) -> Tensor:
        """Return c_skip·x + c_out·F."""
        skip, out = self._factors(share)
        return skip * kept + out * prediction

    def prediction_of(self, image: Tensor, kept: Tensor, noisy: Tensor, share: Tensor) -> Tensor:
        """Return the F that would give `image`."""
        skip, out = self._factors(share)
        return (image - skip * kept) / out


def levels_of(scheduler: Any) -> NoiseLevels:
    """Return the levels of a scheduler that is set to its steps, which changes what it is to be given."""
    return EDMLevels(scheduler) if type(scheduler).__name__ in EDM else NoiseLevels(scheduler)


def shares_of(scheduler: Any) -> Tensor:
    """Return the shares of the image's variance at the steps of a scheduler that is set to them, in no order."""
    kept = [getattr(scheduler, name).double() for name in ("sigmas", "sigmas_interpol") if hasattr(scheduler, name)]
    if not kept:
        return scheduler.alphas_cumprod[scheduler.timesteps.long()].double()
    sigmas = torch.cat(kept)
    return 1 / (1 + sigmas[sigmas > 0] ** 2)
