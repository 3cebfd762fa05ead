"""A preview draws any number of images a batch at a time, and they are the same."""

from pathlib import Path

import pytest
import torch
from torch import nn

from unetgn import UNet
from unetgn.training import preview
from unetgn.training.objective import ObjectiveConfig, make_scheduler
from unetgn.training.preview import Conditions, PreviewConfig, draw_preview, preview_file


def test_many_images_are_drawn_in_batches_of_a_bounded_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    unet = UNet(in_channels=1, out_channels=1, channels=[8], attention_levels=[], depth=1, norm={"num_groups": 4})
    nn.init.normal_(unet.conv_out.weight)
    sizes: set[int] = set()
    unet.register_forward_pre_hook(lambda _, arguments: sizes.add(len(arguments[0])))
    for batch in (64, 4):
        monkeypatch.setattr(preview, "BATCH", batch)
        config, shape = PreviewConfig(count=10, steps=5), Conditions((1, 8, 8))
        draw_preview(unet.eval(), make_scheduler(ObjectiveConfig()), shape, config, tmp_path / str(batch), 1,
                     on_step=lambda: None)  # fmt: skip
    assert sizes == {10, 4, 2}
    for part in (preview_file(Path(), 1), Path("denoise", "step-000001.png")):
        assert (tmp_path / "4" / part).read_bytes() == (tmp_path / "64" / part).read_bytes()
