"""Runs on folders of images: what a resume has to be, and whose images it takes."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from torch.utils.data import get_worker_info

from tests.training.forked import succeed
from tests.training.launched import TWO
from tests.training.runs import assert_equal_bits
from unetgn.training import looks
from unetgn.training.data.images import ImageFolder
from unetgn.training.train import main

TINY = """
model: {in_channels: 3, out_channels: 3, channels: [8, 16], depth: 1, attention_levels: [], norm: {num_groups: 4}}
data: {name: folder, image_size: 8, random_crop: true, crop_scale: 1.5, random_flip: true, num_workers: 2,
       held_out: 0.2}
train: {steps: 6, batch_size: 4, gradient_accumulation: 2, log_every: 1, validate_every: 3,
        trackers: []}
checkpoint: {every: 3}
preview: {every: 0}
"""


def write_images(folder: Path, seed: int) -> Path:
    """A dozen images of noise."""
    random = np.random.default_rng(seed)
    folder.mkdir()
    for number in range(12):
        Image.fromarray(random.integers(0, 256, (14, 19, 3), dtype=np.uint8)).save(folder / f"{number:02d}.png")
    return folder


@pytest.fixture
def line(tmp_path: Path) -> list[str]:
    (tmp_path / "tiny.yaml").write_text(TINY)
    return ["--config", str(tmp_path / "tiny.yaml"), f"data.path={write_images(tmp_path / 'images', seed=0)}"]


def assert_the_same(one: Path, other: Path) -> None:
    assert_equal_bits(one, other, 6)
    assert (one / "validation.csv").read_text() == (other / "validation.csv").read_text()


def test_crops_flips_workers_and_accumulation_are_resumed_exactly_in_mid_epoch(line: list[str], tmp_path: Path) -> None:
    """Ten images to train on, eight a step: step 4 begins in the third epoch. Without workers it is the same run."""
    whole, broken, alone = (tmp_path / name for name in ("whole", "broken", "alone"))
    assert main([*line, "--output", str(whole)]) == 0
    assert main([*line, "--output", str(broken), "train.steps=4"]) == 0
    assert main([*line, "--output", str(broken), "--resume", "auto"]) == 0
    assert main([*line, "--output", str(alone), "data.num_workers=0"]) == 0
    for other in (broken, alone):
        rows = [row for row in (other / "validation.csv").read_text().splitlines() if not row.startswith("4,")]
        (other / "validation.csv").write_text("\n".join(rows) + "\n")  # the last step of the first part
        assert_the_same(whole, other)


def test_held_out_images_are_decoded_in_workers_too(
    line: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """While the held-out loss is computed, an image that the training process decodes is broken."""
    held_out_loss, decode = looks.held_out_loss, ImageFolder.image

    def decode_elsewhere(images: ImageFolder, index: int, random: np.random.Generator | None = None) -> np.ndarray:
        assert get_worker_info() is not None, "decoded in the training process"
        return decode(images, index, random)

    def watch(*arguments: Any, **more: Any) -> float:
        with monkeypatch.context() as patch:
            patch.setattr(ImageFolder, "image", decode_elsewhere)
            return held_out_loss(*arguments, **more)

    monkeypatch.setattr(looks, "held_out_loss", watch)
    assert main([*line, "--output", str(tmp_path / "workers"), "train.steps=3"]) == 0
    assert main([*line, "--output", str(tmp_path / "none"), "train.steps=3", "data.num_workers=0"]) == 1
    assert "cannot be read any more: AssertionError: decoded in the training process" in capsys.readouterr().err


def test_two_processes_on_a_folder_are_resumed_exactly(line: list[str], tmp_path: Path) -> None:
    def train(output: Path, *keys: str) -> None:
        succeed(*line, "--output", str(output), "--resume", "auto", *keys, launcher=TWO, processes=2)

    train(tmp_path / "whole")
    train(tmp_path / "broken", "train.steps=3")
    train(tmp_path / "broken")
    assert_the_same(tmp_path / "whole", tmp_path / "broken")


def test_a_resume_refuses_as_many_other_images_and_takes_the_same_ones_elsewhere(
    line: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = ["--output", str(tmp_path / "run"), "data.num_workers=0", "--resume", "auto"]
    assert main([*line, *run, "train.steps=3"]) == 0
    others = write_images(tmp_path / "others", seed=1)
    assert main([*line, *run, f"data.path={others}"]) == 2
    assert "was made with other images than are here now" in capsys.readouterr().err
    moved = (tmp_path / "images").rename(tmp_path / "moved")
    assert main([*line, *run, f"data.path={moved}"]) == 0
