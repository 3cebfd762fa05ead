"""The loop: step after step until the last one, a signal, or a loss that is not a number."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import NoReturn

import torch
from torch import Tensor
from tqdm import tqdm

from training.checkpoint import delete_old, write_checkpoint
from training.config import RunConfig, to_yaml
from training.data.samples import IndexedSamples, Samples, StepBatches
from training.preview import Conditions, draw_loss, draw_preview, preview_file
from training.run_directory import RunDirectory
from training.signals import Interrupted, StopSignals
from training.step import Numbers, TrainState, learning_rate
from training.throughput import Window, flops_per_image
from training.validate import held_out_loss


class Diverged(Exception):
    """The loss or the gradient is not finite."""


class Preempted(Exception):
    """A signal asked the run to stop; its state is saved."""


class Loop:
    """Everything that happens between the first and the last step of a run."""

    def __init__(
        self,
        config: RunConfig,
        state: TrainState,
        samples: Samples,
        held_out: IndexedSamples | None,
        conditions: Conditions,
        run: RunDirectory,
        signals: StopSignals,
    ) -> None:
        self.config, self.state, self.conditions, self.run, self.signals = config, state, conditions, run, signals
        self.samples, self.held_out = samples, held_out
        self.accelerator = state.accelerator
        self.ranks = self.accelerator.num_processes
        self.images_per_step = config.train.batch_size * config.train.gradient_accumulation * self.ranks
        empty = conditions.empty_text
        flops = flops_per_image(config.model, config.data.image_size, None if empty is None else tuple(empty.shape))
        self.window = Window(self.accelerator, self.images_per_step, flops)
        self.saved_step = state.step
        self.unread: list[Numbers] = []  # of steps that may still be running on the device

    def load(self) -> Iterator[dict[str, Tensor]]:
        """This rank's batches from the next step to the last."""
        train = self.config.train
        rank = self.accelerator.process_index
        order = StepBatches(
            self.state.step, train.steps, train.batch_size, train.gradient_accumulation, rank, self.ranks
        )
        on_gpu = self.accelerator.device.type == "cuda"
        return iter(self.samples.loader(order, num_workers=self.config.data.num_workers, pin_memory=on_gpu))

    def train(self) -> None:
        """Run to the last step. Raises Preempted after a signal (state saved) and Diverged (nothing saved)."""
        state, train = self.state, self.config.train
        main = self.accelerator.is_main_process
        bar = tqdm(total=train.steps, initial=state.step, unit="step", disable=not main, dynamic_ncols=True)
        with bar:
            self.catch_up()
            self.batches = self.load()
            try:
                while state.step < train.steps:
                    self.step()
                    bar.update()
                    self.report(bar)
                if self.agree(reading=len(self.unread)):
                    self.stop()
            finally:
                # Ends the loader's workers now. Left to the garbage collector, which closes their pipes first, it would
                # wait for each of them in vain, in whatever runs next.
                del self.batches

    def step(self) -> None:
        """One step. Raises Preempted and Diverged."""
        began = time.perf_counter()
        accumulation = self.config.train.gradient_accumulation
        step = self.signals.unless_stopped(lambda: [next(self.batches) for _ in range(accumulation)])
        self.window.waited += time.perf_counter() - began
        # The last step may still be running on the device: what is read here are those before it.
        if self.agree(reading=len(self.unread) - 1) or step is None:
            self.stop()
        self.unread.append(self.state.run_step(step))
        self.window.add(self.unread[-1])

    def report(self, bar: tqdm) -> None:
        """What is due after this step."""
        train = self.config.train
        if self.due(train.log_every):
            self.log(bar)
        if self.due(train.checkpoint_every):
            self.save()
        if self.due(train.validate_every):
            self.validate()
        if self.due(train.sample_every):
            self.preview()

    def catch_up(self) -> None:
        """After a resume: the validation and the preview of this step, where the signal came before they were done."""
        step, train = self.state.step, self.config.train
        if step == 0:
            return
        main = self.accelerator.is_main_process
        if self.due(train.validate_every):
            missing = main and step not in self.run.losses("validation.csv")[0]
            if any(self.signals.exchange(missing)[1]):
                self.validate()
        if self.due(train.sample_every):
            missing = main and not preview_file(self.run.path, step).exists()
            if any(self.signals.exchange(missing)[1]):
                self.preview()

    def due(self, every: int) -> bool:
        """Whether this step is one of every `every`, or the last."""
        return every > 0 and (self.state.step % every == 0 or self.state.step == self.config.train.steps)

    def agree(self, *, reading: int) -> bool:
        """Whether any rank was told to stop. Raises Diverged where one of the first `reading` steps whose numbers have
        not been read is bad on any rank."""
        steps, self.unread = self.unread[: max(0, reading)], self.unread[max(0, reading) :]
        # A rank with a bad loss says the step; one that sees it only in the gradient, which all share, minus the step.
        bad = (-n.step if n.loss_is_finite() else n.step for n in steps if not n.usable())
        stop, said = self.signals.exchange(next(bad, 0))
        ranks = [str(rank) for rank, step in enumerate(said) if step > 0]
        if ranks:
            raise Diverged(f"the loss is not finite at step {max(said)}, rank {', '.join(ranks)}")
        if any(said):
            raise Diverged(f"the gradient is not finite at step {-min(said)}, though the loss is on every rank")
        return stop

    def stop(self) -> NoReturn:
        """Save what has not been saved and leave. Raises Preempted."""
        if self.saved_step < self.state.step:
            self.save()
        raise Preempted(f"stopped by a signal after step {self.state.step}")

    def log(self, bar: tqdm) -> None:
        """A row of metrics.csv, the trackers and the progress bar."""
        step = self.state.step
        row = {
            "step": step,
            **self.samples.progress(step * self.images_per_step),
            "learning_rate": learning_rate(self.config.train, step - 1),
            **self.window.close(),
        }
        self.accelerator.log({key: value for key, value in row.items() if key != "step"}, step=step)
        if self.accelerator.is_main_process:
            self.run.log("metrics.csv", row)
            bar.set_postfix_str(f"loss {row['loss']:.4f}, {row['images_per_second']:.0f} images/s")

    def validate(self) -> None:
        """The held-out loss, in validation.csv and the trackers."""
        assert self.held_out is not None  # the configuration sees to it
        began = time.perf_counter()
        with contextlib.suppress(Interrupted):
            loss = held_out_loss(self.state, self.held_out, num_workers=self.config.data.num_workers, go_on=self.go_on)
            self.accelerator.log({"validation_loss": loss}, step=self.state.step)
            if self.accelerator.is_main_process:
                self.run.log("validation.csv", {"step": self.state.step, "loss": loss})
        self.window.since += time.perf_counter() - began

    def preview(self) -> None:
        """Sampled images with the averaged weights, and the loss curve; the main process draws, the others wait."""
        began = time.perf_counter()
        scheduler, step = self.state.objective.scheduler, self.state.step
        with contextlib.suppress(Interrupted), self.state.averaged() as unet:
            if not self.accelerator.is_main_process:
                return self.signals.wait_for_main()
            draw_preview(unet, scheduler, self.conditions, self.config.preview, self.run.path, step, on_step=self.go_on)
            self.draw_loss()
            self.signals.exchange(False)
        self.window.since += time.perf_counter() - began  # drawing is not training: leave it out of images/s

    def draw_loss(self) -> None:
        """loss.png, of what has been logged so far."""
        draw_loss(self.run.losses("metrics.csv"), self.run.losses("validation.csv"), self.run.path / "loss.png")

    def go_on(self) -> None:
        """Ask the other ranks in the middle of long work. Raises Interrupted where one was told to stop."""
        if self.signals.exchange(True)[0]:
            raise Interrupted

    def save(self) -> None:
        """Write a checkpoint, then delete the oldest ones; only the main process writes."""
        self.agree(reading=len(self.unread))
        state = self.state
        window, tensors = self.window.save(), state.tensors()
        if self.accelerator.is_main_process:
            texts = {
                "config.yaml": to_yaml(self.config),
                "config.json": state.config_json,
                "scheduler_config.json": state.objective.scheduler.to_json_string(),
            }
            facts = {
                "counters": state.counters(),
                "window": window,
                "world_size": self.ranks,
                "images": self.samples.fingerprint(),
                "torch": torch.__version__,
            }
            write_checkpoint(self.run.checkpoints, state.step, tensors, texts, facts)
            delete_old(self.run.checkpoints, self.config.checkpoint.keep)
            self.run.write_status("running", state.step)
        self.saved_step = state.step
        self.accelerator.wait_for_everyone()
