"""Shards read in sequence: who reads what, in which order, with which noise, and what is refused."""

import io
import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.training.shards import png, shades, table, write_shards, write_tar
from unetgn.training.data.config import DataConfig, open_images
from unetgn.training.data.images import Digits, check_classes
from unetgn.training.data.samples import IndexedSamples, StepBatches
from unetgn.training.data.stream import ShardStream
from unetgn.training.data.text import read_captions
from unetgn.training.errors import DataError

datasets = pytest.importorskip("datasets")
KINDS = ("parquet", "arrow", "tar")


def open_stream(path: object, *, seed: int = 0, num_classes: int | None = 3, **keys: Any) -> ShardStream:
    config = DataConfig(name="stream", path=str(path), **{"shuffle_buffer": 6, **keys})
    return ShardStream(config, 3, num_classes, seed)


def read(
    stream: ShardStream,
    *,
    batches: int,
    size: int = 3,
    first: int = 0,
    rank: int = 0,
    ranks: int = 1,
    num_workers: int = 0,
) -> list[dict[str, torch.Tensor]]:
    which = StepBatches(first, first + batches, size, 1, rank, ranks)
    return list(stream.loader(which, num_workers=num_workers, pin_memory=False))


def seen(batches: list[dict[str, torch.Tensor]]) -> list[int]:
    return [shade for batch in batches for shade in shades(batch["image"])]


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_one_pass_of_two_ranks_is_every_image_once(kind: str, num_workers: int, tmp_path: Path) -> None:
    stream = open_stream(write_shards(tmp_path, kind))
    ranks = [read(stream, batches=4, rank=rank, ranks=2, num_workers=num_workers) for rank in range(2)]
    one, other = (seen(batches) for batches in ranks)
    assert not set(one) & set(other)
    assert sorted(one + other) == list(range(24))
    for batch in ranks[0] + ranks[1]:
        assert [shade % 3 for shade in shades(batch["image"])] == batch["label"].tolist()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_noise_and_all_that_is_drawn_belong_to_the_sample_and_not_to_the_reader(
    num_workers: int, tmp_path: Path
) -> None:
    """A stream of 8×8 images draws for sample s what the digits draw for it."""
    stream = ShardStream(DataConfig(name="stream", path=write_shards(tmp_path, "tar")), 1, None, 5)
    digits = IndexedSamples(Digits(), np.arange(1797), seed=5)
    which = StepBatches(2, 5, 3, 2, 1, 2)
    here = list(stream.loader(which, num_workers=num_workers, pin_memory=False))
    there = list(digits.loader(which, num_workers=0, pin_memory=False))
    assert len(here) == len(there) == 6
    for one, other in zip(here, there, strict=True):
        assert all(torch.equal(one[key], other[key]) for key in ("noise", "time", "drop"))


def test_the_order_is_a_function_of_the_seed_and_of_the_pass(tmp_path: Path) -> None:
    path = write_shards(tmp_path, "parquet")
    order = seen(read(open_stream(path), batches=24))  # three passes
    assert seen(read(open_stream(path), batches=24)) == order
    passes = [order[i : i + 24] for i in (0, 24, 48)]
    assert [sorted(one) for one in passes] == [list(range(24))] * 3
    assert len({tuple(one) for one in passes}) == 3
    assert seen(read(open_stream(path, seed=1), batches=8)) != passes[0]


def test_a_buffer_of_one_keeps_the_order_within_a_shard(tmp_path: Path) -> None:
    stream = open_stream(write_shards(tmp_path, "tar"), shuffle_buffer=1)
    order = seen(read(stream, batches=8))
    for first in range(0, 24, 6):
        assert [shade for shade in order if first <= shade < first + 6] == list(range(first, first + 6))


def test_a_buffer_mixes_a_shard_by_the_seed_and_reads_no_further_ahead(tmp_path: Path) -> None:
    path = write_shards(tmp_path, "tar", shards=1)
    orders = [seen(read(open_stream(path, seed=seed), batches=8)) for seed in range(3)]
    assert len({tuple(order[:12]) for order in orders}) == 3
    assert all(shade < place + 6 for order in orders for place, shade in enumerate(order))


