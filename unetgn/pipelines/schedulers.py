"""Makes diffusers' schedulers fit a network: which there are, at which levels of noise they begin, what each refuses.

This file needs diffusers and nothing else of ours: saved pipelines carry it (`unetgn.pipelines.pipeline`).
"""

from __future__ import annotations

import inspect
from collections.abc import Collection
from typing import Any

import diffusers
import torch
from diffusers import SchedulerMixin
from torch import Tensor

from .levels import EDM, NO_SIGNAL

# Name on the command line -> class in diffusers, and what it is built with beside the training scheduler's own config.
SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddpm": ("DDPMScheduler", {}),
    "ddim": ("DDIMScheduler", {}),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}),  # under strong guidance stable with 20 steps or more
    "dpmsolver++": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++"}),
    "sde-dpmsolver++": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "dpmsolver++_singlestep": ("DPMSolverSinglestepScheduler", {"algorithm_type": "dpmsolver++"}),
    "deis": ("DEISMultistepScheduler", {}),
    "unipc": ("UniPCMultistepScheduler", {}),
    "sa_solver": ("SASolverScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_ancestral": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "kdpm2": ("KDPM2DiscreteScheduler", {}),
    "kdpm2_ancestral": ("KDPM2AncestralDiscreteScheduler", {}),
    "lms": ("LMSDiscreteScheduler", {}),
    "ddim_parallel": ("DDIMParallelScheduler", {}),
    "ddpm_parallel": ("DDPMParallelScheduler", {}),
}
CLASSES = {class_name for class_name, _ in SCHEDULERS.values()}
# For networks with EDM's preconditioning, and none but these (Karras et al. 2022, arXiv 2206.00364).
EDM_SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "edm_euler": ("EDMEulerScheduler", {}),
    "edm_dpmsolver++": ("EDMDPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++"}),
    "edm_sde-dpmsolver++": ("EDMDPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
}
# Of the others, those that take a noise schedule and a prediction type, and why they do not fit all the same.
REFUSED = {
    "CogVideoXDDIMScheduler": "it shifts the noise schedule as one video model has it; take ddim, the same method",
    "CogVideoXDPMScheduler": "it shifts the noise schedule as one video model has it; take dpmsolver++",
    "DDIMInverseScheduler": "it leads from an image to noise; take ddim",
    "DPMSolverMultistepInverseScheduler": "it leads from an image to noise; take dpmsolver++",
    "DPMSolverSDEScheduler": "the package torchsde draws its noise, and not the generator of each image; take "
    "sde-dpmsolver++, which solves the same equation",
    "LCMScheduler": "it is for networks that were distilled to find the image in one step, and blurs others; take "
    "euler_ancestral",
    "TCDScheduler": "it is for networks that were distilled to find the image in few steps; take ddim",
}
OWN_SCHEDULE = (
    "it has a noise schedule of its own, and cannot follow the one that the network was trained on; take ddim"
)
EVEN = ("DDIMScheduler", "DDIMParallelScheduler", "PNDMScheduler")  # they step down by levels // steps, wherever to
# They combine the noise of several levels, and need it to say something of the image.
FROM_NOISE = ("HeunDiscreteScheduler", "PNDMScheduler", "LMSDiscreteScheduler", "KDPM2DiscreteScheduler",
              "KDPM2AncestralDiscreteScheduler")  # fmt: skip
# Configurations that do not sample what a network knows: of which classes, the key, its value, and one that does.
NOT_FOLLOWED: list[tuple[Collection[str], str, Any, Any]] = [
    (CLASSES, "use_flow_sigmas", True, False),
    (CLASSES, "thresholding", True, False),  # the image is clipped before
    *(
        (classes, "variance_type", wrong, would_do)  # networks that predict a variance are refused, too
        for classes, would_do in ((("DDPMScheduler", "DDPMParallelScheduler"), "fixed_small"), (CLASSES, None))
        for wrong in ("learned", "learned_range")
    ),
    (CLASSES, "timestep_type", "continuous", "discrete"),
    (("PNDMScheduler",), "skip_prk_steps", False, True),
    (EVEN, "timestep_spacing", "linspace", "trailing"),
    (("UniPCMultistepScheduler",), "solver_type", "bh1", "bh2"),  # infinite in the last step, to no noise
    (("SASolverScheduler",), "corrector_order", 0, 1),
    (("SASolverScheduler",), "use_beta_sigmas", True, False),
    (("LMSDiscreteScheduler",), "use_exponential_sigmas", True, False),  # not stable: too much noise with more steps
]
OF_TRAINING = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type",
               "rescale_betas_zero_snr", "clip_sample", "clip_sample_range", "variance_type")  # fmt: skip
