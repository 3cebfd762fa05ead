"""Sets of images: one set in every form is the same set, and what is none is named."""

import io
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from unetgn.sampling.sets import EvaluationError, open_samples

COUNT = 7


def picture(image: np.ndarray) -> Image.Image:
    return Image.fromarray(image[..., 0] if image.shape[2] == 1 else image)


def listed(path: Path, images: np.ndarray) -> None:
    path.mkdir()
    lines = ["file,seed,class_label"]
    for number, image in enumerate(images):
        (path / "000").mkdir(exist_ok=True)
        picture(image).save(path / "000" / f"{number:06d}.png")
        lines.append(f"000/{number:06d}.png,{number},{number % 3}")
    (path / "samples.csv").write_text("\n".join(lines) + "\n")


def bare(path: Path, images: np.ndarray) -> None:
    for number, image in enumerate(images):
        (path / f"class{number // 4}").mkdir(parents=True, exist_ok=True)
        picture(image).save(path / f"class{number // 4}" / f"{number}.{'png' if number % 2 else 'bmp'}")
    (path / "readme.txt").write_text("no image")
    (path / ".hidden.png").write_text("no image")


def archive(path: Path, images: np.ndarray) -> None:
    np.savez_compressed(path, arr_0=images, labels=np.arange(len(images)) % 3)


def shard(path: Path, images: np.ndarray, first: int = 0) -> None:
    with tarfile.open(path, "w") as tar:
        for number, image in enumerate(images, start=first):
            for ending, contents in ((".png", png(image)), (".cls", str(number % 3).encode())):
                member = tarfile.TarInfo(f"{number:06d}{ending}")
                member.size = len(contents)
                tar.addfile(member, io.BytesIO(contents))


def shards(path: Path, images: np.ndarray) -> None:
    path.mkdir()
    shard(path / "000.tar", images[:3])
    shard(path / "001.tar", images[3:], first=3)


def png(image: np.ndarray) -> bytes:
    file = io.BytesIO()
    picture(image).save(file, "PNG")
    return file.getvalue()


FORMS: dict[str, tuple[str, Callable[..., None], bool]] = {
    "a folder of samples": ("samples", listed, True),
    "a folder": ("images", bare, False),
    "an archive": ("samples.npz", archive, True),
    "a shard": ("samples.tar", shard, True),
    "shards": ("shards", shards, True),
}


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("form", FORMS)
def test_a_set_is_the_same_in_every_form(form: str, channels: int, tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (COUNT, 9, 6, channels), dtype=np.uint8)
    name, write, labelled = FORMS[form]
    write(tmp_path / name, images)
    pictures, labels = open_samples(tmp_path / name)
    assert len(pictures) == COUNT
    for _ in range(2):  # as often as asked
        assert np.array_equal([pictures.bytes_of(int(n)) for n in pictures.numbers], images.transpose(0, 3, 1, 2))
    np.testing.assert_allclose(list(pictures), images.reshape(COUNT, -1) / 255)
    assert labels.tolist() == ([n % 3 for n in range(COUNT)] if labelled else [-1] * COUNT)


class Marked:
    """Leaves a mark where it is unpickled."""

    def __reduce__(self) -> tuple:
        return (Path.touch, (Path("unpickled"),))


