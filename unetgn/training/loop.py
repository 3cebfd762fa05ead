"""Runs step after step until the last one, a signal, or a failure, and writes what is due between.

Between two steps the state is sound: it is that of the last whole step, and all that is random about the next one is a
function of its number. Whatever ends the loop then, the state is saved first, on all ranks. Three kinds of work differ
in how all ranks come to know that something failed:

- What a rank does alone (reading, logging, writing) notes an error and goes on to the next question, which raises
  Failed on every rank (unetgn/training/signals.py).
- What all ranks do at once (the passes of a step, sums) cannot be left by one: the others would wait for it. There each
  rank that can saves what all have alike, the first one for all.
- What the run can do without (pictures, trackers, curves) is a warning (unetgn/training/mishaps.py).
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import count, islice
from typing import NoReturn

from accelerate.utils import gather_object
from torch import Tensor

from unetgn.training.bars import Bar
from unetgn.training.checkpoint import Checkpoint, TensorFile, checkpoint_path, delete_old, not_finite
from unetgn.training.config import RunConfig
from unetgn.training.config_files import to_yaml
from unetgn.training.data.samples import IndexedSamples, Restarting, Samples, StepBatches
from unetgn.training.data.standing import RankState
from unetgn.training.errors import Diverged, Failed, Preempted
from unetgn.training.evaluation import Evaluator
from unetgn.training.forecast import Forecast
from unetgn.training.looks import Looks
from unetgn.training.mishaps import Mishaps
from unetgn.training.power_averages import AVERAGES, save_snapshot, snapshot_file
from unetgn.training.preview import Conditions, preview_file
from unetgn.training.profile import Profile
from unetgn.training.rescue import Rescue
from unetgn.training.resume import is_of
from unetgn.training.run_directory import RunDirectory
from unetgn.training.signals import Faults, Interrupted, StopSignals
from unetgn.training.step import Numbers, TrainState, learning_rate
from unetgn.training.throughput import Window, flops_per_image


class Loop(Rescue, Looks):
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
        evaluator: Evaluator | None = None,
    ) -> None:
        self.config, self.state, self.conditions, self.run, self.signals = config, state, conditions, run, signals
        self.samples, self.held_out, self.evaluator = samples, held_out, evaluator
        self.accelerator = state.accelerator
        self.ranks = self.accelerator.num_processes
        self.images_per_step = config.train.batch_size * config.train.gradient_accumulation * self.ranks
        batches = (config.train.batch_size, self.images_per_step) if config.train.noise_scale else None
        self.window = Window(self.accelerator, self.images_per_step, self.flops_per_image, batches)
        self.saved_step, self.drawn_at = state.step, {}
        self.start: Checkpoint | None = None  # what the run goes on from
        self.mishaps = Mishaps()
        self.profile = Profile(self.accelerator, config.train.profile, run.path / "profile")
        self.unread: list[Numbers] = []  # of steps that may still be running on the device
        self.unlogged: list[Numbers] = []  # of the steps since the last row of the log

    def flops_per_image(self) -> int:
        """Count what a step of training takes for one image."""
        text, config = self.conditions.empty_text, self.config
        shape = None if text is None else tuple(text.shape)
        return flops_per_image(config.model, config.data.size, shape, config.lora)

    def restore(self, checkpoint: Checkpoint) -> None:
        """Put the run back as the checkpoint, which is known to be sound, has it."""
        self.state.restore(checkpoint)
        self.start = checkpoint
        self.window.restore(checkpoint)
        self.samples.restore(checkpoint.step, checkpoint.samples())
        self.saved_step = checkpoint.step if is_of(checkpoint, self.run) else 0  # else it is another run's

    def load(self) -> Restarting[list[dict[str, Tensor]]]:
        """Load this rank's batches from the next step to the last, step by step."""
        step, workers = self.state.step, self.config.data.num_workers
        deaths = self.signals.raising_deaths if workers else contextlib.nullcontext
        starts = count()

        def load(given: int) -> Iterator[list[dict[str, Tensor]]]:
            if next(starts):  # anew, from where this rank's readers stood
                self.samples.restore(step + given, [self.samples.state(step + given)] * self.ranks)
            return self.load_from(step + given)

        return Restarting(load, num_workers=workers, raising_deaths=deaths)

    def load_from(self, step: int) -> Iterator[list[dict[str, Tensor]]]:
        """Load this rank's batches from the step after `step` on."""
        train, signals = self.config.train, self.signals
        rank = self.accelerator.process_index
        order = StepBatches(step, train.steps, train.batch_size, train.gradient_accumulation, rank, self.ranks)
        on_gpu = self.accelerator.device.type == "cuda"
        with signals.undisturbed():
            batches = iter(self.samples.loader(order, num_workers=self.config.data.num_workers, pin_memory=on_gpu))
        return in_groups(batches, train.gradient_accumulation)

    def train(self) -> None:
        """Run to the last step. Raises Preempted after a signal, Failed after an error, Diverged."""
        state, train = self.state, self.config.train
        self.bar = self.make_bar()
        self.batches: Restarting[list[dict[str, Tensor]]] | None = None
        try:
            with self.signals.noting():
                self.batches = self.load()
            self.catch_up()
            forecast = Forecast(self.config, state.step, on_cpu=self.accelerator.device.type == "cpu")
            while state.step < train.steps:
                with self.signals.noting(), self.mishaps.beside("the profile"):
                    self.profile.before_step()
                forecast.begin_step()
                self.next_step()
                self.show(lambda bar: bar.update())
                self.say(forecast.end_step())
                self.report()
            if self.accelerator.is_main_process and self.saved_step == state.step:
                with self.signals.noting():  # where a run was killed after its last checkpoint, before this
                    self.delete_old(upto=state.step)
            if self.agree(reading=len(self.unread)):
                self.stop()
        finally:
            # Ends the loader's workers now. Left to the garbage collector, which closes their pipes first, it would
            # wait for each of them in vain, in whatever runs next.
            self.batches = None
            with self.mishaps.beside("the profile"):
                self.profile.close()
            with contextlib.suppress(OSError, ValueError):  # where the terminal has gone, that has been noted
                if self.bar is not None:
                    self.bar.close()

    def make_bar(self) -> Bar | None:
        """Make the progress bar; where the terminal has gone, that is noted."""
        total, step, main = self.config.train.steps, self.state.step, self.accelerator.is_main_process
        with self.signals.noting():
            return Bar(total=total, initial=step, unit="step", disable=not main)
        return None

    def show(self, change: Callable[[Bar], object]) -> None:
        """Change the progress bar; where the terminal has gone, that is noted, and there is no bar any more."""
        if self.bar is None:
            return
        try:
            change(self.bar)
        except (OSError, ValueError) as error:  # a pipe that nobody reads; a file that was closed
            self.bar.disable = True
            self.bar = None
            self.signals.note(error)

    def say(self, text: str) -> None:
        """Print a line beside the progress bar, if there is anything to say."""
        if text:
            self.show(lambda bar: bar.say(text))

    def next_step(self) -> None:
        """Read the batches of a step and make it. Raises Preempted, Failed and Diverged."""
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
        """Read the batches of a step, so that no slow loader delays a checkpoint.

        None where a signal came, or where they could not be read, which is noted.
        """
        signals = self.signals
        if signals.received or self.batches is None:
            return None
        try:
            signals.interruptible = True
            return next(self.batches)
        except Interrupted:
            pass
        except Failed:
            raise
        except BaseException as error:
            signals.note(error)
        finally:
            signals.interruptible = False
        if signals.received:  # what failed is a loader whose workers got the signal, too
            signals.failure = None
        return None

    def report(self) -> None:
        """Write what is due after this step."""
        config = self.config
        if self.due(config.train.log_every):
            self.log()
        if self.due(config.checkpoint.every):
            self.save()
        if self.due(config.train.validate_every):
            self.validate()
        if self.preview_due():
            self.preview()
        if self.due(config.evaluate.every):
            self.evaluate()

    def catch_up(self) -> None:
        """Make up for averages, row, validation and preview of a resumed step, where the run ended before they came."""
        step, main = self.state.step, self.accelerator.is_main_process
        if step == 0:
            return
        with self.signals.noting():
            folder, kept = self.run.path / AVERAGES, self.config.ema.power_widths
            missing = kept and self.due(self.config.checkpoint.every) and not snapshot_file(folder, step).exists()
            if main and missing and self.start is not None:
                save_snapshot(folder, step, self.start.tensors("averages"))
        if self.due(self.config.train.log_every) and self.window.steps:
            missing = True
            with self.signals.noting():
                missing = main and step not in self.run.losses("metrics.csv")[0]
            if self.signals.told_by_main(missing):
                self.log()
            else:
                self.window.clear()
        if self.due(self.config.train.validate_every):
            missing = True
            with self.signals.noting():
                missing = main and step not in self.run.losses("validation.csv")[0]
            if self.signals.told_by_main(missing):
                self.validate()
        if self.preview_due():
            missing = main and not preview_file(self.run.path, step).exists()
            if self.signals.told_by_main(missing):
                self.preview()
        if self.due(self.config.evaluate.every):
            missing = True
            with self.signals.noting():
                missing = main and str(step) not in (row["step"] for row in self.run.rows("evaluation.csv"))
            if self.signals.told_by_main(missing):
                self.evaluate()

    def due(self, every: int) -> bool:
        """Return True where this step is one of every `every`, or the last."""
        return every > 0 and (self.state.step % every == 0 or self.state.step == self.config.train.steps)

    def preview_due(self) -> bool:
        """Return True where samples are drawn after this step."""
        return self.due(self.config.preview.every) or self.config.preview.is_at(self.state.step)

    def agree(self, *, reading: int) -> bool:
        """Return True where any rank was told to stop, after reading the numbers of the first `reading` unread steps.

        Raises Diverged where one of these is bad on any rank. Every rank has to ask.
        """
        reading = max(0, reading)
        mine, signals = find_fault(self.unread[:reading]), self.signals
        alone = self.ranks == 1 and signals.failure is None
        stop, ranks = (signals.received, [mine]) if alone else signals.faults(mine)
        self.unread = self.unread[reading:]
        bad = [str(rank) for rank, faults in enumerate(ranks) if faults.loss]
        if bad:
            step = max(faults.loss for faults in ranks)
            raise Diverged(f"the loss is not finite at step {step}, rank {', '.join(bad)}")
        if step := max(faults.gradient for faults in ranks):
            raise Diverged(f"the gradient is not finite at step {step}, though the loss is on every rank")
        if step := max(faults.weights for faults in ranks):
            raise Diverged(f"the averaged weights are not finite after step {step}, though loss and gradient of it are")
        return stop

    def stop(self) -> NoReturn:
        """Save what has not been saved and leave. Raises Preempted."""
        if self.saved_step < self.state.step:
            self.save()
        raise Preempted(f"stopped by a signal after step {self.state.step}")

    def log(self) -> None:
        """Write a row of metrics.csv, to the trackers and to the progress bar."""
        step = self.state.step
        self.count()
        row = {
            "step": step,
            **self.samples.progress(step * self.images_per_step),
            "learning_rate": learning_rate(self.config.train, step - 1),
            **self.window.close(),
        }
        self.write_row("metrics.csv", row, {key: value for key, value in row.items() if key != "step"})
        rate = row.get("images_per_second")  # which a row of steps before a resume has not
        said = f"loss {row['loss']:.4f}" + ("" if rate is None else f", {rate:.0f} images/s")
        self.show(lambda bar: bar.set_postfix_str(said))

    def count(self) -> None:
        """Add the steps since the last row to the next one."""
        self.window.add(self.unlogged)
        self.unlogged = []

    def save(self) -> None:
        """Write a checkpoint, then delete the oldest ones; only the main process writes."""
        self.agree(reading=len(self.unread))
        self.count()
        main = self.accelerator.is_main_process
        sums, tensors = self.window.all_sums(), self.state.tensors(main=main)
        samples = gather_object([self.samples.state(self.state.step, main=main)])
        if main:
            with self.signals.noting():
                self.write(tensors, sums, self.window.steps, samples)
        self.signals.stop_asked()  # until it is written, or could not be
        self.saved_step = self.state.step

    def write(
        self,
        tensors: dict[TensorFile, dict[str, Tensor]],
        sums: list[list[float]],
        steps: int,
        samples: list[RankState] | None,
    ) -> None:
        """Write a checkpoint of these tensors, of the sums since the last row and of the samples of all ranks."""
        state = self.state
        with self.mishaps.beside("metrics.csv"):
            self.run.write_rows()
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
            window_steps=steps,
        )
        checkpoint.write(
            tensors,
            config=to_yaml(self.config),
            unet_config=state.config_json,
            scheduler_config=state.objective.scheduler.to_json_string(),
            samples=samples,
            base=state.base,
        )
        self.saved_step = state.step
        if "averages" in tensors and self.due(self.config.checkpoint.every):
            save_snapshot(self.run.path / AVERAGES, state.step, tensors["averages"])
        self.delete_old()
        self.write_status("running")

    def delete_old(self, upto: int | None = None) -> None:
        """Delete checkpoints beyond `keep`, and what was put aside (of steps up to `upto`), on the main process."""
        with self.mishaps.beside("deleting older checkpoints"):
            delete_old(self.run.checkpoints, self.config.checkpoint.keep, upto)
            self.run.delete_left(upto)

    def write_status(self, state: str, **facts: str) -> None:
        """Replace status.json, on the main process."""
        if self.accelerator.is_main_process:
            with self.mishaps.beside("status.json"):
                self.run.write_status(state, self.state.step, **facts)


def in_groups(batches: Iterator[dict[str, Tensor]], size: int) -> Iterator[list[dict[str, Tensor]]]:
    """Give `size` batches at a time."""
    while group := list(islice(batches, size)):
        yield group


def find_fault(steps: Iterable[Numbers]) -> Faults:
    """Find the first step that is bad on this rank, by its loss, its gradient or else its weights."""
    bad = next((numbers for numbers in steps if not numbers.usable()), None)
    if bad is None:
        return Faults()
    if not bad.loss_is_finite():
        return Faults(loss=bad.step)
    return Faults(weights=bad.step) if bad.gradient_is_finite() else Faults(gradient=bad.step)