OF_EDM_TRAINING = ("num_train_timesteps", "sigma_min", "sigma_max", "sigma_data", "sigma_schedule", "rho",
                   "prediction_type", "clip_sample")  # fmt: skip
PREDICTIONS = ("epsilon", "v_prediction", "sample")
BY_STEP = ("sigmas", "sigmas_interpol", "sigmas_up", "sigmas_down")  # what a scheduler keeps for each of its steps

MOST_SIGNAL = 0.01  # share of the image's variance that may be left at the last level: Stable Diffusion's has 0.0047
LEAST_SIGNAL = 1e-3  # share at which sampling begins where less of it cannot be used


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


def class_like(name: str, scheduler: Any) -> tuple[type[Any], dict[str, Any]]:
    """Return what `class_of` does, for a network that `scheduler` is for: one of EDM's for one of EDM's.

    Raises ValueError as `class_of` does, and for a scheduler of the other kind.
    """
    of_edm = {short: entry for short, entry in EDM_SCHEDULERS.items() if name in (short, entry[0])}
    if type(scheduler).__name__ in EDM:
        if not of_edm:
            raise ValueError(
                f"scheduler {name!r} does not fit a network with EDM's preconditioning; there are "
                f"{', '.join(EDM_SCHEDULERS)}"
            )
        class_name, extra = next(iter(of_edm.values()))
        return getattr(diffusers, class_name), extra
    return class_of(name)


def check_name(name: str) -> None:
    """Raise ValueError for a name that neither `class_of` knows nor EDM's networks."""
    if not any(name in (short, entry[0]) for short, entry in EDM_SCHEDULERS.items()):
        class_of(name)


def default_name(scheduler: Any, otherwise: str) -> str:
    """Return the name of the scheduler to sample with where none is asked for, for a network that `scheduler` is for.

    It is `otherwise` but for one of EDM's.
    """
    return "edm_dpmsolver++" if type(scheduler).__name__ in EDM else otherwise


def like(scheduler_class: type[Any], config: Any, **extra: Any) -> Any:
    """Make a scheduler of this class of the configuration of another.

    EDM's do not know config.clip_sample, which `unetgn.pipelines.sampling.sample` reads: it is handed on beside them.
    """
    if scheduler_class.__name__ not in EDM:
        return scheduler_class.from_config(config, **extra)
    known = inspect.signature(scheduler_class.__init__).parameters
    made = scheduler_class(**{key: value for key, value in config.items() if key in known} | extra)
    if "clip_sample" in config:
        made.register_to_config(clip_sample=config["clip_sample"])
    return made


def class_of(name: str) -> tuple[type[Any], dict[str, Any]]:
    """Return the class that a scheduler's name stands for, ours or diffusers' own, and what it is built with.

    Raises ValueError for one that is unknown, and with the reason for one of diffusers' that does not fit.
    """
    if name not in SCHEDULERS:
        ours = next((short for short, (class_name, _) in SCHEDULERS.items() if class_name == name), None)
        if ours is None:
            raise ValueError(f"scheduler {name!r} {reason_against(name)}")
        name = ours
    class_name, extra = SCHEDULERS[name]
    found = getattr(diffusers, class_name)
    # Sampling begins at the last level whatever the number of steps (Lin et al. 2023, section 3.3). "leading" may begin
    # far below: with 600 steps of 1000 levels at level 599.
    spaced = "timestep_spacing" in inspect.signature(found.__init__).parameters
    return found, ({"timestep_spacing": "trailing"} if spaced else {}) | extra


def reason_against(name: str) -> str:
    """Say why a scheduler, by diffusers' name or ours, cannot be used for a network without EDM's preconditioning."""
    there = f"there are {', '.join(SCHEDULERS)}"
    class_name = EDM_SCHEDULERS.get(name, (name, {}))[0]
    found = getattr(diffusers, class_name, None) if class_name.endswith("Scheduler") else None
    if found is None:
        return f"is unknown; {there}"
    if class_name in REFUSED:
        return f"does not fit: {REFUSED[class_name]}"
    if class_name in EDM:
        return f"does not fit: it is for networks with EDM's preconditioning, in a pipeline with one of EDM's; {there}"
    taken = inspect.signature(found.__init__).parameters
    if not issubclass(found, SchedulerMixin) or not {"trained_betas", "prediction_type"} <= taken.keys():
        return f"does not fit: {OWN_SCHEDULE}"
    return f"has not been tried here; {there}"


