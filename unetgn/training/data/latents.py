"""Reads latents that training/cache_latents.py encoded once; defines the format of their cache.

A cache is a folder: `latents-NNNNN.safetensors` (shards of `shard_size` images, the last one of the rest), the
`autoencoder/`, with captions `empty_text.safetensors`, `text_encoder/` and `tokenizer/`, and `manifest.json`, which has
the sha256 of every other file.
A shard holds, one row an image: `mean` and `std` of the autoencoder's posterior (C, H, W), and `label`; with --flip
`mean_flipped` and `std_flipped`, of the mirrored image; with captions `text` (tokens, width). Numbers are float32.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file
from tqdm import tqdm

from unetgn.json_files import read_object
from unetgn.messages import said, short
from unetgn.programs.paths import lacking
from unetgn.training.data.folders import check_ordinary
from unetgn.training.data.images import Images
from unetgn.training.errors import reason
from unetgn.training.files import sha256, write_json

MANIFEST = "manifest.json"
EMPTY_TEXT = "empty_text.safetensors"
Form = dict[str, tuple[str, tuple[int, ...]]]  # of each tensor of a file its type, as safetensors names it, and shape
MANIFEST_LIMIT = 2**24  # bytes: a hundred for each shard


@dataclass(frozen=True)
class Manifest:
    """Says what a cache holds: what has been written, and how much it will be."""

    images: int
    """Images in the whole cache."""
    shard_size: int
    shape: tuple[int, int, int]
    """Of a latent: (C, H, W)."""
    scaling_factor: float
    shift_factor: float
    """The network sees (latent - shift_factor)·scaling_factor."""
    class_names: list[str] | None
    flipped: bool
    """True where the cache also holds the mirrored images."""
    text_shape: tuple[int, int] | None
    """Of a caption's embedding: (tokens, width); None without captions."""
    source: dict[str, Any]
    """Keys data.* of the images, and what was in them that has no place above; a second start has to have the same."""
    sha256: dict[str, str]
    """Of each file that is finished, by its name in the folder."""

    @property
    def shards(self) -> list[str]:
        """Return the names of all the shards that there will be."""
        return [f"latents-{number:05d}.safetensors" for number in range(self.shard_count)]

    @property
    def shard_count(self) -> int:
        """Count the shards that there will be."""
        return -(-self.images // self.shard_size)

    def write(self, folder: Path) -> None:
        """Replace the folder's manifest as a whole."""
        write_json(folder / MANIFEST, asdict(self))


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest of a cache. Raises ValueError where there is none, or it is damaged."""
    try:
        keys = read_object(folder / MANIFEST, limit=MANIFEST_LIMIT)
        text_shape = None if keys["text_shape"] is None else tuple(keys["text_shape"])
        manifest = Manifest(**keys | {"shape": tuple(keys["shape"]), "text_shape": text_shape})
        check_types(manifest)
        return manifest
    except FileNotFoundError as error:
        wanted = "give a folder that training/cache_latents.py wrote"
        raise ValueError(f"{lacking(folder, MANIFEST)}: {wanted}") from error
    except OSError as error:
        raise ValueError(f"{folder / MANIFEST} cannot be read: {said(error)}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / MANIFEST} is not as training/cache_latents.py writes it: {said(error)}") from error


def check_types(manifest: Manifest) -> None:
    """Raise ValueError where a value is of another type than it is written with."""
    names, text_shape = manifest.class_names, manifest.text_shape
    right = {
        "images": is_count(manifest.images),
        "shard_size": is_count(manifest.shard_size),
        "shape": len(manifest.shape) == 3 and all(map(is_count, manifest.shape)),
        "scaling_factor": is_of_float32(manifest.scaling_factor) and manifest.scaling_factor != 0,
        "shift_factor": is_of_float32(manifest.shift_factor),
        "class_names": names is None or (isinstance(names, list) and all(isinstance(name, str) for name in names)),
        "flipped": isinstance(manifest.flipped, bool),
        "text_shape": text_shape is None or (len(text_shape) == 2 and all(map(is_count, text_shape))),
        "source": isinstance(manifest.source, dict),
        "sha256": isinstance(manifest.sha256, dict)
        and all(
            is_below(name) and isinstance(sum, str) and not is_beyond(name, manifest)
            for name, sum in manifest.sha256.items()
        ),
    }
    wrong = [f"{name} is {short(getattr(manifest, name))}" for name, is_right in right.items() if not is_right]
    if wrong:
        raise ValueError("; ".join(wrong))


def is_beyond(name: str, manifest: Manifest) -> bool:
    """Return True for the name of a shard that a cache of so many images does not have."""
    found = re.fullmatch(r"latents-(\d{5,})\.safetensors", name)
    counts = manifest.images, manifest.shard_size
    return found is not None and all(map(is_count, counts)) and int(found[1]) >= manifest.shard_count


def is_count(value: object) -> bool:
    """Return True for a number of things, at least one."""
    return isinstance(value, int) and value >= 1


def is_of_float32(value: object) -> bool:
    """Return True for a number that float32 has, within rounding."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 2**127


def is_below(name: str) -> bool:
    """Return True for the name of a file in the folder or below: any other may be of a file that never ends."""
    path = PurePosixPath(name)
    return name.isprintable() and bool(path.parts) and not path.is_absolute() and ".." not in path.parts


def is_shard(name: str) -> bool:
    """Return True for the name of a shard."""
    return name.startswith("latents-")


def unfinished(path: str, finished: int, wanted: int) -> str:
    """Say that a cache is unfinished."""
    return (
        f"{path} is unfinished, {finished} of {wanted} shards are there: start "
        "training/cache_latents.py again with the same line, and it goes on"
    )


class Latents(Images):
    """Reads the images of a cache as diffusion sees them: z = (mean + std·noise - shift_factor)·scaling_factor.

    The noise of z is the training sample's own, and so is, with `random_flip`, whether z is of the image or its mirror
    image: the mirror image of a latent is not the latent of the mirrored image, so both were encoded.
    Raises ValueError, naming the file, where the cache is unfinished or damaged.
    """

    def __init__(self, path: str, *, random_flip: bool = False) -> None:
        self.folder, self.random_flip = Path(path), random_flip
        self.manifest = read_manifest(self.folder)
        self.shape, self.class_names = self.manifest.shape, self.manifest.class_names
        self.autoencoder = self.folder / "autoencoder"
        self._shards: dict[str, Any] = {}  # open files, by name
        if random_flip and not self.manifest.flipped:
            raise ValueError(
                "data.random_flip is true, but the mirror image of a latent is not the latent of the mirrored image, "
                f"and {path} holds the images one way round: make it with --flip, or set data.random_flip to false"
            )
        wanted = self.manifest.shard_count
        if wanted > len(self.manifest.sha256):  # asked first: a manifest may speak of any number
            raise ValueError(unfinished(path, sum(map(is_shard, self.manifest.sha256)), wanted))
        finished = [name for name in self.manifest.shards if name in self.manifest.sha256]
        if len(finished) < wanted:
            raise ValueError(unfinished(path, len(finished), wanted))
        self._labels = np.concatenate([self._read(name, "label", slice(None)) for name in finished])
        if len(self._labels) != self.manifest.images:
            raise ValueError(f"{path}: the shards hold {len(self._labels)} images, {MANIFEST} has {len(self)}")
        self.empty_text: np.ndarray | None = None  # (tokens, width)
        if self.manifest.text_shape is not None:
            self._verify(EMPTY_TEXT)
            self._check_form(EMPTY_TEXT, {"text": ("F32", self.manifest.text_shape)})
            self.empty_text = load_file(self.folder / EMPTY_TEXT)["text"]

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_shards": {}}  # open files do not travel

    def __len__(self) -> int:
        return self.manifest.images

    def image(self, index: int, random: np.random.Generator | None = None) -> np.ndarray:
        """Return the scaled latent, (C, H, W) float32; without `random` its mean."""
        flipped = random is not None and self.random_flip and random.random() < 0.5
        latent = self._row("mean_flipped" if flipped else "mean", index)
        if random is not None:
            noise = random.standard_normal(self.shape, dtype=np.float32)
            latent = latent + self._row("std_flipped" if flipped else "std", index) * noise
        return (latent - self.manifest.shift_factor) * self.manifest.scaling_factor

    def label(self, index: int) -> int:
        return int(self._labels[index])

    def text(self, index: int) -> np.ndarray | None:
        return None if self.manifest.text_shape is None else self._row("text", index)

    def name(self, index: int) -> str:
        number, row = divmod(index, self.manifest.shard_size)
        return f"row {row} of {self.folder / self.manifest.shards[number]}"

    def usable(self) -> np.ndarray:
        """Compare every file, also of the networks, with the manifest; return the numbers of all images."""
        for name in tqdm(self.manifest.sha256, "reading latents", disable=None):
            self._verify(name)
        return np.arange(len(self))

    def fingerprint(self) -> str:
        """Compute a sha256 of the shards' contents and scale; not of the networks, which training does not use."""
        names = (*self.manifest.shards, *([EMPTY_TEXT] if self.manifest.text_shape else []))
        facts = [(name, self.manifest.sha256[name]) for name in names]
        scale = self.manifest.scaling_factor, self.manifest.shift_factor
        return hashlib.sha256(repr((facts, scale)).encode()).hexdigest()

    def _row(self, tensor: str, index: int) -> np.ndarray:
        number, row = divmod(index, self.manifest.shard_size)
        return self._read(self.manifest.shards[number], tensor, row)

    def _read(self, name: str, tensor: str, rows: int | slice) -> np.ndarray:
        """Read rows of a shard's tensor. Raises ValueError, naming the file, where that is missing or damaged."""
        try:
            if name not in self._shards:
                check_ordinary(self.folder / name)
                self._check_form(name, self._form(name))
                self._shards[name] = safe_open(self.folder / name, framework="np")
            return self._shards[name].get_slice(tensor)[rows]
        except FileNotFoundError as error:
            raise ValueError(f"{self.folder / name} is missing: {REMEDY}") from error
        except SafetensorError as error:
            raise ValueError(f"{self.folder / name} is damaged ({reason(error)}): {REMEDY}") from error
        except OSError as error:  # a disk that fails, a file that is not ours to read: nothing to delete
            raise ValueError(f"{self.folder / name} cannot be read: {said(error)}") from error

    def _form(self, name: str) -> Form:
        """Return what the tensors of a shard have to be, by what the manifest says."""
        facts, full = self.manifest, self.manifest.shard_size
        rows = full if name != facts.shards[-1] else facts.images - full * (facts.shard_count - 1)
        kinds = ("mean", "std", *(("mean_flipped", "std_flipped") if facts.flipped else ()))
        form: Form = dict.fromkeys(kinds, ("F32", (rows, *facts.shape))) | {"label": ("I64", (rows,))}
        return form if facts.text_shape is None else form | {"text": ("F32", (rows, *facts.text_shape))}

    def _check_form(self, name: str, form: Form) -> None:
        """Raise ValueError, naming the file, where its tensors are others, whatever its sha256 is."""
        with safe_open(self.folder / name, framework="np") as file:
            slices = {tensor: file.get_slice(tensor) for tensor in file.keys()}  # noqa: SIM118  # it is no dictionary
        found = {tensor: (values.get_dtype(), tuple(values.get_shape())) for tensor, values in slices.items()}
        if wrong := [tensor for tensor in sorted({*found, *form}) if found.get(tensor) != form.get(tensor)]:
            first = wrong[0]
            raise ValueError(
                f"{self.folder / name} does not hold what {MANIFEST} says: its tensor {short(first)} is "
                f"{described(found.get(first))}, and {described(form.get(first))} is right: {REMEDY}"
            )

    def _verify(self, name: str) -> None:
        file = self.folder / name
        if not file.is_file():
            raise ValueError(f"{file} is missing: {REMEDY}")
        if sha256(file) != self.manifest.sha256.get(name):
            raise ValueError(f"{file} is not what was written (its sha256 differs): {REMEDY}")


def described(tensor: tuple[str, tuple[int, ...]] | None) -> str:
    """Describe a tensor by type and shape."""
    return "none" if tensor is None else f"{tensor[0]} {list(tensor[1])}"


REMEDY = "delete it and start training/cache_latents.py again with the same line, and it is made anew"
