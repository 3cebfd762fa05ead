"""Defines the training objective: what the network predicts from a noisy image, and how much each level counts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from diffusers import DDPMScheduler
from torch import Tensor, nn

from unetgn.messages import short
from unetgn.pipelines.schedulers import check_ends_in_noise, training_of
from unetgn.training.checkpoint import Checkpoint
from unetgn.training.edm import EDMConfig, draw_sigma, make_edm_scheduler, precondition
from unetgn.training.errors import CheckpointError

MOST_LEVELS = 10**6


@dataclass(frozen=True)
class ObjectiveConfig:
    """Configures denoising diffusion (Ho et al. 2020, arXiv 2006.11239) with the choices that came after it."""

    prediction_type: Literal["epsilon", "v_prediction", "sample"] = "epsilon"
    """Prediction of the network: the noise, the velocity (Salimans & Ho 2022, arXiv 2202.00512) or the clean image."""
    schedule: Literal["linear", "scaled_linear", "squared_cosine", "zero_terminal_snr"] = "linear"
    """Noise schedule: linear betas (Ho et al. 2020), betas with linear roots (latent diffusion, Rombach et al. 2022,
    arXiv 2112.10752), squared cosine (Nichol & Dhariwal 2021, arXiv 2102.09672), or linear rescaled to end in pure
    noise (Lin et al. 2023, arXiv 2305.08891)."""
    beta_start: float = 1e-4
    """First beta of the schedule, above 0; squared_cosine has none."""
    beta_end: float = 0.02
    """Last beta of the schedule, below 1; squared_cosine has none. The defaults are Ho et al.'s."""
    weighting: Literal["constant", "min_snr"] = "constant"
    """Weight of a noise level in the loss: 1, or min(SNR, gamma) in units of the clean image (Hang et al. 2023,
    arXiv 2303.09556)."""
    min_snr_gamma: float = 5.0
    """Gamma of weighting min_snr; above 0."""
    num_train_timesteps: int = 1000
    """Noise levels of the schedule, which must end in noise: of linear betas by default some 460 or more."""
    label_dropout: float = 0.0
    """Probability, in [0, 1), of training a sample without its class, and with the empty caption in the place of its
    own, for classifier-free guidance (Ho & Salimans 2022, arXiv 2207.12598)."""
    clip_sample: bool = True
    """Clip the predicted clean image to [-1, 1] while sampling: right for pixels, wrong for latents."""
    edm: EDMConfig | None = None
    """EDM's objective in the place of a noise schedule and a prediction type (Karras et al. 2022, arXiv 2206.00364);
    {} takes it with the paper's numbers."""

    def __post_init__(self) -> None:
        if self.edm is not None:
            self._check_edm()
        if self.schedule == "zero_terminal_snr" and self.prediction_type == "epsilon":
            raise ValueError(
                "objective.schedule zero_terminal_snr cannot go with objective.prediction_type epsilon: at its last "
                "level the input is pure noise and says nothing of the image; use v_prediction or sample"
            )
        if not 0 < self.beta_start <= self.beta_end < 1:
            raise ValueError(
                f"objective.beta_start is {self.beta_start} and objective.beta_end {self.beta_end}; betas rise, "
                "between 0 and 1"
            )
        if self.schedule == "squared_cosine" and (self.beta_start, self.beta_end) != (1e-4, 0.02):
            raise ValueError(
                "objective.schedule squared_cosine has no objective.beta_start and beta_end: leave them out, or take "
                "linear or scaled_linear"
            )
        if self.min_snr_gamma <= 0:
            raise ValueError(f"objective.min_snr_gamma is {self.min_snr_gamma}; it must be above 0")
        if self.weighting == "constant" and self.min_snr_gamma != 5.0:
            raise ValueError(
                f"objective.min_snr_gamma is {self.min_snr_gamma}, but objective.weighting constant has none: take "
                "min_snr, or leave objective.min_snr_gamma out"
            )
        if not 1 <= self.num_train_timesteps <= MOST_LEVELS:
            raise ValueError(
                f"objective.num_train_timesteps is {self.num_train_timesteps}; 1 to {MOST_LEVELS} are possible"
            )
        if not 0 <= self.label_dropout < 1:
            raise ValueError(f"objective.label_dropout is {self.label_dropout}; a probability below 1 is needed")
        if self.edm is None:
            check_ends_in_noise(make_scheduler(self).alphas_cumprod, f"objective.schedule {self.schedule}")

    def _check_edm(self) -> None:
        """Raise ValueError where a key was set that EDM's objective has no use for."""
        unused = {
            name: getattr(self, name) for name in OF_A_SCHEDULE if getattr(self, name) != getattr(type(self), name)
        }
        if unused:
            said = ", ".join(f"objective.{name} is {value}" for name, value in unused.items())
            raise ValueError(
                f"{said}, but objective.edm is set, which has noise levels, a target and weights of its own: leave "
                f"{' and '.join(f'objective.{name}' for name in unused)} out, or set objective.edm to null"
            )


# Keys that objective.edm has something else for.
OF_A_SCHEDULE = ("prediction_type", "schedule", "beta_start", "beta_end", "weighting", "min_snr_gamma",
                 "num_train_timesteps")  # fmt: skip

# Names of noise schedules in diffusers.
BETA_SCHEDULES = {
    "linear": "linear",
    "scaled_linear": "scaled_linear",
    "squared_cosine": "squaredcos_cap_v2",
    "zero_terminal_snr": "linear",
}


