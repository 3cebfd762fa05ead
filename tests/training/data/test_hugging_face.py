"""Hugging Face data sets: what is read, what is refused."""

import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.training.shards import CLASSES, png, shades, table, write_shards
from unetgn.training.data.hugging_face import HuggingFaceImages
from unetgn.training.data.images import check_classes
from unetgn.training.data.pixels import Framing
from unetgn.training.data.samples import IndexedSamples


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


def labelled(folder: Path, labels: list) -> HuggingFaceImages:
    """As many images as labels, whose classes have no names."""
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_dict({"image": [Image.new("RGB", (8, 8))] * len(labels), "label": labels})
    data.save_to_disk(str(folder / "set"))
    return HuggingFaceImages(str(folder / "set"), Framing(8, 3), "image", "label")


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (["a", "b"], "model.num_classes is 3, but the images have 2 classes (a, b): set model.num_classes=2"),
        (
            [0, -1],
            "set row 1 has no class number, but with model.num_classes 3 classes are numbers from 0 to 2: ",
        ),
        ([0, None], "set row 1 has no class number"),
        ([0, 2, 3], "set row 2 has the class 3, but with model.num_classes 3 classes are numbers from 0 to 2: "),
    ],
)
def test_labels_that_are_no_classes_of_the_network_are_refused_where_it_reads_them(
    labels: list, message: str, tmp_path: Path
) -> None:
    images = labelled(tmp_path, labels)
    with pytest.raises(ValueError, match=re.escape(message)):
        check_classes(3, images, np.arange(len(labels)))
    check_classes(None, images, np.arange(len(labels)))
    stream = IndexedSamples(images, np.arange(len(labels)), seed=0)
    assert all(isinstance(stream[i]["label"].item(), int) for i in range(len(labels)))


def test_a_part_of_unnamed_classes_will_do(tmp_path: Path) -> None:
    """A subset without its highest class, and one row of no class that is not trained on."""
    images = labelled(tmp_path, [0, 4, 1, -1])
    assert images.class_names is None
    check_classes(10, images, np.arange(3))


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
    assert [images.label(0), images.label(1)] == [1, 0]
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


def test_a_link_to_a_folder_of_shards_is_followed(tmp_path: Path, cache: Path) -> None:
    write_shards(tmp_path / "elsewhere", "parquet")
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "part").symlink_to(tmp_path / "elsewhere")
    assert len(HuggingFaceImages(str(tmp_path / "set"), Framing(8, 3), "image", "label")) == 24


def fingerprint_elsewhere(path: str) -> str:
    """What another process, with a cache of its own, says."""
    script = "import sys; from unetgn.training.data.hugging_face import *; from unetgn.training.data.pixels import *\n"
    script += "print(HuggingFaceImages(sys.argv[1], Framing(8, 3), 'image', 'label').fingerprint())"
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[3]), "HF_DATASETS_CACHE": f"{path}.cache"}
    return subprocess.run([sys.executable, "-c", script, path], env=environment, capture_output=True, text=True,
                          check=True).stdout.strip()  # fmt: skip


def test_the_fingerprint_of_files_is_the_same_in_every_process_and_place_and_for_no_others(
    tmp_path: Path, cache: Path
) -> None:
    """The others are as many, of the same labels, in files of the same names."""

    def fingerprint(name: str) -> str:
        return HuggingFaceImages(str(tmp_path / name), Framing(8, 3), "image", "label").fingerprint()

    write_shards(tmp_path / "one", "parquet")
    first = fingerprint("one")
    assert fingerprint_elsewhere(str(tmp_path / "one")) == first
    (tmp_path / "one").rename(tmp_path / "moved")
    assert fingerprint("moved") == first
    for number in range(4):
        file = tmp_path / "moved" / f"train-000{number}.parquet"
        assert file.is_file()
        rows = range(6 * number, 6 * number + 6)
        table([png(100 + i) for i in rows], [i % 3 for i in rows]).to_parquet(file)
    assert fingerprint("moved") != first


def test_the_fingerprint_of_a_saved_data_set_is_of_what_it_holds(tmp_path: Path) -> None:
    """Two sets of equal length, labels and file sizes, which differ in one shade."""

    def save(name: str, shade: int) -> str:
        table([png(shade), png(3)], [0, 1]).save_to_disk(tmp_path / name)
        return str(tmp_path / name)

    paths = [save("one", 10), save("other", 11)]
    sizes = [[file.stat().st_size for file in Path(path).glob("*.arrow")] for path in paths]
    assert sizes[0] == sizes[1]
    one, other = (HuggingFaceImages(path, Framing(8, 3), "image", "label").fingerprint() for path in paths)
    assert one != other
    assert fingerprint_elsewhere(paths[0]) == one
