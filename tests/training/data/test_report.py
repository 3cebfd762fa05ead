"""What the start says of the images, and what the run keeps of it."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.training.shards import png, table, write_tar
from unetgn.training.data.report import DATA, read_class_names
from unetgn.training.train import main

TINY = """
model: {in_channels: 3, out_channels: 3, channels: [8, 16], depth: 1, attention_levels: [], num_classes: 2,
        norm: {num_groups: 4}}
data: {name: folder, image_size: 8, held_out: 0.1, random_flip: true}
train: {steps: 1, batch_size: 2, trackers: []}
preview: {every: 0}
"""


def start(tmp_path: Path, *keys: str) -> int:
    (tmp_path / "tiny.yaml").write_text(TINY)
    return main(["--config", str(tmp_path / "tiny.yaml"), "--output", str(tmp_path / "run"), *keys])


def write(folder: Path) -> Path:
    """Twenty images: eight of cats, of these two grey, twelve of dogs; two files beside them."""
    for number in range(20):
        file = folder / ("cat" if number < 8 else "dog") / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        mode = "L" if number < 2 else "RGB"
        Image.new(mode, (8 + number, 9), 9 if mode == "L" else (200, 0, 0)).save(file)
    (folder / "cat" / "notes.txt").touch()
    (folder / "licence.svg").touch()
    return folder


def test_the_start_says_one_paragraph_and_the_run_keeps_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "pictures")
    assert start(tmp_path, f"data.path={path}") == 0
    said = capsys.readouterr().out
    (line,) = [line for line in said.splitlines() if str(path) in line]
    for part in ("20 images", "8×9 to 27×9 pixels", "18 in colour and 2 grey",
                 "2 files left out by ending (1 with .svg, 1 with .txt)", "2 classes: cat, dog",
                 "2 held out, 18 to train on", "turned upright",
                 "the middle 8×8 cut out", "mirrored"):  # fmt: skip
        assert part in line
    kept = json.loads((tmp_path / "run" / DATA).read_text())
    assert kept["images"] == 20
    assert kept["class_names"] == ["cat", "dog"] == read_class_names(tmp_path / "run")
    assert sum(kept["class_counts"]) == kept["trained_on"] == 18
    assert kept["held_out"] == 2
    assert kept["left_out"] == {".svg": 1, ".txt": 1}
    assert (kept["smallest"], kept["largest"], kept["colour"], kept["grey"]) == ([8, 9], [27, 9], 18, 2)
    assert kept["treatment"]


def test_classes_that_are_not_read_and_those_that_are_many_are_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(40):
        file = tmp_path / "pictures" / f"class{number:02d}" / "a.png"
        file.parent.mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(file)
    assert start(tmp_path, "--dry-run", f"data.path={tmp_path / 'pictures'}", "model.num_classes=null") == 0
    said = capsys.readouterr().out
    assert "40 classes, which this network does not read: class00, class01, " in said
    assert ", …, class39" in said
    assert "class20" not in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        (["data.random_crop=true", "data.crop_scale=1"], "shorter side resized to 8, 8×8 cut at random"),
        (["data.random_flip=false"], "the middle 8×8 cut out, scaled to [-1, 1] in 3 channels."),
        (["data.to_grey=true", "model.in_channels=1", "model.out_channels=1"], "colours to grey"),
        (["data.held_out=0"], "0 held out, 20 to train on"),
    ],
)
def test_the_paragraph_follows_the_keys(
    keys: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert start(tmp_path, "--dry-run", f"data.path={write(tmp_path / 'pictures')}", *keys) == 0
    assert says in capsys.readouterr().out


def test_a_stream_says_what_it_has_looked_at(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "set").mkdir()
    write_tar(tmp_path / "set" / "0.tar", {f"{i}": {"png": png(i), "cls": b"cat" if i else b"dog"} for i in range(9)})
    (tmp_path / "set" / "README.md").touch()
    keys = ["data.name=stream", f"data.path={tmp_path / 'set'}", "data.held_out=0", "data.class_names=[dog,cat]"]
    assert start(tmp_path, *keys) == 0
    said = capsys.readouterr().out
    assert "12×10 pixels, 9 grey, of the first 9" in said
    assert "1 files left out by ending (1 with .md)" in said
    assert read_class_names(tmp_path / "run") == ["dog", "cat"]


def test_texts_as_labels_are_the_names_of_classes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    images = [{"bytes": png(i), "path": None} for i in range(10)]
    labels = ["sea lion" if i % 2 else "10" for i in range(10)]
    data = datasets.Dataset.from_dict({"image": images, "label": labels}).cast_column("image", datasets.Image())
    data.save_to_disk(tmp_path / "set")
    assert start(tmp_path, "data.name=datasets", f"data.path={tmp_path / 'set'}") == 0
    assert "2 classes: sea lion, 10" in capsys.readouterr().out
    assert read_class_names(tmp_path / "run") == ["sea lion", "10"]


def test_a_row_without_an_image_is_left_out_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """One of 120; three are more than 1 %, and the remedy is to remove the rows."""
    datasets = pytest.importorskip("datasets")
    for empty, code in (((5,), 0), ((5, 6, 7), 2)):
        images = [None if i in empty else {"bytes": png(i), "path": None} for i in range(120)]
        data = datasets.Dataset.from_dict({"image": images, "label": [i % 2 for i in range(120)]})
        path = tmp_path / f"set{len(empty)}"
        data.cast_column("image", datasets.Image()).save_to_disk(path)
        for name in ("datasets", "stream"):
            caplog.clear()
            keys = [f"data.name={name}", f"data.path={path}", "data.held_out=0"]
            assert start(tmp_path, "--dry-run", *keys) == code
            assert "no image: its 'image' is empty; remove the row" in caplog.text + capsys.readouterr().err


def test_a_row_without_a_label_is_an_error_of_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = table([png(i) for i in range(20)], [None if i == 7 else i % 2 for i in range(20)], ["a", "b"])
    data.save_to_disk(tmp_path / "set")
    for name, says in (("datasets", "row 7 has no class number, "), ("stream", "row 8 of ")):
        assert (
            start(tmp_path, "--dry-run", f"data.name={name}", f"data.path={tmp_path / 'set'}", "data.held_out=0") == 2
        )
        said = capsys.readouterr().err
        assert says in said
        assert "remove the row, or give it one" in said
        assert "num_classes=null" not in said


@pytest.mark.parametrize("contents", ["", "{", "[]", '{"class_names": 3}', '{"class_names": [1]}', "{}", "null"])
def test_a_damaged_or_missing_file_has_no_names(contents: str, tmp_path: Path) -> None:
    (tmp_path / DATA).write_text(contents)
    assert read_class_names(tmp_path) is None
    assert read_class_names(tmp_path / "nowhere") is None


def test_the_digits_say_what_they_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--config", "digits8_ddpm", "--dry-run", "--output", str(tmp_path / "run")]) == 0
    said = capsys.readouterr().out
    assert "1,797 images from scikit-learn (data.name=digits) (8×8 pixels, 1,797 grey)" in said
    assert "180 held out, 1,617 to train on" in said
    assert np.char.isdecimal([name.strip() for name in said.split("10 classes: ")[1].split(";")[0].split(",")]).all()
