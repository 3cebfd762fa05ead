"""What the log says of speed."""

import csv
import logging
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator

from tests.training.launched import TINY
from unetgn import UNetConfig
from unetgn.training.config_files import load_config
from unetgn.training.step import Numbers
from unetgn.training.throughput import Window, flops_per_image, peak_flops
from unetgn.training.train import main


def test_the_operations_of_a_convolution_are_counted_both_ways() -> None:
    """A U-Net without attention: doubling height and width makes four times the work of its convolutions."""
    config = UNetConfig.from_dict({"channels": [32, 64], "attention_levels": [], "mid": {"attention": False}})
    small, large = flops_per_image(config, 16, None), flops_per_image(config, 32, None)
    assert 3.9 < large / small < 4.0  # the embedding's products are not multiplied
    assert flops_per_image(config, 64, None) / large == pytest.approx(4, rel=0.01)


def test_the_peak_of_a_device_is_known_by_its_name_in_16_bits_only() -> None:
    assert peak_flops("NVIDIA H100 80GB HBM3", "bf16") == 989e12
    assert peak_flops("NVIDIA H100 PCIe", "fp16") == 756e12
    assert peak_flops("NVIDIA H100 NVL", "bf16") == 835e12
    assert peak_flops("NVIDIA A100-SXM4-80GB", "bf16") == 312e12
    assert peak_flops("NVIDIA GB200", "bf16") is None  # another chip than B200
    assert peak_flops("NVIDIA H100 80GB HBM3", "no") is None
    assert peak_flops("a toaster", "bf16") is None


def numbers(loss: float) -> Numbers:
    return Numbers(1, torch.tensor(loss), torch.tensor(2 * loss), None)


def test_a_row_has_the_means_of_its_steps_and_their_rate() -> None:
    window = Window(Accelerator(cpu=True), images_per_step=10, flops=lambda: 1 // 0)  # nobody asks
    window.add([numbers(loss) for loss in (1.0, 2.0, 6.0)])
    window.since = time.perf_counter() - 2.0
    row = window.close()
    assert (row["loss"], row["gradient_norm"]) == (3.0, 6.0)
    assert row["images_per_second"] == pytest.approx(15, rel=0.05)
    assert "share_of_peak" not in row
    window.peak, window.flops = 5000.0, 100
    window.add([numbers(7.0)])
    window.since = time.perf_counter() - 1.0
    row = window.close()
    assert row["loss"] == 7.0
    assert row["share_of_peak"] == pytest.approx(10 * 100 / 5000, rel=0.05)


def test_a_resumed_run_counts_the_steps_that_it_timed_itself() -> None:
    """Of a row's steps those before the interruption count for its means alone."""

    def resumed(steps: int) -> Window:
        before = Window(Accelerator(cpu=True), images_per_step=10, flops=lambda: 1 // 0)  # nobody asks
        before.add([numbers(5.0)] * steps)
        window = Window(Accelerator(cpu=True), images_per_step=10, flops=lambda: 1 // 0)
        window.restore(SimpleNamespace(window_sums=before.all_sums(), window_steps=before.steps))  # type: ignore[arg-type]
        window.peak, window.flops = 5000.0, 100
        return window

    for steps in (0, 1, 9):
        window = resumed(steps)
        for seconds in (2.0, 4.0):  # the second row is as any
            window.add([numbers(7.0)] * 2)
            window.since = time.perf_counter() - seconds
            row = window.close()
            assert row["images_per_second"] == pytest.approx(2 * 10 / seconds, rel=0.05)
            assert row["share_of_peak"] == pytest.approx(row["images_per_second"] * 100 / 5000)
            assert row["loss"] == pytest.approx((5.0 * steps + 14) / (steps + 2) if seconds == 2.0 else 7.0)
    assert resumed(3).close() == {"loss": 5.0, "gradient_norm": 10.0}  # made up for: no time is known


def close(window: Window, steps: int, waited: float) -> None:
    """A row of so many steps of half a second each, of which that share is waiting."""
    window.add([numbers(1.0)] * steps)
    window.since, window.waited = time.perf_counter() - 0.5 * steps, waited * 0.5 * steps
    window.close()


def test_a_loader_that_is_waited_for_is_named_with_numbers(caplog: pytest.LogCaptureFixture) -> None:
    window = Window(Accelerator(cpu=True), images_per_step=10, flops=lambda: 1 // 0)  # nobody asks
    with caplog.at_level(logging.WARNING):
        close(window, steps=500, waited=0.9)  # the loader's start falls into the first row
        close(window, steps=49, waited=0.5)
        assert caplog.text == ""
        close(window, steps=1, waited=0.5)
    assert "the loader is the bottleneck: 50 % of the last 50 steps (250 ms of 500 ms a step)" in caplog.text


def test_a_loader_is_named_again_where_it_lasts_but_not_in_every_row(caplog: pytest.LogCaptureFixture) -> None:
    window = Window(Accelerator(cpu=True), images_per_step=10, flops=lambda: 1 // 0)  # nobody asks
    said = []
    with caplog.at_level(logging.WARNING):
        for _ in range(14):
            caplog.clear()
            close(window, steps=50, waited=0.5)
            said.append(bool(caplog.messages))
    assert said == [False, True, *[False] * 9, True, False, False]


def test_a_loader_that_keeps_up_is_not_named(caplog: pytest.LogCaptureFixture) -> None:
    window = Window(Accelerator(cpu=True), images_per_step=10, flops=lambda: 1 // 0)  # nobody asks
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            close(window, steps=100, waited=0.1)
    assert caplog.text == ""


def test_a_run_on_a_device_whose_peak_is_known_logs_its_share(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("unetgn.training.throughput.peak_flops", lambda name, precision: 1e12)
    (tmp_path / "tiny.yaml").write_text(TINY)
    keys = ["train.steps=2", "preview.every=0", "train.validate_every=0"]
    assert main(["--config", str(tmp_path / "tiny.yaml"), "--output", str(tmp_path / "run"), *keys]) == 0
    config = load_config(tmp_path / "run" / "config.yaml", []).model
    for row in csv.DictReader((tmp_path / "run" / "metrics.csv").open()):
        expected = float(row["images_per_second"]) * flops_per_image(config, 8, None) / 1e12
        assert float(row["share_of_peak"]) == pytest.approx(expected)
