"""A checkpoint is whole or not there; a damaged one is named and passed over, never trained on."""

import errno
import hashlib
import io
import json
import logging
import os
import re
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch

import unetgn
from unetgn.training import checkpoint
from unetgn.training.checkpoint import (
    Checkpoint,
    CheckpointConfig,
    TensorFile,
    checkpoint_path,
    delete_old,
    find_checkpoint,
    list_checkpoints,
    mark_best,
    newest_valid,
    put_aside,
    verify,
)
from unetgn.training.errors import CheckpointError
from unetgn.training.files import delete
from unetgn.training.manifest import FORMAT, checksum


def write(folder: Path, step: int) -> Path:
    checkpoint = Checkpoint(
        checkpoint_path(folder, step), step, 2, "images", ema_step=step, scaler=None, window_sums=[[0.5, 1.0]] * 2,
        window_steps=1,
    )  # fmt: skip
    tensors: dict[TensorFile, dict[str, torch.Tensor]] = {"model": {"w": torch.full((64,), float(step))}}
    return checkpoint.write(tensors, config="seed: 1\n", unet_config='{"a": 1}', scheduler_config='{"b": 2}').path


def test_what_was_written_is_read_back_and_verifies(tmp_path: Path) -> None:
    path = write(tmp_path, 7)
    assert path.name == "step-000007"
    checkpoint = verify(path)
    assert checkpoint == Checkpoint.read(path)
    assert (checkpoint.step, checkpoint.world_size, checkpoint.window_sums) == (7, 2, [[0.5, 1.0], [0.5, 1.0]])
    assert set(checkpoint.sha256) == {"model.safetensors", "config.yaml", "config.json", "scheduler_config.json"}
    assert checkpoint.digest("model") == hashlib.sha256((path / "model.safetensors").read_bytes()).hexdigest()
    assert torch.equal(checkpoint.tensors("model")["w"], torch.full((64,), 7.0))
    assert (checkpoint.unet_config(), checkpoint.scheduler_config()) == ({"a": 1}, {"b": 2})
    assert checkpoint.config_file.read_text() == "seed: 1\n"
    assert not list(tmp_path.glob(".tmp-*"))


def change_manifest(path: Path, **changes: object) -> None:
    """Change keys as a stranger would, who makes the checksum right again."""
    manifest = json.loads((path / "manifest.json").read_text()) | changes
    del manifest["manifest_sha256"]
    (path / "manifest.json").write_text(json.dumps(manifest | {"manifest_sha256": checksum(manifest)}))


@pytest.mark.parametrize("number", [0, FORMAT + 1, "2", None])
def test_a_checkpoint_of_another_format_is_refused_by_name_and_never_passed_over(
    number: object, tmp_path: Path
) -> None:
    """A run that passed it over would go on from an older one and delete it."""
    write(tmp_path, 1)
    path = write(tmp_path, 2)
    change_manifest(path, format=number, unetgn_version="7.1")
    message = re.escape(
        f"{path} has format {number!r}, but this is unetgn {unetgn.__version__}, which reads formats 1 to {FORMAT}"
    )
    for look in (verify, find_checkpoint, Checkpoint.read):
        with pytest.raises(CheckpointError, match=message + ": use unetgn 7.1, or a newer one"):
            look(path)
    for look in (newest_valid, find_checkpoint):
        with pytest.raises(CheckpointError, match=message):
            look(tmp_path)


