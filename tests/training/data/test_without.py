"""A run that goes on without some images is, for all others, the run that it was."""

import json
import logging
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.training import runs
from tests.training.data.test_stream import open_stream, read, seen
from tests.training.shards import png, write_shards
from unetgn.training.data.config import DataConfig, open_images, split, split_images
from unetgn.training.data.images import ImageFolder, count_parts, fingerprint_parts, part_of
from unetgn.training.data.pixels import Framing
from unetgn.training.data.samples import IndexedSamples
from unetgn.training.errors import DataError
from unetgn.training.train import main

TINY = """
model: {in_channels: 3, out_channels: 3, channels: [8, 16], depth: 1, attention_levels: [], norm: {num_groups: 4}}
data: {name: folder, image_size: 8, random_flip: true, random_crop: true, held_out: 0.2}
train: {steps: 6, batch_size: 4, log_every: 1, trackers: []}
checkpoint: {every: 2, keep: 9}
preview: {every: 0}
"""


def write_images(folder: Path, count: int = 20) -> Path:
    for number in range(count):
        file = folder / "ab"[number % 2] / f"{number:02d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(png(number))
    return folder


def test_every_sample_but_those_of_the_image_stays_and_these_are_of_the_next(tmp_path: Path) -> None:
    images = ImageFolder(str(write_images(tmp_path)), Framing(8, 3, random_crop=True))
    indices = np.arange(3, 17)
    whole = IndexedSamples(images, indices, 5, random_flip=True)
    for left_out in ([4], [4, 5, 6], [3, 16], list(range(4, 17)), [0, 19]):
        fewer = IndexedSamples(images, indices, 5, random_flip=True, left_out=left_out)
        for epoch in range(3):
            before, now = whole.order(epoch), fewer.order(epoch)
            for place, index in enumerate(before):
                later = [other for other in np.roll(before, -place) if other not in left_out]
                assert now[place] == later[0]
                assert index in left_out or now[place] == index
        for counter in range(30):
            one, other = whole[counter], fewer[counter]
            changed = {"image"} if whole.order(counter // 14)[counter % 14] in left_out else set()
            assert all(torch.equal(one[key], other[key]) for key in one.keys() - changed - {"label"})
        assert str(fewer) == f"{14 - len(set(left_out) & set(range(3, 17)))} images"


def test_an_image_that_is_left_out_changes_no_side_of_the_others(tmp_path: Path) -> None:
    images = ImageFolder(str(write_images(tmp_path)), Framing(8, 3))
    train, held = split(20, 0.2)
    for number in range(20):
        usable = np.setdiff1d(np.arange(20), [number])
        left, other = split_images(images, usable, 0.2)
        assert set(left) == set(train) - {number}
        assert set(other) == set(held) - {number}


def rot(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:40])


def rot_in_place(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[:40] = bytes(40)
    file.write_bytes(bytes(data))


def shrink(file: Path) -> None:
    Image.new("RGB", (2, 2)).save(file)


def swap_for_a_pipe(file: Path) -> None:
    import os

    file.unlink()
    os.mkfifo(file)


ACCIDENTS: list[Callable[[Path], None]] = [Path.unlink, rot, rot_in_place, shrink, swap_for_a_pipe]


@pytest.mark.parametrize(
    "accident",
    # What two others do to a run, gone and there but broken, is what these do.
    [pytest.param(each, marks=pytest.mark.slow if each in (rot_in_place, shrink) else ()) for each in ACCIDENTS],
)
def test_the_advice_about_a_rotten_image_lets_the_run_go_on_as_it_would_have(
    accident: Callable[[Path], None], tmp_path: Path, capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """The image is there for the start, and then no more; the run that ends is the one that never had it."""
    (tmp_path / "tiny.yaml").write_text(TINY)
    path = write_images(tmp_path / "set")
    images = ImageFolder(str(path), Framing(8, 3))
    order = IndexedSamples(images, split(20, 0.2)[0], 0).order(0)
    victim = images.files[int(order[13])]  # of the fourth step
    line = ["--config", str(tmp_path / "tiny.yaml"), f"data.path={path}"]
    never = ["--output", str(tmp_path / "never"), f'data.without=["{victim}"]']
    assert main([*line, *never]) == 0
    calls, real = [], ImageFolder.image

    def spoil(self: ImageFolder, index: int, random: np.random.Generator | None = None) -> np.ndarray:
        calls.append(index)
        if len(calls) == 9:
            accident(path / victim)
        return real(self, index, random)

    broken = ["--output", str(tmp_path / "broken"), "--resume", "auto"]
    with monkeypatch.context() as patch:
        patch.setattr(ImageFolder, "image", spoil)
        capsys.readouterr()
        assert main([*line, *broken]) == 1
    said = capsys.readouterr().err
    assert f"{victim} cannot be read any more: " in said
    advice = re.findall(r"'(data\.without=\[.*?\])'", said)
    assert advice == [f'data.without=["{victim.as_posix()}"]']
    if accident in (rot, rot_in_place):  # the file is there, and more than 1 % are broken
        assert main([*line, *broken]) == 2
        assert re.findall(r"'(data\.without=\[.*?\])'", capsys.readouterr().err) == advice
    assert main([*line, *broken, *advice]) == 0
    assert f"data.without leaves 1 images out: {victim.as_posix()}" in caplog.text
    assert f"- {victim.as_posix()}" in (tmp_path / "broken" / "config.yaml").read_text()
    ends = [[row["loss"] for row in runs.rows(tmp_path / name)] for name in ("never", "broken")]
    assert ends[0] == ends[1]
    runs.assert_equal_bits(tmp_path / "never", tmp_path / "broken", 6)


def test_another_change_beside_the_left_out_image_is_still_another_set(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "tiny.yaml").write_text(TINY)
    path = write_images(tmp_path / "set")
    line = ["--config", str(tmp_path / "tiny.yaml"), f"data.path={path}", "--output", str(tmp_path / "run")]
    assert main([*line, "train.steps=2"]) == 0
    (path / "a" / "04.png").unlink()
    (path / "a" / "06.png").write_bytes(png(200, (40, 40)))
    assert main([*line, "--resume", "auto", 'data.without=["a/04.png"]']) == 2
    assert "was made with other images than are here now" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "message"),
    [("c/no.png", "data.without names c/no.png, which is not in data.path"), ("/a/00.png", "no image file below"),
     ("../00.png", "no image file below"), ("a/00.txt", "no image file below")],
)  # fmt: skip
def test_a_name_that_no_image_has_is_refused_at_the_beginning(
    name: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "tiny.yaml").write_text(TINY)
    line = ["--config", str(tmp_path / "tiny.yaml"), "--output", str(tmp_path / "run")]
    assert main([*line, f"data.path={write_images(tmp_path / 'set')}", f'data.without=["{name}"]']) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("parts", [3, 7, 1000])
