"""Looks at a run between its steps: the held-out loss, previews, the judgement of drawn images, curves, trackers."""

from __future__ import annotations

import contextlib
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path

from accelerate import Accelerator
from PIL import Image

from unetgn.training.checkpoint import checkpoint_path, delete_old, mark_best
from unetgn.training.config import RunConfig
from unetgn.training.data.samples import IndexedSamples
from unetgn.training.evaluation import Evaluator
from unetgn.training.mishaps import Mishaps
from unetgn.training.preview import Conditions, draw_levels, draw_loss, draw_preview
from unetgn.training.run_directory import LEVELS, RunDirectory
from unetgn.training.signals import Interrupted, StopSignals
from unetgn.training.step import TrainState
from unetgn.training.throughput import Window
from unetgn.training.trackers import show_picture
from unetgn.training.validate import held_out_loss

LEVELS_PICTURE = "levels.png"


class Looks(ABC):
    """Says how a loop's run stands, in its logs, in pictures and to the trackers."""

    config: RunConfig
    state: TrainState
    held_out: IndexedSamples | None
    conditions: Conditions
    evaluator: Evaluator | None
    run: RunDirectory
    signals: StopSignals
    accelerator: Accelerator
    window: Window
    mishaps: Mishaps
    saved_step: int
    drawn_at: dict[str, int]
    """Step at which each plot was drawn last."""

    @abstractmethod
    def save(self) -> None:
        """Write a checkpoint; every rank has to come."""

    def write_row(self, name: str, row: dict[str, float], tracked: dict[str, float]) -> None:
        """Write a row of a log, and tell the trackers; on the main process.

        A row that cannot be written now waits, at the longest until a checkpoint: none is written without it.
        """
        if not self.accelerator.is_main_process:
            return
        with self.signals.noting(), self.mishaps.beside(name):
            self.run.log(name, row)
        for tracker in self.accelerator.trackers:
            with self.signals.noting(), self.mishaps.beside(f"the tracker {tracker.name}"):
                tracker.log(tracked, step=self.state.step)

    def validate(self) -> None:
        """Write the held-out loss to validation.csv and the trackers."""
        assert self.held_out is not None  # the configuration sees to it
        began = time.perf_counter()
        with contextlib.suppress(Interrupted):
            workers = self.config.data.num_workers
            loss, by_level = held_out_loss(
                self.state,
                self.held_out,
                levels=len(LEVELS),
                num_workers=workers,
                go_on=self.go_on_together,
                noting=self.signals.noting,
            )
            row, parts = {"step": self.state.step, "loss": loss}, dict(zip(LEVELS, by_level, strict=True))
            found = {f"validation_loss/{name}": part for name, part in parts.items() if not math.isnan(part)}
            self.write_row("levels.csv", row | parts, found)
            self.write_row("validation.csv", row, {"validation_loss": loss})  # last: it says that both are there
        self.window.since += time.perf_counter() - began

    def preview(self) -> None:
        """Draw images with the averaged weights, and the loss curve, on the main process; the others wait for it."""
        began = time.perf_counter()
        scheduler, step = self.state.objective.scheduler, self.state.step
        with contextlib.suppress(Interrupted), self.state.averaged() as unet:
            if not self.accelerator.is_main_process:
                return self.signals.wait_for_main()
            config, folder = self.config.preview, self.run.path
            with self.signals.noting(), self.mishaps.beside("the preview"):
                drawn = draw_preview(unet, scheduler, self.conditions, config, folder, step, on_step=self.go_on_alone)
                self.show_pictures(drawn)
            self.draw_loss()
            with self.signals.noting(), self.mishaps.beside(LEVELS_PICTURE):
                self.show_pictures({"levels": folder / LEVELS_PICTURE} if self.run.rows("levels.csv") else {})
            self.signals.tell_from_main(working=False)
        self.window.since += time.perf_counter() - began  # drawing is not training: leave it out of images/s

    def evaluate(self) -> None:
        """Measure images of the averaged weights on the main process; where they are the best so far, save all."""
        began = time.perf_counter()
        scheduler, step, is_best = self.state.objective.scheduler, self.state.step, False
        with contextlib.suppress(Interrupted), self.state.averaged() as unet:
            if self.evaluator is None:  # of the main process alone
                self.signals.wait_for_main()
            else:
                with self.signals.noting(), self.mishaps.beside("the evaluation"):
                    figures = self.evaluator.judge(unet, scheduler, on_step=self.go_on_alone)
                    self.write_row("evaluation.csv", {"step": step, **figures}, figures)
                    is_best = self.run.judged(self.config.evaluate.metric)[:1] == [step]
                self.signals.tell_from_main(working=False)
        if self.signals.told_by_main(is_best):
            if self.saved_step < step:
                self.save()
            self.mark_best()
            if self.accelerator.is_main_process:  # the one that was the best before
                with self.signals.noting(), self.mishaps.beside("deleting older checkpoints"):
                    delete_old(self.run.checkpoints, self.config.checkpoint.keep)
        self.window.since += time.perf_counter() - began

    def mark_best(self) -> None:
        """Have checkpoints/best lead to the best checkpoint that is there, on the main process."""
        if self.accelerator.is_main_process:
            with self.signals.noting(), self.mishaps.beside("checkpoints/best"):
                judged = self.run.judged(self.config.evaluate.metric)
                paths = (checkpoint_path(self.run.checkpoints, step) for step in judged)
                mark_best(self.run.checkpoints, next((path for path in paths if path.is_dir()), None))

    def show_pictures(self, pictures: Mapping[str, Image.Image | Path]) -> None:
        """Show pictures to the trackers, by name; a picture that one cannot take is none of the run's business."""
        for tracker in self.accelerator.trackers:
            for name, picture in pictures.items():
                with self.mishaps.beside(f"a picture for the tracker {tracker.name}"):
                    show_picture(tracker, name, picture, self.state.step)

    def draw_loss(self) -> None:
        """Draw loss.png and levels.png, of what has been logged so far, where that was not done at this step."""
        for name, draw in (("loss.png", self._draw_curve), (LEVELS_PICTURE, self._draw_levels)):
            if self.drawn_at.get(name) != self.state.step:
                with self.signals.noting(), self.mishaps.beside(name):
                    draw(self.run.path / name)
                    self.drawn_at[name] = self.state.step

    def _draw_curve(self, path: Path) -> None:
        draw_loss(self.run.losses("metrics.csv"), self.run.losses("validation.csv"), path)

    def _draw_levels(self, path: Path) -> None:
        if found := self.run.rows("levels.csv"):
            draw_levels(int(found[-1]["step"]), [float(found[-1][name]) for name in LEVELS], path)

    def go_on_together(self) -> None:
        """Ask in the middle of work that all ranks do. Raises Interrupted where one of them was told to stop."""
        if self.signals.stop_asked():
            raise Interrupted

    def go_on_alone(self) -> None:
        """Ask in the middle of work that the others wait for. Raises Interrupted where one of them was told to stop."""
        if self.signals.tell_from_main(working=True):
            raise Interrupted
