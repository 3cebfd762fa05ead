"""Samples images from noise with any of diffusers' schedulers. Image n depends on the network and seed n alone."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import diffusers
import torch
from torch import Tensor

from unetgn.unet import UNet

# Name on the command line -> class in diffusers, and what it is built with beside the training scheduler's own config.
SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddpm": ("DDPMScheduler", {}),
    "ddim": ("DDIMScheduler", {}),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}),  # under strong guidance stable with 20 steps or more
    "dpmsolver++": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++"}),
    "sde-dpmsolver++": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "deis": ("DEISMultistepScheduler", {}),
    "unipc": ("UniPCMultistepScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_ancestral": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
}
EVEN = ("ddim", "pndm")  # diffusers steps down by levels // steps in these, whatever the distance of their timesteps
FROM_NOISE = ("heun", "pndm")  # they combine the noise of several levels, and need it to say something of the image

MOST_SIGNAL = 0.01  # share of the image's variance that may be left at the last level: Stable Diffusion's has 0.0047
LEAST_SIGNAL = 1e-3  # share at which sampling begins where less of it cannot be used
NO_SIGNAL = 1e-5  # a schedule that ends below it ends without any: linear betas (Ho et al. 2020) end with 4e-5


def check_ends_in_noise(alphas_cumprod: Tensor, schedule: str) -> None:
    """Raise ValueError where a noise schedule, called `schedule`, does not end in noise, in which sampling begins.

    alphas_cumprod (levels,) is the share of the image's variance, 1 - alphas_cumprod that of the noise. A network that
    has never seen pure noise draws rubbish from it (Lin et al. 2023, arXiv 2305.08891, section 3.1).
    """
    last, levels = alphas_cumprod[-1].item(), len(alphas_cumprod)
    if not alphas_cumprod.isfinite().all():
        raise ValueError(
            f"{schedule} over {levels} levels has some that are not finite in float32; 1000 levels will do"
        )
    if last > MOST_SIGNAL:
        raise ValueError(
            f"{schedule} over {levels} levels ends with {last:.2g} of the image's variance (alphas_cumprod), but "
            f"sampling begins in pure noise: take more levels or larger betas, for at most {MOST_SIGNAL}, or "
            "squared_cosine, which ends in noise with any number of levels"
        )


def make_sampling_scheduler(name: str, training_scheduler: Any, steps: int) -> Any:
    """Make the scheduler called `name` for a network trained with `training_scheduler`, set to `steps` steps.

    It begins at the last level of the schedule, but for two cases, in which it begins at the last one with 0.1 % of the
    image's variance. heun and pndm do where the schedule ends without any, of which they can make no use. All do for a
    network that predicts the noise and whose image is not clipped (config.clip_sample): above that level such an image
    is the error of the network, divided by sqrt(alphas_cumprod).

    Raises ValueError for an unknown name, for one that cannot follow the noise schedule, for a schedule that does not
    end in noise, and for steps outside 1 .. the schedule's noise levels or (ddim, pndm) far from dividing them.
    """
    if name not in SCHEDULERS:
        raise ValueError(f"scheduler {name!r} is unknown; there are {', '.join(SCHEDULERS)}")
    check_ends_in_noise(training_scheduler.alphas_cumprod, "the noise schedule that the network was trained on")
    class_name, extra = SCHEDULERS[name]
    scheduler_class = getattr(diffusers, class_name)
    scheduler = scheduler_class.from_config(training_scheduler.config, **extra)
    if (scheduler.alphas_cumprod - training_scheduler.alphas_cumprod).abs().max() > 1e-6:  # some avoid an exact 0
        raise ValueError(
            f"scheduler {name!r} cannot follow the noise schedule that the network was trained on; ddim can"
        )
    without_signal = training_scheduler.alphas_cumprod[-1] < NO_SIGNAL
    if loses_the_image(training_scheduler) or (name in FROM_NOISE and without_signal):
        scheduler = scheduler_class.from_config(without_pure_noise(training_scheduler).config, **extra)
    levels, trained_on = scheduler.config.num_train_timesteps, training_scheduler.config.num_train_timesteps
    if not 1 <= steps <= levels:
        used = "" if levels == trained_on else f", of which {name!r} uses {levels}"
        raise ValueError(
            f"steps is {steps}; the network was trained on {trained_on} noise levels{used}, so 1 to {levels} will do"
        )
    if name in EVEN and levels / steps > 1.1 * (levels // steps):
        near = [count for count in range(1, levels + 1) if levels % count == 0 and steps / 2 <= count <= 2 * steps]
        raise ValueError(f"steps is {steps}; {name!r} takes a number that divides {levels} nearly, such as {near}")
    scheduler.set_timesteps(steps)
    keep_levels(scheduler)
    return scheduler


def keep_levels(scheduler: Any) -> None:
    """Take level -1 away, which rounding adds to diffusers' "trailing" timesteps at 61, 103, … steps."""
    kept = scheduler.timesteps >= 0
    scheduler.timesteps = scheduler.timesteps[kept]
    if hasattr(scheduler, "sigmas"):
        scheduler.sigmas = torch.cat([scheduler.sigmas[: len(scheduler.timesteps)], scheduler.sigmas[-1:]])


