"""Draws the samples of a checkpoint that are to be judged, into a folder of its run."""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from accelerate import Accelerator

from unetgn.sampling.judge import Ahead
from unetgn.sampling.options import check_options, make_parser
from unetgn.sampling.sample import open_drawing, run
from unetgn.training.average import average
from unetgn.training.checkpoint import (
    CHECKPOINTS,
    Checkpoint,
    checkpoint_path,
    find_checkpoint,
    list_checkpoints,
    run_of,
    verify,
)
from unetgn.training.errors import CheckpointError
from unetgn.training.power_averages import AVERAGES, list_snapshots

EVALUATION = "evaluation"  # where a run's folder has its samples and what was found of them


@dataclass(frozen=True)
class Drawing:
    """Says which samples are drawn: options of sampling/sample.py, None where its own default is meant."""

    seeds: str = "0-999"
    scheduler: str | None = None
    steps: int | None = None
    guidance_scale: float | None = None
    weights: str | None = None
    batch_size: int | None = None
    prompts: list[str] | None = None
    autoencoder: Path | None = None
    text_encoder: Path | None = None

    def arguments(self, checkpoint: Checkpoint, out: Path) -> argparse.Namespace:
        """Return them as sampling/sample.py has them, to draw into the folder `out`."""
        parser = make_parser()
        parsed = parser.parse_args(["--checkpoint", str(checkpoint.path), "--out", str(out), "--seeds", self.seeds])
        vars(parsed).update(
            {name: value for name, value in vars(self).items() if value is not None and name != "seeds"}
        )
        check_options(parser, parsed)
        return parsed

    def name(self) -> str:
        """Name what decides the look of an image, for a folder."""
        texts = None if self.prompts is None else hashlib.sha256("\n".join(self.prompts).encode()).hexdigest()[:8]
        parts = [*filter(None, (self.autoencoder, self.text_encoder))]
        paths = parts and hashlib.sha256(" ".join(str(part.resolve()) for part in parts).encode()).hexdigest()[:8]
        named = (self.weights, self.scheduler, self.steps and f"{self.steps}-steps",
                 None if self.guidance_scale is None else f"guidance-{self.guidance_scale}",
                 texts and f"prompts-{texts}", paths and f"parts-{paths}")  # fmt: skip
        return "-".join(part for part in named if part) or "samples"


def draw(checkpoint: Checkpoint, drawing: Drawing) -> Path:
    """Draw the samples of a checkpoint that are not there yet, each process its share; return their folder.

    Raises what sampling/sample.py raises.
    """
    out = folder_of(checkpoint, drawing)
    run(drawing.arguments(checkpoint, out))
    return out


def folder_of(checkpoint: Checkpoint, drawing: Drawing) -> Path:
    """Name the folder of a checkpoint's samples."""
    return run_of(checkpoint) / EVALUATION / checkpoint.path.name / drawing.name()


def look_ahead(checkpoint: Checkpoint, drawing: Drawing, accelerator: Accelerator) -> Ahead:
    """Tell what the samples of a checkpoint will be, without drawing any. Raises what sampling/sample.py raises."""
    drawn, subjects = open_drawing(drawing.arguments(checkpoint, folder_of(checkpoint, drawing)), accelerator)
    labelled = all(subject.label is not None for subject in subjects.values())
    return Ahead(len(subjects), (drawn.channels, *drawn.pixels), labelled=labelled)


def make_averages(path: Path, widths: Sequence[float], *, every: bool) -> list[tuple[float, Checkpoint]]:
    """Make the averages of these widths of a run's newest snapshot, or of `every` one, oldest first.

    Raises CheckpointError where the run kept no averages, ValueError for a width that there is not.
    """
    asked = find_checkpoint(path)
    run = run_of(asked)
    steps = [snapshot.step for snapshot in list_snapshots(run / AVERAGES)]
    chosen = steps if every else [asked.step] if asked.path.samefile(path) else steps[-1:]
    return [
        (width, verify(checkpoint_path(average(run, width, step=step) / CHECKPOINTS, step)))
        for step in chosen
        for width in widths
    ]


def find_all(path: Path) -> tuple[list[Checkpoint], list[str]]:
    """Find all sound checkpoints of a run, oldest first; and what is wrong with the others."""
    folder = run_of(find_checkpoint(path)) / CHECKPOINTS
    found, wrong = [], []
    for each in list_checkpoints(folder):
        try:
            found.append(verify(each))
        except CheckpointError as error:
            wrong.append(str(error))
    return found, wrong
