"""Trackers get the pictures of a run; what they cannot do is said once, and costs the run nothing."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.tracking import GeneralTracker, TensorBoardTracker
from PIL import Image

from tests.training.loops import Runs
from tests.training.runs import assert_equal_bits, rows
from unetgn.training import train
from unetgn.training.preview import preview_file
from unetgn.training.run_directory import LEVELS
from unetgn.training.trackers import show_picture
from unetgn.training.validate import sums

EXPECTED = {"samples", "denoise", "levels"}


class Kept(GeneralTracker):
    """Keeps what it is told; of the name and with the calls of another."""

    requires_logging_directory, tracker = False, None  # type: ignore[assignment]
    name = ""

    def __init__(self, name: str, fails: bool = False) -> None:
        self.name = name
        super().__init__()
        self.told: list[Any] = []
        self.fails = fails

    def store_init_configuration(self, values: dict) -> None:
        """Keep nothing of it."""

    def log(self, values: dict, step: int | None = None, **_: Any) -> None:
        self.told.append((values, step))

    def log_images(self, values: dict, step: int | None = None) -> None:
        if self.fails:
            raise ConnectionError("nobody there")
        self.told.append((values, step))


class WithoutPictures(GeneralTracker):
    name, requires_logging_directory, tracker = "mlflow", False, None  # type: ignore[assignment]

    def store_init_configuration(self, values: dict) -> None:
        """Keep nothing of it."""

    def log(self, values: dict, step: int | None = None, **_: Any) -> None:
        """Keep nothing of it."""


@pytest.fixture
def tracked(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that makes a run with trackers."""

    def run(name: str, trackers: list[Any], *keys: str) -> Path:
        monkeypatch.setattr(train, "start_trackers", lambda loop: loop.accelerator.trackers.extend(trackers))
        return runs.run(name, *keys)

    return run


@pytest.mark.usefixtures("loss_curves")
def test_tensorboard_has_the_pictures_of_every_preview(tracked: Any, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tracker = TensorBoardTracker("run", logging_dir=tmp_path / "tb")
    tracker.start()
    run = tracked("a", [tracker])
    events = EventAccumulator(str(tmp_path / "tb" / "run"), size_guidance={"images": 0})
    events.Reload()
    assert set(events.Tags()["images"]) == EXPECTED
    for name in EXPECTED:
        assert [event.step for event in events.Images(name)] == [3, 6]
    drawn = Image.open(preview_file(run, 6)).convert("RGB")
    shown = Image.open(io.BytesIO(events.Images("samples")[-1].encoded_image_string)).convert("RGB")
    assert np.array_equal(np.asarray(drawn), np.asarray(shown))


@pytest.mark.usefixtures("loss_curves")
@pytest.mark.parametrize("name", ["wandb", "aim", "clearml", "swanlab", "somebodys"])
def test_a_tracker_gets_pictures_as_its_call_takes_them(name: str) -> None:
    tracker, picture = Kept(name), Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8))
    show_picture(tracker, "samples", picture, 7)
    ((values, step),) = tracker.told
    assert step == 7
    found = values["samples"][0] if name in ("wandb", "swanlab", "somebodys") else values["samples"]
    assert isinstance(found, np.ndarray if name == "clearml" else Image.Image)
    assert np.array_equal(np.asarray(found), np.asarray(picture.convert("RGB")))


def test_a_tracker_that_fails_or_takes_no_pictures_is_warned_of_once(
    tracked: Any, unbroken: Path, caplog: pytest.LogCaptureFixture
) -> None:
    kept = Kept("kept")
    run = tracked("a", [Kept("bad", fails=True), WithoutPictures(), kept], "preview.every=1")
    assert_equal_bits(unbroken, run, 6)
    assert {name for values, _ in kept.told for name in values} >= {"samples", "denoise"}
    for words in ("picture for the tracker bad failed: ConnectionError: nobody there; the run goes on",
                  "picture for the tracker mlflow failed: TypeError: it takes no pictures"):  # fmt: skip
        assert sum(words in text for text in caplog.messages) == 1


def test_the_held_out_loss_of_each_range_of_noise_levels_is_logged_and_tracked(tracked: Any) -> None:
    """The mean of the ranges, each with its number of images, is the loss."""
    tracker = Kept("kept")
    run = tracked("a", [tracker])
    logged, validated = rows(run, "levels.csv"), rows(run, "validation.csv")
    assert [(row["step"], row["loss"]) for row in logged] == [(row["step"], row["loss"]) for row in validated]
    told = {name: value for values, step in tracker.told for name, value in values.items() if step == 6}
    for level in LEVELS:
        value = float(logged[-1][level])
        assert told.get(f"validation_loss/{level}", float("nan")) == pytest.approx(value, nan_ok=True)
    found = [float(logged[-1][level]) for level in LEVELS]
    assert 1 <= sum(value == value for value in found) <= 4  # of four images


def test_losses_are_added_up_by_their_level() -> None:
    torch.manual_seed(0)
    losses, level = torch.rand(50), torch.randint(0, 10, (50,))
    found = sums(losses, level, 10)
    assert found[:, 0].tolist() == pytest.approx([losses.sum().item(), 50])
    for number in range(10):
        of_level = losses[level == number]
        assert found[:, 1 + number].tolist() == pytest.approx([of_level.sum().item(), len(of_level)])
