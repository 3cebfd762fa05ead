"""Makes one optimizer step, and keeps the state that it changes: network, averaged weights, optimizer."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from unetgn import UNet
from unetgn.training.checkpoint import Checkpoint, TensorFile, not_finite
from unetgn.training.config import EMAConfig, TrainConfig
from unetgn.training.data.samples import Purpose, random_generator
from unetgn.training.errors import CheckpointError, Diverged
from unetgn.training.lora import base_digest, is_adapted, trained_state
from unetgn.training.noise_scale import PartNorms
from unetgn.training.objective import Objective
from unetgn.training.optimizer import optimizer_from_tensors, optimizer_to_tensors, parameters_of, read_state
from unetgn.training.optimizers import FUSED, OptimizerConfig, make_optimizer
from unetgn.training.power_averages import PowerAverages
from unetgn.training.sharding import part_of, run_in_precision, shard_by_block, to_cpu, whole, without_weights

LEAST_SCALE = 2.0**-14  # float16's smallest normal number: gradients that overflow below it are not finite at all


def learning_rate(config: TrainConfig, step: int) -> float:
    """Compute the learning rate of step 0 .. steps - 1, of the step alone, whatever the number of processes."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    return config.learning_rate * config.share_of_peak()(step)


@dataclass(frozen=True)
class Numbers:
    """Holds what a step says of itself, left on the device: reading it there waits until the step is done."""

    step: int
    loss: Tensor  # this rank's
    gradient_norm: Tensor  # of all ranks together, before clipping
    scale: Tensor | None  # float16's loss scale; None without one
    average: Tensor | None = None  # a norm of this rank's averaged weights; None where nobody looked
    parts: Tensor | None = None  # squared norms of this rank's part of the gradient and of the whole one, or 0, 0

    def loss_is_finite(self) -> bool:
        """Return True where this rank's loss is finite."""
        return math.isfinite(self.loss.item())

    def usable(self) -> bool:
        """Return True where loss, gradient and weights are finite, or the loss scale still has room to fall."""
        return self.loss_is_finite() and self.gradient_is_finite() and self.average_is_finite()

    def average_is_finite(self) -> bool:
        """Return True where the averaged weights are finite after the step, and so the weights that went into them."""
        return self.average is None or math.isfinite(self.average.item())

    def gradient_is_finite(self) -> bool:
        """Return True where the gradient is finite, or the loss scale still has room to fall."""
        if self.scale is not None:  # infinite gradients are how a loss scale is found; falling for ever is not
            return self.scale.item() > LEAST_SCALE
        return math.isfinite(self.gradient_norm.item())


