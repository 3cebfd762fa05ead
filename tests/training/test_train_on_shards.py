"""Training from shards as users start it: by number and in sequence, with one process and with two."""

import logging
import signal
from pathlib import Path

import pytest
from PIL import Image

from tests.training import runs
from tests.training.forked import succeed
from tests.training.shards import png, write_shards, write_tar
from unetgn.training import throughput
from unetgn.training.data import pixels
from unetgn.training.train import main

pytest.importorskip("datasets")
TINY = """
model: {in_channels: 3, out_channels: 3, channels: [8, 16], depth: 1, attention_levels: [], num_classes: 3,
        norm: {num_groups: 4}}
train: {steps: 5, batch_size: 4, log_every: 1, trackers: []}
checkpoint: {every: 3}
preview: {every: 0}
"""


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache of `datasets`, for this test alone."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))


def arguments(folder: Path, *keys: str) -> list[str]:
    folder.mkdir(exist_ok=True)
    (folder / "tiny.yaml").write_text(TINY)
    return ["--config", str(folder / "tiny.yaml"), "--output", str(folder / "run"), "--resume", "auto", *keys]


def run(folder: Path, *keys: str) -> int:
    return main(arguments(folder, *keys))


def rows(folder: Path) -> list[dict[str, str]]:
    return runs.rows(folder / "run")


def status(folder: Path) -> dict:
    return runs.status(folder / "run")


def test_parquet_by_number_trains_with_crops_and_resumes_exactly(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = ["data.name=datasets", f"data.path={write_shards(tmp_path / 'set', 'parquet')}", "data.random_crop=true",
            "data.num_workers=2"]  # fmt: skip
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert run(whole, *keys) == 0
    assert "5 steps over 24 images (0.8 epochs)" in capsys.readouterr().out
    assert run(broken, *keys, "train.steps=3") == 0
    assert run(broken, *keys) == 0
    assert [row["loss"] for row in rows(broken)] == [row["loss"] for row in rows(whole)]
    one, other = (folder / "run" / "checkpoints" / "step-000005" / "model.safetensors" for folder in (whole, broken))
    assert one.read_bytes() == other.read_bytes()


def test_parquet_in_sequence_trains_from_a_script(tmp_path: Path) -> None:
    path = write_shards(tmp_path / "set", "parquet", shards=1)
    succeed(*arguments(tmp_path, "data.name=stream", f"data.path={path}"))
    assert [row["epoch"] for row in rows(tmp_path)] == [""] * 5  # nobody has counted the images
    assert status(tmp_path)["state"] == "completed"


@pytest.mark.parametrize("num_workers", [0, 1])
def test_waiting_for_a_stream_is_counted_as_waiting_for_the_loader(
    num_workers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(throughput, "WAITING", 1e-9)  # a share of the time that no loader stays below
    monkeypatch.setattr(throughput, "JUDGED", 4)
    path = write_shards(tmp_path / "set", "tar")
    keys = ["data.name=stream", f"data.path={path}", f"data.num_workers={num_workers}"]
    with caplog.at_level(logging.WARNING):
        assert run(tmp_path, *keys) == 0
    assert "the loader is the bottleneck: " in caplog.text


def test_a_signal_in_the_middle_of_decoding_breaks_no_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real_open, calls = pixels.open_picture, []

    def signalled(source: bytes, max_pixels: int) -> Image.Image:
        calls.append(1)
        if (
            len(calls) == 2 * 24 + 10
        ):  # the start looks at all 24 twice; the third step takes the ninth image and three more
            signal.raise_signal(signal.SIGTERM)
        return real_open(source, max_pixels)

    monkeypatch.setattr(pixels, "open_picture", signalled)
    keys = ["data.name=stream", f"data.path={write_shards(tmp_path / 'set', 'tar')}"]
    with caplog.at_level(logging.WARNING):
        assert run(tmp_path, *keys) == 1
    assert "broken image" not in caplog.text
    assert status(tmp_path) | {"state": "preempted", "step": 2} == status(tmp_path)
    assert run(tmp_path, *keys) == 0


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["data.num_workers=5"], "train.py: error: data.path '{path}' has 4 shards for 5 readers (1 processes × 5 w"),
        (["model.num_classes=4"], "train.py: error: model.num_classes is 4, but the images have 3 classes"),
        (["data.held_out=1e-9", "train.validate_every=1"], "data.held_out is 1e-09, which is none of the images"),
        (["data.image_size=64"], "train.py: error: data.path '{path}': none of the first 100 images is readable"),
        (["--overfit", "3"], "train.py: error: --overfit 3: a stream's images have no numbers"),
        (["--dry-run", "data.image_column=png"], "data.image_column 'png' is not in '{path}'; its columns: ['image'"),
    ],
)
def test_what_a_stream_cannot_do_is_said_before_the_start(
    keys: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_shards(tmp_path / "set", "parquet")
    assert run(tmp_path, "data.name=stream", f"data.path={path}", *keys) == 2
    assert message.format(path=path) in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_other_shards_are_refused_on_resuming(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, other = (write_shards(tmp_path / name, "tar", count=count) for name, count in (("a", 60), ("b", 99)))
    assert run(tmp_path, "data.name=stream", f"data.path={one}") == 0
    assert run(tmp_path, "data.name=stream", f"data.path={other}", "train.steps=6") == 2
    assert "was made with other images than are here now (a stream of 4 shards; data.path" in capsys.readouterr().err


@pytest.mark.parametrize("num_workers", [0, 1])
def test_data_that_turn_out_unfit_end_the_run_with_their_name(
    num_workers: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A label out of range behind the first hundred images, which are looked at before the start."""
    samples = {f"{i:04d}": {"png": png(0), "cls": b"7" if i == 110 else b"0"} for i in range(120)}
    write_tar(tmp_path / "0.tar", samples)
    keys = ["data.name=stream", f"data.path={tmp_path / '0.tar'}", "data.shuffle_buffer=1"]
    assert run(tmp_path, *keys, f"data.num_workers={num_workers}", "train.steps=40") == 1
    said = capsys.readouterr().err
    assert "train.py: 0110 of " in said
    assert "has the label 7, but with model.num_classes 3" in said
    assert "; step 27 was saved, go on with --resume auto" in said
    assert status(tmp_path) | {"state": "failed", "step": 27} == status(tmp_path)
