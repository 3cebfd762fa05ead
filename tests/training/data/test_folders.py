"""Folders that may be anybody's, at every door that reads one: nothing waits, grows without bound or goes unsaid."""

import logging
import os
import shutil
import socket
import stat
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.training.shards import png, table, write_tar
from unetgn.training.data import folders
from unetgn.training.data.config import DataConfig, open_images
from unetgn.training.data.folders import AGAIN, LISTED, SPECIAL, fold, walk
from unetgn.training.data.images import ImageFolder
from unetgn.training.data.latents import Latents
from unetgn.training.data.looking import look_at_all
from unetgn.training.data.pictures import Facts, open_picture
from unetgn.training.data.pixels import Framing, Room
from unetgn.training.data.shards import open_shards
from unetgn.training.data.splits import check_class_folders
from unetgn.training.data.text import read_files

DOORS = {"folder": "png", "datasets": "parquet", "stream": "tar"}


@pytest.fixture(autouse=True)
def no_pipe_is_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail where a pipe would be waited for, instead of waiting."""
    real_open = os.open

    def watched(path: object, flags: int, *more: object, **keys: object) -> int:
        assert not (os.path.exists(str(path)) and stat.S_ISFIFO(os.stat(str(path)).st_mode)), f"{path} is a pipe"
        return real_open(path, flags, *more, **keys)  # type: ignore[call-overload]

    monkeypatch.setattr(os, "open", watched)


def make_pipe(path: Path) -> None:
    os.mkfifo(path)


def make_socket(path: Path) -> None:
    here = os.getcwd()
    os.chdir(path.parent)  # a socket's name is short
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(path.name)
    os.chdir(here)


def make_link_to_a_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def make_link_to_a_pipe(path: Path) -> None:
    os.mkfifo(path.with_name(f".{path.name}"))
    path.symlink_to(path.with_name(f".{path.name}"))


SPECIALS = [make_pipe, make_socket, make_link_to_a_device, make_link_to_a_pipe]


def write_one(folder: Path, door: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"a.{DOORS[door]}"
    if door == "folder":
        file.write_bytes(png(3))
    elif door == "datasets":
        table([png(3)] * 2, [0, 1]).to_parquet(file)
    else:
        write_tar(file, {"a": {"png": png(3)}})
    return file


def opened(path: Path, door: str) -> dict[str, int]:
    """What was left out at a door."""
    if door == "stream":
        return dict(open_shards(str(path), image_column="image", label_column="label").left_out)
    return dict(open_images(DataConfig(name=door, path=str(path)), 3).left_out)  # type: ignore[arg-type]


@pytest.mark.parametrize("make", SPECIALS)
@pytest.mark.parametrize("door", DOORS)
def test_what_is_no_file_is_counted_and_never_opened(
    door: str, make: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    write_one(tmp_path / "set", door)
    make(tmp_path / "set" / f"b.{DOORS[door]}")
    assert opened(tmp_path / "set", door) == {SPECIAL: 1}
    with pytest.raises(ValueError, match=r"data\.path"):
        opened(tmp_path / "set" / f"b.{DOORS[door]}", door)


@pytest.mark.parametrize("make", SPECIALS)
def test_a_special_file_in_the_place_of_one_that_was_there_is_an_error(
    make: Callable[[Path], None], tmp_path: Path
) -> None:
    make(tmp_path / "a.png")
    with pytest.raises(OSError, match="is no ordinary file"):
        open_picture(tmp_path / "a.png")
    make_pipe(tmp_path / "latents-00000.safetensors")
    (tmp_path / "latents.json").write_text("{}")
    images = Latents.__new__(Latents)
    images.folder, images._shards = tmp_path, {}
    with pytest.raises(ValueError, match="is no ordinary file"):
        images._read("latents-00000.safetensors", "label", 0)
    make(tmp_path / "a.txt")
    with pytest.raises(ValueError, match="1 of 1 images have no caption"):
        read_files([tmp_path / "a.txt"])


@pytest.mark.parametrize("door", ["datasets", "stream"])
@pytest.mark.parametrize("name", ["data-00000-of-00001.arrow", "dataset_info.json"])
def test_a_saved_data_set_with_a_pipe_in_it_is_refused(name: str, door: str, tmp_path: Path) -> None:
    table([png(3)] * 2, [0, 1]).save_to_disk(tmp_path / "set")
    (tmp_path / "set" / name).unlink()
    make_pipe(tmp_path / "set" / name)
    with pytest.raises(ValueError, match=f"speaks of {name}, which cannot be read: .* is no ordinary file"):
        opened(tmp_path / "set", door)


def test_twelve_hundred_nested_folders_are_walked(tmp_path: Path) -> None:
    deepest, here = tmp_path / "set", os.getcwd()
    deepest.mkdir()
    os.chdir(deepest)
    for _ in range(1200):
        os.mkdir("d")
        os.chdir("d")
    Path("b.png").write_bytes(png(4))
    os.chdir(here)
    try:
        images = ImageFolder(str(deepest), Framing(8, 3))
        assert [len(file.parts) for file in images.files] == [1201]
        assert [entry.name for entry in walk(deepest, Counter())] == ["b.png"]
    finally:
        flatten(deepest, tmp_path / "one")


def flatten(folder: Path, aside: Path) -> None:
    """Delete folders in each other one by one: pytest would, by a recursion as deep as they are."""
    while (folder / "d").exists():
        (folder / "d").rename(aside)
        (aside / "b.png").unlink(missing_ok=True)
        if (aside / "d").exists():
            (aside / "d").rename(folder / "d")
        aside.rmdir()


def test_links_upon_links_end_in_an_error_and_not_in_a_million_folders(tmp_path: Path) -> None:
    for level in range(30):
        (tmp_path / f"{level}").mkdir()
    for level in range(29):
        for name in ("a", "b"):
            (tmp_path / f"{level}" / name).symlink_to(tmp_path / f"{level + 1}")
    write_one(tmp_path / "29", "folder")
    with pytest.raises(ValueError, match=f"lead to the same folders more than {AGAIN} times"):
        list(walk(tmp_path / "0", Counter()))


@pytest.mark.parametrize("target", ["self", "parent", "other"])
def test_links_in_circles_and_to_nothing_are_one_line_with_a_count(target: str, tmp_path: Path) -> None:
    write_one(tmp_path, "folder")
    for number in range(200):
        link = tmp_path / f"{number:03d}"
        link.symlink_to({"self": link, "parent": tmp_path, "other": tmp_path / "nowhere"}[target])
    with pytest.raises(
        ValueError, match=r"to a folder that it is in itself|is a link to nothing: mend .* 199 others"
    ) as error:
        list(walk(tmp_path, Counter()))
    assert len(str(error.value)) < 300


def test_a_folder_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(9):
        (tmp_path / f"{number}").mkdir()
    real = os.scandir

    def refused(path: str) -> object:
        if path == str(tmp_path):
            return real(path)
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(folders.os, "scandir", refused)
    with pytest.raises(ValueError, match=r"\d \(Permission denied\), .* and 6 more cannot be read"):
        list(walk(tmp_path, Counter()))


def test_many_endings_are_counted_together() -> None:
    counts = fold({f".{number}": 1 + (number == 7) for number in range(100_000)})
    assert len(counts) == LISTED + 1
    assert counts[".7"] == 2
    assert counts["99,980 other endings"] == 99_980
    assert fold({".a": 3}) == {".a": 3}


def test_many_empty_files_are_a_line_for_each_kind(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Two hundred empty pictures and some cut short, among enough whole ones."""

    class Numbered:
        def __len__(self) -> int:
            return 30_000

        def name(self, index: int) -> str:
            return f"picture {index}"

        def look(self, index: int) -> Facts:
            if index % 150 == 0:
                raise OSError("cut short") if index % 450 else SyntaxError("empty")
            return Facts((8, 8), colour=False, profile="none")

    with caplog.at_level(logging.WARNING):
        usable, tally = look_at_all(Numbered())
    assert len(usable) == 29_800
    assert tally.broken == 200
    lines = [record.message for record in caplog.records]
    assert len(lines) == 2
    assert "skipping 67 broken images: picture 0 (SyntaxError: empty), picture 450 " in lines[0]
    assert "skipping 133 broken images: picture 150 (OSError: cut short)" in lines[1]
    assert all(len(line) < 300 for line in lines)