def loses_the_image(training_scheduler: Any) -> bool:
    """Return True where a network predicts the noise and nothing clips the image that follows from it."""
    config = training_scheduler.config
    return config.prediction_type == "epsilon" and not config.get("clip_sample", True)


def without_pure_noise(training_scheduler: Any) -> Any:
    """Cut a schedule to its levels with 0.1 % of the image's variance or more."""
    levels = int((training_scheduler.alphas_cumprod >= LEAST_SIGNAL).sum())
    betas = training_scheduler.betas[:levels].tolist()
    cut = {"num_train_timesteps": levels, "trained_betas": betas, "rescale_betas_zero_snr": False}
    return type(training_scheduler).from_config(training_scheduler.config, **cut)


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


@torch.no_grad()
def sample(
    unet: UNet,
    scheduler: Any,
    seeds: Sequence[int],
    shape: tuple[int, ...],
    *,
    class_labels: Sequence[int] | None = None,
    texts: Tensor | None = None,
    empty_text: Tensor | None = None,
    guidance_scale: float = 1.0,
    clip: bool = True,
    on_step: Callable[[Tensor], None] | None = None,
) -> Tensor:
    """Sample one image of `shape` (C, H, W) for each seed: (len(seeds), C, H, W) float32, on the CPU.

    `scheduler` is one of diffusers' that is set to its steps, at levels that the network was trained on; its config
    says what the network predicts. It is not changed. With `clip`, which is for pixels and not for latents, values end
    in [-1, 1], and so does the image that is predicted at each step (unless the scheduler's config.clip_sample is
    false), from which the prediction is derived again.

    All noise of image n, at the start and between steps, comes from a CPU generator seeded with seeds[n]. The image
    depends neither on the device nor on the other images. Guidance is uncond + w·(cond - uncond); w = 1 is off and
    costs nothing (Ho & Salimans 2022, arXiv 2207.12598, equation 6, whose w is one less). `texts` (len(seeds), tokens,
    width) is for networks that read text, `empty_text` (tokens, width) is what they read for uncond. `on_step` is shown
    the noisy images before every step, and the final ones.

    Raises ValueError where an image that is not clipped would be looked for in pure noise.
    """
    device, dtype = unet.device, unet.dtype
    prediction_type, shares = scheduler.config.prediction_type, scheduler.alphas_cumprod
    limit = (
        scheduler.config.get("clip_sample_range", 1.0) if clip and scheduler.config.get("clip_sample", True) else None
    )
    first = shares[int(scheduler.timesteps[0])]
    if limit is None and prediction_type == "epsilon" and first < NO_SIGNAL:
        raise ValueError(
            f"sampling would begin with {first:.1g} of the image's variance, in which a prediction of the noise finds "
            "no image: clip (for pixels), or take a scheduler of make_sampling_scheduler for clip_sample=False"
        )
    scheduler = copy.deepcopy(scheduler)  # it keeps predictions of earlier steps
    by_noise = isinstance(scheduler, diffusers.PNDMScheduler)  # a linear multistep method for the noise
    scheduler.register_to_config(prediction_type="epsilon" if by_noise else "v_prediction")
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    noise = torch.stack([torch.randn(shape, generator=generator) for generator in generators])
    images = noise.to(device) * scheduler.init_noise_sigma
    labels = None if class_labels is None else torch.tensor(class_labels, device=device)
    texts = None if texts is None else texts.to(device, dtype)
    no_texts = None if texts is None or empty_text is None else empty_text.to(device, dtype).expand_as(texts)
    takes_generator = "generator" in inspect.signature(scheduler.step).parameters
    extra = {"generator": generators} if takes_generator else {}
    for timestep in scheduler.timesteps:
        if on_step:
            on_step(images)
        noisy = scheduler.scale_model_input(images, timestep)
        prediction = unet(noisy.to(dtype), timestep, texts, class_labels=labels).sample
        if guidance_scale != 1:
            unconditional = unet(noisy.to(dtype), timestep, no_texts, class_labels=None).sample
            prediction = unconditional + guidance_scale * (prediction - unconditional)
        alpha = shares[int(timestep)]
        image = predicted_image(prediction.float(), noisy, alpha, prediction_type)
        if limit is not None:
            image = image.clamp(-limit, limit)
        prediction = noise_of(image, noisy, alpha) if by_noise else velocity_of(image, noisy, alpha)
        images = scheduler.step(prediction, timestep, images, **extra).prev_sample
    images = images.clamp(-1, 1) if clip else images
    if on_step:
        on_step(images)
    return images.cpu()
