"""Digits and folders of files: what is read, what is skipped, what is refused."""

import logging
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from unetgn.training.data.images import Digits, ImageFolder
from unetgn.training.data.pixels import Framing


def write_image(path: Path, size: tuple[int, int] = (16, 16), shade: int = 128) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (shade, shade, shade)).save(path)


def test_digits_are_the_data_set_scaled_to_minus_one_to_one() -> None:
    from sklearn.datasets import load_digits

    digits, source = Digits(), load_digits()
    assert len(digits) == 1797
    assert np.array_equal((digits.image(7)[0] + 1) * 8, source.images[7])
    assert digits.label(7) == source.target[7]


def test_classes_are_the_subfolders_in_alphabetic_order(tmp_path: Path) -> None:
    write_image(tmp_path / "dog" / "1.png", shade=0)
    write_image(tmp_path / "cat" / "b.jpg", shade=255)
    write_image(tmp_path / "cat" / "deep" / "a.webp")
    (tmp_path / "cat" / "notes.txt").write_text("not an image")
    images = ImageFolder(str(tmp_path), Framing(8, 3))
    assert images.class_names == ["cat", "dog"]
    assert [images.label(i) for i in range(len(images))] == [0, 0, 1]
    assert images.image(2).shape == (3, 8, 8)
    assert images.image(2).dtype == np.float32
    assert images.image(2).max() == -1  # black


def test_a_flat_folder_has_no_classes(tmp_path: Path) -> None:
    write_image(tmp_path / "1.png")
    images = ImageFolder(str(tmp_path), Framing(16, 1))
    assert images.class_names is None
    assert images.label(0) == -1
    assert images.image(0).shape == (1, 16, 16)


def test_hidden_folders_are_no_classes(tmp_path: Path) -> None:
    write_image(tmp_path / "cat" / "a.png")
    write_image(tmp_path / ".ipynb_checkpoints" / "a.png")
    assert ImageFolder(str(tmp_path), Framing(16, 3)).class_names == ["cat"]


def test_a_broken_image_is_named_and_skipped(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for i in range(120):
        write_image(tmp_path / f"{i:03d}.png")
    broken = tmp_path / "007.png"
    broken.write_bytes(broken.read_bytes()[:40])
    with caplog.at_level(logging.WARNING):
        usable = ImageFolder(str(tmp_path), Framing(16, 3)).usable()
    assert list(usable) == [i for i in range(120) if i != 7]
    assert str(broken) in caplog.text


def test_more_than_one_percent_broken_is_an_error(tmp_path: Path) -> None:
    for i in range(50):
        write_image(tmp_path / f"{i:03d}.png")
    (tmp_path / "007.png").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"1 of 50 images cannot be read, more than 1%.*007\.png"):
        ImageFolder(str(tmp_path), Framing(16, 3)).usable()


def test_images_smaller_than_asked_for_are_an_error(tmp_path: Path) -> None:
    write_image(tmp_path / "small.png", (16, 9))
    write_image(tmp_path / "wide.png", (32, 16))
    with pytest.raises(
        ValueError,
        match=r"1 of 2 images are smaller than data\.image_size × data\.crop_scale.*small\.png \(16×9 pixels, where",
    ):
        ImageFolder(str(tmp_path), Framing(16, 3)).usable()


def test_an_empty_folder_is_an_error(tmp_path: Path) -> None:
    message = r"holds no images; files with these endings would be read: \.apng, .*; found nothing"
    with pytest.raises(ValueError, match=message):
        ImageFolder(str(tmp_path), Framing(16, 3))


def test_images_beside_class_folders_are_an_error(tmp_path: Path) -> None:
    write_image(tmp_path / "a.png")
    write_image(tmp_path / "cat" / "b.png")
    with pytest.raises(ValueError, match="holds 1 images itself and 1 in subfolders"):
        ImageFolder(str(tmp_path), Framing(16, 3))


def test_links_to_class_folders_and_files_are_followed(tmp_path: Path) -> None:
    write_image(tmp_path / "elsewhere" / "a.png", shade=255)
    write_image(tmp_path / "set" / "dog" / "b.png", shade=0)
    (tmp_path / "set" / "cat").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "set" / "dog" / "c.png").symlink_to(tmp_path / "elsewhere" / "a.png")
    images = ImageFolder(str(tmp_path / "set"), Framing(8, 3))
    assert images.class_names == ["cat", "dog"]
    assert [str(file) for file in images.files] == ["cat/a.png", "dog/b.png", "dog/c.png"]
    assert [images.image(i).max() for i in range(3)] == [1, -1, 1]


def test_a_link_in_a_circle_or_to_nothing_is_named(tmp_path: Path) -> None:
    write_image(tmp_path / "cat" / "a.png")
    link = tmp_path / "cat" / "again"
    link.symlink_to(tmp_path)
    with pytest.raises(ValueError, match=rf"{link} is a link to a folder that it is in itself: remove it"):
        ImageFolder(str(tmp_path), Framing(8, 3))
    link.unlink()
    link.symlink_to(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=rf"{link} is a link to nothing: mend or remove it"):
        ImageFolder(str(tmp_path), Framing(8, 3))


def write_noise(folder: Path, seed: int) -> Path:
    random = np.random.default_rng(seed)
    folder.mkdir()
    for number in range(3):
        Image.fromarray(random.integers(0, 256, (16, 16 + number, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    return folder


def test_the_fingerprint_of_a_folder_is_of_its_files_wherever_they_are(tmp_path: Path) -> None:
    """Others are as many, without classes."""

    def fingerprint(folder: Path) -> str:
        return ImageFolder(str(folder), Framing(8, 3)).fingerprint()

    first = fingerprint(write_noise(tmp_path / "one", seed=0))
    moved = (tmp_path / "one").rename(tmp_path / "moved")
    assert fingerprint(moved) == first
    assert fingerprint(write_noise(tmp_path / "two", seed=1)) != first
    (moved / "2.png").rename(moved / "a.png")
    assert fingerprint(moved) != first
    (moved / "a.png").rename(moved / "2.png")
    write_image(moved / "1.png")
    assert fingerprint(moved) != first
