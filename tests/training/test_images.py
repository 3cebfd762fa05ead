"""Folders of files and Hugging Face data sets: what is read, what is skipped, what is refused."""

import logging
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from training.images import Digits, HuggingFaceImages, ImageFolder, to_array


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
    images = ImageFolder(str(tmp_path), 8, 3)
    assert images.class_names == ["cat", "dog"]
    assert [images.label(i) for i in range(len(images))] == [0, 0, 1]
    assert images.image(2).shape == (3, 8, 8)
    assert images.image(2).dtype == np.float32
    assert images.image(2).max() == -1  # black


def test_a_flat_folder_has_no_classes(tmp_path: Path) -> None:
    write_image(tmp_path / "1.png")
    images = ImageFolder(str(tmp_path), 16, 1)
    assert images.class_names is None
    assert images.label(0) == -1
    assert images.image(0).shape == (1, 16, 16)


def test_a_larger_image_is_resized_and_cropped_to_its_centre() -> None:
    pixels = np.zeros((20, 40, 3), dtype=np.uint8)
    pixels[:, 10:30] = 255  # the central square is white
    array = to_array(Image.fromarray(pixels), 10, 3)
    assert array.shape == (3, 10, 10)
    assert array[:, :, 1:-1].min() > 0.99


def test_an_image_of_the_right_size_is_untouched() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    assert np.array_equal(((to_array(Image.fromarray(pixels), 8, 3) + 1) * 127.5).round(), pixels.transpose(2, 0, 1))


def test_sixteen_bits_keep_their_shades() -> None:
    ramp = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    array = to_array(Image.fromarray(ramp), 8, 1)
    assert np.abs(array[0] - (ramp / 65535 * 2 - 1)).max() < 0.01


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_what_is_transparent_becomes_white(mode: str) -> None:
    picture = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    picture.paste((0, 0, 0, 255), (0, 0, 4, 8))
    array = to_array(picture.convert(mode), 8, 3)
    assert array[:, :, :4].max() == -1
    assert array[:, :, 4:].min() == 1


@pytest.mark.parametrize("mode", ["I", "F"])
def test_pixels_without_a_known_range_are_refused(mode: str) -> None:
    with pytest.raises(ValueError, match=f"pixels of mode {mode} .* have no known range"):
        to_array(Image.new(mode, (8, 8)), 8, 1)


def test_hidden_folders_are_no_classes(tmp_path: Path) -> None:
    write_image(tmp_path / "cat" / "a.png")
    write_image(tmp_path / ".ipynb_checkpoints" / "a.png")
    assert ImageFolder(str(tmp_path), 16, 3).class_names == ["cat"]


def test_a_broken_image_is_named_and_skipped(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for i in range(120):
        write_image(tmp_path / f"{i:03d}.png")
    broken = tmp_path / "007.png"
    broken.write_bytes(broken.read_bytes()[:40])
    with caplog.at_level(logging.WARNING):
        usable = ImageFolder(str(tmp_path), 16, 3).usable()
    assert list(usable) == [i for i in range(120) if i != 7]
    assert str(broken) in caplog.text


def test_more_than_one_percent_broken_is_an_error(tmp_path: Path) -> None:
    for i in range(50):
        write_image(tmp_path / f"{i:03d}.png")
    (tmp_path / "007.png").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"1 of 50 images cannot be read, more than 1%.*007\.png"):
        ImageFolder(str(tmp_path), 16, 3).usable()


def test_images_smaller_than_asked_for_are_an_error(tmp_path: Path) -> None:
    write_image(tmp_path / "small.png", (16, 9))
    write_image(tmp_path / "wide.png", (32, 16))
    with pytest.raises(
        ValueError, match=r"1 of 2 images are smaller than data\.image_size.*small\.png \(16×9 pixels\)"
    ):
        ImageFolder(str(tmp_path), 16, 3).usable()


def test_an_empty_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no images; files with these endings would be read: \.bmp"):
        ImageFolder(str(tmp_path), 16, 3)


def test_images_beside_class_folders_are_an_error(tmp_path: Path) -> None:
    write_image(tmp_path / "a.png")
    write_image(tmp_path / "cat" / "b.png")
    with pytest.raises(ValueError, match="holds 1 images itself and 1 in subfolders"):
        ImageFolder(str(tmp_path), 16, 3)


def test_a_hugging_face_data_set_on_disk_is_read(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    pictures = [Image.new("RGB", (16, 16), (shade, 0, 0)) for shade in (0, 255, 128)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
    data = datasets.Dataset.from_dict({"image": pictures, "label": [1, 0, 1]}, features=features)
    data.save_to_disk(str(tmp_path / "set"))
    images = HuggingFaceImages(str(tmp_path / "set"), 8, 3, "image", "label")
    assert images.class_names == ["cat", "dog"]
    assert [images.label(i) for i in range(3)] == [1, 0, 1]
    assert images.image(1)[0].min() == 1
    assert list(images.usable()) == [0, 1, 2]
    with pytest.raises(ValueError, match=r"data\.image_column 'picture' is not in .*its columns: \['image', 'label'\]"):
        HuggingFaceImages(str(tmp_path / "set"), 8, 3, "picture", "label")
    assert HuggingFaceImages(str(tmp_path / "set"), 8, 3, "image", "kind").class_names is None


@pytest.mark.parametrize("labels", [["a", "b"], [0, -1], [0, None]])
def test_labels_that_are_no_class_numbers_are_refused(labels: list, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_dict({"image": [Image.new("RGB", (8, 8))] * 2, "label": labels})
    data.save_to_disk(str(tmp_path / "set"))
    with pytest.raises(ValueError, match=r"data\.label_column holds .*, but classes are numbers from 0 on"):
        HuggingFaceImages(str(tmp_path / "set"), 8, 3, "image", "label")


def test_splits_and_plain_folders_are_refused_as_data_sets(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_dict({"image": [Image.new("RGB", (8, 8))]})
    datasets.DatasetDict({"train": data}).save_to_disk(str(tmp_path / "both"))
    with pytest.raises(ValueError, match=r"holds several splits: give one, for example .*both/train"):
        HuggingFaceImages(str(tmp_path / "both"), 8, 3, "image", "label")
    with pytest.raises(ValueError, match="is not a data set that save_to_disk wrote"):
        HuggingFaceImages(str(tmp_path), 8, 3, "image", "label")
