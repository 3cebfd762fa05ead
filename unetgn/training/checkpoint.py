"""Writes and reads checkpoints: everything that a run needs to go on exactly, in safetensors and JSON.

A checkpoint is a folder, whole or not there at all, with a manifest that has the sha256 of its files. Nothing in it is
a pickle. What is random needs no saving: it is a function of the step (unetgn/training/data/samples.py).
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from unetgn import __version__
from unetgn.json_files import read_object
from unetgn.messages import plain, said
from unetgn.training.data.standing import LIMIT, SAMPLES, RankState, check_states
from unetgn.training.errors import CheckpointError, CheckpointFormatError, reason
from unetgn.training.files import delete, delete_unfinished, free_name, sha256, writing
from unetgn.training.manifest import MANIFEST, read_manifest, write_manifest

logger = logging.getLogger(__name__)

CHECKPOINTS = "checkpoints"  # where a run's folder has them
PREFIX = "step-"
BEST = "best"  # a link to the checkpoint that was judged best
# Why a checkpoint was put aside, at the end of its name.
ASIDE = DAMAGED, LEFT, OTHER = "damaged", "left", "other-version"

TensorFile = Literal["model", "ema", "optimizer", "averages"]
TENSORS: tuple[TensorFile, ...] = ("model", "ema", "optimizer")  # of every checkpoint
# What is the best, or the newest, of a run that goes on is another one a moment later.
GONE = "has been deleted since it was found, by a run that goes on: start again, for its newest or best one"
BASE = "base.json"  # of adapters: the sha256 of the weights that they are for
CONFIGS = CONFIG, UNET_CONFIG, SCHEDULER_CONFIG = "config.yaml", "config.json", "scheduler_config.json"


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

    These are `model`, `ema` (the averaged weights), `optimizer` and, with ema.power_widths, `averages` (WIDTH/NAME),
    each .safetensors with whole tensors, the configurations: of the run (config.yaml), of the network (config.json) and
    of its noise (scheduler_config.json); base.json where the tensors are those of adapters; and samples.json: which
    images there were, or where each reader of a stream stood.
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

        Raises OSError where it cannot be read, CheckpointError where it is missing or damaged, CheckpointFormatError
        where it has another format.
        """
        keys = read_manifest(path)
        if is_number(path.name.removeprefix(PREFIX)) and step_of(path) != keys["step"]:
            raise CheckpointError(f"{path} is damaged: {MANIFEST} says that it is of step {keys['step']}")
        if not keys["sha256"].keys() <= {f"{name}.safetensors" for name in get_args(TensorFile)} | {
            *CONFIGS,
            SAMPLES,
            BASE,
        }:
            raise CheckpointError(f"{path} is damaged: {MANIFEST} names files that no checkpoint has")
        return cls(path=path, **keys)

    def write(
        self,
        tensors: Mapping[TensorFile, dict[str, Tensor]],
        *,
        config: str,
        unet_config: str,
        scheduler_config: str,
        samples: list[RankState] | None = None,
        base: str | None = None,
    ) -> Checkpoint:
        """Write the checkpoint to its path, and return it with the sha256 of its files.

        `base` is the sha256 of the weights that its adapters are for; None where it has all weights.

        When the disk is full (OSError) or the process dies, no folder of that name appears and the older checkpoints
        are as they were.
        """
        texts = {
            CONFIG: config,
            UNET_CONFIG: unet_config,
            SCHEDULER_CONFIG: scheduler_config,
            **({} if samples is None else {SAMPLES: json.dumps({"ranks": samples}) + "\n"}),
            **({} if base is None else {BASE: json.dumps({"sha256": base}) + "\n"}),
        }
        try:
            with writing(self.path) as unfinished:
                unfinished.mkdir()
                for name, contents in tensors.items():
                    file = unfinished / f"{name}.safetensors"
                    save_file(contents, file)
                    file.chmod(unfinished.stat().st_mode & 0o666)  # else the owner's alone, whatever the umask
                for text_name, text in texts.items():
                    (unfinished / text_name).write_text(text, encoding="utf-8")
                written = replace(self, sha256={file.name: sha256(file) for file in sorted(unfinished.iterdir())})
                keys = asdict(written)
                del keys["path"]
                write_manifest(unfinished, keys)
        except SafetensorError as error:  # how safetensors says that the system refused to write
            raise OSError(f"{self.path} could not be written: {said(error)}") from error
        return written

    def tensors(self, name: TensorFile) -> dict[str, Tensor]:
        """Read one of the files of tensors, onto the CPU. Raises CheckpointError."""
        try:
            return load_file(self._file(f"{name}.safetensors"))
        except SafetensorError as error:
            raise CheckpointError(
                f"{self.path} is damaged: {name}.safetensors cannot be read ({reason(error)})"
            ) from error

    def digest(self, name: TensorFile) -> str:
        """Return the sha256 of one of the files of tensors."""
        return self.sha256[f"{name}.safetensors"]

    @property
    def config_file(self) -> Path:
        """Holds the run's whole configuration, for `unetgn.training.config_files.load_config`."""
        return self._file(CONFIG)

    def unet_config(self) -> dict[str, Any]:
        """Read the network's configuration, for `UNet.from_config`. Raises CheckpointError."""
        return self._keys(UNET_CONFIG)

    def scheduler_config(self) -> dict[str, Any]:
        """Read the configuration of the scheduler that adds the noise. Raises CheckpointError."""
        return self._keys(SCHEDULER_CONFIG)

    def samples(self) -> list[RankState]:
        """Read what each rank said of its samples; nothing where an older version wrote it. Raises CheckpointError."""
        if SAMPLES not in self.sha256:
            return []
        try:
            states = check_states(read_object(self.path / SAMPLES, limit=LIMIT))
        except ValueError as error:
            raise CheckpointError(f"{self.path} is damaged: {SAMPLES}: {said(error)}") from error
        if len(states) != self.world_size:
            raise CheckpointError(f"{self.path} is damaged: {SAMPLES} is of {len(states)} processes")
        return states

    def base(self) -> str | None:
        """Read the sha256 of the weights that its adapters are for; None where it has all weights.

        Raises CheckpointError.
        """
        if BASE not in self.sha256:
            return None
        found = self._keys(BASE)
        if found.keys() != {"sha256"} or not isinstance(found["sha256"], str) or len(found["sha256"]) != 64:
            raise CheckpointError(f"{self.path} is damaged: {BASE} has no sha256 of weights")
        return found["sha256"]

    def _keys(self, name: str) -> dict[str, Any]:
        try:
            return read_object(self._file(name))
        except ValueError as error:
            raise CheckpointError(f"{self.path} is damaged: {said(error)}") from error

    def _file(self, name: str) -> Path:
        if not self.path.is_dir():
            raise CheckpointError(f"{self.path} {GONE}")
        if name not in self.sha256:
            raise CheckpointError(f"{self.path} is damaged: {MANIFEST} has no sha256 of {name}")
        return self.path / name


