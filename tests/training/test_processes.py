"""Several processes are one run: launched as users launch them, on the CPU."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[2]
TWO = ROOT / "configs" / "accelerate" / "cpu_2_processes.yaml"

TINY = """
model: {sample_size: 8, in_channels: 1, out_channels: 1, channels: [8, 16], depth: 1, attention_levels: [1],
        num_classes: 10, norm: {num_groups: 4}}
objective: {label_dropout: 0.2}
data: {held_out: 0.05}
train: {steps: 25, batch_size: 4, learning_rate: 1e-3, learning_rate_schedule: cosine, warmup_steps: 2, log_every: 1,
        checkpoint_every: 10, sample_every: 20, validate_every: 25, trackers: []}
ema: {decay: 0.9}
preview: {count: 4, steps: 3}
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("processes") / "tiny.yaml"
    file.write_text(TINY)
    return file


def command(*arguments: str, script: str = "training/train.py", launcher: Path | None = TWO) -> list[str]:
    port = str(29600 + os.getpid() % 300)  # test workers side by side
    start = [] if launcher is None else ["--config_file", str(launcher), "--main_process_port", port]
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


@pytest.fixture(scope="module")
def two(config: Path) -> Path:
    output = config.parent / "two"
    launch("--config", str(config), "--output", str(output))
    return output


def test_two_processes_and_one_with_the_same_images_a_step_agree(config: Path, two: Path, tmp_path: Path) -> None:
    launch("--config", str(config), "--output", str(tmp_path / "one"), "train.batch_size=8", launcher=None)
    for name in ("model", "ema"):
        one, other = weights(tmp_path / "one", 25, name), weights(two, 25, name)
        assert max((one[key] - other[key]).abs().max().item() for key in one) < 1e-4
    rows = [(run / "metrics.csv").read_text().splitlines() for run in (tmp_path / "one", two)]
    for one_row, other_row in zip(*rows, strict=True):
        assert one_row.split(",")[3] == other_row.split(",")[3]  # the learning rate of every step
    held_out = [float((run / "validation.csv").read_text().split(",")[-1]) for run in (tmp_path / "one", two)]
    assert held_out[0] == pytest.approx(held_out[1], rel=1e-4)


def test_a_run_of_two_stopped_by_a_signal_to_one_and_resumed_is_the_unbroken_run(
    config: Path, two: Path, tmp_path: Path
) -> None:
    """One rank gets SIGTERM, both save the same step and leave; the rest of the run is exact."""
    output = tmp_path / "broken"
    line = ["--config", str(config), "--output", str(output), "--resume", "auto"]
    process = subprocess.Popen(command(*line), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    try:
        wait_until(lambda: status(output)["state"] == "running" and len(logged(output)) > 2)
        os.kill(status(output)["pid"], signal.SIGTERM)
        process.wait(timeout=60)
    finally:
        process.kill()
    assert status(output)["state"] == "preempted"
    assert (output / "checkpoints" / f"step-{status(output)['step']:06d}").is_dir()
    launch(*line)
    for name in ("model", "ema", "optimizer"):
        whole, resumed = weights(two, 25, name), weights(output, 25, name)
        assert [key for key in whole if not torch.equal(whole[key], resumed[key])] == []
    without_speed = [
        [row.rsplit(",", 2)[0] for row in (run / "metrics.csv").read_text().splitlines()] for run in (two, output)
    ]
    assert without_speed[0] == without_speed[1]


def test_two_processes_sample_the_images_that_one_does(two: Path, tmp_path: Path) -> None:
    arguments = ["--checkpoint", str(two), "--seeds", "0-6", "--steps", "4"]
    launch(*arguments, "--out", str(tmp_path / "two"), script="sampling/sample.py")
    launch(*arguments, "--out", str(tmp_path / "one"), script="sampling/sample.py", launcher=None)
    from sampling.evaluate import read_samples

    (one, labels), (other, other_labels) = (read_samples(tmp_path / name) for name in ("one", "two"))
    assert len(one) == 7
    assert labels.tolist() == other_labels.tolist() == list(range(7))
    assert abs(one - other).max() <= 1.01 / 255  # a shade, by rounding


def test_a_process_whose_launcher_died_saves_and_stops(config: Path, tmp_path: Path) -> None:
    output = tmp_path / "orphan"
    line = ["--config", str(config), "--output", str(output), "train.steps=100000", "train.sample_every=0",
            "train.validate_every=0", "train.checkpoint_every=100000"]  # fmt: skip
    process = subprocess.Popen(command(*line, launcher=None), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    wait_until(lambda: status(output)["state"] == "running")
    process.kill()
    process.wait()
    wait_until(lambda: status(output)["state"] == "preempted")
    assert list((output / "checkpoints").glob("step-*"))


def wait_until(condition: object, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.05)
