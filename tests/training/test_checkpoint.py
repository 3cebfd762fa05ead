"""A checkpoint is whole or not there; a damaged one is named and passed over, never trained on."""

import errno
import logging
import os
from pathlib import Path
from typing import NoReturn

import pytest
import torch
from safetensors.torch import load_file

from training import checkpoint
from training.checkpoint import (
    CheckpointConfig,
    CheckpointError,
    delete_newer,
    delete_old,
    find_checkpoint,
    list_checkpoints,
    newest_valid,
    optimizer_from_tensors,
    optimizer_to_tensors,
    verify,
    write_checkpoint,
)


def write(folder: Path, step: int) -> Path:
    return write_checkpoint(
        folder, step, {"model": {"w": torch.full((64,), float(step))}}, {"note.txt": "x"}, {"who": 1}
    )


def test_what_was_written_is_read_back_and_verifies(tmp_path: Path) -> None:
    path = write(tmp_path, 7)
    assert path.name == "step-000007"
    manifest = verify(path)
    assert manifest["step"] == 7
    assert manifest["who"] == 1
    assert set(manifest["sha256"]) == {"model.safetensors", "note.txt"}
    assert torch.equal(load_file(path / "model.safetensors")["w"], torch.full((64,), 7.0))
    assert not list(tmp_path.glob(".tmp-*"))


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
        assert newest_valid(tmp_path) == good
    assert str(bad) in caplog.text


def test_all_damaged_is_an_error_and_none_is_none(tmp_path: Path) -> None:
    assert newest_valid(tmp_path) is None
    for step in (1, 2):
        damage(write(tmp_path, step), "flipped")
    with pytest.raises(CheckpointError, match=r"all 2 checkpoints in .* are damaged"):
        newest_valid(tmp_path)


def test_a_run_or_a_checkpoint_is_found_by_its_path(tmp_path: Path) -> None:
    newest = [write(tmp_path / "checkpoints", step) for step in (1, 2)][-1]
    assert find_checkpoint(tmp_path) == newest
    assert find_checkpoint(newest) == newest
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

    monkeypatch.setattr(checkpoint.safetensors.torch, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        write(tmp_path, 2)
    assert [path.name for path in tmp_path.iterdir()] == [good.name]
    verify(good)


def test_checkpoints_after_the_one_that_is_gone_on_from_are_deleted_by_name(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for step in (1, 2, 3):
        write(tmp_path, step)
    delete_newer(tmp_path, 1)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-000001"]
    assert "step-000002" in caplog.text
    assert "step-000003" in caplog.text


def test_an_optimizer_goes_on_in_the_layout_of_its_parameters() -> None:
    torch.manual_seed(0)
    module = torch.nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(module.parameters(), fused=True)
    module(torch.randn(1, 3, 5, 5)).sum().backward()
    optimizer.step()
    names = [name for name, _ in module.named_parameters()]
    saved = optimizer_to_tensors(optimizer, names)
    optimizer_from_tensors(optimizer, names, saved)
    moment = optimizer.state[module.weight]["exp_avg"]
    assert moment.stride() == module.weight.stride()
    assert torch.equal(moment, saved["weight/exp_avg"])


def test_an_optimizer_goes_on_exactly_from_its_tensors() -> None:
    def make() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        module = torch.nn.Linear(5, 3)
        return module, torch.optim.AdamW(module.parameters(), lr=0.1, weight_decay=0.1)

    def step(module: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        module(torch.linspace(-1, 1, 10).view(2, 5)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    (one, optimizer), (other, fresh) = make(), make()
    for _ in range(3):
        step(one, optimizer)
    names = [name for name, _ in one.named_parameters()]
    other.load_state_dict(one.state_dict())
    optimizer_from_tensors(fresh, names, optimizer_to_tensors(optimizer, names))
    for _ in range(3):
        step(one, optimizer)
        step(other, fresh)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    with pytest.raises(CheckpointError, match="a parameter that the model has not: head"):
        optimizer_from_tensors(fresh, names, {"head/exp_avg": torch.zeros(1)})
