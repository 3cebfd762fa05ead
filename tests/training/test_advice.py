"""What error messages advise, carried out word for word."""

import errno
import fcntl
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from tests.training.launched import SIX_STEPS
from tests.training.shards import png, table, write_tar
from unetgn import interop
from unetgn.interop.files import read_checkpoint
from unetgn.training.config import RunConfig
from unetgn.training.config_files import check_key, known_keys, list_keys, make_parser
from unetgn.training.errors import RunDirectoryError
from unetgn.training.resume import flat
from unetgn.training.run_directory import RunDirectory
from unetgn.training.train import main

TINY = """
model: {channels: [8, 16], depth: 1, attention_levels: [], num_classes: 3, norm: {num_groups: 4}}
objective: {label_dropout: 0.2}
data: {name: folder, image_size: 8}
train: {steps: 1, batch_size: 2, trackers: []}
preview: {every: 0}
"""


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache of `datasets`, for this test alone."""
    pytest.importorskip("datasets")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def advised(message: str) -> list[str]:
    """The `key=value` of a message; of alternatives the first."""
    message = message.split(", or ")[0]
    quoted = re.findall(r"'((?:data|model)\.\w+=[^']*)'", message)
    return quoted or re.findall(r"(?<![\w.])(?:model|data|objective|train)\.[\w.]+=[^\s,;:]+", message)


def follow(line: list[str], capsys: pytest.CaptureFixture[str], rounds: int = 2) -> str:
    """Start a dry run, and again with what it advises, until it is content; return what it said first."""
    capsys.readouterr()  # what was said before is not its own
    first = ""
    for _ in range(rounds + 1):
        code = main([*line, "--dry-run"])
        said = capsys.readouterr().err
        first = first or said
        if code == 0:
            return first
        assert code == 2
        assert advised(said), f"no advice in: {said}"
        line = [*line, *advised(said)]
    raise AssertionError(f"after {line} it still says: {said}")


def write_image(file: Path, colour: tuple[int, int, int] = (9, 9, 9)) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), colour).save(file)


def flat_folder(root: Path) -> list[str]:
    write_image(root / "a.png")
    return []


def two_classes(root: Path) -> list[str]:
    for name in ("cat", "dog"):
        write_image(root / name / "a.png")
    return []


def colours(root: Path) -> list[str]:
    for name in ("a", "b", "c"):
        write_image(root / name / "a.png", (200, 0, 0))
    return ["model.in_channels=1", "model.out_channels=1"]


def grey_for_three(root: Path) -> list[str]:
    for name in ("a", "b", "c"):
        write_image(root / name / "a.png")
    return ["data.to_grey=true"]


def splits(root: Path) -> list[str]:
    for name in ("train/a", "train/b", "train/c", "val/a"):
        write_image(root / name / "a.png")
    return []


def saved(root: Path, columns: dict[str, list[Any]], **casts: Any) -> list[str]:
    import datasets

    data = datasets.Dataset.from_dict(columns)
    images = [name for name in ("image", "picture") if name in columns]
    for name, feature in {**{name: datasets.Image() for name in images}, **casts}.items():
        data = data.cast_column(name, feature)
    data.save_to_disk(root)
    return ["data.name=datasets"]


def images(count: int = 3) -> list[dict[str, Any]]:
    return [{"bytes": png(i), "path": None} for i in range(count)]


def another_label_column(root: Path) -> list[str]:
    import datasets

    names = datasets.ClassLabel(names=["a", "b", "c"])
    columns = {"image": images(), "caption": ["x", "y", "z"], "width": [8, 8, 8], "fine": [0, 1, 2]}
    return saved(root, columns, fine=names)


def another_image_column(root: Path) -> list[str]:
    return saved(root, {"picture": images(), "label": [0, 1, 2]})


def no_label_column(root: Path) -> list[str]:
    return saved(root, {"image": images()})


def texts(root: Path) -> list[str]:
    return saved(root, {"image": images(), "label": ["dog", "cat", "dog"]})


def counted_from_one(root: Path) -> list[str]:
    return saved(root, {"image": images(), "label": [1, 2, 3]})


def floats(root: Path) -> list[str]:
    return saved(root, {"image": images(), "label": [0.0, 1.0, 3.0]})


def data_set_of_splits(root: Path) -> list[str]:
    import datasets

    both = datasets.DatasetDict({"train": table([png(1)] * 3, [0, 1, 2])})
    both.save_to_disk(root)
    return ["data.name=datasets"]


def tars(root: Path, label: dict[str, bytes]) -> list[str]:
    root.mkdir()
    write_tar(root / "0.tar", {f"{i}": {"png": png(i), **label} for i in range(3)})
    return ["data.name=stream"]


def tar_by_number(root: Path) -> list[str]:
    tars(root, {"cls": b"0"})
    return ["data.name=datasets"]


def tar_of_texts(root: Path) -> list[str]:
    return tars(root, {"cls": b"cat"})


def tar_with_another_key(root: Path) -> list[str]:
    return tars(root, {"json": b'{"animal": 2}'})


def tar_without_labels(root: Path) -> list[str]:
    return tars(root, {})


def split_files(root: Path) -> list[str]:
    root.mkdir()
    for name in ("set-train-0.tar", "set-val-0.tar"):
        write_tar(root / name, {"a": {"png": png(1), "cls": b"0"}})
    return ["data.name=stream"]


def split_folders_of_files(root: Path) -> list[str]:
    for name in ("train", "test"):
        (root / name).mkdir(parents=True)
        write_tar(root / name / "0.tar", {"a": {"png": png(1), "cls": b"0"}})
    return ["data.name=stream"]


CAUSES: list[Callable[[Path], list[str]]] = [
    flat_folder, two_classes, colours, grey_for_three, splits, another_label_column, another_image_column,
    no_label_column, texts, counted_from_one, floats, data_set_of_splits, tar_by_number, tar_of_texts,
    tar_with_another_key, tar_without_labels, split_files, split_folders_of_files,
]  # fmt: skip
HAVE_NO_CLASSES = {flat_folder, no_label_column, tar_without_labels}


@pytest.mark.parametrize("cause", CAUSES)
def test_what_is_advised_about_data_is_taken(
    cause: Callable[[Path], list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Classes are given up only where there are none."""
    (tmp_path / "tiny.yaml").write_text(TINY)
    keys = cause(tmp_path / "set")
    said = follow(["--config", str(tmp_path / "tiny.yaml"), "--output", str(tmp_path / "run"),
                   f"data.path={tmp_path / 'set'}", *keys], capsys)  # fmt: skip
    assert ("num_classes=null" in said) == (cause in HAVE_NO_CLASSES)
    assert said.count("train.py: error:") == 1


