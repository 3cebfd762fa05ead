"""Looks at a run while it trains, and writes nothing to its folder: what it says of itself, its losses, its samples."""

from __future__ import annotations

import shutil
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from unetgn.json_files import read_object
from unetgn.messages import plain, said
from unetgn.training.checkpoint import CHECKPOINTS, list_checkpoints, step_of
from unetgn.training.preview import draw_loss
from unetgn.training.run_directory import STATUS, RunDirectory

LOGS = METRICS, VALIDATION = "metrics.csv", "validation.csv"
MOST_POINTS = 2000  # of a curve: more than a picture has columns
GONE = "no process has it: it was killed, or lost its machine; with --resume auto it goes on"
KEPT = 3  # pictures of a kind: a browser may still be reading the one before the newest, or ask for it


@dataclass(frozen=True)
class Sight:
    """Holds what there is to see of a run."""

    facts: dict[str, str]
    """By what they are called."""
    loss: Path | None = None
    samples: Path | None = None
    """Its newest preview, and how it came to be, both None where there is none yet."""
    strip: Path | None = None


class Watcher:
    """Looks at the run in a folder for any number of visitors, and keeps pictures for them in `out`."""

    def __init__(self, run: Path, out: Path, *, steps: int) -> None:
        """Begin to watch a run that is to make `steps` steps."""
        self.run, self.out, self.steps = run, out, steps
        self._lock = threading.Lock()
        self._drawn: tuple[list[int], Path] | None = None

    def look(self) -> Sight:
        """Look at the run now."""
        with self._lock:  # matplotlib draws one picture at a time
            return Sight(
                self.facts(),
                loss=self._loss(),
                samples=self._newest("samples"),
                strip=self._newest("denoise"),
            )

    def facts(self) -> dict[str, str]:
        """Say how the run stands."""
        try:
            status = read_object(self.run / STATUS)
            state, step = plain(str(status.get("state", "unknown"))), plain(str(status.get("step", 0)))
        except FileNotFoundError:
            state, step = "not started yet", "0"
        except (OSError, ValueError) as error:
            state, step = f"unknown: {said(error)}", "0"
        if state == "running" and RunDirectory(self.run).is_held() is False:
            state = GONE
        facts = {"state": state}
        rows = RunDirectory(self.run).rows(METRICS)
        last = rows[-1] if rows else {"step": step}
        facts["step"] = f"{last['step']} of {self.steps}"
        for name, words in (("loss", "loss"), ("images_per_second", "images a second")):
            if last.get(name):  # a row of steps before a resume says no speed
                facts[words] = f"{float(last[name]):.4g}"
        if held_out := RunDirectory(self.run).rows(VALIDATION):
            facts["held-out loss"] = f"{float(held_out[-1]['loss']):.4g} after step {held_out[-1]['step']}"
        if rows:
            facts["logged"] = ago(time.time() - (self.run / METRICS).stat().st_mtime)
        checkpoints = list_checkpoints(self.run / CHECKPOINTS)
        facts["newest checkpoint"] = f"step {step_of(checkpoints[-1])}" if checkpoints else "none yet"
        return facts

    def _loss(self) -> Path | None:
        """Draw the losses where they have changed since the last time, in a file that nobody is reading."""
        run = RunDirectory(self.run)
        stamps = [file.stat().st_mtime_ns if (file := self.run / name).is_file() else 0 for name in LOGS]
        if self._drawn is None or stamps != self._drawn[0]:
            steps, losses = run.losses(METRICS)
            if not steps:
                return None
            every = -(-len(steps) // MOST_POINTS)
            picture = self.out / f"loss-{max(stamps)}.png"
            draw_loss((steps[::every], losses[::every]), run.losses(VALIDATION), picture)
            self._delete_old("loss")
            self._drawn = stamps, picture
        return self._drawn[1]

    def _newest(self, kind: str) -> Path | None:
        """Copy the newest picture of a kind to where the page may show it from."""
        pictures = sorted((self.run / kind).glob("step-*.png"), key=lambda path: (len(path.name), path.name))
        if not pictures or not pictures[-1].is_file():
            return None
        copy = self.out / f"{kind}-{pictures[-1].name}"
        if not copy.exists():
            shutil.copyfile(pictures[-1], copy)
            self._delete_old(kind)
        return copy

    def _delete_old(self, kind: str) -> None:
        """Delete all but the newest pictures of a kind."""
        for old in sorted(self.out.glob(f"{kind}-*"), key=lambda path: path.stat().st_mtime_ns)[:-KEPT]:
            old.unlink()


def ago(seconds: float) -> str:
    """Say how long ago something was: "12 s ago", "3 min ago"."""
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit} ago"
    return f"{max(seconds, 0):.0f} s ago"