def test_the_splits_of_deep_folders_are_looked_for_in_each_folder_once() -> None:
    deep = Path(*["d"] * 1000)
    check_class_folders(Path("root"), [deep / f"{number}" / "a.png" for number in range(1000)])
    with pytest.raises(ValueError, match="train"):
        check_class_folders(Path("root"), [deep / name / "a.png" for name in ("train", "val")])


def test_threads_decode_no_more_pixels_at_a_time_than_there_is_room_for() -> None:
    """Pictures of 1 to 40 pixels in eight threads, room for 20: those above go alone."""
    room, now, seen = Room(20), [0], []
    lock = threading.Lock()

    def decode(pixels: int) -> None:
        with room.take(pixels):
            with lock:
                now[0] += pixels
                seen.append((now[0], pixels))
            threading.Event().wait(0.001)
            with lock:
                now[0] -= pixels

    random = np.random.default_rng(0)
    threads = [threading.Thread(target=decode, args=(int(pixels),)) for pixels in random.integers(1, 41, 200)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(seen) == 200
    assert all(total <= 20 or total == pixels for total, pixels in seen)
    assert any(total > pixels for total, pixels in seen)


@pytest.mark.parametrize("kind", ["zip", "arrow"])
def test_no_more_contents_are_in_memory_than_there_is_room_for(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of pictures that are no files of their own; each is as large as the room, so that they are there one by one."""
    folder, now, most = tmp_path / "images", [0], [0]
    folder.mkdir()
    for number in range(12):
        Image.new("RGB", (8, 8 + number)).save(folder / f"{number:02}.png")
    if kind == "zip":
        config = DataConfig(name="folder", path=shutil.make_archive(str(tmp_path / "packed"), "zip", folder))
    else:
        datasets = pytest.importorskip("datasets")
        table = {"image": [{"bytes": file.read_bytes(), "path": None} for file in sorted(folder.iterdir())]}
        datasets.Dataset.from_dict(table).save_to_disk(str(tmp_path / "set"))
        config = DataConfig(name="datasets", path=str(tmp_path / "set"))
    monkeypatch.setattr("unetgn.training.data.pixels.CONTENTS", Room(60))
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    original, lock = Framing.facts, threading.Lock()

    def facts(framing: Framing, source: Path | bytes) -> Facts:
        assert isinstance(source, bytes)
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
        threading.Event().wait(0.005)
        with lock:
            now[0] -= 1
        return original(framing, source)

    monkeypatch.setattr(Framing, "facts", facts)
    assert len(open_images(config, 3).usable()) == 12
    assert most == [1]


def test_looking_at_pictures_asks_for_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []

    class Watched(Room):
        def take(self, pixels: int):  # type: ignore[no-untyped-def]
            taken.append(pixels)
            return super().take(pixels)

    monkeypatch.setattr("unetgn.training.data.pixels.ROOM", Watched(10))
    for number in range(3):
        Image.new("RGB", (8, 9 + number)).save(tmp_path / f"{number}.png")
    images = open_images(DataConfig(name="folder", path=str(tmp_path)), 3)
    assert len(images.usable()) == 3
    assert sorted(taken) == [72, 80, 88]
    assert Framing(8, 3).read(tmp_path / "0.png").shape == (3, 8, 8)
