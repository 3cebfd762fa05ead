"""Previews: the steps after which they are drawn, and any number of images, a batch at a time."""

from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn

from tests.training.loops import Runs, spare_time
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


@pytest.mark.parametrize(
    ("classes", "count", "columns"),
    [(3, 9, 3), (3, 4, 3), (None, 9, 3), (None, 16, 4), (10, 9, 3), (20, 36, 6), (1, 9, 3)],
)
def test_a_class_has_a_column_where_so_many_fit(classes: int | None, count: int, columns: int, tmp_path: Path) -> None:
    unet = UNet(in_channels=1, out_channels=1, channels=[4], attention_levels=[], depth=1, norm={"num_groups": 2},
                num_classes=classes)  # fmt: skip
    config, shape = PreviewConfig(count=count, steps=1), Conditions((1, 8, 8))
    draw_preview(unet.eval(), make_scheduler(ObjectiveConfig()), shape, config, tmp_path, 1, on_step=lambda: None)
    assert Image.open(preview_file(tmp_path, 1)).width == 66 * columns


@pytest.mark.parametrize(
    ("first", "every", "steps"),
    [
        (50, 1000, [50, 100, 200, 400, 800, 1000, 2000, 3000]),
        (250, 1000, [250, 500, 1000, 2000, 3000]),
        (999, 1000, [999, 1000, 2000, 3000]),
        (0, 1000, [1000, 2000, 3000]),
        (1, 3000, [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 3000]),
        (0, 0, []),
        (50, 0, []),  # off
        (1500, 1000, [1000, 2000, 3000]),
    ],
)
def test_early_previews_come_at_twice_the_step_until_the_others_do(first: int, every: int, steps: list[int]) -> None:
    config = PreviewConfig(first=first, every=every)
    assert [step for step in range(1, 3001) if config.is_at(step)] == steps
    for step in range(3000 if steps else 0):
        assert config.next_step(step) == next(later for later in steps if later > step)


def test_a_negative_step_is_refused() -> None:
    with pytest.raises(ValueError, match=r"preview\.first is -1"):
        PreviewConfig(first=-1)


def test_a_run_draws_early_and_draws_what_a_stop_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spare_time(monkeypatch.setattr)
    runs, keys = Runs(tmp_path), ("preview.first=1", "preview.every=5", "checkpoint.every=2", "train.validate_every=0")
    run = runs.run("run", *keys)
    assert sorted(file.name for file in (run / "samples").iterdir()) == [f"step-{n:06d}.png" for n in (1, 2, 4, 5, 6)]
    preview_file(run, 4).unlink()  # as a kill between checkpoint and preview leaves it
    runs.run("run", *keys, resume=str(run / "checkpoints" / "step-000004"))
    assert preview_file(run, 4).is_file()