def test_every_line_of_the_help_is_a_key_that_is_taken() -> None:
    keys = re.findall(r"^  ([\w.]+)=", list_keys(), flags=re.MULTILINE)
    assert "  --" not in list_keys()
    assert set(keys) == {key for key, about in known_keys().items() if not about.group or about.optional}
    values = flat(RunConfig())
    line = {key: values[key] for key in keys if key in values}
    for key, value in line.items():
        check_key("command line", key, "null" if value is None else str(value))
    parsed = make_parser().parse_args([f"--{key}={written(value)}" for key, value in line.items()])
    assert RunConfig(**vars(make_parser().instantiate(parsed))) == RunConfig()


def written(value: Any) -> str:
    """A value as it is written on the command line."""
    return "null" if value is None else str(list(value)) if isinstance(value, tuple) else str(value)


def test_a_resume_with_another_configuration_is_told_how_to_take_the_weights(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(finished, tmp_path / "run")
    (tmp_path / "tiny.yaml").write_text(SIX_STEPS)
    for resume in ("auto", str(tmp_path / "run")):
        line = ["--config", str(tmp_path / "tiny.yaml"), "--output", str(tmp_path / "run"), "--dry-run"]
        line += ["--resume", resume]
        assert main([*line, "train.learning_rate=1e-4"]) == 2
        said = capsys.readouterr().err
        options = re.search(r"with these weights: (.*) and another --output", said)
        assert options is not None
        again = [*line, "train.learning_rate=1e-4", *options[1].split(), "--output", str(tmp_path / "another")]
        assert main(again) == 0


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL])
def test_a_file_system_without_locks_is_not_taken_for_another_run(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = fcntl.lockf

    def without(file: Any, *rest: int) -> None:
        if "network" in file.name:
            raise OSError(number, os.strerror(number))
        real(file, *rest)

    monkeypatch.setattr(fcntl, "lockf", without)
    with pytest.raises(RunDirectoryError, match="cannot be locked") as refused:
        RunDirectory(tmp_path / "network" / "run").lock()
    assert "another run" not in str(refused.value)
    assert "Give a folder on another file system" in str(refused.value)
    assert not (tmp_path / "network" / "run").exists()
    RunDirectory(tmp_path / "local" / "run").lock()


@pytest.mark.parametrize("number", [errno.EACCES, errno.EAGAIN])
def test_a_lock_that_is_held_is(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def held(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "lockf", held)
    with pytest.raises(RunDirectoryError, match="is in use by another run"):
        RunDirectory(tmp_path / "run").lock()


@pytest.mark.parametrize("name", ["weights/adm.pt", "a b/x'y.ckpt", "model.bin", "half.safetensors", "x.v1.pth"])
@pytest.mark.parametrize("nested", [False, True])
def test_a_pickle_is_converted_as_its_error_says(
    nested: bool, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two of its tensors share their memory, which safetensors refuses."""
    monkeypatch.chdir(tmp_path)
    state = {"a": torch.arange(6.0).reshape(2, 3).T, "b": torch.ones(2)}
    state["c"] = state["b"]
    Path(name).parent.mkdir(exist_ok=True)
    torch.save({"state_dict": state, "step": 3} if nested else state, name)
    with pytest.raises(ValueError, match="A pickle runs any code") as refused:
        read_checkpoint(name)
    first, *lines = str(refused.value).splitlines()
    exec("\n".join(line.strip() for line in lines), {})
    converted = re.search(r"give (['\"])(.*)\1:$", first)
    assert converted is not None
    found = read_checkpoint(converted[2])
    assert found.keys() == state.keys()
    assert all(torch.equal(found[key], state[key]) for key in state)


def test_a_damaged_file_is_not_taken_for_a_pickle(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"a": torch.ones(100)}, tmp_path / "a.safetensors")
    (tmp_path / "a.safetensors").write_bytes((tmp_path / "a.safetensors").read_bytes()[:100])
    with pytest.raises(ValueError, match=r"damaged .*: copy or download it again") as refused:
        read_checkpoint(tmp_path / "a.safetensors")
    assert "pickle" not in str(refused.value)


def test_the_argument_that_names_the_original_class_is_called_as_it_is(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"a": torch.ones(1)}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="give DhariwalUNet or SongUNet as class_name"):
        interop.load("edm", tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="give DhariwalUNet or SongUNet as 'class'"):
        interop.convert("edm", {}, {})