Check = Callable[[Checkpoint], None]  # raises CheckpointError where one does not do for what it is wanted for


def checkpoint_path(folder: Path, step: int) -> Path:
    """Name the checkpoint of a step in a folder of checkpoints."""
    return folder / f"{PREFIX}{step:06d}"


def run_of(checkpoint: Checkpoint) -> Path:
    """Name the folder of the run that a checkpoint lies in, itself or by a link."""
    at_home = (place for place in places(checkpoint.path) if place.parent.name == CHECKPOINTS)
    return next(at_home, checkpoint.path.resolve()).parent.parent


def places(path: Path) -> Iterator[Path]:
    """List where a checkpoint lies: at its path, and wherever links lead to from there."""
    path = path.absolute()
    yield path
    while path.is_symlink():
        path = path.parent / os.readlink(path)
        yield path
    yield path.resolve()


def list_checkpoints(folder: Path) -> list[Path]:
    """List the checkpoints in a folder by step, oldest first, good or bad, with links to what is not there."""
    named = [path for path in folder.glob(f"{PREFIX}*") if is_number(path.name.removeprefix(PREFIX))]
    return sorted((path for path in named if path.is_dir() or path.is_symlink()), key=step_of)


def step_of(path: Path) -> int:
    """Read the step from the name of a checkpoint."""
    return int(path.name.removeprefix(PREFIX))


