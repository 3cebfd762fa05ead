"""Shards that may be anybody's: cut, nested, enlarged, linked; each ends in one line that names shard and sample."""

import gzip
import io
import json
import logging
import re
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.training.data.test_stream import open_stream, read, seen
from tests.training.shards import png, shades, table, write_shards, write_tar
from unetgn.training.data import mixing, tars
from unetgn.training.data.config import DataConfig, open_images
from unetgn.training.data.rows import CutShort
from unetgn.training.data.shards import open_shards
from unetgn.training.errors import DataError
from unetgn.training.train import main

KINDS = ("parquet", "arrow", "arrow file", "tar", "tar.gz")


def entry(name: str, contents: bytes = b"", **fields: Any) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(contents)
    for key, value in fields.items():
        setattr(info, key, value)
    return info, contents


def write(file: Path, *entries: tuple[tarfile.TarInfo, bytes]) -> Path:
    with tarfile.open(file, "w:gz" if file.suffix == ".gz" else "w") as tar:
        for info, contents in entries:
            tar.addfile(info, io.BytesIO(contents) if info.isreg() else None)
    return file


def rows(file: Path) -> list[Any]:
    shards = open_shards(str(file), image_column="image", label_column="label")
    return list(shards.rows(0))


def one_sample(number: int = 0) -> tuple[tarfile.TarInfo, bytes]:
    return entry(f"{number:06d}.png", png(number))


LINKS = [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE]


@pytest.mark.parametrize("kind", LINKS)
@pytest.mark.parametrize("target", ["/etc/passwd", "000000.png", "../../a.png", "b.png"])
def test_links_and_devices_in_a_tar_are_never_followed_and_said_in_one_line(
    kind: bytes, target: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    links = [entry(f"link{i}.png", type=kind, linkname=target) for i in range(50)]
    with caplog.at_level(logging.WARNING):
        found = rows(write(tmp_path / "0.tar", one_sample(), *links, one_sample(1)))
    assert [row.key for row in found] == ["000000", "000001"]
    assert [record.message for record in caplog.records] == [
        f"{tmp_path}/0.tar holds 50 links, pipes, devices or sparse files, which are not read; what other shards hold "
        "of these is not said"
    ] * (1 + (len(caplog.records) > 1))


def test_no_end_of_links_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tars, "IN_A_ROW", 20)
    few = [entry(f"d{i}", type=tarfile.DIRTYPE) for i in range(20)]
    assert len(rows(write(tmp_path / "few.tar", *few, one_sample(), *few))) == 1
    links = [entry(f"link{i}", type=tarfile.SYMTYPE, linkname="x") for i in range(21)]
    with pytest.raises(ValueError, match=r"many\.tar.* more than 20 entries follow each other that are of no sample"):
        rows(write(tmp_path / "many.tar", *links, one_sample()))


def test_entries_of_an_archive_are_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = []
    clear = tarfile.TarFile.next

    def watched(tar: tarfile.TarFile) -> Any:
        kept.append(len(tar.members))  # type: ignore[attr-defined]
        return clear(tar)

    monkeypatch.setattr(tarfile.TarFile, "next", watched)
    rows(write(tmp_path / "0.tar", *map(one_sample, range(30))))
    assert max(kept) <= 1


