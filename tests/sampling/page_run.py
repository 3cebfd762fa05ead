"""Has a run that was trained for a moment, to draw with and to watch."""

from pathlib import Path

from unetgn.training.train import main as train

TINY = """
model: {sample_size: 8, in_channels: 1, out_channels: 1, channels: [8, 16], depth: 1, attention_levels: [1],
        num_classes: 10, norm: {num_groups: 4}}
data: {held_out: 0.1}
objective: {label_dropout: 0.2}
train: {steps: 20, learning_rate: 5e-3, batch_size: 8, log_every: 5, validate_every: 10, trackers: []}
checkpoint: {every: 10}
preview: {every: 10, count: 4, steps: 4}
"""


def make_run(folder: Path) -> Path:
    """Train in `folder`, and return the run's."""
    (folder / "tiny.yaml").write_text(TINY)
    assert train(["--config", str(folder / "tiny.yaml"), "--output", str(folder / "run")]) == 0
    return folder / "run"