def check_tensors(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], file: Path) -> None:
    """Raise CheckpointError where tensors of a file are not those that are wanted, or not finite.

    Their names, shapes and types have to be those of `wanted`, whose values do not count.
    """
    for name in [*wanted, *found]:
        if name not in found:
            raise CheckpointError(f"{file} is of another network: it lacks {plain(name)}")
        if name not in wanted:
            raise CheckpointError(f"{file} is of another network: it has {plain(name)}, which this one has not")
        for fact in ("shape", "dtype"):
            here, there = getattr(found[name], fact), getattr(wanted[name], fact)
            if here != there:
                raise CheckpointError(
                    f"{file} is of another network: the {fact} of {plain(name)} is {here}, not {there}"
                )
    if wrong := not_finite(found):
        raise CheckpointError(f"{file}: {plain(wrong)} holds numbers that are not finite")


def not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """Name the first tensor that holds a number which is not finite; None where all are."""
    return next((name for name, tensor in tensors.items() if not tensor.isfinite().all()), None)


def check_weights(weights: Mapping[str, Tensor], folder: Path) -> None:
    """Raise ValueError where weights that diffusers loaded are missing, which it lets pass, or not finite."""
    if missing := [name for name, tensor in weights.items() if tensor.is_meta]:
        raise ValueError(f"the weights in {folder} lack {plain(missing[0])} (of {len(missing)} missing)")
    if wrong := not_finite(weights):
        raise ValueError(f"the weights in {folder} are damaged: {plain(wrong)} holds numbers that are not finite")


def is_number(text: str) -> bool:
    """Return True for digits that `int` takes: there are others, such as ²."""
    return text.isascii() and text.isdecimal()


def delete_old(folder: Path, keep: int, upto: int | None = None) -> None:
    """Delete all but the newest `keep` checkpoints, what was put aside, and what a killed save left behind.

    Only after a checkpoint has been written: until then these are what there is. Where one was found as the last, of
    those that were put aside only the ones of steps `upto` its own, which have been made anew.
    """
    delete_unfinished(folder)
    for path in [*old(list_checkpoints(folder), keep), *aside(folder, upto)]:
        delete(path)


def aside(folder: Path, upto: int | None = None) -> list[Path]:
    """List the checkpoints that were put aside, of all steps or of those up to one."""
    found = sorted(path for reason in ASIDE for path in folder.glob(f"{PREFIX}*.{reason}*"))
    return found if upto is None else [path for path in found if is_upto(path, upto)]


def is_upto(path: Path, step: int) -> bool:
    """Return True where a name that begins as a checkpoint's, step-NUMBER.…, is of that step or of an earlier one."""
    number = path.name.removeprefix(PREFIX).partition(".")[0]
    return is_number(number) and int(number) <= step


def old(checkpoints: list[Path], keep: int) -> list[Path]:
    """List those that `delete_old` deletes, of checkpoints by step: the best one stays."""
    return [path for path in checkpoints[:-keep] if os.path.realpath(path) != os.path.realpath(path.parent / BEST)]


def best(folder: Path) -> Path | None:
    """Name the checkpoint that the link `best` in a folder of checkpoints leads to; None without a link."""
    link = folder / BEST
    return folder / os.readlink(link) if link.is_symlink() else None


def mark_best(folder: Path, checkpoint: Path | None) -> None:
    """Have the link `best` lead to a checkpoint of the folder, or remove it."""
    link = folder / BEST
    if checkpoint is not None and best(folder) != checkpoint:
        with writing(link) as unfinished:
            unfinished.symlink_to(checkpoint.name)
    elif checkpoint is None and link.is_symlink():
        link.unlink()


def newer(folder: Path, step: int) -> list[Path]:
    """List the checkpoints after `step`."""
    return [path for path in list_checkpoints(folder) if step_of(path) > step]


