"""One optimizer step, and the state that it changes: network, averaged weights, optimizer."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from training.checkpoint import optimizer_from_tensors, optimizer_to_tensors
from training.data.samples import Purpose, random_generator
from training.objective import Objective
from training.sharding import part_of, run_in_precision, shard_by_block, to_cpu, whole, without_weights
from unetgn import UNet

LEAST_SCALE = 2.0**-14  # float16's smallest normal number: gradients that overflow below it are not finite at all


@dataclass(frozen=True)
class TrainConfig:
    """The steps: how many, how large, how often something is written."""

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
    """Peak learning rate of AdamW."""
    learning_rate_schedule: Literal["constant", "cosine"] = "constant"
    """After warm-up: constant, or half a cosine that reaches 0 where the run ends."""
    warmup_steps: int = 0
    """Steps over which the learning rate rises linearly to its peak; a shorter run ends while it rises."""
    weight_decay: float = 0.0
    """Decoupled weight decay of AdamW."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay rates of AdamW's two moments."""
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
    checkpoint_every: int = 1000
    """Steps between two checkpoints; the last step always makes one."""
    sample_every: int = 1000
    """Steps between two previews; 0 is off."""
    validate_every: int = 0
    """Steps between two held-out losses (data.held_out has to be above 0); 0 is off."""
    trackers: tuple[str, ...] = ("tensorboard",)
    """Trackers by their name in Accelerate: tensorboard, wandb, …; an empty list is off."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "gradient_accumulation", "log_every", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"train.{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("warmup_steps", "weight_decay", "max_gradient_norm", "sample_every", "validate_every"):
            if getattr(self, name) < 0:
                raise ValueError(f"train.{name} is {getattr(self, name)}; it must not be negative")
        if self.processes is not None and self.processes < 1:
            raise ValueError(f"train.processes is {self.processes}; it must be at least 1, or null for any number")
        if self.learning_rate <= 0:
            raise ValueError(f"train.learning_rate is {self.learning_rate}; it must be above 0")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"train.betas is {self.betas}; both must be at least 0 and below 1")


@dataclass(frozen=True)
class EMAConfig:
    """The average of the weights that samples are made with."""

    decay: float = 0.9999
    """Decay per step; step n uses min(decay, (1 + n) / (10 + n)), so that the first weights are soon forgotten."""

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1:
            raise ValueError(f"ema.decay is {self.decay}; it must be at least 0 and below 1")


def learning_rate(config: TrainConfig, step: int) -> float:
    """Learning rate of step 0 .. steps - 1: a function of the step alone, whatever the number of processes."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    if config.learning_rate_schedule == "constant":
        return config.learning_rate
    progress = (step - config.warmup_steps) / (config.steps - config.warmup_steps)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))


@dataclass(frozen=True)
class Numbers:
    """What a step says of itself, left on the device: reading it there waits until the step is done."""

    step: int
    loss: Tensor  # this rank's
    gradient_norm: Tensor  # of all ranks together, before clipping
    scale: Tensor | None  # float16's loss scale; None without one

    def loss_is_finite(self) -> bool:
        """Whether this rank's loss is."""
        return math.isfinite(self.loss.item())

    def usable(self) -> bool:
        """Whether the loss is finite, and the gradient too, or the loss scale still has room to fall."""
        if not self.loss_is_finite():
            return False
        if self.scale is not None:  # infinite gradients are how a loss scale is found; falling for ever is not
            return self.scale.item() > LEAST_SCALE
        return math.isfinite(self.gradient_norm.item())