def test_a_stream_never_ends_where_readers_have_fewer_images_than_others(tmp_path: Path) -> None:
    """One image a shard: each of two ranks asks for ten times as many as there are."""
    stream = open_stream(write_shards(tmp_path, "tar", count=3, shards=2))
    for rank in range(2):
        assert len(read(stream, batches=10, rank=rank, ranks=2)) == 10


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_resume_is_approximate_and_says_so(
    num_workers: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stream = open_stream(write_shards(tmp_path, "tar"))
    with caplog.at_level(logging.WARNING):
        whole = read(stream, batches=8, num_workers=num_workers)
        assert "approximately" not in caplog.text
        resumed = read(stream, first=4, batches=4, num_workers=num_workers)
        assert "data.name stream resumes approximately: step 5 begins a new pass over the shards" in caplog.text
    for one, other in zip(whole[4:], resumed, strict=True):
        assert torch.equal(one["noise"], other["noise"])
    assert seen(resumed) not in (seen(whole)[:12], seen(whole)[12:])
    assert seen(read(stream, first=4, batches=4, num_workers=num_workers)) == seen(resumed)


def test_only_the_first_rank_says_that_a_resume_is_approximate(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stream = open_stream(write_shards(tmp_path, "tar"))
    with caplog.at_level(logging.WARNING):
        read(stream, first=4, batches=1, rank=1, ranks=2)
    assert caplog.text == ""


def test_flips_and_crops_are_drawn_by_the_sample(tmp_path: Path) -> None:
    """Every row the same picture, with a shade of its own in each place: what differs are the draws."""
    pixels = np.arange(192, dtype=np.uint8).reshape(8, 24, 1).repeat(3, 2)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    write_tar(tmp_path / "0.tar", {f"{i}": {"png": file.getvalue()} for i in range(8)})
    crop = open_stream(tmp_path, num_classes=None, random_crop=True, random_flip=True)
    one, other = (torch.cat([batch["image"] for batch in read(crop, batches=8)]) for _ in range(2))
    assert torch.equal(one, other)
    lefts = set()
    for image in one:
        found = ((image.permute(1, 2, 0).numpy() + 1) * 127.5).round().astype(np.uint8)
        cuts = {(left, side): pixels[:, left : left + 8][:, ::side] for left in range(17) for side in (1, -1)}
        lefts |= {place for place, cut in cuts.items() if np.array_equal(cut, found)}
    assert len(lefts) > 8
    assert {side for _, side in lefts} == {1, -1}


def test_a_saved_data_set_is_streamed_too(tmp_path: Path) -> None:
    table([png(i) for i in range(6)], [i % 3 for i in range(6)]).save_to_disk(tmp_path / "set", num_shards=2)
    stream = open_stream(tmp_path / "set")
    assert str(stream) == "a stream of 2 shards"
    assert sorted(seen(read(stream, batches=2))) == list(range(6))


@pytest.mark.parametrize(
    ("endings", "keys"),
    [
        ({"jpg": png(7), "json": json.dumps({"label": 2}).encode()}, {}),
        ({"jpeg": png(7), "cls": b"2", "json": json.dumps({"label": 1}).encode()}, {}),
        ({"webp": png(7), "kind.cls": b"2", "cls": b"0"}, {"label_column": "kind.cls"}),
        ({"png": png(7), "mask.png": png(9), "json": b'{"animal": 2}'},
         {"image_column": "png", "label_column": "animal"}),
    ],
)  # fmt: skip
def test_images_and_labels_of_tar_shards_are_found_by_their_endings(
    endings: dict[str, bytes], keys: dict[str, str], tmp_path: Path
) -> None:
    write_tar(tmp_path / "0.tar", {f"{i}": endings for i in range(3)})
    (batch,) = read(open_stream(tmp_path, **keys), batches=1)
    assert shades(batch["image"]) == [7, 7, 7]
    assert batch["label"].tolist() == [2, 2, 2]


@pytest.mark.parametrize(
    "second", [("png", "PNG"), ("JPG", "JPEG"), ("webp", "WEBP"), ("jp2", "JPEG2000"), ("gif", "GIF")]
)
def test_shards_of_one_format_and_then_of_another_are_all_read(
    second: tuple[str, str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A hundred and twenty of JPEG come first: as many as the start looks at."""
    for shard, (ending, kind) in enumerate((("jpg", "JPEG"), second)):
        file = io.BytesIO()
        Image.new("RGB", (8, 8), (100 * shard,) * 3).save(file, kind)
        write_tar(tmp_path / f"{shard}.tar", {f"{i:04d}": {ending: file.getvalue(), "cls": b"1"} for i in range(120)})
    stream = open_stream(tmp_path, image_size=8)
    stream.check(1, 0)
    with caplog.at_level(logging.WARNING):
        found = seen(read(stream, batches=80))
    assert sum(shade < 50 for shade in found) == sum(shade > 50 for shade in found) == 120
    assert caplog.text == ""


@pytest.mark.parametrize("ending", ["pth", "pkl", "npy", "msgpack", "pickle", "pt"])
def test_what_else_is_in_a_shard_is_not_decoded(ending: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def decoded(*_: object, **__: object) -> None:
        raise AssertionError("decoded")

    for name in ("torch.load", "pickle.loads", "numpy.load"):
        monkeypatch.setattr(name, decoded)
    write_tar(tmp_path / "0.tar", {f"{i}": {"png": png(7), ending: b"x", "cls": b"2"} for i in range(3)})
    (batch,) = read(open_stream(tmp_path), batches=1)
    assert batch["label"].tolist() == [2, 2, 2]


def test_colours_for_one_channel_are_refused_before_the_start(tmp_path: Path) -> None:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (200, 0, 0)).save(file, "PNG")
    write_tar(tmp_path / "0.tar", {f"{i:04d}": {"png": file.getvalue()} for i in range(120)})
    stream = ShardStream(DataConfig(name="stream", path=str(tmp_path), image_size=8), 1, None, 0)
    with pytest.raises(DataError, match=r"in colour, but model\.in_channels is 1.*or data\.to_grey=true"):
        stream.check(1, 0)


def test_labels_are_left_alone_where_the_network_has_no_classes(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", {f"{i}": {"png": png(i), "cls": b"77"} for i in range(3)})
    (batch,) = read(open_stream(tmp_path, num_classes=None), batches=1)
    assert batch["label"].tolist() == [-1, -1, -1]


@pytest.mark.parametrize("label", [b"3", b"-1"])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_label_that_is_no_class_is_an_error_that_names_it(num_workers: int, label: bytes, tmp_path: Path) -> None:
    for shard in range(2):
        write_tar(tmp_path / f"{shard}.tar", {f"image{i}": {"png": png(i), "cls": label} for i in range(3)})
    message = rf"image\d of .*\.tar has the label {label.decode()}, but with model\.num_classes 3 they are .* 0 to 2"
    with pytest.raises(DataError, match=message):
        read(open_stream(tmp_path), batches=2, num_workers=num_workers)


def test_class_names_and_the_lack_of_labels_are_checked_at_once(tmp_path: Path) -> None:
    path = write_shards(tmp_path / "named", "parquet")
    with pytest.raises(ValueError, match=r"model\.num_classes is 5, but the images have 3 classes"):
        open_stream(path, num_classes=5)
    write_tar(tmp_path / "0.tar", {"a": {"png": png(0)}})
    with pytest.raises(ValueError, match=r"model\.num_classes is 3, but the images have no classes"):
        open_stream(tmp_path / "0.tar")


@pytest.mark.parametrize("kind", KINDS)
def test_a_broken_image_is_named_and_skipped(kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    stream = open_stream(write_shards(tmp_path, kind, count=120, broken=(77,)))
    with caplog.at_level(logging.WARNING):
        assert sorted(seen(read(stream, batches=17, size=7))) == [i for i in range(120) if i != 77]
    lines = [line for line in caplog.messages if line.startswith("skipping a broken image")]
    assert len(lines) == 1
    name = {"tar": "000077 of", "parquet": "row 18 of", "arrow": "row 18 of"}[kind]  # the third shard's 18th of 30
    assert re.search(rf"broken image: {name} {tmp_path}/(train-)?0002\.{kind} \(UnidentifiedImageError", lines[0])


@pytest.mark.parametrize("num_workers", [0, 1])
def test_more_than_one_percent_of_broken_images_is_an_error(num_workers: int, tmp_path: Path) -> None:
    stream = open_stream(write_shards(tmp_path, "parquet", count=120, shards=2, broken=(5, 60)))
    with pytest.raises(
        DataError, match=r"[23] of 1\d\d images of .* are broken or too small, more than 1%; the last is"
    ):
        read(stream, batches=60, num_workers=num_workers)


def test_a_reader_without_a_readable_image_is_an_error_and_no_endless_wait(tmp_path: Path) -> None:
    stream = open_stream(write_shards(tmp_path, "tar", count=4, shards=2, broken=(0, 1, 2, 3)))
    with pytest.raises(DataError, match=r"a reader's shards of data\.path .* hold no readable image"):
        read(stream, batches=1)
    with pytest.raises(DataError, match="none of the first 100 images"):
        stream.check(1, 0)


def test_images_that_are_too_small_are_left_out_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    stream = open_stream(write_shards(tmp_path, "tar"), image_size=11)
    with caplog.at_level(logging.WARNING), pytest.raises(DataError, match="none of the first 100 images"):
        stream.check(1, 0)
    assert "TooSmall: 12×10 pixels, where 11×11 are needed" in caplog.text


def test_fewer_shards_than_readers_are_refused_with_the_numbers(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stream = open_stream(write_shards(tmp_path, "tar"))
    message = r"has 4 shards for 6 readers \(2 processes × 3 workers\), and each needs one: lower data\.num_workers"
    with pytest.raises(ValueError, match=message):
        stream.check(2, 3)
    with pytest.raises(ValueError, match=r"4 shards for 5 readers \(5 processes × 1 workers\)"):
        stream.check(5, 0)
    with caplog.at_level(logging.WARNING):
        stream.check(2, 2)
        assert caplog.text == ""
        stream.check(3, 0)
    assert "4 shards for 3 readers: those with fewer show their images more often" in caplog.text


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_a_shard_that_breaks_off_is_an_error_that_names_the_path(kind: str, tmp_path: Path) -> None:
    path = write_shards(tmp_path, kind, count=60, shards=2)
    last = tmp_path / f"train-0001.{kind}"
    last.write_bytes(last.read_bytes()[:-500])
    with pytest.raises(DataError, match=rf"the shards of data\.path '{re.escape(path)}' cannot be read: "):
        read(open_stream(path), batches=40)


def test_the_fingerprint_is_of_the_files_wherever_they_are(tmp_path: Path) -> None:
    one, moved = (open_stream(write_shards(tmp_path / name, "tar")) for name in ("a", "b"))
    fewer = open_stream(write_shards(tmp_path / "c", "tar", count=99))
    assert one.fingerprint() == moved.fingerprint() != fewer.fingerprint()


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a.png", "b.png", "c.txt"], r"found 2 with \.png, 1 with \.txt \(for plain image files: data\.name=folder\)"),
        (["a.tar", "b.parquet"], r"all \*\.parquet, all \*\.arrow or, streamed, all \*\.tar; found 1 with \.parquet"),
        (["train-0.tar", "val-0.tar"], r"files of the splits train, validation: give those of one, .*train\*"),
        (["train/0.tar", "test/0.tar"], "files of the splits test, train: give those of one"),
        ([], "found no file"),
    ],
)
def test_a_path_that_fits_no_format_is_told_what_was_found(names: list[str], message: str, tmp_path: Path) -> None:
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    with pytest.raises(ValueError, match=message):
        open_stream(tmp_path)


def test_columns_without_images_are_refused(tmp_path: Path) -> None:
    path = write_shards(tmp_path / "tables", "parquet")
    with pytest.raises(ValueError, match=r"data\.image_column 'png' is not in .*\['image', 'label'\]"):
        open_stream(path, image_column="png")
    with pytest.raises(ValueError, match=r"data\.image_column 'label' of .* holds no images but ClassLabel"):
        open_stream(path, image_column="label")
    write_tar(tmp_path / "0.tar", {"a": {"png": png(0), "mask.png": png(0)}})
    message = r"of the endings \['png', 'mask\.png'\] in the shards 2 are of images; name one as data\.image_column"
    with pytest.raises(ValueError, match=message):
        open_stream(tmp_path / "0.tar")


def test_files_that_are_not_what_their_ending_says_are_refused(tmp_path: Path) -> None:
    for ending in ("parquet", "arrow", "tar"):
        file = tmp_path / f"a.{ending}"
        file.write_bytes(b"nothing of the kind" * 100)
        with pytest.raises(ValueError, match=rf"data\.path '{file}' cannot be read"):
            open_stream(file)


def test_images_by_number_are_refused_of_a_stream(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data\.name is stream, but here images are asked for by number"):
        open_images(DataConfig(name="stream", path=str(tmp_path)), 3)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """A hub with one data set, somebody/pictures, of the subsets small (24 images) and large (splits train with 30 and
    test with 60 images); gives the names that it was asked for. What is on this disk is read as ever."""

    def write(name: str, count: int) -> list[str]:
        return sorted(str(file) for file in Path(write_shards(tmp_path / name, "parquet", count=count)).iterdir())

    files = {"small": {"train": write("hub", 24)}, "large": {"train": write("many", 30), "test": write("more", 60)}}
    load, asked = datasets.load_dataset_builder, []

    def load_from_hub(path: str, name: str | None = None, *, data_files: list[str] | None = None) -> Any:
        if data_files is not None:
            return load(path, name, data_files=data_files)
        asked.append(path)
        if path != "somebody/pictures":
            raise datasets.exceptions.DatasetNotFoundError(f"Dataset '{path}' doesn't exist on the Hub")
        if name not in files:
            raise ValueError(f"Config name is missing. Please pick one among {list(files)}")
        return load("parquet", data_files=files[name])

    monkeypatch.setattr(datasets, "load_dataset_builder", load_from_hub)
    return asked


def test_a_name_that_is_no_path_is_looked_for_on_the_hub(hub: list[str]) -> None:
    stream = open_stream("somebody/pictures", subset="small")
    assert sorted(seen(read(stream, batches=8))) == list(range(24))
    with pytest.raises(ValueError, match=r"data\.path 'no/body' is neither here nor to be had on the hub: .*no/body"):
        open_stream("no/body")
    assert hub == ["somebody/pictures", "no/body"]


def test_of_the_hub_the_subset_and_the_split_that_are_asked_for_are_read(hub: list[str]) -> None:
    stream = open_stream("somebody/pictures", subset="large", split="test")
    assert sorted(seen(read(stream, batches=20))) == list(range(60))
    train = open_stream("somebody/pictures", subset="large")
    assert sorted(seen(read(train, batches=10))) == list(range(30))
    assert train.fingerprint() != stream.fingerprint()
    message = r"'somebody/pictures' is on the hub, but not as data\.subset and data\.split have it: ValueError: "
    with pytest.raises(ValueError, match=message + r"Config name is missing.*\['small', 'large'\]"):
        open_stream("somebody/pictures")
    with pytest.raises(ValueError, match=message + r".*\['train'\]"):
        open_stream("somebody/pictures", subset="small", split="test")


def test_a_path_that_is_mistyped_in_a_folder_here_is_not_looked_for_on_the_hub(
    hub: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    with pytest.raises(ValueError, match=r"data\.path 'data/imagenet' should be a folder .*; found no file"):
        open_stream("data/imagenet")
    assert hub == []
    with pytest.raises(ValueError, match=r"data\.subset and data\.split are for a data set on the hub: remove them"):
        open_stream(write_shards(tmp_path / "set", "tar"), split="test")


@pytest.mark.parametrize("ending", ["pth", "pt", "npy", "npz", "pkl", "pickle", "msgpack", "mp4", "wav", "glb", "cbor"])
def test_of_tar_shards_on_the_hub_nothing_but_image_and_label_is_decoded(
    ending: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`datasets` looks into the first samples with decoders of its own, unless it is not asked."""
    from datasets.packaged_modules.webdataset.webdataset import WebDataset

    write_tar(tmp_path / "train-0.tar", {f"{i}": {"png": png(i), "cls": b"1", ending: b"never"} for i in range(6)})
    load = datasets.load_dataset_builder

    def load_from_hub(path: str, name: str | None = None) -> Any:
        return load("webdataset", data_files={"train": [str(tmp_path / "train-0.tar")]})

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a member was opened")

    monkeypatch.setattr(datasets, "load_dataset_builder", load_from_hub)
    monkeypatch.setattr(WebDataset, "_split_generators", refuse)
    monkeypatch.setattr(WebDataset, "_get_pipeline_from_tar", refuse)
    assert sorted(seen(read(open_stream("somebody/pictures"), batches=2))) == list(range(6))
    with pytest.raises(ValueError, match=r"there is no split 'test', but \['train'\]"):
        open_stream("somebody/pictures", split="test")


@pytest.mark.parametrize("column", ["label", "text", "audio"])
def test_no_column_but_the_images_is_decoded(column: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A column of labels or captions may be said to hold pictures, which `datasets` would open whatever they are."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.Image, "decode_example", lambda *_, **__: pytest.fail("decoded"))
    rows = {
        "image": [{"bytes": png(i), "path": None} for i in range(4)],
        column: [{"bytes": b"%!PS", "path": None}] * 4,
    }
    features = datasets.Features({"image": datasets.Image(), column: datasets.Image()})
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "a.parquet")
    load = datasets.load_dataset_builder
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda path, name: load(
        "parquet", data_files={"train": [str(tmp_path / "a.parquet")]}))  # fmt: skip
    for path in (tmp_path / "a.parquet", "somebody/pictures"):
        assert seen(read(open_stream(path, num_classes=None, shuffle_buffer=1), batches=1)) == [0, 1, 2]
    images = open_images(DataConfig(name="datasets", path=str(tmp_path / "a.parquet"), image_size=8), 3)
    assert len(images.usable()) == 4
    with pytest.raises(ValueError, match="the images have no classes"):
        check_classes(2, images, images.usable())
    with pytest.raises(ValueError, match=r"holds no texts but|is not in"):
        read_captions(images, [0, 1], "text")