def test_of_the_digests_each_is_of_images_that_follow_each_other_or_of_one(
    parts: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("unetgn.training.data.images.PARTS", parts)
    path, whole = write_images(tmp_path), np.arange(20)
    before = fingerprint_parts(ImageFolder(str(path), Framing(8, 3)), whole, [])
    assert len(before) == count_parts(20) <= parts
    (path / "b" / "07.png").write_bytes(b"x")
    after = fingerprint_parts(ImageFolder(str(path), Framing(8, 3)), whole, [13])
    assert [part for part in range(len(before)) if before[part] != after[part]] == [part_of(13, 20)]
    assert {part_of(index, 20) for index in range(20)} == set(range(len(before)))


def test_beside_an_image_that_is_left_out_any_other_that_has_changed_is_noticed(tmp_path: Path) -> None:
    """Of 300 images, whichever it is: no two stand for each other."""
    for number in range(300):
        (tmp_path / f"{number:03d}.png").write_bytes(bytes(10))

    def samples(*without: str) -> IndexedSamples:
        images = ImageFolder(str(tmp_path), Framing(8, 3), without)
        return IndexedSamples(images, np.arange(300), 0, left_out=list(images.without))

    states = json.loads(json.dumps([samples().state(1)]))
    (tmp_path / "100.png").unlink()
    assert samples("100.png").changed(states, {"100.png"}) == []
    for number in {*range(0, 300, 7), 99, 101} - {100}:
        (tmp_path / f"{number:03d}.png").write_bytes(bytes(11))
        assert samples("100.png").changed(states, {"100.png"}) is None
        (tmp_path / f"{number:03d}.png").write_bytes(bytes(10))


def test_rows_of_a_table_are_left_out_by_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    path = write_shards(tmp_path / "set", "parquet", broken=(5,))
    images = open_images(DataConfig(name="datasets", path=path, without=("row 5", "row 7")), 3)
    assert list(images.usable()) == [number for number in range(24) if number not in (5, 7)]
    for name in ("row 24", "5", "row -1", "a.png", "row " + "9" * 40):
        with pytest.raises(ValueError, match="is no row of these, from 'row 0' to 'row 23'"):
            open_images(DataConfig(name="datasets", path=path, without=(name,)), 3)
    with pytest.raises(
        ValueError, match=r"row 5 .*: mend or remove them, or go on without them: 'data\.without=\[\"row 5\"\]'"
    ):
        open_images(DataConfig(name="datasets", path=path), 3).usable()


@pytest.mark.parametrize("kind", ["parquet", "tar"])
def test_a_stream_keeps_the_order_of_all_that_it_does_not_leave_out(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_shards(tmp_path, kind, count=120, broken=(77, 78))
    whole = [*range(120)]
    with pytest.raises(DataError, match=r"go on without them: 'data\.without") as refused:
        read(open_stream(path), batches=60)
    names = re.findall(r'"([^"]+)"', str(refused.value))
    assert len(names) == 2
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        order = seen(read(open_stream(path, without=tuple(names)), batches=39))
        assert "skipping" not in caplog.text
    assert sorted(order[:117]) == sorted(set(order[:117]))
    fixed = write_shards(tmp_path / "fixed", kind, count=120)
    before = [shade for shade in seen(read(open_stream(fixed), batches=40)) if shade not in (77, 78)]
    assert order[:117] == before[:117]
    assert set(order) <= set(whole)
    with pytest.raises(ValueError, match=r"data\.without names row 1 of x\.tar, but data\.path"):
        open_stream(path, without=("row 1 of x.tar",))
