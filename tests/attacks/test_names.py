"""Names that are anybody's reach messages as one line of which a terminal obeys nothing, whatever door they come by."""

import contextlib
import functools
import json
import random
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load, save

from tests.attacks.damage import places, replaced, value_at
from tests.attacks.files import (
    DATA,
    READABLE,
    Readable,
    made,
    make_images,
    quiet,
    read_images,
    read_judged,
    read_stream,
)
from tests.attacks.judge import Wrong, refused
from tests.training.shards import png, table, write_tar
from unetgn.interop.original_configs import read_original
from unetgn.sampling.page.watching import Watcher
from unetgn.sampling.sets import EvaluationError, open_samples
from unetgn.training.data.hugging_face import find_files
from unetgn.training.data.text import read_files

NAMES = {
    "a line": "a\nWARNING: b",
    "a terminal": "\x1b]0;title\x07\x1b[31mred\r",
    "right to left": "\u202egnp.exe",
    "long": "x" * 100_000,
}
LONGEST_NAME = 200  # bytes of a file's, and more in an archive


def with_key(tree: Any, name: str, draw: random.Random) -> Any:
    """Give a key of an object the name, or add one."""
    objects = [place for place in places(tree) if isinstance(value_at(tree, place), dict)]
    place = draw.choice(objects or [()])
    keys = dict(value_at(tree, place)) if objects else {}
    value = keys.pop(draw.choice(list(keys))) if keys and draw.random() < 0.5 else 1
    return replaced(tree, place, {**keys, name: value})


def with_value(tree: Any, name: str, draw: random.Random) -> Any:
    """Put the name in the place of a value, alone or in a list or an object."""
    return replaced(tree, draw.choice(places(tree)[1:] or [()]), draw.choice((name, [name], {name: name})))


def rename(data: bytes, name: str, draw: random.Random) -> bytes:
    """Give the name to a tensor of a safetensors file."""
    tensors = load(data)
    tensors[name] = tensors.pop(draw.choice(sorted(tensors)))
    return save(tensors, metadata={name: name, "format": "pt"})


def put(file: Path, name: str, draw: random.Random) -> None:
    """Put the name into a file, somewhere where names and values are."""
    if file.suffix == ".safetensors":
        file.write_bytes(rename(file.read_bytes(), name, draw))
        return
    tree = (json.loads if file.suffix == ".json" else yaml.safe_load)(file.read_text())
    tree = draw.choice((with_key, with_value))(tree, name, draw)
    file.write_text(json.dumps(tree) if file.suffix == ".json" else yaml.safe_dump(tree))


def knock(door: Callable[[], object], refusals: tuple[type[BaseException], ...]) -> None:
    """Come to a door: what it says, as an error or to the log, is a line that can be printed."""
    try:
        with quiet():
            door()
    except refusals as error:
        refused(error)


# Those that train take seconds for each; names in files of families are tried in tests/interop/test_refusals.py.
READ = [
    readable for readable in READABLE if not readable.name.startswith(("resume of", "sampling of", "newest", "family"))
]
WITH_NAMES = (".json", ".yaml", ".safetensors")


@pytest.mark.parametrize("kind", NAMES)
@pytest.mark.parametrize(
    "readable",
    [one for one in READ if one.name not in ("images", "parquet", "arrow", "tar", "samples")],
    ids=lambda readable: readable.name,
)
def test_names_in_files_reach_messages_as_one_line(readable: Readable, kind: str, tmp_path: Path) -> None:
    draw = random.Random(f"{readable.name}/{kind}")
    sound = made(readable)
    files = sorted({file for names in readable.files for file in sound.glob(names) if file.suffix in WITH_NAMES})
    assert files
    for number in range(5):
        copy = tmp_path / str(number)
        shutil.copytree(sound, copy)
        put(copy / draw.choice(files).relative_to(sound), NAMES[kind], draw)
        if readable.seal is not None:
            with contextlib.suppress(OSError):  # the name may stand where a file's was
                readable.seal(copy)
        knock(functools.partial(readable.load, copy), readable.refusals)
        shutil.rmtree(copy)


def write_zip(folder: Path, name: str) -> Path:
    with zipfile.ZipFile(folder / "a.zip", "w") as archive:
        archive.writestr(f"{name[:100]}/{name[:60_000]}.png", png(1)[:30])
        archive.writestr(f"{name}.{name[:100]}", "")
        archive.writestr("b/1.png", png(1))
        archive.writestr("1.png", png(1))
    return folder / "a.zip"


