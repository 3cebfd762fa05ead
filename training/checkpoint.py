"""Checkpoints: everything that a run needs to go on exactly, in safetensors and JSON, whole or not there at all.

A checkpoint is a folder, written under a temporary name with a manifest of its files' sha256, flushed to the disk, then
renamed. Nothing in it is a pickle. What is random needs no saving: it is a function of the step (data/samples.py).
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.optim import Optimizer

from training.sharding import part_of

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
TEMPORARY = ".tmp-"


@dataclass(frozen=True)
class CheckpointConfig:
    """How many checkpoints are kept."""

    keep: int = 2
    """The newest this many stay; an older one is deleted only after a newer one stands. At least 1."""

    def __post_init__(self) -> None:
        if self.keep < 1:
            raise ValueError(f"checkpoint.keep is {self.keep}; at least 1 has to stay")


class CheckpointError(Exception):
    """A checkpoint that is missing, incomplete or damaged; the message says which and how."""


def write_checkpoint(
    folder: Path, step: int, tensors: dict[str, dict[str, Tensor]], texts: dict[str, str], facts: dict[str, Any]
) -> Path:
    """Write folder/step-NNNNNN with NAME.safetensors for each of `tensors`, the `texts`, and a manifest with `facts`.

    Returns its path. When the disk is full (OSError) or the process dies, no folder of that name appears and the older
    checkpoints are as they were.
    """
    final, unfinished = folder / f"step-{step:06d}", folder / f"{TEMPORARY}step-{step:06d}"
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        for name, contents in tensors.items():
            path = unfinished / f"{name}.safetensors"
            safetensors.torch.save_file(contents, path)
            path.chmod(unfinished.stat().st_mode & 0o666)  # it is the owner's alone otherwise, whatever the umask
        for file, text in texts.items():
            (unfinished / file).write_text(text)
        files = {path.name: sha256(path) for path in sorted(unfinished.iterdir())}
        manifest = {"step": step, **facts, "sha256": files}
        (unfinished / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
        for path in (*unfinished.iterdir(), unfinished):
            flush(path)
    except BaseException as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        if isinstance(error, SafetensorError):  # how safetensors says that the system refused to write
            raise OSError(f"{final} could not be written: {error}") from error
        raise
    if final.exists():  # damaged, or the run would have gone on from it
        shutil.rmtree(final)
    unfinished.rename(final)
    flush(folder)
    return final


def delete_old(folder: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints, and what a killed save left behind."""
    for path in folder.glob(f"{TEMPORARY}*"):
        shutil.rmtree(path, ignore_errors=True)
    for path in list_checkpoints(folder)[:-keep]:
        delete(path)


def delete_newer(folder: Path, step: int) -> None:
    """Delete the checkpoints after `step`, naming them: the run that now goes on from `step` is another one."""
    for path in list_checkpoints(folder):
        if int(path.name.removeprefix("step-")) > step:
            logger.warning("deleting %s, since the run goes on from step %d", path, step)
            delete(path)


def delete(path: Path) -> None:
    """Delete a checkpoint, renamed first: half a checkpoint is never seen as one."""
    condemned = path.with_name(TEMPORARY + path.name)
    path.rename(condemned)
    shutil.rmtree(condemned, ignore_errors=True)


def list_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints in the folder by step, oldest first, good or bad."""
    found = [path for path in folder.glob("step-*") if path.is_dir() and path.name.removeprefix("step-").isdigit()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def read_manifest(path: Path) -> dict[str, Any]:
    """The checkpoint's manifest, its files taken on trust: for one that was verified before. Raises CheckpointError."""
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        dict(manifest["sha256"])
        int(manifest["step"])
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is no checkpoint: it has no {MANIFEST}") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged: {MANIFEST} cannot be read ({error})") from error
    return manifest


def verify(path: Path) -> dict[str, Any]:
    """The checkpoint's manifest, after every file was compared with it. Raises CheckpointError."""
    manifest = read_manifest(path)
    for name, digest in manifest["sha256"].items():
        if not (path / name).is_file():
            raise CheckpointError(f"{path} is damaged: {name} is missing")
        if sha256(path / name) != digest:
            raise CheckpointError(f"{path} is damaged: {name} is not what was written (its sha256 differs)")
    return manifest


def newest_valid(folder: Path) -> Path | None:
    """The newest checkpoint in `folder` that verifies, naming each newer one that does not; None where there is none.

    Raises CheckpointError where there are checkpoints and all are damaged: starting afresh would hide the loss.
    """
    checkpoints = list_checkpoints(folder)
    for path in reversed(checkpoints):
        try:
            verify(path)
        except CheckpointError as error:
            logger.warning("passing over a checkpoint: %s", error)
        else:
            return path
    if checkpoints:
        raise CheckpointError(f"all {len(checkpoints)} checkpoints in {folder} are damaged; nothing to go on from")
    return None


def find_checkpoint(path: Path) -> Path:
    """The checkpoint that a path means: itself, or the newest valid one of a run's folder. Raises CheckpointError."""
    wanted = "give a run's folder or one of its checkpoints/step-… folders"
    if not path.is_dir():
        raise CheckpointError(f"{path} is {'a file' if path.exists() else 'not there'}; {wanted}")
    if (path / MANIFEST).is_file() or path.name.startswith("step-"):
        verify(path)
        return path
    found = newest_valid(path) or newest_valid(path / "checkpoints")
    if found is None:
        raise CheckpointError(f"{path} holds no checkpoint; {wanted}")
    return found


def optimizer_to_tensors(optimizer: Optimizer, names: Iterable[str]) -> dict[str, Tensor]:
    """The optimizer's state as {parameter name/state name: tensor}; `names` in the order of its parameters."""
    state = optimizer.state_dict()["state"]
    return {
        f"{name}/{key}": torch.as_tensor(value)
        for number, name in enumerate(names)
        for key, value in state.get(number, {}).items()
    }


def optimizer_from_tensors(optimizer: Optimizer, names: Iterable[str], tensors: dict[str, Tensor]) -> None:
    """Put back what `optimizer_to_tensors` gave, whole; a rank that has a part of a parameter takes its part of them.

    Raises CheckpointError where parameters differ.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    number = {name: i for i, name in enumerate(names)}
    state: dict[int, dict[str, Tensor]] = {}
    for full_name, tensor in tensors.items():
        name, _, key = full_name.rpartition("/")
        if name not in number:
            raise CheckpointError(f"the checkpoint's optimizer has a parameter that the model has not: {name}")
        parameter = parameters[number[name]]
        of_elements = tensor.shape == parameter.shape and key != "step"
        state.setdefault(number[name], {})[key] = part_of(tensor, parameter) if of_elements else tensor.clone()
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    for parameter, values in optimizer.state.items():  # a fused optimizer pairs them by place in memory: same layout
        for key, value in values.items():
            if value.shape == parameter.shape:
                values[key] = torch.empty_like(parameter).copy_(value)


def sha256(path: Path) -> str:
    """Hexadecimal sha256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def flush(path: Path) -> None:
    """Have the disk, not its cache, hold the file or the folder's list of names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
