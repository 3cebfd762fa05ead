"""The loop: step after step until the last one, a signal, or a loss that is not a number."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Iterator
from types import FrameType, TracebackType
from typing import Any

import torch
import torch.distributed
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm

from training.checkpoint import delete_old, optimizer_to_tensors, write_checkpoint
from training.config import RunConfig, to_yaml
from training.data import SampleStream, StepBatches, make_loader
from training.preview import draw_loss, draw_preview
from training.run_directory import RunDirectory
from training.step import TrainState, learning_rate


class Diverged(Exception):
    """The loss or the gradient is not finite."""


class Preempted(Exception):
    """A signal asked the run to stop; its state is saved."""


class StopSignals:
    """SIGTERM and SIGINT as a question that every rank answers alike, so that all of them save the same step."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.received = False
        several = accelerator.num_processes > 1
        # Over the CPU, so that asking does not wait for the GPU.
        self._group = torch.distributed.new_group(backend="gloo") if several else None
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignals:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = True

    def anywhere(self, bad: bool) -> tuple[bool, bool]:
        """Whether any rank received a signal, and whether any rank's numbers are bad."""
        if self._group is None:
            return self.received, bad
        flags = torch.tensor([self.received, bad], dtype=torch.int32)
        torch.distributed.all_reduce(flags, torch.distributed.ReduceOp.MAX, group=self._group)
        return bool(flags[0]), bool(flags[1])


class Window:
    """Means over the steps since the last row of the log, kept on the device until they are asked for."""

    def __init__(self, device: torch.device) -> None:
        self.sums, self.steps, self.since = torch.zeros(2, device=device), 0, time.perf_counter()

    def add(self, loss: Tensor, norm: Tensor) -> None:
        self.sums += torch.stack([loss.float(), norm.float()])
        self.steps += 1

    def close(self, accelerator: Accelerator, images_per_step: int) -> tuple[float, float, float]:
        """(mean loss over steps and ranks, mean gradient norm, images per second), and begin anew."""
        loss, norm = (accelerator.reduce(self.sums, reduction="mean") / self.steps).tolist()
        now = time.perf_counter()
        rate = self.steps * images_per_step / (now - self.since)
        self.sums, self.steps, self.since = torch.zeros_like(self.sums), 0, now
        return loss, norm, rate


class Loop:
    """Everything that happens between the first and the last step of a run."""

    def __init__(self, config: RunConfig, state: TrainState, stream: SampleStream, run: RunDirectory) -> None:
        self.config, self.state, self.stream, self.run = config, state, stream, run
        self.accelerator = state.accelerator
        self.ranks = self.accelerator.num_processes
        self.images_per_step = config.train.batch_size * config.train.gradient_accumulation * self.ranks

    def batches(self) -> Iterator[dict[str, Tensor]]:
        """This rank's batches from the next step to the last."""
        train = self.config.train
        rank = self.accelerator.process_index
        order = StepBatches(
            self.state.step, train.steps, train.batch_size, train.gradient_accumulation, rank, self.ranks
        )
        on_gpu = self.accelerator.device.type == "cuda"
        return iter(make_loader(self.stream, order, num_workers=self.config.data.num_workers, pin_memory=on_gpu))

    def train(self) -> None:
        """Run to the last step. Raises Preempted after a signal (state saved) and Diverged (nothing saved)."""
        state, train = self.state, self.config.train
        main = self.accelerator.is_main_process
        self.window = Window(self.accelerator.device)
        bar = tqdm(total=train.steps, initial=state.step, unit="step", disable=not main, dynamic_ncols=True)
        last: tuple[Tensor, Tensor] | None = None
        with StopSignals(self.accelerator) as signals, bar:
            batches = self.batches()
            while state.step < train.steps:
                previous, last = last, state.run_step(batches)
                self.window.add(*last)
                bar.update()
                saving = self.due(train.checkpoint_every) or signals.received
                # A step's numbers are read while the next one runs, unless it is about to be saved.
                stop, bad = signals.anywhere(self.is_bad(last if saving else previous))
                if bad or ((saving or stop) and signals.anywhere(self.is_bad(last))[1]):
                    raise Diverged(f"the loss or the gradient is not finite at step {state.step}")
                if self.due(train.log_every):
                    self.log(bar)
                if self.due(train.sample_every):
                    self.preview()
                if saving or stop:
                    self.save()
                if stop and state.step < train.steps:
                    raise Preempted(f"stopped by a signal after step {state.step}")

    def due(self, every: int) -> bool:
        """Whether this step is one of every `every`, or the last."""
        return every > 0 and (self.state.step % every == 0 or self.state.step == self.config.train.steps)

    def is_bad(self, numbers: tuple[Tensor, Tensor] | None) -> bool:
        """Whether a step's loss or gradient is not finite; float16's loss scaling provokes infinite gradients."""
        if numbers is None:
            return False
        loss, norm = numbers
        return not math.isfinite(loss.item()) or (self.accelerator.scaler is None and not math.isfinite(norm.item()))

    def log(self, bar: tqdm) -> None:
        """A row of metrics.csv, the trackers and the progress bar."""
        loss, norm, rate = self.window.close(self.accelerator, self.images_per_step)
        step = self.state.step
        row = {
            "step": step,
            "epoch": step * self.images_per_step / len(self.stream.indices),
            "loss": loss,
            "learning_rate": learning_rate(self.config.train, step - 1),
            "gradient_norm": norm,
            "images_per_second": rate,
        }
        self.accelerator.log({key: value for key, value in row.items() if key != "step"}, step=step)
        if self.accelerator.is_main_process:
            self.run.log(row)
            bar.set_postfix_str(f"loss {loss:.4f}, {rate:.0f} images/s")

    def preview(self) -> None:
        """Sampled images with the averaged weights, and the loss curve; only the main process draws."""
        if self.accelerator.is_main_process:
            model, data = self.config.model, self.config.data
            shape = (model.in_channels, data.image_size, data.image_size)
            with self.state.averaged() as unet:
                scheduler = self.state.objective.scheduler
                draw_preview(
                    unet, scheduler, shape, self.config.preview, model.num_classes, self.run.path, self.state.step
                )
            draw_loss(*self.run.losses(), self.run.path / "loss.png")
            self.window.since = time.perf_counter()  # drawing is not training: leave it out of images/s
        self.accelerator.wait_for_everyone()

    def save(self) -> None:
        """Write a checkpoint, then delete the oldest ones; only the main process writes."""
        if self.accelerator.is_main_process:
            state = self.state
            tensors = {
                "model": state.raw_weights(),
                "ema": state.averaged_weights(),
                "optimizer": optimizer_to_tensors(state.optimizer, state.names()),
            }
            texts = {
                "config.yaml": to_yaml(self.config),
                "config.json": state.unet.to_json_string(),
                "scheduler_config.json": state.objective.scheduler.to_json_string(),
            }
            facts = {"counters": state.counters(), "world_size": self.ranks, "torch": torch.__version__}
            write_checkpoint(self.run.checkpoints, state.step, tensors, texts, facts)
            delete_old(self.run.checkpoints, self.config.checkpoint.keep)
            self.run.write_status("running", state.step)
        self.accelerator.wait_for_everyone()
