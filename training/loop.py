"""Runs step after step until the last one, a signal, or a loss that is not a number, and writes what is due between."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Iterator
from typing import NoReturn

from accelerate.utils import gather_object
from torch import Tensor
from tqdm import tqdm

from training.checkpoint import Checkpoint, checkpoint_path, delete_old, not_finite
from training.config import RunConfig
from training.config_files import to_yaml
from training.data.samples import IndexedSamples, Samples, StepBatches
from training.errors import Diverged, Preempted
from training.preview import Conditions, draw_loss, draw_preview, preview_file
from training.run_directory import RunDirectory
from training.signals import Faults, Interrupted, StopSignals
from training.step import Numbers, TrainState, learning_rate
from training.throughput import Window, flops_per_image
from training.validate import held_out_loss


class Loop:
    """Does everything that happens between the first and the last step of a run."""

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
        self.unlogged: list[Numbers] = []  # of the steps since the last row of the log

    def restore(self, checkpoint: Checkpoint) -> None:
        """Put the run back as the checkpoint, which is known to be sound, has it."""
        self.state.restore(checkpoint)
        self.window.restore(checkpoint)
        self.samples.restore(checkpoint.step, checkpoint.samples())
        self.saved_step = checkpoint.step

    def load(self) -> Iterator[dict[str, Tensor]]:
        """Load this rank's batches from the next step to the last."""
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
                    self.next_step()
                    bar.update()
                    self.report(bar)
                if self.agree(reading=len(self.unread)):
                    self.stop()
            finally:
                # Ends the loader's workers now. Left to the garbage collector, which closes their pipes first, it would
                # wait for each of them in vain, in whatever runs next.
                del self.batches

    def next_step(self) -> None:
        """Read the batches of a step and make it. Raises Preempted and Diverged."""
        began = time.perf_counter()
        batches = self.read_batches()
        self.window.waited += time.perf_counter() - began
        # The last step may still be running on the device: what is read here are those before it.
        if self.agree(reading=len(self.unread) - 1) or batches is None:
            self.stop()
        numbers = self.state.run_step(batches)
        self.unread.append(numbers)
        self.unlogged.append(numbers)

    def read_batches(self) -> list[dict[str, Tensor]] | None:
        """Read the batches of a step, so that no slow loader delays a checkpoint: None where a signal came."""
        signals = self.signals
        try:
            signals.interruptible = True
            if signals.received:
                return None
            return [next(self.batches) for _ in range(self.config.train.gradient_accumulation)]
        except Interrupted:
            return None
        except RuntimeError:  # a loader whose workers got the signal, too
            if signals.received:
                return None
            raise
        finally:
            signals.interruptible = False

    def report(self, bar: tqdm) -> None:
        """Write what is due after this step."""
        config = self.config
        if self.due(config.train.log_every):
            self.log(bar)
        if self.due(config.checkpoint.every):
            self.save()
        if self.due(config.train.validate_every):
            self.validate()
        if self.due(config.preview.every):
            self.preview()

    def catch_up(self) -> None:
        """Make up for the validation and the preview of a resumed step, where a signal came before they were done."""
        step, main = self.state.step, self.accelerator.is_main_process
        if step == 0:
            return
        if self.due(self.config.train.validate_every):
            missing = main and step not in self.run.losses("validation.csv")[0]
            if self.signals.told_by_main(missing):
                self.validate()
        if self.due(self.config.preview.every):
            missing = main and not preview_file(self.run.path, step).exists()
            if self.signals.told_by_main(missing):
                self.preview()

    def due(self, every: int) -> bool:
        """Return True where this step is one of every `every`, or the last."""
        return every > 0 and (self.state.step % every == 0 or self.state.step == self.config.train.steps)

    def agree(self, *, reading: int) -> bool:
        """Return True where any rank was told to stop, after reading the numbers of the first `reading` unread steps.

        Raises Diverged where one of these is bad on any rank. Every rank has to ask.
        """
        steps, self.unread = self.unread[: max(0, reading)], self.unread[max(0, reading) :]
        mine = find_fault(steps)
        stop, ranks = self.signals.faults(mine) if self.ranks > 1 else (self.signals.received, [mine])
        bad = [str(rank) for rank, faults in enumerate(ranks) if faults.loss]
        if bad:
            step = max(faults.loss for faults in ranks)
            raise Diverged(f"the loss is not finite at step {step}, rank {', '.join(bad)}")
        if step := max(faults.gradient for faults in ranks):
            raise Diverged(f"the gradient is not finite at step {step}, though the loss is on every rank")
        return stop

    def stop(self) -> NoReturn:
        """Save what has not been saved and leave. Raises Preempted."""
        if self.saved_step < self.state.step:
            self.save()
        raise Preempted(f"stopped by a signal after step {self.state.step}")

    def log(self, bar: tqdm) -> None:
        """Write a row of metrics.csv, to the trackers and to the progress bar."""
        step = self.state.step
        self.count()
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

    def count(self) -> None:
        """Add the steps since the last row to the next one."""
        self.window.add(self.unlogged)
        self.unlogged = []

    def validate(self) -> None:
        """Write the held-out loss to validation.csv and the trackers."""
        assert self.held_out is not None  # the configuration sees to it
        began = time.perf_counter()
        with contextlib.suppress(Interrupted):
            workers = self.config.data.num_workers
            loss = held_out_loss(self.state, self.held_out, num_workers=workers, go_on=self.go_on_together)
            self.accelerator.log({"validation_loss": loss}, step=self.state.step)
            if self.accelerator.is_main_process:
                self.run.log("validation.csv", {"step": self.state.step, "loss": loss})
        self.window.since += time.perf_counter() - began

    def preview(self) -> None:
        """Draw images with the averaged weights, and the loss curve, on the main process; the others wait for it."""
        began = time.perf_counter()
        scheduler, step = self.state.objective.scheduler, self.state.step
        with contextlib.suppress(Interrupted), self.state.averaged() as unet:
            if not self.accelerator.is_main_process:
                return self.signals.wait_for_main()
            config, folder = self.config.preview, self.run.path
            draw_preview(unet, scheduler, self.conditions, config, folder, step, on_step=self.go_on_alone)
            self.draw_loss()
            self.signals.tell_from_main(working=False)
        self.window.since += time.perf_counter() - began  # drawing is not training: leave it out of images/s

    def draw_loss(self) -> None:
        """Draw loss.png, of what has been logged so far."""
        draw_loss(self.run.losses("metrics.csv"), self.run.losses("validation.csv"), self.run.path / "loss.png")

    def go_on_together(self) -> None:
        """Ask in the middle of work that all ranks do. Raises Interrupted where one of them was told to stop."""
        if self.signals.stop_asked():
            raise Interrupted

    def go_on_alone(self) -> None:
        """Ask in the middle of work that the others wait for. Raises Interrupted where one of them was told to stop."""
        if self.signals.tell_from_main(working=True):
            raise Interrupted

    def save(self) -> None:
        """Write a checkpoint, then delete the oldest ones; only the main process writes."""
        self.agree(reading=len(self.unread))
        self.count()
        state = self.state
        sums, tensors = self.window.all_sums(), state.tensors()
        samples = gather_object([self.samples.state(state.step)])
        if self.accelerator.is_main_process:
            for kind, contents in tensors.items():
                if name := not_finite(contents):
                    raise Diverged(
                        f"after step {state.step} {name} of {kind} is not finite: it was not saved, and the "
                        "checkpoints before it are as they were"
                    )
            checkpoint = Checkpoint(
                checkpoint_path(self.run.checkpoints, state.step),
                step=state.step,
                world_size=self.ranks,
                images=self.samples.fingerprint(),
                ema_step=state.ema.optimization_step,
                scaler=state.scaler_state(),
                window_sums=sums,
                window_steps=self.window.steps,
            )
            checkpoint.write(
                tensors,
                config=to_yaml(self.config),
                unet_config=state.config_json,
                scheduler_config=state.objective.scheduler.to_json_string(),
                samples=samples,
            )
            delete_old(self.run.checkpoints, self.config.checkpoint.keep)
            self.run.write_status("running", state.step)
        self.saved_step = state.step
        self.accelerator.wait_for_everyone()


def find_fault(steps: Iterable[Numbers]) -> Faults:
    """Find the first step that is bad on this rank, by its loss or else by its gradient."""
    bad = next((numbers for numbers in steps if not numbers.usable()), None)
    if bad is None:
        return Faults()
    return Faults(gradient=bad.step) if bad.loss_is_finite() else Faults(loss=bad.step)
