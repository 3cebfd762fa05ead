"""Runs that a launcher starts, as users do: the lines, and what is left of them in the run's folder."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[2]
TWO = ROOT / "configs" / "accelerate" / "cpu_2_processes.yaml"
FSDP2 = ROOT / "configs" / "accelerate" / "fsdp2.yaml"
ON_CPUS = "tests/training/train_with_fsdp2_on_cpus.py"
BAD_RANK = "tests/training/train_with_a_bad_rank.py"
PAIR = ("--num_processes", "2")

TINY = """
model: {sample_size: 8, in_channels: 1, out_channels: 1, channels: [8, 16], depth: 1, attention_levels: [1],
        num_classes: 10, norm: {num_groups: 4}}
objective: {label_dropout: 0.2}
data: {held_out: 0.05}
train: {steps: 25, batch_size: 4, learning_rate: 1e-3, learning_rate_schedule: cosine, warmup_steps: 2, log_every: 1,
        validate_every: 25, trackers: []}
ema: {decay: 0.9}
checkpoint: {every: 10}
preview: {every: 20, count: 4, steps: 3}
"""


def command(
    *arguments: str, script: str = "training/train.py", launcher: Path | None = TWO, options: Sequence[str] = ()
) -> list[str]:
    port = str(29600 + os.getpid() % 300)  # test workers side by side
    start = [] if launcher is None else ["--config_file", str(launcher), "--main_process_port", port, *options]
    return [sys.executable, "-m", "accelerate.commands.launch", *start, str(ROOT / script), *arguments]


def launch(*arguments: str, **more: object) -> None:
    done = subprocess.run(command(*arguments, **more), capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


def weights(run: Path, step: int, name: str = "model") -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoints" / f"step-{step:06d}" / f"{name}.safetensors")


def status(run: Path) -> dict:
    return json.loads((run / "status.json").read_text()) if (run / "status.json").exists() else {"step": 0, "state": ""}


def logged(run: Path) -> list[str]:
    return (run / "metrics.csv").read_text().splitlines() if (run / "metrics.csv").exists() else []


def assert_equal_bits(one: Path, other: Path, step: int) -> None:
    for name in ("model", "ema", "optimizer"):
        first, second = weights(one, step, name), weights(other, step, name)
        assert first.keys() == second.keys()
        assert [key for key in first if not torch.equal(first[key], second[key])] == []


def assert_close(one: Path, other: Path, step: int) -> None:
    for name in ("model", "ema"):
        first, second = weights(one, step, name), weights(other, step, name)
        assert max((first[key] - second[key]).abs().max().item() for key in first) < 1e-4


def wait_until(condition: object, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.05)