def write_folder(folder: Path, name: str) -> Path:
    make_images(folder)
    (folder / name).mkdir()
    (folder / name / f"{name}.png").write_bytes(png(1)[:30])
    (folder / f"{name}.{name[:50]}").touch()
    (folder / "a" / f"{name}.png").write_bytes(png(1)[:30])
    return folder


def write_loose(folder: Path, name: str) -> Path:
    (folder / f"1.{name[:50]}").touch()
    return folder


def write_link(folder: Path, name: str) -> Path:
    (folder / name).symlink_to("nowhere")
    return folder


def write_splits(folder: Path, name: str) -> Path:
    for split in ("train", "test"):
        (folder / f"{split} {name}").mkdir()
        (folder / f"{split} {name}" / "1.png").write_bytes(png(1))
    return folder


def write_tars(folder: Path, name: str) -> Path:
    write_tar(
        folder / f"{name[:100]}.tar", {name: {"png": png(1)[:30], name: b"1"}, f"{name}2": {"png": b"", "json": b"1"}}
    )
    return folder


def write_columns(folder: Path, name: str) -> Path:
    made = table([png(1)], [name], None, text=True).rename_columns({"label": f"{name}1", "image": f"{name}2"})
    made.to_parquet(folder / "a.parquet")
    return folder


def write_labels(folder: Path, name: str) -> Path:
    table([png(1), png(2)[:30]], [0, 1], [name, f"{name}2"]).to_parquet(folder / "a.parquet")
    return folder


def write_state(folder: Path, name: str) -> Path:
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name.replace("/", "")}]}))
    return folder


def write_listing(folder: Path, name: str) -> Path:
    Path(folder / "samples.csv").write_text(f'file,seed,class_label\n"{name}.png",1,1\n"{name}.png",2,2\n')
    return folder


def write_original(folder: Path, name: str) -> Path:
    target = {"target": f"ldm.modules.diffusionmodules.openaimodel.{name}", "params": {name: name}}
    (folder / "a.yaml").write_text(yaml.safe_dump({"model": {"a": target, "b": target}}))
    return folder / "a.yaml"


def watch(folder: Path) -> None:
    said = Watcher(folder, folder, steps=10).facts()
    if not all(words.isprintable() and len(words) < 5000 for words in said.values()):
        raise Wrong(str(said))


def write_status(folder: Path, name: str) -> Path:
    (folder / "status.json").write_text(json.dumps({"state": name, "step": name}))
    return folder


PLACES: dict[str, tuple[Callable[[Path, str], Path], Callable[[Path], object], tuple[type[BaseException], ...]]] = {
    "members of a zip archive": (write_zip, read_images, DATA),
    "files of a folder": (write_folder, read_images, DATA),
    "no images": (write_loose, read_images, DATA),
    "a link to nothing": (write_link, read_images, DATA),
    "folders of splits": (write_splits, read_images, DATA),
    "shards of splits": (write_splits, lambda folder: find_files(str(folder)), DATA),
    "members of tar shards": (write_tars, read_stream, DATA),
    "columns": (write_columns, read_stream, DATA),
    "columns by number": (write_columns, lambda folder: read_images(folder, "datasets"), DATA),
    "names of classes": (write_labels, read_stream, DATA),
    "names of classes by number": (write_labels, lambda folder: read_images(folder, "datasets"), DATA),
    "files of a saved set": (write_state, lambda folder: find_files(str(folder)), DATA),
    "a listing": (write_listing, lambda folder: list(open_samples(folder)[0]), (EvaluationError,)),
    "a listing, judged": (write_listing, read_judged, (EvaluationError,)),
    "a target": (write_original, read_original, DATA),
    "captions": (write_folder, lambda folder: read_files([next(folder.glob("*/*.png")).with_suffix(".txt")]), DATA),
    "status.json": (write_status, watch, ()),
}


@pytest.mark.parametrize("kind", NAMES)
@pytest.mark.parametrize("place", PLACES)
def test_names_of_files_and_in_archives_reach_messages_as_one_line(place: str, kind: str, tmp_path: Path) -> None:
    write, door, refusals = PLACES[place]
    name = NAMES[kind].replace("/", "")
    in_files = place in ("files of a folder", "no images", "a link to nothing", "captions") or "splits" in place
    path = write(tmp_path, name[:LONGEST_NAME] if in_files else name[:60_000])
    knock(lambda: door(path), refusals)
