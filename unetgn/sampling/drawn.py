"""Draws the samples of a checkpoint that are to be judged, into a folder of its run."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from unetgn.sampling.sample import parse_arguments, run
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

    def options(self) -> list[str]:
        """Write them as sampling/sample.py takes them."""
        words = []
        for name, value in vars(self).items():
            if value is not None:
                words += [f"--{name.replace('_', '-')}", *(value if isinstance(value, list) else [str(value)])]
        return words

    def name(self) -> str:
        """Name what decides the look of an image, for a folder."""
        texts = None if self.prompts is None else hashlib.sha256("\n".join(self.prompts).encode()).hexdigest()[:8]
        named = (self.weights, self.scheduler, self.steps and f"{self.steps}-steps",
                 None if self.guidance_scale is None else f"guidance-{self.guidance_scale}",
                 texts and f"prompts-{texts}")  # fmt: skip
        return "-".join(part for part in named if part) or "samples"


def draw(checkpoint: Checkpoint, drawing: Drawing) -> Path:
    """Draw the samples of a checkpoint that are not there yet, each process its share; return their folder.

    Raises what sampling/sample.py raises.
    """
    out = run_of(checkpoint) / EVALUATION / checkpoint.path.name / drawing.name()
    run(parse_arguments(["--checkpoint", str(checkpoint.path), "--out", str(out), *drawing.options()]))
    return out


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
