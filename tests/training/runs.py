"""Reads what a run left in its folder, and compares runs."""

import csv
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file

from unetgn.training.run_directory import COLUMNS

KINDS = ("model", "ema", "optimizer")


def weights(run: Path, step: int, kind: str = "model") -> dict[str, torch.Tensor]:
    """Read one file of a checkpoint: "model", "ema" or "optimizer"."""
    return load_file(run / "checkpoints" / f"step-{step:06d}" / f"{kind}.safetensors")


def everything(run: Path, step: int) -> dict[str, torch.Tensor]:
    """Read all tensors of a checkpoint, by "model.NAME", "ema.NAME" and "optimizer.NAME"."""
    return {f"{kind}.{name}": tensor for kind in KINDS for name, tensor in weights(run, step, kind).items()}


def assert_same_tensors(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    """Raise AssertionError where a name is missing or a bit differs."""
    assert one.keys() == other.keys()
    differing = {
        name: (one[name] - other[name]).abs().max().item() for name in one if not torch.equal(one[name], other[name])
    }
    assert not differing, f"{len(differing)} of {len(one)} differ: {list(differing.items())[:4]}"


def assert_equal_bits(one: Path, other: Path, step: int) -> None:
    """Raise AssertionError where the checkpoints of two runs differ in a bit."""
    assert_same_tensors(everything(one, step), everything(other, step))


def assert_close(one: Path, other: Path, step: int) -> None:
    """Raise AssertionError where weights or averages of two runs differ by more than rounding."""
    for kind in ("model", "ema"):
        first, second = weights(one, step, kind), weights(other, step, kind)
        assert max((first[name] - second[name]).abs().max().item() for name in first) < 1e-4


def status(run: Path) -> dict:
    """Read status.json; of a run that has none yet, step 0 and no state."""
    return json.loads((run / "status.json").read_text()) if (run / "status.json").exists() else {"step": 0, "state": ""}


def logged(run: Path) -> list[str]:
    """Read the lines of metrics.csv, the header first; none where the run has not got that far."""
    return (run / "metrics.csv").read_text().splitlines() if (run / "metrics.csv").exists() else []


def logged_without_speed(run: Path) -> list[str]:
    """Read the lines of metrics.csv without the columns that are of the machine."""
    of_machine = ("images_per_second", "share_of_peak")
    columns = [index for index, name in enumerate(COLUMNS["metrics.csv"]) if name not in of_machine]
    return [",".join(row.split(",")[index] for index in columns) for row in logged(run)]


def rows(run: Path, name: str = "metrics.csv") -> list[dict[str, str]]:
    """Read a log by its columns."""
    with (run / name).open(newline="") as lines:
        return list(csv.DictReader(lines))


def losses(run: Path) -> list[tuple[str, str, str]]:
    """Read step, loss and learning rate of every logged row."""
    return [(row["step"], row["loss"], row["learning_rate"]) for row in rows(run)]


def wait_until(condition: Callable[[], bool], seconds: float = 120) -> None:
    """Wait. Raises AssertionError where the condition does not come true in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.02)
