"""Empty files by the hundred thousand: a line or two, whatever holds them, and no memory for each."""

import io
import logging
import tarfile
import zipfile
from pathlib import Path

import pytest

from tests.traced import peak_of
from unetgn.training.data.config import DataConfig, open_images
from unetgn.training.data.stream import ShardStream
from unetgn.training.prepare import read_all

LONGEST = 2000  # characters of a line, of which paths are a part
FEW = 500


def folder(path: Path, count: int) -> None:
    for number in range(count):
        (path / f"{number}.png").touch()


def zipped(path: Path, count: int) -> None:
    with zipfile.ZipFile(path / "a.zip", "w") as archive:
        for number in range(count):
            archive.writestr(f"{number}.png", b"")


def tar(path: Path, count: int) -> None:
    with tarfile.open(path / "a.tar", "w") as archive:
        for number in range(count):
            archive.addfile(tarfile.TarInfo(f"{number}.png"), io.BytesIO())


def tar_of_nothing(path: Path, count: int) -> None:
    """Of names that none of the parts of a sample has."""
    with tarfile.open(path / "a.tar", "w") as archive:
        for number in range(count):
            archive.addfile(tarfile.TarInfo(f"{number}"), io.BytesIO())


def read(path: Path) -> None:
    if list(path.glob("*.tar")):
        ShardStream(DataConfig(name="stream", path=str(path), image_size=8), 3, None, 0).check(1, 0)
        return
    archives = list(path.glob("*.zip"))
    read_all(open_images(DataConfig(name="folder", path=str(archives[0] if archives else path), image_size=8), 3), None)


@pytest.mark.parametrize("count", [FEW, pytest.param(100_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("make", [folder, zipped, tar, tar_of_nothing])
def test_empty_files_are_refused_in_a_line_and_take_no_memory_each(
    make, count: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make(tmp_path, count)
    raised: list[Exception] = []

    def refused() -> None:
        with caplog.at_level(logging.WARNING), pytest.raises(Exception) as caught:  # noqa: PT011 (of several types)
            read(tmp_path)
        raised.append(caught.value)

    peak = peak_of(refused)
    (error,) = raised
    assert type(error).__module__.startswith("unetgn") or isinstance(error, ValueError)
    said = [str(error), *(record.getMessage() for record in caplog.records)]
    assert len(said) <= 5
    for line in said:
        assert line.isprintable(), line
        assert len(line) < LONGEST
        assert " object at 0x" not in line
    assert peak < 2**24 + 2500 * count  # for names, offsets and the like
