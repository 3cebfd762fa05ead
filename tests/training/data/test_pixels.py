"""From pictures to arrays: sizes, colours, crops."""

import numpy as np
import pytest
from PIL import Image

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
