"""Pixels and grids."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from unetgn.pipelines.pictures import to_grid, to_picture, to_uint8


def test_minus_one_to_one_becomes_black_to_white() -> None:
    images = torch.tensor([-2.0, -1.0, 0.0, 1.0, 3.0]).view(1, 1, 1, 5)
    assert to_uint8(images).flatten().tolist() == [0, 0, 128, 255, 255]


def test_all_shades_survive_the_way_to_a_tensor_and_back(tmp_path: Path) -> None:
    shades = torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1)
    assert torch.equal(to_uint8(shades.permute(0, 3, 1, 2).float() / 127.5 - 1), shades)
    to_picture(shades[0]).save(tmp_path / "a.png")
    assert np.array_equal(np.asarray(Image.open(tmp_path / "a.png")), shades[0, :, :, 0].numpy())


@pytest.mark.parametrize("channels", [1, 3])
def test_a_grid_holds_every_image_in_reading_order(channels: int) -> None:
    values = torch.tensor([-1.0, 0.0, 0.5]).view(3, 1, 1, 1)
    grid = np.asarray(to_grid(values.expand(3, channels, 8, 8), columns=2).convert("L"))
    cell = grid.shape[0] // 2
    centres = [grid[r * cell + cell // 2, c * cell + cell // 2] for r in range(2) for c in range(2)]
    assert centres == [0, 128, 191, 255]  # the fourth place is empty: white


def test_latents_are_no_picture() -> None:
    with pytest.raises(ValueError, match="4 channels is no picture"):
        to_picture(torch.zeros(8, 8, 4, dtype=torch.uint8))