def make_scheduler(config: ObjectiveConfig) -> Any:
    """Make diffusers' scheduler for the objective: DDPM's, which adds noise in training too, or one of EDM's."""
    if config.edm is not None:
        return make_edm_scheduler(config.edm, clip_sample=config.clip_sample)
    return DDPMScheduler(
        num_train_timesteps=config.num_train_timesteps,
        # Said even where they are the defaults: from_config of another scheduler puts its own where nothing was said.
        beta_start=config.beta_start,
        beta_end=config.beta_end,
        beta_schedule=BETA_SCHEDULES[config.schedule],
        prediction_type=config.prediction_type,
        clip_sample=config.clip_sample,
        rescale_betas_zero_snr=config.schedule == "zero_terminal_snr",
        # Sampling begins at the last level whatever the number of steps (Lin et al. 2023, section 3.3). "leading" may
        # begin far below: with 600 steps of 1000 levels at level 599.
        timestep_spacing="trailing",
    )


def described_scheduler(checkpoint: Checkpoint, config: ObjectiveConfig) -> Any:
    """Make the scheduler of a checkpoint's objective, which its scheduler_config.json has to describe, too.

    Raises CheckpointError where that is of another one.
    """
    scheduler, described = make_scheduler(config), checkpoint.scheduler_config()
    for key, value in {"_class_name": type(scheduler).__name__, **training_of(scheduler)}.items():
        if (said := described.get(key)) != value:
            raise CheckpointError(
                f"{checkpoint.path} is damaged: its scheduler_config.json says that {key} is {short(said)}, and by its "
                f"config.yaml it is {short(value)}"
            )
    return scheduler


class Objective:
    """Computes the loss of a network on a batch of `unetgn.training.data.samples.IndexedSamples`.

    With x the clean image, e the noise and a = alphas_cumprod[t]: the network sees z = sqrt(a)·x + sqrt(1-a)·e and is
    asked for e (epsilon), x (sample) or sqrt(a)·e - sqrt(1-a)·x (v_prediction). The loss of a sample is the mean of the
    squared error over its elements, times the weight of its level. With `config.edm` all three are those of
    `unetgn.training.edm.precondition`. Where the samples have texts, the network reads them (encoder_hidden_states),
    and `empty_text` (tokens, width) in the place of those that are dropped.
    """

    def __init__(self, config: ObjectiveConfig, num_classes: int | None, empty_text: Tensor | None = None) -> None:
        self.config, self.num_classes, self.empty_text = config, num_classes, empty_text
        self.scheduler = make_scheduler(config)
        if config.edm is not None:
            return
        alphas = self.scheduler.alphas_cumprod.double()
        self.weights = level_weights(alphas / (1 - alphas), config).float()  # (num_train_timesteps,)

    def timesteps(self, time: Tensor) -> Tensor:
        """Return the level of each sample, int64, from numbers uniform in [0, 1)."""
        return (time * self.config.num_train_timesteps).long()

    def labels(self, label: Tensor, drop: Tensor) -> Tensor | None:
        """Return the class of each sample, the null class (the last row) where it is dropped; None without classes."""
        if self.num_classes is None:
            return None
        return torch.where(drop < self.config.label_dropout, self.num_classes, label)

    def texts(self, text: Tensor, drop: Tensor) -> Tensor:
        """Return the text of each sample (N, tokens, width), the empty one where it is dropped."""
        assert self.empty_text is not None  # whatever has texts has this one too
        return torch.where((drop < self.config.label_dropout)[:, None, None], self.empty_text, text)

    def target(self, image: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return what the network is asked for, in the shape of the image."""
        if self.config.prediction_type == "epsilon":
            return noise
        if self.config.prediction_type == "sample":
            return image
        return self.scheduler.get_velocity(image, noise, timesteps)

    def prepare(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Turn a batch of samples into what `losses` takes: image, noise, its level, `labels` of classes, `text`.

        The level is in `timesteps`, and with EDM's objective in `sigma`. For the CPU: the uniform numbers are float64,
        which not every device has.
        """
        prepared = {"image": batch["image"], "noise": batch["noise"]}
        if self.config.edm is None:
            prepared["timesteps"] = self.timesteps(batch["time"])
        else:
            prepared["sigma"] = draw_sigma(batch["time"], self.config.edm)
        labels = self.labels(batch["label"], batch["drop"])
        if labels is not None:
            prepared["labels"] = labels
        if "text" in batch:
            prepared["text"] = self.texts(batch["text"], batch["drop"])
        return prepared

    def losses(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """Compute the loss of each sample of a prepared batch, (N,) float32."""
        image, noise = batch["image"], batch["noise"]
        if self.config.edm is None:
            timesteps = batch["timesteps"]
            noisy, target = self.scheduler.add_noise(image, noise, timesteps), self.target(image, noise, timesteps)
        else:
            noisy, timesteps, target = precondition(image, noise, batch["sigma"], self.config.edm)
        prediction = model(noisy, timesteps, batch.get("text"), class_labels=batch.get("labels")).sample
        error = (prediction.float() - target).square().flatten(1).mean(1)
        if self.config.edm is not None:  # its weights are in its target
            return error
        self.weights = self.weights.to(error.device)
        return self.weights[timesteps] * error


def level_weights(snr: Tensor, config: ObjectiveConfig) -> Tensor:
    """Weigh each noise level, from its signal-to-noise ratio a / (1 - a).

    min_snr weighs the error of the clean image by min(SNR, gamma); in the units of the prediction that is
    min(SNR, gamma) / SNR for epsilon, / (SNR + 1) for v_prediction and / 1 for sample (Hang et al. 2023, section 3.4).
    """
    if config.weighting == "constant":
        return torch.ones_like(snr)
    gamma = config.min_snr_gamma
    if config.prediction_type == "epsilon":
        return (gamma / snr).clamp(max=1)  # 1 where the ratio is 0
    return snr.clamp(max=gamma) / (snr + 1 if config.prediction_type == "v_prediction" else 1)
