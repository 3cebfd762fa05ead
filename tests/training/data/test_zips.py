"""A zip archive is read as the folder that was packed, and one that may be anybody's does no harm."""

import os
import pickle
import shutil
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.traced import peak_of
from tests.training.runs import assert_equal_bits
from unetgn.training.data.images import ImageFolder
from unetgn.training.data.pixels import Framing
from unetgn.training.data.zips import ZipFolder
from unetgn.training.train import main

TINY = """
model: {in_channels: 3, out_channels: 3, channels: [8, 16], depth: 1, attention_levels: [], norm: {num_groups: 4}}
data: {name: folder, image_size: 8, num_workers: 2, held_out: 0.2}
train: {steps: 3, batch_size: 4, log_every: 1, trackers: []}
preview: {every: 0}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes of pictures, and what is no picture."""
    random = np.random.default_rng(0)
    for number in range(10):
        file = tmp_path / "images" / ("sea", "hills")[number % 2] / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (12, 11, 3), dtype=np.uint8)).save(file)
    (tmp_path / "images" / "sea" / "notes.txt").write_text("where it was")
    (tmp_path / "images" / "sea" / ".hidden.png").write_bytes(b"none")
    return tmp_path / "images"


@pytest.fixture
def archive(folder: Path) -> Path:
    return Path(shutil.make_archive(str(folder.parent / "packed"), "zip", folder))


def test_an_archive_is_the_folder_that_was_packed(folder: Path, archive: Path) -> None:
    packed, plain = ImageFolder(str(archive), Framing(8, 3)), ImageFolder(str(folder), Framing(8, 3))
    assert packed.files == plain.files
    assert packed.class_names == plain.class_names == ["hills", "sea"]
    assert packed.left_out == plain.left_out == {".txt": 1}
    assert list(packed.usable()) == list(plain.usable())
    for index in range(len(plain)):
        assert np.array_equal(packed.image(index), plain.image(index))
        assert packed.label(index) == plain.label(index)
        assert packed.key(index) == plain.key(index)
    assert packed.name(0) == f"hills/1.png in {archive}"
    moved = archive.with_name("moved.zip")
    archive.rename(moved)
    assert ImageFolder(str(moved), Framing(8, 3)).fingerprint() == packed.fingerprint()


def test_another_picture_of_the_same_size_is_another_archive(tmp_path: Path) -> None:
    prints = set()
    for shade in (7, 8):
        with zipfile.ZipFile(tmp_path / f"{shade}.zip", "w") as archive:
            Image.new("RGB", (9, 9), (shade, shade, shade)).save(tmp_path / "a.bmp")
            archive.write(tmp_path / "a.bmp", "a.bmp")
        prints.add(ImageFolder(str(tmp_path / f"{shade}.zip"), Framing(8, 3)).fingerprint())
    assert len(prints) == 2


def test_a_run_on_an_archive_is_the_run_on_its_folder(folder: Path, archive: Path, tmp_path: Path) -> None:
    """With two processes that decode, which were forked with the archive open."""
    (tmp_path / "tiny.yaml").write_text(TINY)
    for name, path in (("one", folder), ("other", archive)):
        line = ["--config", str(tmp_path / "tiny.yaml"), "--output", str(tmp_path / name), f"data.path={path}"]
        assert main(line) == 0
    assert_equal_bits(tmp_path / "one", tmp_path / "other", 3)


def test_an_archive_is_read_in_another_process_with_a_file_of_its_own(archive: Path) -> None:
    images = ImageFolder(str(archive), Framing(8, 3))
    before = images.image(3)
    again = pickle.loads(pickle.dumps(images))
    assert np.array_equal(again.image(3), before)
    child = os.fork()
    if child == 0:
        os._exit(not all(np.array_equal(images.image(3), before) for _ in range(50)))
    assert all(np.array_equal(images.image(3), before) for _ in range(50))
    assert os.waitpid(child, 0)[1] == 0


def test_a_folder_of_macos_and_names_that_lead_out_are_left_out(tmp_path: Path) -> None:
    picture = tmp_path / "a.png"
    Image.new("RGB", (9, 9)).save(picture)
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for name in ("in/a.png", "__MACOSX/in/._a.png", "in/.hidden.png", "../out.png", "in/../../out.png", "/out.png"):
            archive.writestr(zipfile.ZipInfo(name), picture.read_bytes())
    images = ImageFolder(str(tmp_path / "a.zip"), Framing(8, 3))
    assert [str(file) for file in images.files] == ["in/a.png"]