def make_sampling_scheduler(name: str, training_scheduler: Any, steps: int) -> Any:
    """Make the scheduler called `name` for a network trained with `training_scheduler`, set to `steps` steps.

    It begins at the last level of the schedule, but for two cases, in which it begins at the last one with 0.1 % of the
    image's variance. heun, pndm, lms and kdpm2 do where the schedule ends without any, of which they can make no use.
    All do for a network that predicts the noise and whose image is not clipped (config.clip_sample): above that level
    such an image is the error of the network, divided by sqrt(alphas_cumprod).

    Raises ValueError for an unknown name, for one that cannot follow the noise schedule, for a schedule that does not
    end in noise, and for steps outside 1 .. the schedule's noise levels or (ddim, pndm) far from dividing them. For a
    network with EDM's preconditioning it is one of EDM's, which begin at sigma_max.
    """
    scheduler_class, extra = class_like(name, training_scheduler)
    if scheduler_class.__name__ in EDM:
        return _set_edm(like(scheduler_class, training_scheduler.config, **extra), steps)
    return _fit(name, scheduler_class, training_scheduler.config, training_scheduler, steps, **extra)


def set_to_steps(scheduler: Any, steps: int) -> Any:
    """Make a scheduler like `scheduler`, with all that its config says, set to `steps` steps as above.

    Its config says on what noise schedule the network was trained. Raises ValueError as above, and for configurations
    that sampling here does not follow.
    """
    name, config = type(scheduler).__name__, scheduler.config
    if name in EDM:
        return _set_edm(scheduler, steps)
    if name not in CLASSES:
        raise ValueError(f"scheduler {name!r} {reason_against(name)}")
    predicts = config.get("prediction_type", "epsilon")
    if predicts not in PREDICTIONS:
        raise ValueError(
            f"{name} has prediction_type={predicts!r:.100}; networks predict {', '.join(PREDICTIONS)} here"
        )
    for classes, key, wrong, would_do in NOT_FOLLOWED:
        if name in classes and config.get(key, would_do) == wrong:
            raise ValueError(
                f"{name} has {key}={wrong!r}, which does not lead to images of the right distribution here; "
                f"{key}={would_do!r} will do: {name}.from_config(scheduler.config, {key}={would_do!r})"
            )
    return _fit(name, type(scheduler), config, diffusers.DDPMScheduler(**training_of(scheduler)), steps)


def training_of(scheduler: Any) -> dict[str, Any]:
    """Return what a scheduler's config says of the training of its network, whatever else it says of sampling."""
    keys = OF_EDM_TRAINING if type(scheduler).__name__ in EDM else OF_TRAINING
    return {key: value for key, value in scheduler.config.items() if key in keys}


def _set_edm(scheduler: Any, steps: int) -> Any:
    """Make a scheduler of EDM's like `scheduler`, set to `steps` steps."""
    if steps < 2:
        raise ValueError(f"steps is {steps}; schedulers of EDM's take 2 or more")
    config = scheduler.config
    if config.sigma_max < 10 * config.sigma_data:
        raise ValueError(
            f"sigma_max is {config.sigma_max}, where images have a spread (sigma_data) of {config.sigma_data}, but "
            "sampling begins in pure noise: take ten times as much or more (Karras et al. 2022: 80)"
        )
    found = like(type(scheduler), config)
    found.set_timesteps(steps)
    found.set_begin_index(0)
    return found


