"""Images that are no squares: data.image_size=[height, width], from the pictures to what is drawn and judged."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from unetgn.pipelines import UNetPipeline
from unetgn.sampling.evaluate import main as evaluate
from unetgn.sampling.page.asked import IN_TURN, Asked
from unetgn.sampling.sample import main as sample
from unetgn.sampling.train_classifier import main as train_classifier
from unetgn.training.config_files import load_config
from unetgn.training.data.config import DataConfig
from unetgn.training.data.pixels import Framing
from unetgn.training.train import main as train

PICTURES = [(40, 30), (30, 40), (64, 64), (97, 31), (31, 97), (24, 16), (16, 24), (33, 32)]  # width, height
SIZES = [(16, 24), (24, 16), (16, 16), (8, 31), (31, 8)]  # height, width


def waves(width: int, height: int) -> Image.Image:
    """Make a smooth picture, each place of which is another colour."""
    y, x = np.mgrid[:height, :width]
    shades = [np.sin(x / 9 + 0.3), np.cos(y / 8), np.sin((x + 2 * y) / 13)]
    return Image.fromarray(np.uint8(np.stack(shades, axis=-1) * 120 + 128))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("picture", PICTURES)
def test_the_middle_is_what_pillow_fits(picture: tuple[int, int], size: tuple[int, int]) -> None:
    whole = waves(*picture)
    framing = Framing(size, 3, enlarge=True)
    found = (framing(whole) + 1) * 127.5
    expected = np.asarray(ImageOps.fit(whole, size[::-1], Image.Resampling.LANCZOS)).transpose(2, 0, 1)
    assert found.shape == framing.shape == (3, *size)
    # The middle begins at a whole pixel here, and at half a one there.
    assert np.abs(found - expected).max() <= 255 * 0.5 * max(picture[0] / size[1], picture[1] / size[0], 1) / 5


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("picture", PICTURES)
def test_a_random_place_is_a_part_of_the_picture_that_just_covers(
    picture: tuple[int, int], size: tuple[int, int]
) -> None:
    width, height = picture
    framing, whole = Framing(size, 3, random_crop=True, crop_scale=1.5, enlarge=True), waves(width, height)
    factor = max(round(size[1] * 1.5) / width, round(size[0] * 1.5) / height)
    wide, high = round(width * factor), round(height * factor)
    resized = np.asarray(whole.resize((wide, high), Image.Resampling.LANCZOS)).transpose(2, 0, 1)
    places = np.lib.stride_tricks.sliding_window_view(resized, size, axis=(1, 2))
    random = np.random.default_rng(0)
    for _ in range(3):
        found = np.round((framing(whole, random) + 1) * 127.5)
        assert (places == found[:, None, None]).all(axis=(0, 3, 4)).any()
    assert min(wide - round(size[1] * 1.5), high - round(size[0] * 1.5)) == 0


@pytest.mark.parametrize("crop_scale", [1.0, 1.25])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("picture", PICTURES)
def test_the_size_that_is_advised_fits(picture: tuple[int, int], size: tuple[int, int], crop_scale: float) -> None:
    wanted = (size[0] * 10, size[1] * 10)  # more than any of the pictures has
    options = {"random_crop": crop_scale != 1, "crop_scale": crop_scale}
    whole = waves(*picture)
    with pytest.raises(ValueError, match="are needed") as refused:
        Framing(wanted, 3, **options)(whole)
    most = refused.value.most
    assert Framing(most, 3, **options)(whole).shape == (3, *most)
    assert abs(most[0] * size[1] - most[1] * size[0]) <= max(size)  # of the same proportions, but for whole pixels


@pytest.mark.parametrize(("size", "says"), [((0, 8), "at least 1"), ((8, -1), "at least 1")], ids=str)
def test_sizes_that_are_none_are_refused(size: tuple[int, int], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        DataConfig(image_size=size)


def test_equal_sides_are_the_square_that_one_number_is() -> None:
    assert DataConfig(image_size=(8, 8)) == DataConfig(image_size=8)
    assert DataConfig(image_size=(8, 12)).size == (8, 12)


SMALL = [
    *("model.channels=[8,16]", "model.depth=1", "model.attention_levels=[]", "model.norm.num_groups=4"),
    *("train.steps=2", "train.batch_size=2", "train.trackers=[]", "train.warmup_steps=0"),
    *("preview.count=2", "preview.steps=2", "data.num_workers=0", "data.random_crop=true", "data.random_flip=true"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with pictures, and a run on them of images 16 high and 24 wide."""
    folder = tmp_path_factory.mktemp("rectangles")
    (folder / "pictures").mkdir()
    for number, size in enumerate([(40, 30), (64, 50), (47, 40), (90, 41), (41, 77), (25, 17)]):
        waves(*size).save(folder / "pictures" / f"{number}.png")
    line = [str(folder / "pictures"), "data.image_size=[16,24]", "--output", str(folder / "run"), *SMALL]
    assert train(line) == 0
    return folder


