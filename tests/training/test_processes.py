"""Several processes are one run."""

import os
import signal
from pathlib import Path

import pytest

from tests.training.forked import finish, start, succeed
from tests.training.launched import SAMPLE, TWO
from tests.training.runs import (
    assert_close,
    assert_equal_bits,
    logged,
    logged_without_speed,
    rows,
    status,
    wait_until,
)
from unetgn.sampling.evaluate import read_samples

PAIR = {"launcher": TWO, "processes": 2}


def test_two_processes_and_one_with_the_same_images_a_step_agree(tiny: Path, two: Path, tmp_path: Path) -> None:
    one = tmp_path / "one"
    succeed("--config", str(tiny), "--output", str(one), "train.batch_size=8")
    assert_close(one, two, 25)
    assert [row["learning_rate"] for row in rows(one)] == [row["learning_rate"] for row in rows(two)]
    held_out = [float(rows(run, "validation.csv")[-1]["loss"]) for run in (one, two)]
    assert held_out[0] == pytest.approx(held_out[1], rel=1e-4)


def test_a_run_of_two_stopped_by_a_signal_to_one_and_resumed_is_the_unbroken_run(
    tiny: Path, two: Path, tmp_path: Path
) -> None:
    """One rank gets SIGTERM, both save the same step and leave; the rest of the run is exact."""
    output = tmp_path / "broken"
    line = ["--config", str(tiny), "--output", str(output), "--resume", "auto"]
    with start(*line, **PAIR) as ranks:
        wait_until(lambda: status(output)["state"] == "running" and len(logged(output)) > 2)
        os.kill(status(output)["pid"], signal.SIGTERM)
        assert ranks.wait(timeout=60).codes == [1, 1]
    assert status(output)["state"] == "preempted"
    assert (output / "checkpoints" / f"step-{status(output)['step']:06d}").is_dir()
    succeed(*line, **PAIR)
    assert_equal_bits(two, output, 25)
    assert logged_without_speed(two) == logged_without_speed(output)


def test_two_processes_sample_the_images_that_one_does(two: Path, tmp_path: Path) -> None:
    arguments = ["--checkpoint", str(two), "--seeds", "0-6", "--steps", "4"]
    succeed(*arguments, "--out", str(tmp_path / "two"), script=SAMPLE, **PAIR)
    succeed(*arguments, "--out", str(tmp_path / "one"), script=SAMPLE)
    (one, labels), (other, other_labels) = (read_samples(tmp_path / name) for name in ("one", "two"))
    assert len(one) == 7
    assert labels.tolist() == other_labels.tolist() == list(range(7))
    assert abs(one - other).max() <= 1.01 / 255  # a shade, by rounding


def test_two_ranks_that_accumulate_with_workers_in_bf16_go_on_exactly_across_epochs(tiny: Path, tmp_path: Path) -> None:
    keys = ["train.batch_size=128", "train.gradient_accumulation=2", "data.num_workers=2", "train.mixed_precision=bf16",
            "train.steps=6", "checkpoint.every=1", "preview.every=0", "checkpoint.keep=9"]  # fmt: skip
    line = ["--config", str(tiny), *keys]  # 512 of 1,707 images a step: the fourth step has the end of the first pass
    succeed(*line, "--output", str(tmp_path / "whole"), **PAIR)
    middle = tmp_path / "whole" / "checkpoints" / "step-000003"
    succeed(*line, "--output", str(tmp_path / "resumed"), "--resume", str(middle), **PAIR)
    assert_equal_bits(tmp_path / "whole", tmp_path / "resumed", 6)


def test_a_run_of_three_processes_goes_on_exactly(tiny: Path, tmp_path: Path) -> None:
    """From three on, the order in which DDP sums gradients shows; with two, a + b = b + a hides it."""
    line = ["--config", str(tiny), "train.steps=6", "checkpoint.every=3", "preview.every=0"]
    three = {"launcher": TWO, "processes": 3}
    succeed(*line, "--output", str(tmp_path / "whole"), **three)
    middle = tmp_path / "whole" / "checkpoints" / "step-000003"
    succeed(*line, "--output", str(tmp_path / "b"), "--resume", str(middle), **three)
    assert_equal_bits(tmp_path / "whole", tmp_path / "b", 6)


def test_another_number_of_processes_goes_on_with_a_notice_and_close(tiny: Path, two: Path, tmp_path: Path) -> None:
    middle = two / "checkpoints" / "step-000020"
    for name, keys, notice in (
        ("same", ["train.batch_size=4", "train.gradient_accumulation=2"], "close to the unbroken run, but not equal"),
        ("half", [], "a step takes another number of images"),
    ):
        line = ["--config", str(tiny), "--output", str(tmp_path / name), "--resume", str(middle), *keys]
        done = succeed(*line)
        assert f"2 processes were at work and now 1: {notice}" in done.stderr
    assert_close(two, tmp_path / "same", 25)
    line = ["--config", str(tiny), "--output", str(tmp_path / "c"), "--resume", str(middle), "train.batch_size=5"]
    assert "train.batch_size was 4 and is 5" in finish(*line).stderr


def test_two_processes_that_accumulate_are_one_that_does(tiny: Path, tmp_path: Path) -> None:
    keys = ["train.gradient_accumulation=2", "train.steps=10", "preview.every=0"]
    succeed("--config", str(tiny), "--output", str(tmp_path / "two"), *keys, **PAIR)
    succeed("--config", str(tiny), "--output", str(tmp_path / "one"), *keys, "train.batch_size=8")
    assert_close(tmp_path / "one", tmp_path / "two", 10)
