"""Writes and reads checkpoints: everything that a run needs to go on exactly, in safetensors and JSON.

A checkpoint is a folder, whole or not there at all, with a manifest that has the sha256 of its files. Nothing in it is
a pickle. What is random needs no saving: it is a function of the step (training/data/samples.py).
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from training.errors import CheckpointError, CheckpointFormatError
from training.files import delete, delete_unfinished, sha256, writing
from unetgn import __version__

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
FORMAT = 2  # of what is written; format 1 has no number in its manifest, and the configuration's keys of its time
CHECKPOINTS = "checkpoints"  # where a run's folder has them
PREFIX = "step-"

TensorFile = Literal["model", "ema", "optimizer"]
CONFIG, UNET_CONFIG, SCHEDULER_CONFIG = "config.yaml", "config.json", "scheduler_config.json"


@dataclass(frozen=True)
class CheckpointConfig:
    """Sets how often a checkpoint is made, and how many are kept."""

    every: int = 1000
    """Steps between two checkpoints; the last step always makes one."""
    keep: int = 2
    """The newest this many stay; an older one is deleted only after a newer one stands. At least 1."""

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ValueError(f"checkpoint.every is {self.every}; it must be at least 1")
        if self.keep < 1:
            raise ValueError(f"checkpoint.keep is {self.keep}; at least 1 has to stay")


@dataclass(frozen=True)
class Checkpoint:
    """Says what is in a checkpoint: the fields of its manifest, and by its methods what the other files hold.

    These are `model`, `ema` (the averaged weights) and `optimizer`, each .safetensors with whole tensors, and the
    configurations: of the run (config.yaml), of the network (config.json) and of its noise (scheduler_config.json).
    """

    path: Path
    step: int
    """Steps that were made."""
    world_size: int
    """Processes that made them."""
    images: str
    """Fingerprint of the images that they were made with."""
    ema_step: int
    """Steps that the average of the weights counted."""
    scaler: dict[str, Any] | None
    """State of float16's loss scale; None without one."""
    window_sums: list[list[float]]
    """Sums of loss and gradient norm since the last row of the log, for each rank."""
    window_steps: int
    """Steps in these sums."""
    torch_version: str = str(torch.__version__)
    unetgn_version: str = __version__
    sha256: dict[str, str] = field(default_factory=dict)
    """Of each other file, by its name."""

    @classmethod
    def read(cls, path: Path) -> Checkpoint:
        """Read the manifest, and take the other files on trust: for one that was verified before.

        Raises CheckpointError where it is missing or damaged, CheckpointFormatError where it has another format.
        """
        try:
            keys = json.loads((path / MANIFEST).read_text())
            number = keys.pop("format", 1)
            if number in (1, FORMAT):
                checkpoint = cls(path=path, **(from_format_1(keys) if number == 1 else keys))
                dict(checkpoint.sha256), int(checkpoint.step)
                return checkpoint
        except FileNotFoundError as error:
            raise CheckpointError(f"{path} is no checkpoint: it has no {MANIFEST}") from error
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{path} is damaged: {MANIFEST} cannot be read ({error})") from error
        writer = f"unetgn {keys['unetgn_version']}" if "unetgn_version" in keys else "the unetgn that wrote it"
        raise CheckpointFormatError(
            f"{path} has format {number}, but this is unetgn {__version__}, which reads formats 1 to {FORMAT}: use "
            f"{writer}, or a newer one"
        )

    def write(
        self, tensors: Mapping[TensorFile, dict[str, Tensor]], *, config: str, unet_config: str, scheduler_config: str
    ) -> Checkpoint:
        """Write the checkpoint to its path, and return it with the sha256 of its files.

        When the disk is full (OSError) or the process dies, no folder of that name appears and the older checkpoints
        are as they were.
        """
        texts = {CONFIG: config, UNET_CONFIG: unet_config, SCHEDULER_CONFIG: scheduler_config}
        try:
            with writing(self.path) as unfinished:
                unfinished.mkdir()
                for name, contents in tensors.items():
                    file = unfinished / f"{name}.safetensors"
                    save_file(contents, file)
                    file.chmod(unfinished.stat().st_mode & 0o666)  # else the owner's alone, whatever the umask
                for text_name, text in texts.items():
                    (unfinished / text_name).write_text(text)
                written = replace(self, sha256={file.name: sha256(file) for file in sorted(unfinished.iterdir())})
                manifest = {"format": FORMAT, **asdict(written)}
                del manifest["path"]
                (unfinished / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
        except SafetensorError as error:  # how safetensors says that the system refused to write
            raise OSError(f"{self.path} could not be written: {error}") from error
        return written

    def tensors(self, name: TensorFile) -> dict[str, Tensor]:
        """Read one of the files of tensors, onto the CPU."""
        return load_file(self.path / f"{name}.safetensors")

    def digest(self, name: TensorFile) -> str:
        """Return the sha256 of one of the files of tensors."""
        return self.sha256[f"{name}.safetensors"]

    @property
    def config_file(self) -> Path:
        """Holds the run's whole configuration, for `training.config_files.load_config`."""
        return self.path / CONFIG

    def unet_config(self) -> dict[str, Any]:
        """Read the network's configuration, for `UNet.from_config`."""
        return json.loads((self.path / UNET_CONFIG).read_text())

    def scheduler_config(self) -> dict[str, Any]:
        """Read the configuration of the scheduler that adds the noise, for `DDPMScheduler.from_config`."""
        return json.loads((self.path / SCHEDULER_CONFIG).read_text())


def from_format_1(keys: dict[str, Any]) -> dict[str, Any]:
    """Translate the manifest of format 1, which had no versions of ours and its numbers in two groups."""
    counters, window = keys["counters"], keys["window"]
    return {
        "step": keys["step"],
        "world_size": keys["world_size"],
        "images": keys["images"],
        "ema_step": counters["ema_step"],
        "scaler": counters["scaler"],
        "window_sums": window["sums"],
        "window_steps": window["steps"],
        "torch_version": keys["torch"],
        "unetgn_version": "0.1.0",
        "sha256": keys["sha256"],
    }


def checkpoint_path(folder: Path, step: int) -> Path:
    """Name the checkpoint of a step in a folder of checkpoints."""
    return folder / f"{PREFIX}{step:06d}"


def list_checkpoints(folder: Path) -> list[Path]:
    """List the checkpoints in a folder by step, oldest first, good or bad."""
    found = [path for path in folder.glob(f"{PREFIX}*") if path.is_dir() and path.name.removeprefix(PREFIX).isdigit()]
    return sorted(found, key=step_of)


def step_of(path: Path) -> int:
    """Read the step from the name of a checkpoint."""
    return int(path.name.removeprefix(PREFIX))


def delete_old(folder: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints, and what a killed save left behind."""
    delete_unfinished(folder)
    for path in old(list_checkpoints(folder), keep):
        delete(path)


def old(checkpoints: list[Path], keep: int) -> list[Path]:
    """List those that `delete_old` deletes, of checkpoints by step."""
    return checkpoints[:-keep]


def newer(folder: Path, step: int) -> list[Path]:
    """List the checkpoints after `step`."""
    return [path for path in list_checkpoints(folder) if step_of(path) > step]


def delete_newer(folder: Path, step: int) -> None:
    """Delete the checkpoints after `step`, naming them: the run that now goes on from `step` is another one."""
    for path in newer(folder, step):
        logger.warning("deleting %s, since the run goes on from step %d", path, step)
        delete(path)


def verify(path: Path) -> Checkpoint:
    """Read a checkpoint's manifest and compare every file with it. Raises CheckpointError."""
    checkpoint = Checkpoint.read(path)
    for name, known in checkpoint.sha256.items():
        if not (path / name).is_file():
            raise CheckpointError(f"{path} is damaged: {name} is missing")
        if sha256(path / name) != known:
            raise CheckpointError(f"{path} is damaged: {name} is not what was written (its sha256 differs)")
    return checkpoint


def newest_valid(folder: Path) -> Checkpoint | None:
    """Find the newest checkpoint in a folder that verifies, naming each newer one that does not; None without any.

    Raises CheckpointError where there are checkpoints and all are damaged: starting afresh would hide the loss.
    Raises CheckpointFormatError rather than pass over what another version of unetgn wrote.
    """
    checkpoints = list_checkpoints(folder)
    for path in reversed(checkpoints):
        try:
            return verify(path)
        except CheckpointFormatError:
            raise
        except CheckpointError as error:
            logger.warning("passing over a checkpoint: %s", error)
    if checkpoints:
        raise CheckpointError(f"all {len(checkpoints)} checkpoints in {folder} are damaged; nothing to go on from")
    return None


def find_checkpoint(path: Path) -> Checkpoint:
    """Find the checkpoint that a path means: itself, or the newest valid one of a run's folder.

    Raises CheckpointError where there is none, or none that is sound.
    """
    wanted = "give a run's folder or one of its checkpoints/step-… folders"
    if not path.is_dir():
        raise CheckpointError(f"{path} is {'a file' if path.exists() else 'not there'}; {wanted}")
    if (path / MANIFEST).is_file() or path.name.startswith(PREFIX):
        return verify(path)
    found = newest_valid(path) or newest_valid(path / CHECKPOINTS)
    if found is None:
        raise CheckpointError(f"{path} holds no checkpoint; {wanted}")
    return found


def is_run_or_checkpoint(path: Path) -> bool:
    """Return True where a folder is a run's, or one of its checkpoints, whole or damaged."""
    return (path / "ema.safetensors").is_file() or (path / CHECKPOINTS).is_dir()