def change(archive: Path, mark: bytes, offset: int, value: bytes) -> None:
    """Change the bytes at `offset` of every header that begins with `mark`."""
    data = bytearray(archive.read_bytes())
    place = data.find(mark)
    while place >= 0:
        data[place + offset : place + offset + len(value)] = value
        place = data.find(mark, place + 1)
    archive.write_bytes(data)


CENTRAL, LOCAL = b"PK\x01\x02", b"PK\x03\x04"  # signatures of headers, APPNOTE.TXT of PKWARE, sections 4.3.12 and 4.3.7
HOSTILE: dict[str, tuple[Callable[[Path], None], str]] = {
    "encrypted": (lambda file: (change(file, CENTRAL, 8, b"\x01\0"), change(file, LOCAL, 6, b"\x01\0"))[0],
                  "it is encrypted: unpack the archive"),
    "a method of its own": (lambda file: change(file, CENTRAL, 10, struct.pack("<H", 97)), "compressed by method 97"),
    "gigabytes": (lambda file: change(file, CENTRAL, 24, struct.pack("<I", 2**31)), "unpacks to 2147483648 bytes"),
    "flipped": (lambda file: change(file, LOCAL, 60, b"\xff\xff\xff\xff"), "Bad CRC-32"),
}  # fmt: skip


@pytest.mark.parametrize("what", HOSTILE)
def test_what_cannot_be_read_is_said_in_a_line(what: str, archive: Path) -> None:
    damage, says = HOSTILE[what]
    damage(archive)
    with pytest.raises(ValueError, match=says) as caught:
        ImageFolder(str(archive), Framing(8, 3)).usable()
    assert len(str(caught.value).splitlines()) == 1


def test_a_picture_that_unpacks_to_more_than_it_says_takes_no_memory(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.png", b"\x89PNG\r\n\x1a\n" + bytes(2**26))
    change(tmp_path / "a.zip", CENTRAL, 24, struct.pack("<I", 1000))

    def look() -> None:
        with pytest.raises(ValueError, match="cannot be read"):
            ImageFolder(str(tmp_path / "a.zip"), Framing(8, 3)).usable()

    assert peak_of(look) < 2**24


@pytest.mark.parametrize("place", range(36, 60, 4))
def test_a_damaged_stream_is_said(place: int, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.png", b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 9)
    data = bytearray((tmp_path / "a.zip").read_bytes())
    data[place : place + 4] = b"\xff\xff\xff\xff"
    (tmp_path / "a.zip").write_bytes(data)
    with pytest.raises(OSError, match="damaged in its archive"):
        ZipFolder(tmp_path / "a.zip").source(Path("a.png"))


@pytest.mark.parametrize("contents", [b"", b"none", b"PK\x05\x06" + bytes(18), b"PK\x03\x04" + bytes(100)])
def test_what_is_no_archive_is_said(contents: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.zip").write_bytes(contents)
    with pytest.raises(ValueError, match=r"cannot be read as a zip archive|holds no images"):
        ImageFolder(str(tmp_path / "a.zip"), Framing(8, 3))


@pytest.mark.parametrize("system", [0, 3])
def test_names_as_some_programs_of_windows_write_them_are_paths(system: int, folder: Path, tmp_path: Path) -> None:
    """PowerShell's Compress-Archive among them; elsewhere such a character is one of a name."""
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for file in sorted(folder.rglob("*.png")):
            info = zipfile.ZipInfo(f"top\\{file.relative_to(folder)}".replace("/", "\\"))
            info.create_system = system
            archive.writestr(info, file.read_bytes())
        for name in ("..\\out.png", "\\out.png", "top\\.hidden.png"):
            info = zipfile.ZipInfo(name)
            info.create_system = system
            archive.writestr(info, b"none")
    packed = ImageFolder(str(tmp_path / "a.zip"), Framing(8, 3))
    if system == 3:
        assert packed.class_names is None
        return
    assert packed.files == [Path("top") / file for file in ImageFolder(str(folder), Framing(8, 3)).files]
    assert len(packed.usable()) == 10


@pytest.mark.parametrize("packed", [False, True])
def test_names_that_a_terminal_obeys_are_written_in_a_message(
    packed: bool, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    name = "a\nERROR: \x1b[31mpwned.png"
    (folder / "sea" / name).write_bytes(b"none")
    path = shutil.make_archive(str(folder.parent / "packed"), "zip", folder) if packed else str(folder)
    images = ImageFolder(path, Framing(8, 3))
    with pytest.raises(ValueError, match=r"1 of 11 images cannot be read") as caught:
        images.usable()
    assert r"a\nERROR: \x1b[31mpwned.png" in caplog.messages[0]
    assert all(text.isprintable() for text in (caplog.messages[0], str(caught.value)))