def broken(path: Path, kind: str) -> Path:
    """Make what is no set of images."""
    images = np.zeros((COUNT, 8, 8, 1), np.uint8)
    file = path / "set.npz"
    if kind == "nothing":
        return path / "missing"
    if kind == "an empty folder":
        return path
    if kind == "a text":
        (path / "set.txt").write_text("text")
        return path / "set.txt"
    if kind == "objects":
        np.savez(file, arr_0=np.array([Marked()] * COUNT, dtype=object))
    if kind == "floats":
        np.savez(file, arr_0=images.astype(np.float32))
    if kind == "channels first":
        np.savez(file, arr_0=np.zeros((COUNT, 3, 8, 8), np.uint8))
    if kind == "another name":
        np.savez(file, images=images)
    if kind == "too few labels":
        np.savez(file, arr_0=images, labels=np.arange(3))
    if kind == "labels that are names":
        np.savez(file, arr_0=images, labels=np.array(["cat"] * COUNT))
    if kind == "one image":
        np.savez(file, arr_0=images[:1])
    if kind == "no archive":
        file.write_bytes(b"PK, it may be")
    if kind == "no tar":
        (path / "set.tar").write_bytes(b"x" * 2000)
        return path / "set.tar"
    if kind == "a class that is a name":
        with tarfile.open(path / "set.tar", "w") as tar:
            member = tarfile.TarInfo("0.cls")
            member.size = 3
            tar.addfile(member, io.BytesIO(b"cat"))
        return path / "set.tar"
    if kind == "a class of 25 digits":
        with tarfile.open(path / "set.tar", "w") as tar:
            member = tarfile.TarInfo("0.cls")
            member.size = 25
            tar.addfile(member, io.BytesIO(b"9" * 25))
        return path / "set.tar"
    if kind in ("a file elsewhere", "a file by its whole path", "a listed class of 25 digits"):
        listed(path / "set", images)
        name = {"a file elsewhere": "../private.png,9,0", "a file by its whole path": f"{path}/private.png,9,0"}
        with (path / "set" / "samples.csv").open("a") as table:
            table.write(f"{name.get(kind, f'000/000000.png,9,{25 * chr(57)}')}\n")
        return path / "set"
    if kind == "links that lead back":
        bare(path / "set", images)
        for name in "ab":
            (path / "set" / "class0" / name).symlink_to("..")
        return path / "set"
    if kind == "terabytes":
        with zipfile.ZipFile(file, "w") as packed, packed.open("arr_0.npy", "w") as member:
            header = {"descr": "|u1", "fortran_order": False, "shape": (10**9, 64, 64, 3)}
            np.lib.format.write_array_header_1_0(member, header)
    return file


KINDS = {
    "a class of 25 digits": "no tar shard of images: b'9+' is no number of a class",
    "a listed class of 25 digits": "is not as sampling/sample.py writes it",
    "a file elsewhere": r"'\.\./private\.png' is no file below the folder",
    "a file by its whole path": "private.png' is no file below the folder",
    "links that lead back": "is a link to a folder that it is in itself: remove it",
    "terabytes": "cannot be read: Unable to allocate",
    "nothing": "there is no such folder: make samples with sampling/sample.py",
    "an empty folder": "holds no samples.csv: make samples with sampling/sample.py",
    "a text": "is a file: give a folder",
    "objects": "cannot be read",
    "floats": r"float32 of the shape \(7, 8, 8, 1\)",
    "channels first": r"uint8 of the shape \(7, 3, 8, 8\)",
    "another name": "it should hold arr_0",
    "too few labels": r"labels in .* of the shape \(3,\)",
    "labels that are names": "not a number an image",
    "one image": r"holds 1 sample\(s\)",
    "no archive": "cannot be read",
    "no tar": "no tar shard",
    "a class that is a name": "no tar shard",
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_set_is_named(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(EvaluationError, match=KINDS[kind]):
        open_samples(broken(tmp_path, kind))
    assert not (tmp_path / "unpickled").exists()


@pytest.mark.parametrize("form", ["a folder of samples", "a folder", "a shard"])
def test_an_image_that_cannot_be_read_is_named(form: str, tmp_path: Path) -> None:
    name, write, _ = FORMS[form]
    write(tmp_path / name, np.random.default_rng(0).integers(0, 256, (COUNT, 8, 8, 3), dtype=np.uint8))
    if form == "a shard":
        file = tmp_path / name
        file.write_bytes(file.read_bytes().replace(b"IDAT", b"IDAX"))
        words = r"samples\.tar:000001 cannot be read"
    else:
        file = sorted((tmp_path / name).rglob("*1.png"))[0]
        file.write_bytes(b"no image")
        words = rf"{file.name}.*cannot be read"
    pictures, _ = open_samples(tmp_path / name)
    with pytest.raises(EvaluationError, match=words):
        [pictures.bytes_of(n) for n in range(1, COUNT)]


def test_a_sparse_file_of_a_shard_is_no_image(tmp_path: Path) -> None:
    """Its header may promise terabytes of holes, for which memory would be taken."""
    images = np.zeros((COUNT, 8, 8, 1), np.uint8)
    shard(tmp_path / "set.tar", images)
    data = bytearray((tmp_path / "set.tar").read_bytes())
    data[156:157], data[257:265] = b"S", b"ustar  \0"
    data[386:410] = b"%011o\0%011o\0" % (0, len(png(images[0])))
    data[483:495] = b"\x80" + (2**42).to_bytes(11, "big")  # its size, unpacked
    data[148:156] = b" " * 8
    data[148:156] = b"%06o\0 " % sum(data[:512])
    (tmp_path / "set.tar").write_bytes(data)
    pictures, labels = open_samples(tmp_path / "set.tar")
    assert len(list(pictures)) == len(labels) == COUNT - 1