def test_a_run_remembers_height_and_width_and_draws_them(folder: Path) -> None:
    run = folder / "run"
    config = load_config(run / "config.yaml")
    assert (config.data.image_size, config.model.sample_size) == ((16, 24), (16, 24))
    with Image.open(run / "samples" / "step-000002.png") as grid:
        assert (grid.width, grid.height) == (2 * (24 * (grid.height // 16) + 2), 16 * (grid.height // 16) + 2)
    pipeline = UNetPipeline.from_pretrained(run / "pipeline")
    (picture,) = pipeline(seeds=3, num_inference_steps=2).images
    assert picture.size == (24, 16)
    assert "24×16" in (run / "pipeline" / "README.md").read_text()
    assert "the middle" not in json.dumps(json.loads((run / "data.json").read_text())["treatment"])


def test_such_a_run_is_sampled_judged_and_goes_on(folder: Path, tmp_path: Path) -> None:
    run = folder / "run"
    line = ["--checkpoint", str(run), "--seeds", "0-5", "--scheduler", "ddim", "--steps", "2"]
    assert sample([*line, "--out", str(tmp_path / "same")]) == 0
    assert sample([*line, "--out", str(tmp_path / "other"), "--image-size", "8", "20"]) == 0
    assert sample([*line, "--out", str(tmp_path / "square"), "--image-size", "8", "--strip"]) == 0
    waves(48, 32).save(tmp_path / "begin.png")
    begun = ["--image", str(tmp_path / "begin.png"), "--strength", "0.5"]
    assert sample([*line, "--out", str(tmp_path / "begun"), *begun]) == 0
    sizes = {out: Image.open(tmp_path / out / "000000.png").size for out in ("same", "other", "square", "begun")}
    assert sizes == {"same": (24, 16), "other": (20, 8), "square": (8, 8), "begun": (24, 16)}
    judged = ["--samples", str(tmp_path / "same"), "--real", str(tmp_path / "begun"), "--out", str(tmp_path / "f.json")]
    assert evaluate(judged) == 0
    assert json.loads((tmp_path / "f.json").read_text())["samples"] == 6
    assert evaluate(["--samples", str(tmp_path / "same"), "--config", str(run), "--out", str(tmp_path / "g.json")]) == 0
    keys = [*SMALL, "data.image_size=16,24"]
    again = [str(folder / "pictures"), *keys, "--output", str(run), "--resume", "auto"]
    assert train(again) == 0


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        (["data.image_size=[16,26,3]"], "data.image_size is [16, 26, 3], but it takes a whole number, or a list of 2"),
        (["data.image_size=[32,24]"], "images are smaller than data.image_size"),
        (["data.image_size=[16,24]", "model.sample_size=16"], "set both alike"),
        (["data.name=digits", "data.path=null", "data.image_size=[8,16]"], "the digits are 8 pixels wide"),
    ],
)
def test_what_does_not_fit_is_said_before_the_first_step(
    keys: list[str], says: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["--config", "my_images", f"data.path={folder / 'pictures'}", *SMALL, "--output", str(tmp_path / "run")]
    if "data.name=digits" in keys:
        line = [word for word in line if "data.random_crop" not in word]
    assert train([*line, *keys]) == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("size", "trained", "factor", "expected"),
    [
        (48, (16, 24), 1, (32, 48)),
        (48, (24, 16), 1, (48, 32)),
        (48, (16, 16), 1, (48, 48)),
        (64, (8, 12), 8, (40, 64)),  # latents; 42.7 is no multiple of 8
        (None, (16, 24), 1, (None, None)),  # what it was trained on
    ],
)
def test_the_page_s_size_is_that_of_the_longer_side(
    size: int | None, trained: tuple[int, int], factor: int, expected: tuple[int | None, int | None]
) -> None:
    asked = Asked([0], IN_TURN, None, None, "ddim", 2, 1.0, size)
    assert asked.height_and_width(trained, factor) == expected


def test_a_classifier_of_ours_sees_squares_and_says_so(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train_classifier(["--config", str(folder / "run"), "--out", str(folder / "none.safetensors")]) == 2
    assert "the images are 24×16 pixels, but this classifier sees squares" in capsys.readouterr().err
