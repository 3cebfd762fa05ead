"""Hugging Face data sets: what is read, what is refused."""

import logging
from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.training.shards import CLASSES, png, shades, write_shards
from training.data.hugging_face import HuggingFaceImages
from training.data.pixels import Framing


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


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache of `datasets`, for this test alone."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "cache"


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_files_of_a_folder_or_a_glob_are_read_by_number(kind: str, tmp_path: Path, cache: Path) -> None:
    write_shards(tmp_path / "set", kind)
    for path in (str(tmp_path / "set" / f"*.{kind}"), str(tmp_path / "set" / f"train-0002.{kind}")):
        images = HuggingFaceImages(path, Framing(8, 3), "image", "label")
        assert images.class_names == CLASSES
        first = 0 if "*" in path else 12
        assert len(images) == (24 if "*" in path else 6)
        assert [images.label(i) for i in range(len(images))] == [(first + i) % 3 for i in range(len(images))]
        assert shades(torch.stack([torch.from_numpy(images.image(i)) for i in (5, 0)])) == [first + 5, first]
    assert cache.is_dir()


def test_other_columns_and_plain_bytes_do_no_harm(tmp_path: Path, cache: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    file = tmp_path / "a.parquet"
    columns = {"picture": [png(3), png(4)], "kind": [1, 0], "image": ["a.png", "b.png"]}
    pyarrow.parquet.write_table(pyarrow.table(columns), file)
    images = HuggingFaceImages(str(file), Framing(8, 3), "picture", "kind")
    assert images.class_names == ["0", "1"]
    assert shades(torch.from_numpy(images.image(1))[None]) == [4]
    with pytest.raises(ValueError, match=r"data\.image_column 'image' of .* holds no images but Value\('string'\)"):
        HuggingFaceImages(str(file), Framing(8, 3), "image", "kind")


def test_a_broken_row_is_named_and_skipped(tmp_path: Path, cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write_shards(tmp_path / "set", "parquet", count=120, broken=(77,))
    with caplog.at_level(logging.WARNING):
        usable = HuggingFaceImages(path, Framing(8, 3), "image", "label").usable()
    assert list(usable) == [i for i in range(120) if i != 77]
    assert f"skipping a broken image: {path} row 77" in caplog.text


def test_tar_shards_by_number_are_refused_with_the_way_to_read_them(tmp_path: Path) -> None:
    path = write_shards(tmp_path, "tar")
    with pytest.raises(ValueError, match=r"tar shards, which are read in sequence only: set data\.name=stream"):
        HuggingFaceImages(path, Framing(8, 3), "image", "label")


def test_files_that_are_not_what_their_ending_says_are_refused(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"nothing of the kind" * 9)
    with pytest.raises(ValueError, match=r"cannot be read as parquet files: ArrowInvalid: .*magic bytes"):
        HuggingFaceImages(str(tmp_path), Framing(8, 3), "image", "label")