def test_who_may_read_the_folder_may_read_its_files(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        path = write(tmp_path, 7)
    finally:
        os.umask(before)
    assert {oct(file.stat().st_mode & 0o777) for file in path.iterdir()} == {"0o644"}


def damage(path: Path, how: str) -> None:
    file = path / "model.safetensors"
    content = bytearray(file.read_bytes())
    if how == "truncated":
        file.write_bytes(content[: len(content) // 2])
    elif how == "flipped":
        content[-5] ^= 4
        file.write_bytes(content)
    elif how == "missing":
        file.unlink()
    elif how == "no manifest":
        (path / "manifest.json").unlink()
    else:
        (path / "manifest.json").write_text("{")


HOWS = ["truncated", "flipped", "missing", "no manifest", "broken manifest"]


@pytest.mark.parametrize("how", HOWS)
def test_a_damaged_checkpoint_is_passed_over_and_named(
    tmp_path: Path, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    good, bad = write(tmp_path, 1), write(tmp_path, 2)
    damage(bad, how)
    with pytest.raises(CheckpointError, match="step-000002"):
        verify(bad)
    with caplog.at_level(logging.WARNING):
        assert newest_valid(tmp_path) == verify(good)
    assert str(bad) in caplog.text


def test_all_damaged_is_an_error_and_none_is_none(tmp_path: Path) -> None:
    assert newest_valid(tmp_path) is None
    for step in (1, 2):
        damage(write(tmp_path, step), "flipped")
    with pytest.raises(CheckpointError, match=r"all 2 checkpoints in .* are damaged"):
        newest_valid(tmp_path)


def test_a_run_or_a_checkpoint_is_found_by_its_path(tmp_path: Path) -> None:
    newest = [write(tmp_path / "checkpoints", step) for step in (1, 2)][-1]
    assert find_checkpoint(tmp_path).path == newest
    assert find_checkpoint(newest).path == newest
    with pytest.raises(CheckpointError, match="is not there"):
        find_checkpoint(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        find_checkpoint(tmp_path / "empty")


def test_old_checkpoints_go_and_leftovers_of_a_killed_save_too(tmp_path: Path) -> None:
    for step in (100, 9, 20):
        write(tmp_path, step)
    (tmp_path / ".tmp-step-000200").mkdir()
    delete_old(tmp_path, keep=2)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-000020", "step-000100"]
    assert not list(tmp_path.glob(".tmp-*"))
    with pytest.raises(ValueError, match=r"checkpoint\.keep is 0; at least 1 has to stay"):
        CheckpointConfig(keep=0)


def test_a_full_disk_leaves_the_old_checkpoints_and_no_half_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = write(tmp_path, 1)

    def full(*_: object) -> NoReturn:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        write(tmp_path, 2)
    assert [path.name for path in tmp_path.iterdir()] == [good.name]
    verify(good)


def test_checkpoints_after_the_one_that_is_gone_on_from_are_put_aside_until_the_next_one_stands(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for step in (1, 2, 3):
        write(tmp_path, step)
    damage(tmp_path / "step-000002", "flipped")
    (tmp_path / "step-000003.left").mkdir()  # from another time
    put_aside(tmp_path, 1)
    names = ["step-000001", "step-000002.damaged", "step-000003.left", "step-000003.left1"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert verify(tmp_path / "step-000003.left1").step == 3
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-000001"]
    assert "step-000002 is now step-000002.damaged, until" in caplog.text
    write(tmp_path, 2)
    delete_old(tmp_path, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000001", "step-000002"]


@pytest.mark.parametrize("name", ["manifest.json", "model.safetensors"])
@pytest.mark.parametrize("error", [errno.EIO, errno.ESTALE, errno.EACCES])
def test_a_file_that_cannot_be_read_this_time_is_no_damage(
    error: int, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A failed read that counted as damage cost the newest checkpoint."""
    write(tmp_path, 1)
    newest = write(tmp_path, 2)
    real = io.open

    def fail(file: object, *arguments: object, **more: object) -> object:
        if str(file) == str(newest / name):
            raise OSError(error, os.strerror(error), str(file))
        return real(file, *arguments, **more)  # type: ignore[call-overload]

    monkeypatch.setattr(io, "open", fail)
    for look in (newest_valid, find_checkpoint):
        with pytest.raises(OSError, match=re.escape(os.strerror(error))):
            look(tmp_path)
    assert len(list_checkpoints(tmp_path)) == 2


@pytest.mark.parametrize("moment", ["read", "sha256"])
@pytest.mark.parametrize("asked", ["checkpoints/best", "checkpoints", "."])
def test_a_checkpoint_that_is_deleted_while_it_is_looked_at_makes_way_for_the_one_that_came(
    asked: str, moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run goes on meanwhile: it has a better or a newer one, and keeps no other."""
    folder = tmp_path / "checkpoints"
    write(folder, 3)
    mark_best(folder, folder / "step-000003")
    owner, name = (Checkpoint, "read") if moment == "read" else (checkpoint, "sha256")
    original, seen = getattr(owner, name), list[object]()

    def go_on(*arguments: Any) -> Any:
        seen.append(arguments)
        if len(seen) == 1:
            write(folder, 4)
            mark_best(folder, folder / "step-000004")
            delete(folder / "step-000003")
        return original(*arguments)

    monkeypatch.setattr(owner, name, go_on)
    assert find_checkpoint(tmp_path / asked).path.name == "step-000004"


def test_a_checkpoint_that_is_deleted_after_it_was_found_is_said_to_be(tmp_path: Path) -> None:
    found = find_checkpoint(write(tmp_path, 3))
    delete(found.path)
    for read in (lambda: found.tensors("model"), found.unet_config, found.scheduler_config, lambda: found.config_file):
        with pytest.raises(CheckpointError, match=r"step-000003 has been deleted since it was found, by a run that"):
            read()
