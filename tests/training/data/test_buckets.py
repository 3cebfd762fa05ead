"""Images of several proportions are cut to sizes of one area, and each batch has one of them."""

import shutil
from collections import Counter, deque
from pathlib import Path

import numpy as np
import pytest
import yaml
from accelerate import Accelerator
from PIL import Image

from tests.training.runs import assert_equal_bits, rows
from unetgn.training.config_files import load_config
from unetgn.training.data.buckets import MOST, Buckets, list_sizes, nearest
from unetgn.training.data.samples import IndexedSamples, StepBatches, random_generator
from unetgn.training.errors import DataError
from unetgn.training.prepare import prepare_samples
from unetgn.training.train import main

SHAPES = [(16, 16), (24, 12), (12, 24), (40, 30), (16, 40)]  # height and width; the last one is longer than any size


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Thirteen pictures, three or two of each shape, of one colour each; one is turned by its EXIF entry."""
    folder = tmp_path_factory.mktemp("pictures")
    for number in range(13):
        height, width = SHAPES[number % 5]
        picture = Image.new("RGB", (width, height), (number * 15, 100, 200))
        exif = Image.Exif()
        if number == 6:  # 12 wide, 24 high, shown as 24 wide, 12 high
            exif[0x0112] = 6
        picture.save(folder / f"{number:02d}.png", exif=exif)
    return folder


@pytest.fixture
def config(pictures: Path, tmp_path: Path) -> Path:
    keys = {
        "model": {"in_channels": 3, "out_channels": 3, "channels": [8, 16], "depth": 1, "attention_levels": [],
                  "norm": {"num_groups": 4}},
        "data": {"name": "folder", "path": str(pictures), "image_size": 16, "buckets": 4, "held_out": 0.15},
        "train": {"steps": 6, "batch_size": 2, "log_every": 1, "trackers": [], "validate_every": 6},
        "ema": {"decay": 0.5},
        "preview": {"every": 6, "count": 2, "steps": 2},
        "checkpoint": {"every": 3, "keep": 9},
    }  # fmt: skip
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(keys))
    return tmp_path / "config.yaml"


@pytest.mark.parametrize(("side", "step"), [(16, 4), (64, 8), (512, 64), (96, 32), (768, 8)])
def test_sizes_have_the_pixels_of_the_square_and_sides_that_the_network_takes(side: int, step: int) -> None:
    sizes = list_sizes(side, step)
    assert (side, side) in sizes
    assert {(width, height) for height, width in sizes} == {*sizes}
    for height, width in sizes:
        assert height % step == width % step == 0
        assert 1 / MOST <= height / width <= MOST
        assert side * side - step * min(height, width) < height * width <= side * side


def test_a_picture_takes_the_size_that_leaves_most_of_it() -> None:
    """By the definition: the largest share of its pixels that any of the sizes can have, or as much."""
    sizes, random = list_sizes(64, 8), np.random.default_rng(0)
    for _ in range(200):
        width, height = (int(side) for side in random.integers(64, 400, 2))
        shares = [min(width / wide, height / high) ** 2 * wide * high / (width * height) for high, wide in sizes]
        assert shares[nearest(sizes, width, height)] == pytest.approx(max(shares))


def test_an_epoch_has_every_image_in_batches_of_one_size_and_another_order_each_time() -> None:
    sizes, batch = list_sizes(64, 8), 4
    of_image = np.random.default_rng(0).integers(0, len(sizes), 50)
    buckets, indices = Buckets(sizes, of_image, batch), np.arange(3, 50)
    orders = [buckets.arrange(random_generator(0, 0, epoch), indices) for epoch in range(3)]
    counts = np.bincount(of_image[indices])
    for order in orders:
        assert len(order) == buckets.length(indices) == sum(-(-count // batch) * batch for count in counts)
        assert {*order} == {*indices}
        assert all(len({of_image[i] for i in row}) == 1 for row in order.reshape(-1, batch))
        visits = Counter(order.tolist())
        for number, count in enumerate(counts):  # whole batches: none more often than once more than another
            times = [visits[i] for i in indices if of_image[i] == number]
            assert not count or max(times) - min(times) <= 1
    assert len({tuple(order) for order in orders}) == 3
    assert np.array_equal(orders[1], buckets.arrange(random_generator(0, 0, 1), indices))


def test_images_are_cut_to_the_size_of_their_proportions_upright(config: Path) -> None:
    samples, held_out = prepare_samples(load_config(config), Accelerator(cpu=True), None)
    assert isinstance(samples, IndexedSamples)
    wanted = {(16, 16): (16, 16), (24, 12): (20, 12), (12, 24): (12, 20), (40, 30): (20, 12), (16, 40): (12, 20)}
    sizes = list_sizes(16, 4)
    assert {*wanted.values()} <= {*sizes}
    assert samples.buckets is not None
    for index in range(13):
        shape = SHAPES[index % 5] if index != 6 else SHAPES[2]
        chosen = samples.buckets.size_of(index)
        assert chosen == sizes[nearest(sizes, shape[1], shape[0])]
        assert samples.images.image(index).shape == (3, *chosen)
        if shape != (40, 30):
            assert chosen == wanted[shape]
    assert held_out is not None
    assert len(held_out.indices) == 2
    assert all(held_out[i]["image"].shape == (3, 16, 16) for i in range(2))


@pytest.mark.parametrize(("rank", "workers"), [(0, 0), (1, 2)])
def test_every_batch_of_every_rank_has_one_size(rank: int, workers: int, config: Path) -> None:
    samples, _ = prepare_samples(load_config(config), Accelerator(cpu=True), None)
    assert isinstance(samples, IndexedSamples)
    order = StepBatches(0, 12, 2, 2, rank, 2)
    shapes = {
        tuple(batch["image"].shape): batch["noise"].shape
        for batch in samples.loader(order, num_workers=workers, pin_memory=False)
    }
    assert len(shapes) >= 3
    assert all(noise == shape and shape[0] == 2 for shape, noise in shapes.items())


def test_a_bucketed_run_says_its_sizes_and_resumes_exactly(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["--config", str(config), "--output"]
    assert main([*line, str(tmp_path / "whole")]) == 0
    said = capsys.readouterr().out
    assert "3 sizes, each batch of one: 20×12 (" in said
    assert "resized to cover the size of its proportions, and that cut out in the middle" in said
    shutil.copytree(tmp_path / "whole", tmp_path / "broken")
    shutil.rmtree(tmp_path / "broken" / "checkpoints" / "step-000006")
    assert main([*line, str(tmp_path / "broken"), "--resume", "auto"]) == 0
    assert_equal_bits(tmp_path / "whole", tmp_path / "broken", 6)
    assert [row["epoch"] for row in rows(tmp_path / "whole")] == [row["epoch"] for row in rows(tmp_path / "broken")]
    assert main([*line, str(tmp_path / "broken"), "--resume", "auto", "data.buckets=2", "train.steps=7"]) == 2
    assert "data.buckets was 4 and is 2" in capsys.readouterr().err


def test_an_image_that_has_become_another_is_said(config: Path, pictures: Path, tmp_path: Path) -> None:
    shutil.copytree(pictures, tmp_path / "pictures")
    keys = load_config(config, [f"data.path={tmp_path / 'pictures'}"])
    samples, _ = prepare_samples(keys, Accelerator(cpu=True), None)
    assert isinstance(samples, IndexedSamples)
    for file in (tmp_path / "pictures").iterdir():
        Image.new("RGB", (16, 16)).save(file)
    with pytest.raises(DataError, match="it has other proportions than when the run began"):
        deque((samples[counter] for counter in range(samples.epoch_length)), maxlen=0)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["data.image_size=[16,12]"], "image_size has to be one number, a multiple of buckets"),
        (["data.image_size=18"], "image_size has to be one number, a multiple of buckets"),
        (["data.buckets=16"], "several times as large"),
        (["data.buckets=-4"], "data.buckets is -4"),
        (["data.buckets=4", "model.channels=8,16,16,16"], "set it to a multiple of 8"),
        (["data.name=digits", "data.path=null"], "data.buckets is 4, but data.name digits takes none"),
    ],
)
def test_buckets_that_make_no_sense_are_refused(keys: list[str], message: str, config: Path) -> None:
    with pytest.raises(ValueError, match=message):
        load_config(config, keys)


def test_images_that_are_too_small_for_their_size_are_told_a_size_that_all_have(
    config: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    line = ["--config", str(config), "--dry-run", "--output", str(tmp_path / "run")]
    assert main([*line, "data.image_size=32"]) == 2
    error = capsys.readouterr().err
    assert "data.enlarge=true" in error
    size = int(error.partition("set data.image_size=")[2].partition(",")[0])
    assert main([*line, f"data.image_size={size}"]) == 0
    assert main([*line, f"data.image_size={size + 4}"]) == 2
