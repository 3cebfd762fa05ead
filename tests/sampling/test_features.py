"""Features of real images are kept, and never trusted where they are not what was written."""

import json
import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from torch import Tensor

from unetgn.sampling.extractors import Extractor
from unetgn.sampling.features import compute_features, kept_features
from unetgn.sampling.sets import Pictures

IMAGES = np.random.default_rng(0).random((9, 1, 4, 5))


class Counting:
    """Makes the first numbers of an image, and counts the images."""

    def __init__(self) -> None:
        self.seen = 0

    def __call__(self, images: Tensor) -> Tensor:
        self.seen += len(images)
        return images.flatten(1)[:, :3].float()

    def extractor(self, digest: str = "0") -> Extractor:
        return Extractor("counting", digest, self, torch.device("cpu"))


def pictures(images: np.ndarray = IMAGES) -> Pictures:
    return Pictures(lambda number: images[number], np.arange(len(images)))


@pytest.fixture
def accelerator() -> Accelerator:
    return Accelerator(cpu=True)


@pytest.mark.parametrize("batch", [1, 4, 64])
def test_features_are_those_of_each_image_in_order(batch: int, accelerator: Accelerator) -> None:
    found = compute_features(Counting().extractor(), pictures(), accelerator, batch=batch)
    expected = (IMAGES * 255).round().reshape(9, -1)[:, :3]  # what a file of 8 bits holds
    assert np.array_equal(found, expected)


def test_features_are_computed_once_for_equal_pixels(tmp_path: Path, accelerator: Accelerator) -> None:
    counting = Counting()
    first, digest = kept_features(counting.extractor(), pictures(), accelerator, folder=tmp_path)
    again, same = kept_features(counting.extractor(), pictures(IMAGES.copy()), accelerator, folder=tmp_path)
    assert np.array_equal(first, again)
    assert digest == same
    assert counting.seen == 9
    changed = IMAGES.copy()
    changed[4, 0, 1, 1] = 1 - changed[4, 0, 1, 1]
    for images, own in ((changed, "0"), (IMAGES[::-1], "0"), (IMAGES[:8], "0"), (IMAGES, "1")):
        counting.seen = 0
        kept_features(counting.extractor(own), pictures(images), accelerator, folder=tmp_path)
        assert counting.seen == len(images)


def rewrite(file: Path, **changes: object) -> None:
    """Write a file again, with another fact or other features."""
    with safe_open(file, "np") as opened:
        facts = json.loads(opened.metadata()["features"])
    tensors = {"features": changes.pop("features")} if "features" in changes else load_file(file)
    save_file(tensors, file, {"features": json.dumps({**facts, **changes})})


DAMAGE: dict[str, Callable[[Path], object]] = {
    "cut off": lambda file: file.write_bytes(file.read_bytes()[:-4]),
    "a number": lambda file: file.write_bytes(file.read_bytes()[:-1] + b"\x7f"),
    "no file of tensors": lambda file: file.write_bytes(b"x" * 300),
    "empty": lambda file: file.write_bytes(b""),
    "another key": lambda file: rewrite(file, key="0" * 64),
    "another sha256": lambda file: rewrite(file, sha256="0" * 64),
    "fewer features": lambda file: rewrite(file, features=np.zeros((3, 3), np.float32)),
    "another precision": lambda file: rewrite(file, features=np.zeros((9, 3), np.float64)),
    "no metadata": lambda file: save_file({"features": np.zeros((9, 3), np.float32)}, file),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_features_are_computed_anew_and_said(
    damage: str, tmp_path: Path, accelerator: Accelerator, caplog: pytest.LogCaptureFixture
) -> None:
    expected, _ = kept_features(Counting().extractor(), pictures(), accelerator, folder=tmp_path)
    (file,) = tmp_path.iterdir()
    DAMAGE[damage](file)
    with caplog.at_level(logging.WARNING):
        found, _ = kept_features(Counting().extractor(), pictures(), accelerator, folder=tmp_path)
    assert np.array_equal(found, expected)
    assert str(file) in caplog.text
    counting = Counting()  # and they are whole again
    kept_features(counting.extractor(), pictures(), accelerator, folder=tmp_path)
    assert counting.seen == 0


def test_where_nothing_can_be_kept_it_is_said(
    tmp_path: Path, accelerator: Accelerator, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    found, _ = kept_features(Counting().extractor(), pictures(), accelerator, folder=tmp_path / "file" / "folder")
    assert found.shape == (9, 3)
    assert "are not kept for the next time" in caplog.text
