"""From pictures to arrays: sizes, colours, crops."""

import io

import numpy as np
import pytest
from PIL import Image, ImageOps

from unetgn.training.data.pixels import Framing, TooSmall


def test_a_larger_image_is_resized_and_cropped_to_its_centre() -> None:
    pixels = np.zeros((20, 40, 3), dtype=np.uint8)
    pixels[:, 10:30] = 255  # the central square is white
    array = Framing(10, 3)(Image.fromarray(pixels))
    assert array.shape == (3, 10, 10)
    assert array[:, :, 1:-1].min() > 0.99


def test_an_image_of_the_right_size_is_untouched() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    assert np.array_equal(((Framing(8, 3)(Image.fromarray(pixels)) + 1) * 127.5).round(), pixels.transpose(2, 0, 1))


def test_sixteen_bits_keep_their_shades() -> None:
    ramp = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    array = Framing(8, 1)(Image.fromarray(ramp))
    assert np.abs(array[0] - (ramp / 65535 * 2 - 1)).max() < 0.01


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_what_is_transparent_becomes_white(mode: str) -> None:
    picture = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    picture.paste((0, 0, 0, 255), (0, 0, 4, 8))
    array = Framing(8, 3)(picture.convert(mode))
    assert array[:, :, :4].max() == -1
    assert array[:, :, 4:].min() == 1


@pytest.mark.parametrize("mode", ["I", "F"])
def test_pixels_without_a_known_range_are_refused(mode: str) -> None:
    with pytest.raises(ValueError, match=f"pixels of mode {mode} .* have no known range"):
        Framing(8, 1)(Image.new(mode, (8, 8)))


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def to_bytes(array: np.ndarray) -> np.ndarray:
    return ((array + 1) * 127.5).round().astype(np.uint8).transpose(1, 2, 0)


def test_a_random_crop_at_scale_one_takes_whole_pixels_and_every_place() -> None:
    """A picture as high as the crop: the crop is one of its columns of squares, untouched, and each comes up."""
    source = picture(12, 8)
    pixels, framing = np.asarray(source), Framing(8, 3, random_crop=True)
    lefts = set()
    for seed in range(60):
        crop = to_bytes(framing(source, np.random.default_rng(seed)))
        lefts |= {left for left in range(5) if np.array_equal(crop, pixels[:, left : left + 8])}
    assert lefts == set(range(5))


def test_a_scaled_random_crop_is_a_square_of_the_resized_picture() -> None:
    source, framing = picture(60, 40), Framing(8, 3, random_crop=True, crop_scale=1.5)
    resized = np.asarray(source.resize((18, 12), Image.Resampling.LANCZOS))  # the shorter side is 8 × 1.5
    places = [(top, left) for top in range(5) for left in range(11)]
    for seed in range(20):
        crop = to_bytes(framing(source, np.random.default_rng(seed)))
        assert sum(np.array_equal(crop, resized[top : top + 8, left : left + 8]) for top, left in places) == 1


def test_without_a_generator_a_random_crop_is_the_middle() -> None:
    source = picture(30, 20)
    assert np.array_equal(Framing(8, 3, random_crop=True, crop_scale=1.5)(source), Framing(8, 3)(source))


def test_what_would_have_to_be_enlarged_is_refused() -> None:
    assert Framing(8, 3, random_crop=True, crop_scale=1.5)(picture(12, 12)).shape == (3, 8, 8)
    with pytest.raises(TooSmall, match="12×11 pixels, where 12×12 are needed"):
        Framing(8, 3, random_crop=True, crop_scale=1.5)(picture(12, 11))


def test_a_picture_is_turned_as_its_camera_noted() -> None:
    upright = picture(8, 8)
    turned = upright.transpose(Image.Transpose.ROTATE_90)
    turned.getexif()[0x0112] = 6  # to be seen upright, turn clockwise by a quarter (Exif 2.3, Orientation)
    assert np.array_equal(to_bytes(Framing(8, 3)(turned)), np.asarray(upright))


TURNED = 0x0112  # the orientation, in Exif data


def photograph(width: int, height: int, orientation: int = 1) -> bytes:
    """Make a JPEG with coarse shapes, fine ones, and the noise of a sensor."""
    y, x = np.mgrid[:height, :width]
    shades = [np.sin(x / 90), np.cos(y / 70), np.sin((x + 2 * y) / 11)]
    noise = np.random.default_rng(0).normal(0, 5, (height, width, 1))
    pixels = np.stack(shades, axis=-1) * 100 + 128 + noise
    exif, file = Image.Exif(), io.BytesIO()
    exif[TURNED] = orientation
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=92, exif=exif)
    return file.getvalue()


@pytest.mark.parametrize("random_crop", [False, True])
@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize(
    ("size", "scale"),
    [(16, 8), ((16, 24), 8), (32, 4), (100, 2), (101, 1)],  # 600 pixels are 3 · 16 · 8, but not 3 · 32 · 8
    ids=str,
)
def test_a_large_jpeg_is_decoded_smaller_and_cut_to_the_same(
    size: int | tuple[int, int], scale: int, orientation: int, random_crop: bool
) -> None:
    """As the definition, which decodes all, does, within a few shades, which the filters differ in."""
    encoded = photograph(800, 600, orientation)
    framing = Framing(size, 3, random_crop=random_crop, crop_scale=1.0)
    assert framing.open(encoded).size == tuple(side // scale for side in ((800, 600), (600, 800))[orientation == 6])
    with Image.open(io.BytesIO(encoded)) as opened:
        whole = ImageOps.exif_transpose(opened)
    found, expected = (framing.read(encoded, np.random.default_rng(0)), framing(whole, np.random.default_rng(0)))
    apart = np.abs(found - expected) * 127.5
    assert apart.max() <= (8 if scale > 1 else 0)
    assert apart.mean() <= 0.7


def test_a_jpeg_whose_sides_would_leave_a_rest_and_other_formats_are_decoded_whole() -> None:
    file = io.BytesIO()
    picture(800, 600).save(file, "PNG")
    for encoded, size in ((photograph(801, 603), (801, 603)), (file.getvalue(), (800, 600))):
        assert Framing(16, 3).open(encoded).size == size


def test_a_large_jpeg_that_is_cut_short_is_refused_as_any() -> None:
    encoded = photograph(800, 600)
    with pytest.raises(OSError, match="truncated"):
        Framing(16, 3).open(encoded[: len(encoded) // 2])


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("size", [(40, 60), (60, 40)])
def test_what_a_picture_is_large_enough_for_is_known_of_the_upright_one(
    size: tuple[int, int], orientation: int
) -> None:
    """A picture of a telephone that was held upright lies in its file."""
    encoded, framing = photograph(64, 48, orientation), Framing(size, 3)
    if framing.unfit(framing.facts(encoded)):
        with pytest.raises(TooSmall):
            framing.read(encoded)
    else:
        assert framing.read(encoded).shape == (3, *size)
    assert bool(framing.unfit(framing.facts(encoded))) == ((orientation < 5) == (size == (60, 40)))
