"""Holds the configurations of small runs, and the lines that start them with Accelerate's launcher."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TRAIN = ROOT / "training" / "train.py"
SAMPLE = ROOT / "sampling" / "sample.py"
TWO = ROOT / "configs" / "accelerate" / "cpu_2_processes.yaml"
FSDP2 = ROOT / "configs" / "accelerate" / "fsdp2.yaml"
ON_CPUS = ROOT / "tests" / "training" / "train_with_fsdp2_on_cpus.py"
BAD_RANK = ROOT / "tests" / "training" / "train_with_a_bad_rank.py"
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

SIX_STEPS = """
model: {sample_size: 8, in_channels: 1, out_channels: 1, channels: [8, 16], depth: 1, attention_levels: [1],
        num_classes: 10, dropout: 0.1, norm: {num_groups: 4}}
objective: {label_dropout: 0.2}
train: {steps: 6, batch_size: 8, learning_rate: 1e-3, learning_rate_schedule: cosine, warmup_steps: 2, log_every: 1,
        trackers: []}
ema: {decay: 0.9}
checkpoint: {every: 2, keep: 9}
preview: {every: 3, count: 4, steps: 3}
"""


def launcher_line(
    *arguments: str, script: Path = TRAIN, launcher: Path | None = TWO, options: Sequence[str] = ()
) -> list[str]:
    """Return what follows `accelerate launch`; port 0 is a free one."""
    start = [] if launcher is None else ["--config_file", str(launcher), "--main_process_port", "0", *options]
    return [*start, str(script), *arguments]