def put_aside(folder: Path, step: int, check: Check | None = None) -> None:
    """Give the checkpoints after `step` other names, which say why: the run goes on from `step` and makes them anew.

    They are step-N.damaged, step-N.other-version, or step-N.left where they are sound. Raises OSError where one cannot
    be read or renamed.
    """
    for path in newer(folder, step):
        try:
            verify(path, check)
            why = LEFT
        except CheckpointFormatError:
            why = OTHER
        except CheckpointError:
            why = DAMAGED
        named = free_name(path, why)
        path.rename(named)
        logger.warning("the run goes on from step %d: %s is now %s, until the next checkpoint is written", step, path,
                       named.name)  # fmt: skip


def verify(path: Path, check: Check | None = None) -> Checkpoint:
    """Read a checkpoint's manifest, compare every file with it, and then `check` what they hold.

    Raises CheckpointError where they differ, OSError where they cannot be read: that is no sign of damage, nor is a
    link to a disk that is not there now.
    """
    if path.is_symlink() and not path.exists():
        raise OSError(f"{path} is a link to {os.readlink(path)}, which is not there: mount it, or remove the link")
    checkpoint = Checkpoint.read(path)
    tensors = [f"{name}.safetensors" for name in TENSORS]
    if lacking := [name for name in CONFIGS if name not in checkpoint.sha256]:
        raise CheckpointError(f"{path} is damaged: {MANIFEST} has no sha256 of {lacking[0]}")
    if not any(name in checkpoint.sha256 for name in tensors):  # an average has one of them, a run's checkpoint all
        raise CheckpointError(f"{path} is damaged: {MANIFEST} has no sha256 of any of {', '.join(tensors)}")
    for name, known in checkpoint.sha256.items():
        if not (path / name).is_file():
            raise CheckpointError(f"{path} is damaged: {name} is missing")
        if sha256(path / name) != known:
            raise CheckpointError(f"{path} is damaged: {name} is not what was written (its sha256 differs)")
    checkpoint.samples()
    if check is not None:
        check(checkpoint)
    return checkpoint


def newest_valid(folder: Path, check: Check | None = None) -> Checkpoint | None:
    """Find the newest checkpoint in a folder that verifies, naming each newer one that does not; None without any.

    Raises CheckpointError where there are checkpoints and all are damaged: starting afresh would hide the loss.
    Raises CheckpointFormatError rather than pass over what another version of unetgn wrote, and OSError rather than
    pass over what could not be read this time.
    """
    checkpoints = list_checkpoints(folder)
    for path in reversed(checkpoints):
        try:
            return verify(path, check)
        except CheckpointFormatError:
            raise
        except (CheckpointError, OSError) as error:
            if not os.path.lexists(path):  # a run that goes on has deleted it, and has a newer one
                return newest_valid(folder, check)
            if isinstance(error, OSError):
                raise
            logger.warning("passing over a checkpoint: %s", error)
    if checkpoints:
        raise CheckpointError(f"all {len(checkpoints)} checkpoints in {folder} are damaged; nothing to go on from")
    return None


def find_checkpoint(path: Path, check: Check | None = None) -> Checkpoint:
    """Find the checkpoint that a path means: itself, or the newest valid one of a run's folder.

    Raises CheckpointError where there is none, or none that is sound.
    """
    wanted = "give a run's folder or one of its checkpoints/step-… folders"
    if path.name == BEST and (found := best(path.parent)) is not None and found.name != BEST:
        try:
            return find_checkpoint(found, check)  # by its own name: another step's may be the best tomorrow
        except (CheckpointError, OSError):
            if os.path.lexists(found) or best(path.parent) == found:
                raise
        return find_checkpoint(path, check)  # it is another one by now, and that one has been deleted
    if not path.is_dir():
        raise CheckpointError(f"{path} is {'a file' if path.exists() else 'not there'}; {wanted}")
    if (path / MANIFEST).is_file() or path.name.startswith(PREFIX):
        return verify(path, check)
    newest = newest_valid(path, check) or newest_valid(path / CHECKPOINTS, check)
    if newest is None:
        raise CheckpointError(f"{path} holds no checkpoint; {wanted}")
    return newest


def is_run_or_checkpoint(path: Path) -> bool:
    """Return True where a folder is a run's, or one of its checkpoints, whole or damaged."""
    return (path / "ema.safetensors").is_file() or (path / CHECKPOINTS).is_dir()
