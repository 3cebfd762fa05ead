"""Hugging Face data sets: what is read, what is refused."""

from pathlib import Path

import pytest
from PIL import Image

from training.hugging_face import HuggingFaceImages
from training.pixels import Framing


def test_a_hugging_face_data_set_on_disk_is_read(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    pictures = [Image.new("RGB", (16, 16), (shade, 0, 0)) for shade in (0, 255, 128)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
    data = datasets.Dataset.from_dict({"image": pictures, "label": [1, 0, 1]}, features=features)
    data.save_to_disk(str(tmp_path / "set"))
    images = HuggingFaceImages(str(tmp_path / "set"), Framing(8, 3), "image", "label")
    assert images.class_names == ["cat", "dog"]
    assert [images.label(i) for i in range(3)] == [1, 0, 1]
    assert images.image(1)[0].min() == 1
    assert list(images.usable()) == [0, 1, 2]
    with pytest.raises(ValueError, match=r"data\.image_column 'picture' is not in .*its columns: \['image', 'label'\]"):
        HuggingFaceImages(str(tmp_path / "set"), Framing(8, 3), "picture", "label")
    assert HuggingFaceImages(str(tmp_path / "set"), Framing(8, 3), "image", "kind").class_names is None


@pytest.mark.parametrize("labels", [["a", "b"], [0, -1], [0, None]])
def test_labels_that_are_no_class_numbers_are_refused(labels: list, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_dict({"image": [Image.new("RGB", (8, 8))] * 2, "label": labels})
    data.save_to_disk(str(tmp_path / "set"))
    with pytest.raises(ValueError, match=r"data\.label_column holds .*, but classes are numbers from 0 on"):
        HuggingFaceImages(str(tmp_path / "set"), Framing(8, 3), "image", "label")


def test_splits_and_plain_folders_are_refused_as_data_sets(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_dict({"image": [Image.new("RGB", (8, 8))]})
    datasets.DatasetDict({"train": data}).save_to_disk(str(tmp_path / "both"))
    with pytest.raises(ValueError, match=r"holds several splits: give one, for example .*both/train"):
        HuggingFaceImages(str(tmp_path / "both"), Framing(8, 3), "image", "label")
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.png").touch()
    message = (
        r"should be a folder that save_to_disk wrote, .*found 1 with \.png \(for plain image files: data\.name=folder"
    )
    with pytest.raises(ValueError, match=message):
        HuggingFaceImages(str(tmp_path / "pictures"), Framing(8, 3), "image", "label")
