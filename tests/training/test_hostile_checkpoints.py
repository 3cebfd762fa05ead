"""What a stranger or a bad disk may put into a checkpoint ends in one line, before anything is changed."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.training.runs import assert_same_tensors
from tests.training.test_checkpoint import change_manifest, write
from tests.training.test_step import batches
from unetgn import UNet
from unetgn.training.checkpoint import Checkpoint, checkpoint_path, newest_valid, verify
from unetgn.training.config import EMAConfig, TrainConfig
from unetgn.training.errors import CheckpointError, Diverged
from unetgn.training.network import load_checkpoint
from unetgn.training.objective import Objective, ObjectiveConfig
from unetgn.training.step import TrainState


def test_every_bit_of_a_manifest_counts(tmp_path: Path) -> None:
    path = write(tmp_path, 7)
    file = path / "manifest.json"
    whole, known = file.read_bytes(), Checkpoint.read(path)
    passed = []
    for bit in range(0, 8 * len(whole), 7):  # each bit of a byte in turn
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        file.write_bytes(flipped)
        try:
            read = Checkpoint.read(path)
        except CheckpointError as error:
            passed += [bit] if "\n" in str(error) else []
        else:
            passed += [bit] if read != known else []
    assert passed == []


VALUES: dict[str, Any] = {
    "list": [],
    "object": {},
    "null": None,
    "true": True,
    "text": "7",
    "negative": -2,
    "fraction": 0.5,
    "huge": 10**400,
    "infinite": float("inf"),
    "nested": [[[[1]]]],
    "long": "x" * 10_000,
}
SOUND = {("images", "text"), ("images", "long"), ("torch_version", "text"), ("torch_version", "long"),
         ("unetgn_version", "text"), ("unetgn_version", "long"), ("scaler", "null"), ("scaler", "object"),
         ("window_sums", "list")}  # fmt: skip
KEYS = ["step", "world_size", "images", "ema_step", "scaler", "window_sums", "window_steps", "torch_version",
        "unetgn_version", "sha256"]  # fmt: skip


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("key", KEYS)
def test_a_manifest_that_is_right_in_itself_is_still_looked_at(key: str, value: str, tmp_path: Path) -> None:
    good, bad = write(tmp_path, 6), write(tmp_path, 7)
    change_manifest(bad, **{key: VALUES[value]})
    if (key, value) in SOUND:
        assert verify(bad).step == 7
        return
    with pytest.raises(CheckpointError) as caught:
        verify(bad)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500 + len(str(bad))
    found = newest_valid(tmp_path)
    assert found is not None
    assert found.path == good


CONTENTS: dict[str, bytes] = {
    "nothing": b"",
    "a string": b'"manifest"',
    "a list": b"[]",
    "null": b"null",
    "deep": b"[" * 200_000,
    "deep objects": b'{"a":' * 200_000,
    "no end": b'{"step": 7',
    "1e999": b'{"step": 1e999}',
    "many digits": b'{"step": ' + b"9" * 100_000 + b"}",
    "not UTF-8": b'{"step": "\xff"}',
    "large": b'{"step": "' + b" " * 2**21 + b'"}',
    "no keys": b"{}",
    "another file": b'{"format": 3}',
}


@pytest.mark.parametrize("content", CONTENTS)
@pytest.mark.parametrize("name", ["manifest.json", "config.json", "scheduler_config.json"])
def test_a_file_with_anything_in_it_is_one_line_and_passed_over(name: str, content: str, tmp_path: Path) -> None:
    good, bad = write(tmp_path, 6), write(tmp_path, 7)
    (bad / name).write_bytes(CONTENTS[content])
    with pytest.raises(CheckpointError) as caught:
        verify(bad)
    assert "\n" not in str(caught.value)
    found = newest_valid(tmp_path)
    assert found is not None
    assert found.path == good
    if name == "manifest.json" or content in ("no keys", "another file"):
        return
    seal(bad, name)  # as a stranger would
    checkpoint = verify(bad)
    with pytest.raises(CheckpointError) as caught:
        (checkpoint.unet_config if name == "config.json" else checkpoint.scheduler_config)()
    assert "\n" not in str(caught.value)


def seal(path: Path, name: str) -> None:
    """Make the manifest say of a file what is in it now."""
    sums = json.loads((path / "manifest.json").read_text())["sha256"]
    change_manifest(path, sha256=sums | {name: hashlib.sha256((path / name).read_bytes()).hexdigest()})


@pytest.mark.parametrize("kind", ["pipe", "folder", "link to nothing"])
def test_a_manifest_that_is_no_file_is_passed_over(kind: str, tmp_path: Path) -> None:
    good, bad = write(tmp_path, 6), write(tmp_path, 7)
    file = bad / "manifest.json"
    file.unlink()
    {"pipe": os.mkfifo, "folder": Path.mkdir, "link to nothing": lambda file: file.symlink_to("nowhere")}[kind](file)
    found = newest_valid(tmp_path)
    assert found is not None
    assert found.path == good


def test_a_step_that_is_not_the_folders_is_damage(tmp_path: Path) -> None:
    path = write(tmp_path, 7)
    change_manifest(path, step=3)
    with pytest.raises(CheckpointError, match=r"step-000007 is damaged: manifest.json says that it is of step 3"):
        verify(path)


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "a/b", "", ".", "other.safetensors"])
def test_a_manifest_names_files_of_checkpoints_alone(name: str, tmp_path: Path) -> None:
    path = write(tmp_path, 7)
    change_manifest(path, sha256={name: "0" * 64})
    with pytest.raises(CheckpointError, match=r"is damaged: manifest\.json"):
        verify(path)


def trained(steps: int = 2) -> TrainState:
    torch.manual_seed(0)
    unet = UNet(in_channels=1, out_channels=1, channels=[8], attention_levels=[], depth=1, norm={"num_groups": 4})
    config = TrainConfig(steps=20, learning_rate=1e-2)
    state = TrainState(unet, Objective(ObjectiveConfig(), None), config, EMAConfig(), Accelerator(cpu=True), seed=0)
    for batch in batches(steps, 4):
        state.run_step([batch])
    return state


def save(state: TrainState, folder: Path) -> Checkpoint:
    path = checkpoint_path(folder, state.step)
    facts = {"ema_step": state.ema.optimization_step, "scaler": None, "window_sums": [[0.0, 0.0]], "window_steps": 0}
    checkpoint = Checkpoint(path, state.step, 1, "images", **facts)  # type: ignore[arg-type]
    scheduler = state.objective.scheduler.to_json_string()
    return checkpoint.write(state.tensors(), config="", unet_config=state.config_json, scheduler_config=scheduler)


Edit = Callable[[dict[str, Tensor], str], object]
EDITS: dict[str, Edit] = {
    "missing": lambda tensors, name: tensors.pop(name),
    "too many": lambda tensors, name: tensors.update({f"{name}.more": tensors[name].clone()}),
    "one number": lambda tensors, name: tensors.update({name: torch.zeros(1)}),
    "a scalar": lambda tensors, name: tensors.update({name: torch.tensor(1.0).double()}),
    "empty": lambda tensors, name: tensors.update({name: tensors[name].flatten()[:0].clone()}),
    "larger": lambda tensors, name: tensors.update({name: torch.cat([tensors[name].flatten()] * 2)}),
    "as many numbers": lambda tensors, name: tensors.update({name: tensors[name][None].contiguous()}),
    "half precision": lambda tensors, name: tensors.update({name: tensors[name].half()}),
    "integers": lambda tensors, name: tensors.update({name: tensors[name].long()}),
    "NaN": lambda tensors, name: tensors[name].flatten()[-1:].fill_(float("nan")),
    "infinite": lambda tensors, name: tensors[name].flatten()[-1:].fill_(float("inf")),
    "negative": lambda tensors, name: tensors[name].flatten()[-1:].fill_(-1.0),
    "none at all": lambda tensors, name: tensors.clear(),
}
PLACES = {
    "model": "mid.first.norm1.weight",
    "ema": "mid.first.norm1.weight",
    "optimizer": "exp_avg",
    "optimizer, squares": "exp_avg_sq",
    "optimizer, steps": "step",
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(trained(), tmp_path_factory.mktemp("saved")).path


@pytest.fixture(scope="module")
def state() -> TrainState:
    """A state that each refusal has to leave as it is."""
    return trained(1)


def copies(state: TrainState) -> dict[str, Tensor]:
    return {f"{kind} {key}": value.clone() for kind, held in state.tensors().items() for key, value in held.items()}


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("place", PLACES)
def test_a_strangers_tensors_are_refused_before_anything_is_changed(
    place: str, edit: str, saved: Path, state: TrainState, tmp_path: Path
) -> None:
    name = place.partition(",")[0]
    path = Path(shutil.copytree(saved, tmp_path / saved.name))
    file = path / f"{name}.safetensors"
    tensors = load_file(file)
    edited = next(key for key in tensors if key.endswith(PLACES[place]) or (name != "optimizer" and "norm" in key))
    EDITS[edit](tensors, edited)
    save_file(tensors, file)
    seal(path, file.name)
    checkpoint = verify(path)
    if edit == "negative" and place in ("model", "ema", "optimizer"):
        trained(1).restore(checkpoint)
        return
    before = copies(state)
    with pytest.raises(CheckpointError) as caught:
        state.restore(checkpoint)
    assert file.name in str(caught.value)
    assert "\n" not in str(caught.value)
    assert state.step == 1
    assert_same_tensors(copies(state), before)
    if name != "optimizer":
        with pytest.raises(CheckpointError, match=file.name):
            load_checkpoint(checkpoint, name)  # type: ignore[arg-type]


def test_an_average_that_is_not_finite_is_neither_lent_nor_loaded(tmp_path: Path) -> None:
    state = trained()
    state.ema.shadow_params[3].flatten()[0] = float("nan")
    with pytest.raises(Diverged, match=r"after step 2 the averaged weights are not finite: "), state.averaged():
        pass
    with pytest.raises(CheckpointError, match=r"ema.safetensors: .* holds numbers that are not finite"):
        load_checkpoint(save(state, tmp_path), "ema")


LARGE = [{"channels": [10**9]}, {"channels": [10**6]}, {"depth": 10**6}, {"depth": "1"}, {"in_channels": -1}]


@pytest.mark.parametrize("changes", LARGE)
def test_a_configuration_of_any_size_takes_no_memory(changes: dict[str, Any], saved: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(saved, tmp_path / saved.name))
    keys = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(keys | changes))
    seal(path, "config.json")
    with pytest.raises(CheckpointError, match=r"ema\.safetensors is of another network|describes no network"):
        load_checkpoint(verify(path), "ema")