def _fit(name: str, scheduler_class: type[Any], config: Any, training_scheduler: Any, steps: int, **extra: Any) -> Any:
    class_name = scheduler_class.__name__
    check_ends_in_noise(training_scheduler.alphas_cumprod, "the noise schedule that the network was trained on")
    scheduler = scheduler_class.from_config(config, **extra)
    if (scheduler.alphas_cumprod - training_scheduler.alphas_cumprod).abs().max() > 1e-6:  # some avoid an exact 0
        raise ValueError(
            f"scheduler {name!r} cannot follow the noise schedule that the network was trained on; ddim can"
        )
    without_signal = training_scheduler.alphas_cumprod[-1] < NO_SIGNAL
    if loses_the_image(training_scheduler) or (class_name in FROM_NOISE and without_signal):
        scheduler = scheduler_class.from_config(config, **extra, **cut_betas(training_scheduler))
    levels, trained_on = scheduler.config.num_train_timesteps, training_scheduler.config.num_train_timesteps
    if not 1 <= steps <= levels:
        used = "" if levels == trained_on else f", of which {name!r} uses {levels}"
        raise ValueError(
            f"steps is {steps}; the network was trained on {trained_on} noise levels{used}, so 1 to {levels} will do"
        )
    if class_name in EVEN and levels / steps > 1.1 * (levels // steps):
        near = [count for count in range(1, levels + 1) if levels % count == 0 and steps / 2 <= count <= 2 * steps]
        raise ValueError(f"steps is {steps}; {name!r} takes a number that divides {levels} nearly, such as {near}")
    scheduler.set_timesteps(steps)
    if class_name == "EulerAncestralDiscreteScheduler":
        scheduler.sigmas = scheduler.sigmas.double()  # what it takes the root of may come out below 0 in float32
    keep_levels(scheduler)
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)  # of two equal timesteps at the start, which Karras' sigmas may have, too
    first = scheduler.alphas_cumprod[int(scheduler.timesteps[0])].item()
    if first > MOST_SIGNAL:
        raise ValueError(
            f"with {steps} steps {name!r} begins at level {int(scheduler.timesteps[0])} of {levels}, with {first:.2g} "
            "of the image's variance, but sampling begins in pure noise: take another number of steps, or "
            "timestep_spacing='trailing' in the scheduler's config"
        )
    return scheduler


def keep_levels(scheduler: Any) -> None:
    """Take level -1 away, which rounding adds to diffusers' "trailing" timesteps at 61, 103, … steps."""
    if not (scheduler.timesteps < 0).any():
        return
    kept = int((scheduler.timesteps >= 0).sum())
    if scheduler.order == 2 and kept % 2 == 0:  # a level between the last one and -1
        kept -= 1
    scheduler.timesteps = scheduler.timesteps[:kept]
    if hasattr(scheduler, "sigmas"):
        scheduler.sigmas = torch.cat([scheduler.sigmas[:kept], scheduler.sigmas[-1:]])
    if hasattr(scheduler, "sigmas_interpol"):
        scheduler.sigmas_interpol[kept - 1 :] = 0  # where the last step leads


def begin_later(scheduler: Any, strength: float) -> None:
    """Leave out the first steps of a scheduler that is set to its steps, but for the share `strength` in (0, 1].

    At least one step is left. The scheduler takes the first one that is left for its first.
    """
    if not 0 < strength <= 1:
        raise ValueError(f"strength is {strength}; it is a share of the steps, above 0 and at most 1")
    pndm = isinstance(scheduler, diffusers.PNDMScheduler)
    timesteps = torch.cat([scheduler.timesteps[:1], scheduler.timesteps[2:]]) if pndm else scheduler.timesteps
    steps = -(-len(timesteps) // scheduler.order)
    left_out = (steps - max(1, round(steps * strength))) * scheduler.order
    if left_out == 0:
        return
    timesteps = timesteps[left_out:]
    # PNDM goes to its second level twice, by name of their timesteps.
    scheduler.timesteps = torch.cat([timesteps[:2], timesteps[1:]]) if pndm else timesteps
    for name in BY_STEP:
        if hasattr(scheduler, name):
            setattr(scheduler, name, getattr(scheduler, name)[left_out:])
    if hasattr(scheduler, "order_list"):
        scheduler.order_list = scheduler.get_order_list(len(timesteps))


def loses_the_image(training_scheduler: Any) -> bool:
    """Return True where a network predicts the noise and nothing clips the image that follows from it."""
    config = training_scheduler.config
    return config.prediction_type == "epsilon" and not config.get("clip_sample", True)


def cut_betas(training_scheduler: Any) -> dict[str, Any]:
    """Return the configuration of the levels of a schedule with 0.1 % of the image's variance or more."""
    levels = int((training_scheduler.alphas_cumprod >= LEAST_SIGNAL).sum())
    betas = training_scheduler.betas[:levels].tolist()
    return {"num_train_timesteps": levels, "trained_betas": betas, "rescale_betas_zero_snr": False}


def without_pure_noise(training_scheduler: Any) -> Any:
    """Cut a schedule to its levels with 0.1 % of the image's variance or more."""
    return type(training_scheduler).from_config(training_scheduler.config, **cut_betas(training_scheduler))
