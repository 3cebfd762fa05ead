"""Names of splits: never classes, and never one set."""

import itertools
from pathlib import Path

import pytest
from PIL import Image

from unetgn.training.data.config import DataConfig, open_images
from unetgn.training.data.images import ImageFolder
from unetgn.training.data.pixels import Framing
from unetgn.training.data.splits import SPLITS, splits_among

PATTERNS = ("{}", "{}2017", "{}_images", "images-{}", "cifar10_{}", "{}_64x64", "{} set")
PAIRS = [(one, other) for one, other in itertools.combinations(SPLITS, 2) if SPLITS[one] != SPLITS[other]]


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("change", [str, str.upper, str.capitalize])
def test_two_folders_that_differ_in_the_split_are_splits(change: type, pattern: str) -> None:
    for pair in PAIRS:
        names = [pattern.format(change(word)) for word in pair]
        assert sorted(splits_among([*names, "cat", "LICENSE"]).values()) == sorted(names)


@pytest.mark.parametrize(
    "names",
    [["car", "train", "bus"], ["train station", "test tube"], ["cat", "dog"], ["strain", "contest"], ["train", "trn"],
     ["training shoe", "validation stamp", "test card"], ["valid", "invalid"]],
)  # fmt: skip
def test_classes_that_only_look_like_splits_are_classes(names: list[str], tmp_path: Path) -> None:
    assert splits_among(names) == {}
    write(tmp_path, *names)
    if len(set(names) - set(SPLITS)):
        assert ImageFolder(str(tmp_path), Framing(8, 3)).class_names == sorted(names)


def write(root: Path, *folders: str) -> None:
    for folder in folders:
        (root / folder).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(root / folder / "1.png")


@pytest.mark.parametrize(
    ("folders", "named"),
    [
        (["train/cat", "train/dog", "test/cat", "test/dog"], "test, train"),
        (["train", "val"], "train, val"),
        (["Train", "Validation", "Test"], "Test, Train, Validation"),
        (["train2017/cat", "val2017/cat"], "train2017, val2017"),
        (["train/cat", "train/dog"], "train"),
        (["cat/train", "cat/test", "dog/train", "dog/test"], "test, train"),
    ],
)
def test_folders_of_splits_are_refused_and_the_advice_is_a_path_that_is_taken(
    folders: list[str], named: str, tmp_path: Path
) -> None:
    write(tmp_path, *folders)
    with pytest.raises(ValueError, match=rf"named as the splits of a data set \({named}\)") as refused:
        open_images(DataConfig(name="folder", path=str(tmp_path)), 3)
    if named in ("test, train", "train, val") and "cat/train" in folders:
        return
    path = str(refused.value).split("data.path=")[1].split(";")[0]
    images = open_images(DataConfig(name="folder", path=path), 3)
    assert images.class_names == (["cat", "dog"] if "train/dog" in folders else ["cat"] if "/" in folders[0] else None)