class TrainState:
    """What a run changes while it trains, on one rank. `step` is the number of optimizer steps done."""

    def __init__(
        self,
        unet: UNet,
        objective: Objective,
        config: TrainConfig,
        ema: EMAConfig,
        accelerator: Accelerator,
        seed: int,
    ) -> None:
        self.config, self.objective, self.accelerator, self.seed = config, objective, accelerator, seed
        self.step = 0
        self.sharded = accelerator.is_fsdp2
        self.layout = torch.channels_last if config.channels_last else torch.contiguous_format
        # FSDP2 takes contiguous weights only; there only activations have the layout, and convolutions follow them.
        weights = torch.contiguous_format if self.sharded else self.layout
        self.unet = unet.to(device=accelerator.device, memory_format=weights)
        self.config_json = self.unet.to_json_string()  # asked for now: FSDP2 renames the network's class
        if self.sharded:
            self.unsharded = without_weights(self.unet)
            run_in_precision(self.unet, accelerator)
            shard_by_block(self.unet, accelerator)
        if config.compile:
            self.unet.compile()
        optimizer = torch.optim.AdamW(
            self.unet.parameters(),
            lr=config.learning_rate,
            betas=config.betas,
            weight_decay=config.weight_decay,
            fused=True,  # in one pass, and able to skip a step by a flag on the device
        )
        self.model, self.optimizer = accelerator.prepare(self.unet, optimizer)
        self.ema = EMAModel(self.unet.parameters(), decay=ema.decay)  # of this rank's parts, where it has only parts
        self.ema.to(accelerator.device)
        self._settled = not isinstance(self.model, DistributedDataParallel)

    def run_step(self, batches: Sequence[dict[str, Tensor]]) -> Numbers:
        """One optimizer step on `gradient_accumulation` batches; where the gradient is not finite, none is made."""
        self.model.train()
        if not self._settled:
            self._settle_buckets(batches[0])
        self._seed_dropout()
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.config, self.step)
        total = torch.zeros((), device=self.accelerator.device)
        for number, batch in enumerate(batches, start=1):
            last = number == len(batches)
            with contextlib.nullcontext() if last else self.accelerator.no_sync(self.model):
                loss = self.objective.losses(self.model, self.to_device(batch)).mean()
                self.accelerator.backward(loss / len(batches))
            total += loss.detach() / len(batches)
        norm = self._clip()
        scaler = self.accelerator.scaler
        if scaler is None:  # the optimizer itself then leaves everything as it is, without the host having to ask
            self.optimizer.optimizer.found_inf = (~norm.isfinite()).float()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.ema.step(self.unet.parameters())
        self.step += 1
        # The scale by way of scaling a one: `get_scale` would wait for the device.
        return Numbers(self.step, total, norm, None if scaler is None else scaler.scale(torch.ones_like(total)))

    def _settle_buckets(self, batch: dict[str, Tensor]) -> None:
        """Backward passes that count for nothing, before the first step of a process.

        DDP chooses anew which gradients it sums together after the first backward pass, or the second where the graph
        is static, and from three processes on that decides how the sums round. So the first step of a resumed run has
        to find what the steps before it found.
        """
        for _ in range(2):
            self.accelerator.backward(self.objective.losses(self.model, self.to_device(batch)).mean())
        self.optimizer.zero_grad()
        self._settled = True

    def _seed_dropout(self) -> None:
        """Dropout draws from torch's own generator: seeded from (seed, step, rank), it needs no saving."""
        number = self.step * self.accelerator.num_processes + self.accelerator.process_index
        torch.manual_seed(int(random_generator(self.seed, Purpose.STEP, number).integers(2**63)))

    def _clip(self) -> Tensor:
        limit = self.config.max_gradient_norm or math.inf
        return whole(torch.as_tensor(self.accelerator.clip_grad_norm_(self.unet.parameters(), limit)).detach())

    def to_device(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """A batch of samples prepared for the objective, where the network is and in its memory layout."""
        batch = self.objective.prepare(batch)
        moved = {key: value.to(self.accelerator.device, non_blocking=True) for key, value in batch.items()}
        return {key: v.contiguous(memory_format=self.layout) if v.ndim == 4 else v for key, v in moved.items()}

    def names(self) -> list[str]:
        """Names of the network's parameters, in the optimizer's order."""
        return [name for name, _ in self.unet.named_parameters()]

    def averaged_state(self) -> dict[str, Tensor]:
        """The network's state dict with averaged parameters; of a sharded one, this rank's part."""
        return {**self.unet.state_dict(), **dict(zip(self.names(), self.ema.shadow_params, strict=True))}

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """What a checkpoint holds, whole and on the CPU; empty on all but the main process. Every rank has to ask."""
        main = self.accelerator.is_main_process
        return {
            "model": to_cpu(self.unet.state_dict(), keep=main),
            "ema": to_cpu(self.averaged_state(), keep=main),
            "optimizer": to_cpu(optimizer_to_tensors(self.optimizer, self.names()), keep=main),
        }

    @contextlib.contextmanager
    def averaged(self) -> Iterator[UNet]:
        """The network in evaluation mode with the averaged weights, for as long as the context lasts.

        Of a sharded network it is a whole copy, so that one rank may run it alone; but every rank has to enter.
        """
        if self.sharded:
            yield self._averaged_copy()
            return
        self.ema.store(self.unet.parameters())
        self.ema.copy_to(self.unet.parameters())
        self.unet.eval()
        try:
            yield self.unet
        finally:
            self.ema.restore(self.unet.parameters())

    def _averaged_copy(self) -> UNet:
        unet = copy.deepcopy(self.unsharded)
        unet.load_state_dict({name: whole(tensor) for name, tensor in self.averaged_state().items()}, assign=True)
        run_in_precision(unet, self.accelerator)
        return unet.eval()

    def counters(self) -> dict[str, Any]:
        """Numbers beside the tensors that the next step depends on."""
        scaler = self.accelerator.scaler
        return {"ema_step": self.ema.optimization_step, "scaler": scaler.state_dict() if scaler else None}

    def restore(self, step: int, counters: dict[str, Any], tensors: dict[str, dict[str, Tensor]]) -> None:
        """Put back what `tensors` and `counters` gave. Raises CheckpointError where they are of another network."""
        now = self.unet.state_dict()
        self.unet.load_state_dict({name: part_of(tensor, now[name]) for name, tensor in tensors["model"].items()})
        for name, shadow in zip(self.names(), self.ema.shadow_params, strict=True):
            shadow.copy_(part_of(tensors["ema"][name], shadow))
        optimizer_from_tensors(self.optimizer, self.names(), tensors["optimizer"])
        self.ema.optimization_step = counters["ema_step"]
        if self.accelerator.scaler and counters["scaler"]:
            self.accelerator.scaler.load_state_dict(counters["scaler"])
        self.step = step