def test_what_unpacks_to_many_times_its_size_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One large entry, many entries, contents that are skipped, and what stands behind the end of the archive."""
    monkeypatch.setattr(tars, "UNPACKED", 2**18)
    nothing = bytes(2**19)
    bombs = {
        "image": [one_sample(), entry("a.png", nothing)],
        "skipped": [one_sample(), entry("a.bin", nothing), one_sample(1)],
        "many": [one_sample(), *[entry(f"{i}.bin", bytes(512)) for i in range(2000)]],
    }
    for name, entries in bombs.items():
        file = write(tmp_path / f"{name}.tar.gz", *entries)
        with pytest.raises(ValueError, match=rf"{name}\.tar\.gz.* unpacks to [\d,]+ bytes or more, from "):
            rows(file)
    file = write(tmp_path / "behind.tar.gz", one_sample())
    file.write_bytes(gzip.compress(gzip.decompress(file.read_bytes()) + nothing))
    with pytest.raises(ValueError, match="unpacks to"):
        rows(file)
    plain = write(tmp_path / "plain.tar", one_sample(), entry("a.bin", nothing), one_sample(1))
    assert len(rows(plain)) == 3


def test_an_entry_that_is_too_large_is_refused_before_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tars, "LARGEST", 2**16)
    with pytest.raises(ValueError, match=r"in b: .*b\.png has 65,537 bytes; at most 65,536 are read"):
        rows(write(tmp_path / "0.tar", one_sample(), entry("b.png", bytes(2**16 + 1))))
    write(tmp_path / "1.tar", one_sample(), entry("b.pth", bytes(2**17)))
    assert rows(tmp_path / "1.tar")[1].values["pth"] == b""  # never read
    with tarfile.open(tmp_path / "2.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        tar.addfile(entry("a.png", pax_headers={"comment": "x" * 10**6})[0])
    with pytest.raises(ValueError, match=r"(takes|header of) 1,000,\d+ bytes"):
        rows(tmp_path / "2.tar")


def test_headers_upon_headers_are_refused(tmp_path: Path) -> None:
    header = tarfile.TarInfo("x")
    header.type, header.size = tarfile.XHDTYPE, 0
    (tmp_path / "0.tar").write_bytes(header.tobuf(tarfile.USTAR_FORMAT) * 5000)
    with pytest.raises(ValueError, match=r"0\.tar' cannot be read: RecursionError"):
        rows(tmp_path / "0.tar")


@pytest.mark.parametrize("start", tars.COMPRESSED)
def test_other_compressions_are_named(start: bytes, tmp_path: Path) -> None:
    (tmp_path / "0.tar").write_bytes(start + bytes(2000))
    with pytest.raises(ValueError, match=f"it is compressed by {tars.COMPRESSED[start]}: unpack it"):
        rows(tmp_path / "0.tar")


PARTS = ["pth", "pt", "pkl", "pickle", "npy", "npz", "joblib", "msgpack", "bin", "safetensors", "txt", "mp4"]


@pytest.mark.parametrize("ending", PARTS)
def test_of_a_sample_only_image_label_and_json_are_read(ending: str, tmp_path: Path) -> None:
    parts = {"png": png(7), ending: b"never", "seg.pkl": b"never", "json": b'{"label": 1}', "cls": b"2"}
    write_tar(tmp_path / "0.tar", {"a": parts})
    (row,) = rows(tmp_path / "0.tar")
    assert {name for name, value in row.values.items() if value} == {"__key__", "png", "json", "cls"}


@pytest.mark.parametrize(
    "text", [b"{", b"[" * 100_000, b'{"label": ' + b"1" * 5000 + b"}", b"\xff\xfe", b"", b'{"label": 1e999}']
)
def test_a_broken_json_is_a_broken_sample(text: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    samples: dict[str, dict[str, bytes]] = {f"{i:04d}": {"png": png(i % 200), "cls": b"1"} for i in range(300)}
    samples["0130"] = {"png": png(9), "json": text}
    write_tar(tmp_path / "0.tar", samples)
    stream = open_stream(tmp_path)
    if b"1e999" in text:
        with pytest.raises(DataError, match=r"0130 of .* has the label inf, but"):
            read(stream, batches=100)
        return
    read(stream, batches=99)
    assert "0130 of" in caplog.text
    assert "its json" in caplog.text


def cut(kind: str, folder: Path, how: Callable[[bytes], bytes]) -> tuple[str, Path]:
    """Four shards of six images, the third changed."""
    path = write_shards(folder, kind.partition(" ")[0])
    if kind == "arrow file":
        import pyarrow

        for file in folder.glob("*.arrow"):
            whole = pyarrow.ipc.open_stream(file.read_bytes()).read_all()
            with pyarrow.ipc.new_file(file, whole.schema) as writer:
                for start in range(0, len(whole), 2):
                    writer.write_table(whole.slice(start, 2))
    file = sorted(file for file in folder.iterdir() if file.is_file())[2]
    file.write_bytes(how(file.read_bytes()))
    return path, file


CUTS = {"its last bytes": lambda data: data[:-9], "half": lambda data: data[: len(data) // 2]}


@pytest.mark.parametrize("how", CUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_shard_that_ends_early_is_refused_or_read_and_said(
    kind: str, how: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path, file = cut(kind, tmp_path, CUTS[how])

    def refused() -> None:
        stream = open_stream(path)
        stream.check(1, 0)
        read(stream, batches=9)

    with pytest.raises(DataError, match=rf"{re.escape(str(file))}.*data\.cut_shards=read"):
        refused()
    caplog.clear()
    stream = open_stream(path, cut_shards="read", shuffle_buffer=1)
    with caplog.at_level(logging.WARNING):
        stream.check(1, 0)
        first = seen(read(stream, batches=8))
    assert len([record for record in caplog.records if str(file) in record.message]) == 1
    others = [shade for shade in range(24) if shade // 6 != 2]
    assert set(others) <= set(first)
    whole = [shade for shade in range(12, 18) if shade in first]
    assert whole == list(range(12, 12 + len(whole)))  # what was read of it is its beginning


@pytest.mark.parametrize("damage", [b"\xff" * 512, b"\x00" * 512, b"x" * 512])
def test_damage_in_the_middle_of_a_tar_is_no_end_of_it(damage: bytes, tmp_path: Path) -> None:
    """In the place of a header; zeros are the mark that ends an archive."""
    data = bytearray(write(tmp_path / "0.tar", *map(one_sample, range(6))).read_bytes())
    data[2048:2560] = damage
    (tmp_path / "0.tar").write_bytes(bytes(data))
    message = "it ends early or is damaged at byte" if any(damage) else "behind its end-of-archive mark, before byte"
    with pytest.raises(ValueError, match=rf"0\.tar: in 00000.: ReadError: {message}"):
        rows(tmp_path / "0.tar")


def test_archives_one_behind_the_other_are_not_read_as_the_first_alone(tmp_path: Path) -> None:
    one, other = (write(tmp_path / name, one_sample(number)) for number, name in enumerate(("a.tar", "b.tar")))
    for ending, change in (("tar", bytes), ("tar.gz", gzip.compress)):
        (tmp_path / f"c.{ending}").write_bytes(change(one.read_bytes() + other.read_bytes()))
        with pytest.raises(ValueError, match="there is more: another archive, or damage"):
            rows(tmp_path / f"c.{ending}")


def test_a_damaged_checksum_of_gzip_is_noticed(tmp_path: Path) -> None:
    file = write(tmp_path / "0.tar.gz", *map(one_sample, range(6)))
    data = bytearray(file.read_bytes())
    data[-8] ^= 1
    file.write_bytes(bytes(data))
    with pytest.raises(ValueError, match=r"0\.tar\.gz: in 000005: BadGzipFile: CRC check failed"):
        rows(file)


def test_a_buffer_of_too_many_bytes_names_its_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mixing, "BUFFERED", 5 * len(png(0)) + 20)
    path = write_shards(tmp_path, "tar")
    with pytest.raises(DataError, match=r"lower data\.shuffle_buffer, which is 7"):
        read(open_stream(path, shuffle_buffer=7), batches=3)
    assert len(read(open_stream(path, shuffle_buffer=4), batches=8)) == 8


def test_parquet_that_unpacks_to_many_times_its_size_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pyarrow
    import pyarrow.parquet

    monkeypatch.setattr(tars, "UNPACKED", 2**16)
    picture = png(3) + bytes(2**20)
    rows_of_it = pyarrow.table({"image": [picture + bytes([i]) for i in range(4)]})
    pyarrow.parquet.write_table(rows_of_it, tmp_path / "a.parquet", compression="zstd")
    with pytest.raises(DataError, match=r"a\.parquet.* unpacks to"):
        read(open_stream(tmp_path, num_classes=None), batches=1)


@pytest.mark.parametrize("kind", ["parquet", "tar"])
def test_the_same_rows_are_held_out_whoever_reads_and_never_trained_on(kind: str, tmp_path: Path) -> None:
    from unetgn.training.data.held_out import HeldOutRows

    path = write_shards(tmp_path, kind, count=200, shards=8)
    stream = open_stream(path, held_out=0.25, held_out_most=500)
    held = HeldOutRows(stream)
    held_out = shades(torch_of(held))
    assert 30 <= len(set(held_out)) == len(held_out) <= 70
    assert [held.label(i) for i in range(len(held))] == [shade % 3 for shade in held_out]
    left = sorted(set(range(200)) - set(held_out))
    for ranks, workers in ((1, 0), (2, 0), (1, 2)):
        trained: set[int] = set()
        for rank in range(ranks):
            fresh = open_stream(path, held_out=0.25)
            trained |= set(seen(read(fresh, batches=90, rank=rank, ranks=ranks, num_workers=workers)))
        assert sorted(trained) == left
    few = HeldOutRows(open_stream(path, held_out=0.25, held_out_most=7))
    assert shades(torch_of(few)) == held_out[:7]


def torch_of(images: Any) -> Any:
    import torch

    return torch.from_numpy(np.stack([images.image(i) for i in range(len(images))]))


TINY = """
model: {in_channels: 3, out_channels: 3, channels: [8, 16], depth: 1, attention_levels: [], norm: {num_groups: 4}}
data: {name: stream, image_size: 8}
train: {steps: 1, batch_size: 2, trackers: []}
preview: {every: 0}
"""


@pytest.mark.parametrize("kind", ["parquet", "tar"])
def test_the_advice_about_a_cut_shard_is_right(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, file = cut(kind, tmp_path / "set", CUTS["half"])
    (tmp_path / "tiny.yaml").write_text(TINY)
    line = ["--config", str(tmp_path / "tiny.yaml"), "--output", str(tmp_path / "run"), f"data.path={path}"]
    assert main(line) == 2
    said = capsys.readouterr().err
    said = said.splitlines()[-1]  # behind the bars that made the set
    assert f"1 of 4 shards end early: {file} (it has no" in said
    assert main([*line, *re.findall(r"data\.cut_shards=\w+", said)]) == 0


def test_rows_of_every_table_only_hold_contents(tmp_path: Path) -> None:
    """A column that names files, nested or as text, is no column of images, or gives none."""
    import pyarrow
    import pyarrow.parquet

    (tmp_path / "private.png").write_bytes(png(1))
    named = str(tmp_path / "private.png")
    columns = {
        "struct": pyarrow.array([{"bytes": None, "path": name} for name in (named, f"file://{named}", "private.png")]),
        "text": pyarrow.array([named] * 3),
        "nested": pyarrow.array([{"image": {"bytes": None, "path": named}}] * 3),
        "list": pyarrow.array([[{"bytes": None, "path": named}]] * 3),
    }
    for name, column in columns.items():
        pyarrow.parquet.write_table(pyarrow.table({"image": column}), tmp_path / f"{name}.parquet")
        with pytest.raises((ValueError, DataError), match=r"holds no images but|only names a file"):
            open_stream(tmp_path / f"{name}.parquet", num_classes=None).check(1, 0)
    assert json.dumps(table([png(0)], [0]).column_names)


@pytest.mark.parametrize("what", ["a size below 0", "a long pax header", "a long name", "a sparse map cut short"])
def test_a_header_that_leads_nowhere_is_refused_in_one_line(what: str, tmp_path: Path) -> None:
    info = tarfile.TarInfo("a.png")
    if what == "a size below 0":
        info.size = -1024
    elif what == "a long pax header":
        info.type, info.size = tarfile.XHDTYPE, 2**20
    elif what == "a long name":
        info.type, info.size = tarfile.GNUTYPE_LONGNAME, 2**20
    header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    if what == "a sparse map cut short":
        header[156:157], header[482] = b"S", 1
        header[148:156] = b" " * 8
        header[148:156] = b"%06o\0 " % sum(header)
    contents = b"7" * 2**20 if "long" in what else b""
    (tmp_path / "a.tar").write_bytes(bytes(header) + contents)
    began = time.monotonic()
    with pytest.raises((DataError, ValueError), match=r"a\.tar"):
        rows(tmp_path / "a.tar")
    assert time.monotonic() - began < 30  # it hung


def test_rows_of_one_value_take_the_memory_of_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kilobyte of Parquet holds a value of megabytes once, and names it in each row."""
    import pyarrow
    import pyarrow.parquet

    size, count = 2**21, 64
    column = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * count, "int32"), pyarrow.array([bytes(size)]))
    pyarrow.parquet.write_table(
        pyarrow.table({"image": column}), tmp_path / "a.parquet", compression="zstd", store_schema=False,
        dictionary_pagesize_limit=2**30,
    )  # fmt: skip
    assert (tmp_path / "a.parquet").stat().st_size < 2**14
    del column
    before = pyarrow.total_allocated_bytes()
    shards = open_shards(str(tmp_path), image_column="image", label_column="label")
    taken = [pyarrow.total_allocated_bytes() - before for _ in zip(range(5), shards.rows(0), strict=False)]
    assert max(taken) < 4 * size
    monkeypatch.setattr(tars, "UNPACKED", 10 * size)
    with pytest.raises(CutShort, match=r"a\.parquet.* unpacks to"):
        list(shards.rows(0))


