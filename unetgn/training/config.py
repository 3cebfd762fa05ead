"""Says what a run is: its keys by group, and what one group demands of another.

Most groups stand beside the code that they configure; train.* and ema.* stand here, since every part of a run reads
them. unetgn/training/config_files.py reads all of them from YAML and from the command line.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from unetgn import UNetConfig
from unetgn.pipelines.schedulers import make_sampling_scheduler
from unetgn.training.checkpoint import CheckpointConfig
from unetgn.training.data.config import DataConfig
from unetgn.training.data.text import context_dims
from unetgn.training.evaluation import EvaluateConfig
from unetgn.training.lora import LoRAConfig
from unetgn.training.objective import ObjectiveConfig, make_scheduler
from unetgn.training.optimizers import BETAS_READ_BY, OptimizerConfig
from unetgn.training.power_averages import gamma_of
from unetgn.training.preview import PreviewConfig
from unetgn.training.profile import AFTER
from unetgn.training.schedules import Schedule, share_of_peak


@dataclass(frozen=True)
class TrainConfig:
    """Configures the steps: how many, how large, and what is said of them."""

    steps: int = 1000
    """Optimizer steps of the whole run."""
    processes: int | None = None
    """Refuse to run with another number of processes; null takes what the launcher started."""
    batch_size: int = 32
    """Images per process and forward pass; a step takes batch_size × processes × gradient_accumulation."""
    gradient_accumulation: int = 1
    """Forward passes per optimizer step."""
    initial_weights: str | None = None
    """Begin with the weights of this network of the same shape, not with random ones: a diffusers model or pipeline, a
    run or checkpoint of ours (its averaged weights). A resumed run takes its checkpoint's."""
    learning_rate: float = 1e-4
    """Peak learning rate; of the optimizer prodigy a factor of the step size that it finds, usually 1."""
    learning_rate_schedule: Schedule = "constant"
    """Schedule after the warm-up, by its name in diffusers.optimization: constant, a line (linear), half a cosine
    (cosine) or a power of a line (polynomial) that end where the run does, at 0 or 1e-7, cosine_with_restarts, or
    piecewise_constant. constant_with_warmup is constant."""
    learning_rate_cycles: int | None = None
    """Half cosines of cosine_with_restarts, each from the peak; null is 1."""
    learning_rate_power: float | None = None
    """Power of polynomial; null is 1, a line."""
    learning_rate_rules: str | None = None
    """Shares of the peak of piecewise_constant, each with the step before which it ends, at last one for all others:
    1:1000,0.1:2000,0.01."""
    warmup_steps: int = 0
    """Steps over which the learning rate rises linearly to its peak; a shorter run ends while it rises."""
    weight_decay: float = 0.0
    """Weight decay of the optimizer, decoupled but in adam and sgd, where it is a penalty."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay rates of the optimizer's two moments; sgd has none."""
    max_gradient_norm: float = 1.0
    """Gradients are scaled down to at most this norm; 0 is off."""
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    """Precision of the forward pass; weights and optimizer stay in float32."""
    compile: bool = False
    """torch.compile the network."""
    channels_last: bool = False
    """Keep activations with channels innermost: faster convolutions on most GPUs."""
    log_every: int = 10
    """Steps between two rows of metrics.csv."""
    profile: int = 0
    """Steps that accelerator.profile records, after the first three of a process, in RUN/profile/rank-N.json for
    Perfetto or chrome://tracing; 0 is off."""
    validate_every: int = 0
    """Steps between two held-out losses (data.held_out has to be above 0); 0 is off."""
    noise_scale: bool = False
    """Log the gradient noise scale, in images: the batch size above which larger ones stop to pay (McCandlish et al.
    2018, arXiv 1812.06162). It compares the gradient of a step with that of a part: train.gradient_accumulation has to
    be 2 or more, or the processes several. Means over many steps are steadier: train.log_every."""
    trackers: tuple[str, ...] = ("tensorboard",)
    """Trackers by their name in Accelerate: tensorboard, wandb, trackio, …; an empty list is off. They get the rows of
    the logs and, where they take them, the pictures of each preview."""

    def __post_init__(self) -> None:
        if self.initial_weights is not None:
            if not self.initial_weights:
                raise ValueError("train.initial_weights is empty; it is the folder of a network, or null for none")
            object.__setattr__(self, "initial_weights", os.path.expanduser(self.initial_weights))
        for name in ("steps", "batch_size", "gradient_accumulation", "log_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"train.{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("warmup_steps", "weight_decay", "max_gradient_norm", "profile", "validate_every"):
            if getattr(self, name) < 0:
                raise ValueError(f"train.{name} is {getattr(self, name)}; it must not be negative")
        if self.processes is not None and self.processes < 1:
            raise ValueError(f"train.processes is {self.processes}; it must be at least 1, or null for any number")
        if self.learning_rate <= 0:
            raise ValueError(f"train.learning_rate is {self.learning_rate}; it must be above 0")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"train.betas is {self.betas}; both must be at least 0 and below 1")
        if self.profile and self.steps < AFTER + self.profile:
            raise ValueError(
                f"train.profile is {self.profile}, after the first {AFTER} steps, but train.steps is {self.steps}: at "
                f"least {AFTER + self.profile} are needed, or train.profile 0"
            )
        self.share_of_peak()

    def share_of_peak(self) -> Callable[[int], float]:
        """Return the function from a step to its share of the peak learning rate. Raises ValueError."""
        return share_of_peak(
            self.learning_rate_schedule,
            peak=self.learning_rate,
            steps=self.steps,
            warmup_steps=self.warmup_steps,
            cycles=self.learning_rate_cycles,
            power=self.learning_rate_power,
            rules=self.learning_rate_rules,
        )


@dataclass(frozen=True)
class EMAConfig:
    """Configures the average of the weights that samples are made with."""

    decay: float = 0.9999
    """Decay per step; step n uses min(decay, (1 + n) / (10 + n)), so that the first weights are soon forgotten."""
    power_widths: tuple[float, ...] = ()
    """Widths (sigma_rel) of power-function averages that are kept beside it (Karras et al. 2024, arXiv 2312.02696:
    [0.05, 0.1]). Every checkpoint.every steps they go to RUN/averages, as large as the weights each, and of these
    training/average.py makes any other width afterwards. An empty list is off."""

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1:
            raise ValueError(f"ema.decay is {self.decay}; it must be at least 0 and below 1")
        for width in self.power_widths:
            try:
                gamma_of(width)
            except ValueError as error:
                raise ValueError(f"ema.power_widths is {list(self.power_widths)}: {error}") from error
        if len(set(self.power_widths)) < len(self.power_widths):
            raise ValueError(f"ema.power_widths is {list(self.power_widths)}, which has one twice")


@dataclass(frozen=True)
class RunConfig:
    """Configures a run, wholly: the same configuration gives the same weights."""

    seed: int = 0
    """Decides the initial weights, the order of the images and all noise; 0 or more."""
    model: UNetConfig = field(default_factory=UNetConfig)
    data: DataConfig = field(default_factory=DataConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    lora: LoRAConfig | None = None
    ema: EMAConfig = field(default_factory=EMAConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    preview: PreviewConfig = field(default_factory=PreviewConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)

    def __post_init__(self) -> None:
        check_config(self)


def check_config(config: RunConfig) -> None:
    """Raise ValueError where keys of different groups contradict each other."""
    if not 0 <= config.seed < 2**63:
        raise ValueError(f"seed is {config.seed}; it must be at least 0 and below 2**63")
    check_finite(asdict(config))
    check_model(config)
    check_guidance(config)
    check_optimizer(config)
    check_lora(config)
    check_evaluate(config)
    if config.train.validate_every > 0 and config.data.held_out == 0:
        raise ValueError(
            "train.validate_every needs images that are not trained on: set data.held_out, or leave it at 0"
        )
    if config.data.name == "latents" and config.objective.clip_sample:
        raise ValueError(
            "objective.clip_sample is true, but latents are not confined to [-1, 1] as pixels are: set it to false"
        )
    try:
        scheduler = make_scheduler(config.objective)
        make_sampling_scheduler(config.preview.scheduler_for(scheduler), scheduler, config.preview.steps)
    except ValueError as error:
        raise ValueError(f"preview.scheduler and preview.steps do not fit the objective: {error}") from error


def check_finite(keys: dict[str, Any], prefix: str = "") -> None:
    """Raise ValueError where a number is infinite or NaN."""
    for key, value in keys.items():
        if isinstance(value, dict):
            check_finite(value, f"{prefix}{key}.")
        elif isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{prefix}{key} is {value}; it must be a finite number")


def check_model(config: RunConfig) -> None:
    """Raise ValueError where the network is not one for these data, or waits for what training does not give."""
    model, data = config.model, config.data
    if model.spatial_dims != 2:
        raise ValueError(f"model.spatial_dims is {model.spatial_dims}, but images have 2 axes: set it to 2")
    if model.out_channels != model.in_channels:
        raise ValueError(
            f"model.out_channels is {model.out_channels} and model.in_channels is {model.in_channels}: "
            "the objective predicts something of the image's shape, so set both alike"
        )
    if model.sample_size not in (None, data.image_size, data.size):
        raise ValueError(
            f"model.sample_size is {model.sample_size} and data.image_size is {data.image_size}: "
            "set both alike, or leave model.sample_size out"
        )
    if context_dims(model) and data.name != "latents":
        raise ValueError(
            f"the network reads a context {sorted(context_dims(model))} wide (model.transformer or "
            f"model.attention.context_dim), but data.name {data.name} has no text for it to read: leave it out, or "
            "cache latents with captions (training/cache_latents.py --text-encoder) and train on those"
        )
    if data.buckets % 2 ** (len(model.channels) - 1):
        raise ValueError(
            f"data.buckets is {data.buckets}, but the network halves sizes {len(model.channels) - 1} times: set it to "
            f"a multiple of {2 ** (len(model.channels) - 1)}, or to 0"
        )
    if not model.condition.null_class_trained:
        raise ValueError(
            "model.condition.null_class_trained is false, but that is for training to find out, by "
            "objective.label_dropout: leave it out"
        )
    if model.condition.class_embedding != "table":
        raise ValueError(
            f"model.condition.class_embedding is {model.condition.class_embedding!r}, but the classes of training data "
            "are numbers, rows of a table: leave it out"
        )
    for name, value in (("condition.vector_dim", model.condition.vector_dim),
                        ("condition.context_dim", model.condition.context_dim),
                        ("condition.added_dim", model.condition.added_dim),
                        ("condition.augment_dim", model.condition.augment_dim),
                        ("time_cond_proj_dim", model.time_cond_proj_dim)):  # fmt: skip
        if value is not None:
            raise ValueError(f"model.{name} is {value}, but training has nothing to feed into it: leave it out")


def check_optimizer(config: RunConfig) -> None:
    """Raise ValueError where keys of train are not for the optimizer."""
    train, name = config.train, config.optimizer.name
    if name not in BETAS_READ_BY and train.betas != TrainConfig.betas:
        raise ValueError(
            f"train.betas is {train.betas}, but optimizer.name {name} has none: leave it out (optimizer.momentum is "
            f"its own), or take one of {', '.join(BETAS_READ_BY)}"
        )
    if name == "adamw_8bit" and train.channels_last:
        raise ValueError(
            "optimizer.name is adamw_8bit and train.channels_last true, but bitsandbytes puts every weight back into "
            "the usual layout: set train.channels_last to false, or take another optimizer.name"
        )


def check_lora(config: RunConfig) -> None:
    """Raise ValueError where adapters have no network to adapt, or no optimizer."""
    if config.lora is None:
        return
    if config.train.initial_weights is None:
        raise ValueError(
            "lora is set and train.initial_weights is not, but adapters change a network that has been trained: name "
            "it there, or leave lora out"
        )
    if config.optimizer.name == "muon":
        raise ValueError(
            "lora is set and optimizer.name is muon, but the two factors of an adapter are no weights of a layer, "
            "which it makes orthogonal: take adamw"
        )


def check_evaluate(config: RunConfig) -> None:
    """Raise ValueError where images are to be judged and there is nothing to judge them by."""
    evaluate, data = config.evaluate, config.data
    if evaluate.every == 0:
        return
    if data.held_out == 0:
        raise ValueError(
            f"evaluate.every is {evaluate.every} and data.held_out 0, but drawn images are compared with some that are "
            "not trained on: set data.held_out, or evaluate.every to 0"
        )
    if data.name in ("latents", "stream"):
        raise ValueError(
            f"evaluate.every is {evaluate.every} and data.name {data.name}, which has no real images to compare with: "
            "set evaluate.every to 0, and judge afterwards with sampling/evaluate.py"
        )


def conditional_only(config: RunConfig) -> bool:
    """Return True where the network has classes or reads text, and training shows it no sample without."""
    conditional = config.model.num_classes is not None or bool(context_dims(config.model))
    return conditional and config.objective.label_dropout == 0 and config.train.initial_weights is None


def check_guidance(config: RunConfig) -> None:
    """Raise ValueError where conditions are to be dropped, or guided by, that are not there."""
    model, dropped, scale = config.model, config.objective.label_dropout, config.preview.guidance_scale
    if dropped > 0 and model.num_classes is None and not context_dims(model):
        raise ValueError(
            f"objective.label_dropout is {dropped}, but model.num_classes is not set, nor does the network read text: "
            "there is nothing to drop; set one or remove the other"
        )
    if dropped > 0 and model.num_classes is not None and not model.condition.null_class:
        raise ValueError(
            f"objective.label_dropout is {dropped}, but model.condition.null_class is false: there is no class for the "
            "dropped labels; set it to true, or objective.label_dropout to 0"
        )
    if scale != 1 and dropped == 0:
        raise ValueError(
            f"preview.guidance_scale is {scale}, but guidance needs a network that was trained without labels or text "
            "too: set objective.label_dropout above 0, and model.num_classes or text, or leave it out"
        )
