"""Samples images from noise with any of diffusers' schedulers. Image n depends on the network and seed n alone."""

from __future__ import annotations

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
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}),
    "dpmsolver++": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++"}),
    "sde-dpmsolver++": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "deis": ("DEISMultistepScheduler", {}),
    "unipc": ("UniPCMultistepScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_ancestral": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
}
EVEN = ("ddim", "pndm")  # diffusers steps down by levels // steps in these, whatever the distance of their timesteps
NOT_FROM_SAMPLE = ("pndm", "euler_ancestral")  # diffusers has no way from a predicted clean image in these


MOST_SIGNAL = 0.01  # share of the image's variance that may be left at the last level: Stable Diffusion's has 0.0047


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

    Raises ValueError for an unknown name, for one that cannot use what the network predicts or cannot follow its noise
    schedule, for a schedule that does not end in noise, and for steps outside 1 .. the schedule's noise levels or
    (ddim, pndm) far from dividing them.
    """
    if name not in SCHEDULERS:
        raise ValueError(f"scheduler {name!r} is unknown; there are {', '.join(SCHEDULERS)}")
    check_ends_in_noise(training_scheduler.alphas_cumprod, "the noise schedule that the network was trained on")
    levels = training_scheduler.config.num_train_timesteps
    if not 1 <= steps <= levels:
        raise ValueError(
            f"steps is {steps}; the network was trained on {levels} noise levels, so 1 to {levels} will do"
        )
    if name in EVEN and levels / steps > 1.1 * (levels // steps):
        near = [count for count in range(1, levels + 1) if levels % count == 0 and steps / 2 <= count <= 2 * steps]
        raise ValueError(f"steps is {steps}; {name!r} takes a number that divides {levels} nearly, such as {near}")
    if training_scheduler.config.prediction_type == "sample" and name in NOT_FROM_SAMPLE:
        raise ValueError(f"scheduler {name!r} cannot use a network that predicts the clean image; ddim and others can")
    class_name, extra = SCHEDULERS[name]
    scheduler = getattr(diffusers, class_name).from_config(training_scheduler.config, **extra)
    if (scheduler.alphas_cumprod - training_scheduler.alphas_cumprod).abs().max() > 1e-6:  # some avoid an exact 0
        raise ValueError(
            f"scheduler {name!r} cannot follow the noise schedule that the network was trained on; ddim can"
        )
    scheduler.set_timesteps(steps)
    return scheduler


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

    With `clip`, which is for pixels and not for latents, values end in [-1, 1].

    All noise of image n, at the start and between steps, comes from a CPU generator seeded with seeds[n]. The image
    depends neither on the device nor on the other images. Guidance is uncond + w·(cond - uncond); w = 1 is off and
    costs nothing (Ho & Salimans 2022, arXiv 2207.12598, equation 6, whose w is one less). `texts` (len(seeds), tokens,
    width) is for networks that read text, `empty_text` (tokens, width) is what they read for uncond. `on_step` is shown
    the noisy images before every step, and the final ones.
    """
    device, dtype = unet.device, unet.dtype
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
        scaled = scheduler.scale_model_input(images, timestep).to(dtype)
        prediction = unet(scaled, timestep, texts, class_labels=labels).sample
        if guidance_scale != 1:
            unconditional = unet(scaled, timestep, no_texts, class_labels=None).sample
            prediction = unconditional + guidance_scale * (prediction - unconditional)
        images = scheduler.step(prediction.float(), timestep, images, **extra).prev_sample
    images = images.clamp(-1, 1) if clip else images
    if on_step:
        on_step(images)
    return images.cpu()
