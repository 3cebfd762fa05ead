"""Several processes are one run: launched as users launch them, on the CPU."""

import os
import signal
import subprocess
from pathlib import Path

import pytest
import torch

from tests.training.launched import (
    assert_close,
    assert_equal_bits,
    command,
    launch,
    logged,
    status,
    wait_until,
    weights,
)


def test_two_processes_and_one_with_the_same_images_a_step_agree(tiny: Path, two: Path, tmp_path: Path) -> None:
    launch("--config", str(tiny), "--output", str(tmp_path / "one"), "train.batch_size=8", launcher=None)
    for name in ("model", "ema"):
        one, other = weights(tmp_path / "one", 25, name), weights(two, 25, name)
        assert max((one[key] - other[key]).abs().max().item() for key in one) < 1e-4
    rows = [(run / "metrics.csv").read_text().splitlines() for run in (tmp_path / "one", two)]
    for one_row, other_row in zip(*rows, strict=True):
        assert one_row.split(",")[3] == other_row.split(",")[3]  # the learning rate of every step
    held_out = [float((run / "validation.csv").read_text().split(",")[-1]) for run in (tmp_path / "one", two)]
    assert held_out[0] == pytest.approx(held_out[1], rel=1e-4)


def test_a_run_of_two_stopped_by_a_signal_to_one_and_resumed_is_the_unbroken_run(
    tiny: Path, two: Path, tmp_path: Path
) -> None:
    """One rank gets SIGTERM, both save the same step and leave; the rest of the run is exact."""
    output = tmp_path / "broken"
    line = ["--config", str(tiny), "--output", str(output), "--resume", "auto"]
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


def test_two_ranks_that_accumulate_with_workers_in_bf16_go_on_exactly_across_epochs(tiny: Path, tmp_path: Path) -> None:
    keys = ["train.batch_size=128", "train.gradient_accumulation=2", "data.num_workers=2", "train.mixed_precision=bf16",
            "train.steps=6", "checkpoint.every=1", "preview.every=0", "checkpoint.keep=9"]  # fmt: skip
    line = ["--config", str(tiny), *keys]  # 512 of 1,707 images a step: the fourth step has the end of the first pass
    launch(*line, "--output", str(tmp_path / "whole"))
    middle = tmp_path / "whole" / "checkpoints" / "step-000003"
    launch(*line, "--output", str(tmp_path / "resumed"), "--resume", str(middle))
    assert_equal_bits(tmp_path / "whole", tmp_path / "resumed", 6)


def test_a_run_of_three_processes_goes_on_exactly(tiny: Path, tmp_path: Path) -> None:
    """From three on, the order in which DDP sums gradients shows; with two, a + b = b + a hides it."""
    keys = ["--num_processes", "3"], ["train.steps=6", "checkpoint.every=3", "preview.every=0"]
    launch("--config", str(tiny), "--output", str(tmp_path / "whole"), *keys[1], options=keys[0])
    middle = tmp_path / "whole" / "checkpoints" / "step-000003"
    launch("--config", str(tiny), "--output", str(tmp_path / "b"), "--resume", str(middle), *keys[1], options=keys[0])
    assert_equal_bits(tmp_path / "whole", tmp_path / "b", 6)


def test_another_number_of_processes_goes_on_with_a_notice_and_close(tiny: Path, two: Path, tmp_path: Path) -> None:
    middle = two / "checkpoints" / "step-000020"
    for name, keys, notice in (
        ("same", ["train.batch_size=4", "train.gradient_accumulation=2"], "close to the unbroken run, but not equal"),
        ("half", [], "a step takes another number of images"),
    ):
        line = ["--config", str(tiny), "--output", str(tmp_path / name), "--resume", str(middle), *keys]
        done = subprocess.run(command(*line, launcher=None), capture_output=True, text=True, check=False, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
        assert f"2 processes were at work and now 1: {notice}" in done.stderr
    assert_close(two, tmp_path / "same", 25)
    line = ["--config", str(tiny), "--output", str(tmp_path / "c"), "--resume", str(middle), "train.batch_size=5"]
    done = subprocess.run(command(*line, launcher=None), capture_output=True, text=True, check=False, timeout=300)
    assert "train.batch_size was 4 and is 5" in done.stderr


def test_two_processes_that_accumulate_are_one_that_does(tiny: Path, tmp_path: Path) -> None:
    keys = ["train.gradient_accumulation=2", "train.steps=10", "preview.every=0"]
    launch("--config", str(tiny), "--output", str(tmp_path / "two"), *keys)
    launch("--config", str(tiny), "--output", str(tmp_path / "one"), *keys, "train.batch_size=8", launcher=None)
    assert_close(tmp_path / "one", tmp_path / "two", 10)