NAMES = ["new\nline", "\x1b[2Jescape", "bell\x07", "x" * 5000, "\u202eturned"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("part", ["label", "key", "json"])
def test_what_a_sample_says_is_a_short_line_of_a_message(part: str, name: str, tmp_path: Path) -> None:
    """Labels and names are anybody's: no lines of their own, nothing that a terminal obeys."""
    sample = {"png": png(0), "cls": name.encode()} if part == "label" else {"png": png(0), "cls": b"7"}
    if part == "json":
        sample = {"png": png(0), "json": json.dumps({"label": name}).encode()}
    write_tar(tmp_path / "0.tar", {name if part == "key" else "a": sample})
    with pytest.raises((DataError, ValueError)) as caught:
        read(open_stream(tmp_path, class_names=("ant", "bee", "cow")), batches=1)
    said = str(caught.value)
    assert said.isprintable()
    assert len(said) < 1000


@pytest.mark.parametrize("text", [b"{", b"[" * 100_000, b'{"label": ' + b"1" * 5000 + b"}", b"\xff\xfe", b""])
def test_a_broken_first_sample_is_named_with_its_shard(text: bytes, tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", {"a": {"png": png(0), "json": text}, "b": {"png": png(1), "cls": b"1"}})
    with pytest.raises(ValueError, match=rf"a of {tmp_path}/0\.tar: its json .*; mend it, or remove it"):
        open_stream(tmp_path)


SCHEMAS = [
    b"{", b"[]", b"7", b'"image"', b"null", b"[" * 100_000,
    *(json.dumps({"info": {"features": features}}).encode() for features in (
        "image", 7, [1], {"image": "Image"}, {"image": {"_type": 7}}, {"image": {"_type": "Nothing"}}, {"image": None},
        {"image": {"_type": "Image", "decode": {}}, "more": {"_type": "Value", "dtype": "no type"}},
        {"image": [{"x": "y"}]}, {"image": {"_type": "ClassLabel", "names": 7}},
    )),
    b'{"info": ' * 5000 + b"1" + b"}" * 5000,
]  # fmt: skip


@pytest.mark.parametrize("schema", SCHEMAS, ids=lambda schema: ascii(schema[:60]))
@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_a_schema_that_is_anybodys_is_read_or_refused_in_a_line(schema: bytes, kind: str, tmp_path: Path) -> None:
    """`datasets` writes its features into a schema as JSON, and raises anything where it is another."""
    import pyarrow
    import pyarrow.parquet

    rows = table([png(0)], [1]).data.table.replace_schema_metadata({b"huggingface": schema})
    if kind == "parquet":
        pyarrow.parquet.write_table(rows, tmp_path / "0.parquet")
    else:
        with pyarrow.OSFile(str(tmp_path / "0.arrow"), "wb") as file, pyarrow.ipc.new_stream(file, rows.schema) as out:
            out.write_table(rows)
    doors: list[Callable[[], object]] = [
        lambda: open_shards(str(tmp_path), image_column="image", label_column="label"),
        lambda: open_images(DataConfig(name="datasets", path=str(tmp_path), image_size=8), 3),
    ]
    for door in doors:
        said = str(tmp_path)
        try:
            door()
        except ValueError as error:
            said = str(error)
        assert str(tmp_path) in said
        assert said.isprintable()
        assert len(said) < 2000