class TrainState:
    """Holds what a run changes while it trains, on one rank. `step` is the number of optimizer steps done."""

    def __init__(
        self,
        unet: UNet,
        objective: Objective,
        config: TrainConfig,
        ema: EMAConfig,
        accelerator: Accelerator,
        seed: int,
        optimizer: OptimizerConfig | None = None,
    ) -> None:
        self.config, self.objective, self.accelerator, self.seed = config, objective, accelerator, seed
        self.step = 0
        self.between_steps = True  # else the state is of no step: some weights are of the next one, some are not
        self.sharded = accelerator.is_fsdp2
        self.layout = torch.channels_last if config.channels_last else torch.contiguous_format
        # FSDP2 takes contiguous weights only; there only activations have the layout, and convolutions follow them.
        weights = torch.contiguous_format if self.sharded else self.layout
        self.unet = unet.to(device=accelerator.device, memory_format=weights)
        self.base = base_digest(self.unet) if is_adapted(self.unet) else None  # of the weights that stay
        self.config_json = self.unet.to_json_string()  # asked for now: FSDP2 renames the network's class
        if self.sharded:
            self.unsharded = without_weights(self.unet)
            run_in_precision(self.unet, accelerator)
            shard_by_block(self.unet, accelerator)
        if config.compile:
            self.unet.compile()
        self.optimizer_config = optimizer or OptimizerConfig()
        made = make_optimizer(
            self.optimizer_config,
            self.unet,
            learning_rate=config.learning_rate,
            weight_decay=config.weight_decay,
            betas=config.betas,
        )
        self.model, self.optimizer = accelerator.prepare(self.unet, made)
        accumulated, device = config.gradient_accumulation, accelerator.device
        self.part_norms = PartNorms(self.model, accumulated, device) if config.noise_scale else None
        self.ema = EMAModel(self.trained().values(), decay=ema.decay)  # of this rank's parts, where it has only parts
        self.ema.to(accelerator.device)
        self.power = PowerAverages(self.trained(), widths=ema.power_widths)
        self._settled = not isinstance(self.model, DistributedDataParallel)

    def run_step(self, batches: Sequence[dict[str, Tensor]]) -> Numbers:
        """Make one optimizer step on `gradient_accumulation` batches; where the gradient is not finite, make none."""
        self.model.train()
        if not self._settled:
            self._settle_buckets(batches[0])
        self._seed_dropout()
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.config, self.step)
        if self.part_norms is not None:
            self.part_norms.begin()
        total = torch.zeros((), device=self.accelerator.device)
        for number, batch in enumerate(batches, start=1):
            last = number == len(batches)
            with contextlib.nullcontext() if last else self.accelerator.no_sync(self.model):
                loss = self.objective.losses(self.model, self.to_device(batch)).mean()
                self.accelerator.backward(loss / len(batches))
            if number == 1 and self.part_norms is not None:
                self.part_norms.after_first(self.trained().values())
            total += loss.detach() / len(batches)
        unscale = None if self.accelerator.scaler is None else self.accelerator.scaler.scale(torch.ones_like(total))
        norm = self._clip()
        scaler = self.accelerator.scaler
        flagged = self.optimizer_config.name in FUSED
        if scaler is None and flagged:  # it then leaves everything as it is, without the host having to ask
            self.optimizer.optimizer.found_inf = (~norm.isfinite()).float()
        self.between_steps = False
        if scaler is not None or flagged or norm.isfinite():
            self.optimizer.step()
        self.ema.step(self.trained().values())
        if self.power.averages:
            self.power.update(self.trained())
        self.step += 1
        self.between_steps = True
        self.optimizer.zero_grad()
        # The scale by way of scaling a one: `get_scale` would wait for the device.
        scale = None if scaler is None else scaler.scale(torch.ones_like(total))
        return Numbers(self.step, total, norm, scale, self._norm_of_average(), self._parts(norm, unscale))

    def _parts(self, norm: Tensor, scale: Tensor | None) -> Tensor | None:
        """Return the squared norms of a part of the gradient and of the whole; 0, 0 of one that overflowed."""
        if self.part_norms is None:
            return None
        part = self.part_norms.squared if scale is None else self.part_norms.squared / scale.square()
        both = torch.stack([part.float(), norm.float().square()])
        return torch.where(both.isfinite().all(), both, torch.zeros_like(both))

    def _norm_of_average(self) -> Tensor:
        """Compute the norm of this rank's averaged weights, on the device: NaN or inf tells of such a weight.

        It tells of a finite one above 1e19 too, whose square float32 does not hold. The largest magnitude would not,
        but PyTorch's kernel for it is not vectorized on a CPU.
        """
        parts = [part.to_local() if isinstance(part, DTensor) else part for part in self.ema.shadow_params]
        norms = torch._foreach_norm([part for part in parts if part.numel()])
        return torch.stack([torch.zeros((), device=self.accelerator.device), *norms]).max()

    def _settle_buckets(self, batch: dict[str, Tensor]) -> None:
        """Run two backward passes that count for nothing, before the first step of a process.

        DDP chooses anew which gradients it sums together after the first backward pass, or the second where the graph
        is static, and from three processes on that decides how the sums round. So the first step of a resumed run has
        to find what the steps before it found.
        """
        for _ in range(2):
            self.accelerator.backward(self.objective.losses(self.model, self.to_device(batch)).mean())
        self.optimizer.zero_grad()
        self._settled = True

    def _seed_dropout(self) -> None:
        """Seed torch's own generator, which dropout draws from, by (seed, step, rank): it needs no saving."""
        number = self.step * self.accelerator.num_processes + self.accelerator.process_index
        torch.manual_seed(int(random_generator(self.seed, Purpose.STEP, number).integers(2**63)))

    def _clip(self) -> Tensor:
        limit = self.config.max_gradient_norm or math.inf
        norm = torch.as_tensor(self.accelerator.clip_grad_norm_(self.trained().values(), limit)).detach()
        return whole(norm) if self.sharded else norm

    def to_device(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Prepare a batch of samples for the objective, on the network's device and in its memory layout."""
        batch = self.objective.prepare(batch)
        moved = {key: value.to(self.accelerator.device, non_blocking=True) for key, value in batch.items()}
        return {key: v.contiguous(memory_format=self.layout) if v.ndim == 4 else v for key, v in moved.items()}

    def trained(self) -> dict[str, nn.Parameter]:
        """Return the parameters that are trained, by name: all of the network, or those of its adapters."""
        return {name: each for name, each in self.unet.named_parameters() if each.requires_grad}

    def names(self) -> list[str]:
        """List the names of the parameters that are trained."""
        return list(self.trained())

    def stepped(self) -> list[str]:
        """List the names of the parameters that are trained, in the optimizer's order."""
        names = {id(parameter): name for name, parameter in self.trained().items()}
        return [names[id(parameter)] for parameter in parameters_of(self.optimizer)]

    def averaged_state(self) -> dict[str, Tensor]:
        """Return what is trained of the network, averaged, as a state dict; of a sharded one, this rank's part."""
        return {**trained_state(self.unet), **dict(zip(self.names(), self.ema.shadow_params, strict=True))}

    def tensors(self, *, main: bool = True) -> dict[TensorFile, dict[str, Tensor]]:
        """Collect what goes into a checkpoint, whole and on the CPU; nothing on all but the `main` process.

        Of a sharded network every rank has to ask.
        """
        tensors: dict[TensorFile, dict[str, Tensor]] = {
            "model": to_cpu(trained_state(self.unet), keep=main),
            "ema": to_cpu(self.averaged_state(), keep=main),
            "optimizer": to_cpu(optimizer_to_tensors(self.optimizer, self.stepped()), keep=main),
        }
        if averages := self.power.state():
            tensors["averages"] = to_cpu(averages, keep=main)
        return tensors

    @contextlib.contextmanager
    def averaged(self) -> Iterator[UNet]:
        """Lend the network in evaluation mode with the averaged weights, for as long as the context lasts.

        Of a sharded network it is a whole copy, so that one rank may run it alone; but every rank has to enter. Raises
        Diverged where the averaged weights are not finite: nothing is to be drawn or written from them.
        """
        if self.sharded:
            copied = self._averaged_copy()
            self._check_average(copied.state_dict())
            yield copied
            return
        self._check_average(self.averaged_state())
        self.ema.store(self.trained().values())
        try:
            self.ema.copy_to(self.trained().values())
            self.unet.eval()
            yield self.unet
        finally:
            self.ema.restore(self.trained().values())

    def _check_average(self, state: dict[str, Tensor]) -> None:
        if name := not_finite(state):
            raise Diverged(f"after step {self.step} the averaged weights are not finite: {name}")

    def _averaged_copy(self) -> UNet:
        unet = copy.deepcopy(self.unsharded)
        unet.load_state_dict({name: whole(tensor) for name, tensor in self.averaged_state().items()}, assign=True)
        run_in_precision(unet, self.accelerator)
        return unet.eval()

    def scaler_state(self) -> dict[str, Any] | None:
        """Return the state of float16's loss scale; None without one."""
        scaler = self.accelerator.scaler
        return scaler.state_dict() if scaler else None

    def restore(self, checkpoint: Checkpoint) -> None:
        """Put the state back as the checkpoint has it.

        Raises CheckpointError, before anything is changed, where a tensor is not one of this network or not finite,
        or where its adapters are of another network.
        """
        if (there := checkpoint.base()) != self.base:
            raise CheckpointError(
                f"{checkpoint.path} has adapters of another network than is in train.initial_weights now: put back the "
                f"one that the run began with (sha256 {there}, now {self.base})"
            )
        now, kept = trained_state(self.unet), self.power.state()
        weights, averaged, moments, averages = read_state(
            checkpoint, self.unet, kept, optimizer=self.optimizer_config, betas=self.config.betas
        )
        whole_network = self.base is None
        self.unet.load_state_dict({n: part_of(tensor, now[n]) for n, tensor in weights.items()}, strict=whole_network)
        for name, shadow in zip(self.names(), self.ema.shadow_params, strict=True):
            shadow.copy_(part_of(averaged[name], shadow))
        optimizer_from_tensors(self.optimizer, self.stepped(), moments)
        self.ema.optimization_step = checkpoint.ema_step
        for name, average in kept.items():
            average.copy_(part_of(averages[name], average))
        self.power.step = checkpoint.step
        if self.accelerator.scaler and checkpoint.scaler:
            self.accelerator.scaler.load_state_dict(checkpoint.scaler)
        self.step = checkpoint.step
