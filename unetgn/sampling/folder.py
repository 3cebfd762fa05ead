"""Keeps the folder that samples go to: whose it is, what is in it, what sums it up."""

from __future__ import annotations

import csv
import io
import math
import shutil
import tarfile
import zipfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch

from unetgn.json_files import read_object
from unetgn.messages import short
from unetgn.pipelines.pictures import tile_pixels
from unetgn.programs.paths import check_file, check_folder
from unetgn.training.data.pictures import open_picture
from unetgn.training.files import delete_unfinished, write_json, write_png, writing

REQUEST = "request.json"
GRID, SIDE = 256, 32  # images in grid.png at most, and in a row or column of classes
REQUEST_LIMIT = 2**28  # bytes: some fifty for each image
GRID_PIXELS = 2**25  # which are fewer where images are large
PER_FOLDER = PER_SHARD = 1000  # images
BLOCK = 4096  # bytes that a small file takes on most disks


NO_MEMORY = "the memory does not hold so many images at a time: give a smaller --batch-size, or smaller images"


class SamplingError(Exception):
    """Says that what was asked for cannot be sampled, why, and what would do."""


@dataclass(frozen=True)
class Request:
    """Holds everything that decides what an image looks like, beside its seed and its subject."""

    network: str  # sha256 of the weights
    scheduler: str
    steps: int
    guidance_scale: float
    image_size: int | list[int]  # height and width, one number where they are alike
    autoencoder: str | None = None  # sha256 of the weights; None where the network makes images
    text_encoder: str | None = None  # likewise; None where the network reads no text
    # None where they are not used, as in requests that were written before there were these.
    guidance_interval: list[float] | None = None
    guidance_rescale: float | None = None
    image: str | None = None  # sha256 of the file to begin with
    mask: str | None = None  # likewise, of what is drawn anew
    strength: float | None = None
    precision: str | None = None  # None is fp32
    negative_prompt: str | None = None


@dataclass(frozen=True)
class Subject:
    """Says what an image is to show: a class, a text, both, or nothing in particular."""

    label: int | None = None
    prompt: str | None = None


def check_request(out: Path, request: Request, subjects: dict[int, Subject]) -> dict[str, Any]:
    """Return what request.json is to hold: the request, and the subjects of these images and of those that are there.

    Numbered images in the folder must be of the same request. Raises SamplingError where they are of another one, or
    where their request.json is missing or damaged. Changes nothing.
    """
    asked = asdict(request)
    now = {**asked, "subjects": {str(seed): asdict(subject) for seed, subject in subjects.items()}}
    if not holds_images(out):
        return now
    before = read_request(out / REQUEST)
    differences = [f"{key} was {short(before.get(key))} and is {short(asked[key])}" for key in asked
                   if before.get(key) != asked[key]]  # fmt: skip
    there = before.get("subjects", {})
    differences += [
        f"the {what} of seed {seed} was {short(there[seed][key])} and is {short(subject[key])}"
        for seed, subject in now["subjects"].items()
        for key, what in (("label", "class"), ("prompt", "prompt"))
        if seed in there and there[seed][key] != subject[key]
    ]
    if differences:
        raise SamplingError(
            f"{out} holds images made otherwise: {'; '.join(differences[:4])}: give another folder, or delete it"
        )
    return {**now, "subjects": there | now["subjects"]}


def claim(out: Path, request: Request, subjects: dict[int, Subject]) -> None:
    """Write request.json, in the place of an earlier one that no image was made of. Raises as `check_request` does."""
    now = check_request(out, request, subjects)
    for folder in (out, *folders(out)):
        delete_unfinished(folder)
    write_json(out / REQUEST, now)


def read_request(file: Path) -> dict[str, Any]:
    """Read what the images beside the file were made of. Raises SamplingError where it is missing or damaged."""
    if not file.exists():
        raise SamplingError(f"{file.parent} holds numbered images that were not made here: give another --out")
    try:
        request = read_object(file, limit=REQUEST_LIMIT)
        subjects = list(request["subjects"].values())
        if subjects and all(isinstance(one, dict) and {"label", "prompt"} <= one.keys() for one in subjects):
            return request
        reason = "a subject lacks its label or prompt"
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = short(str(error))
    raise SamplingError(
        f"{file} is damaged ({reason}), so that nobody knows how the images beside it were made: delete these, or give "
        "another --out"
    )


def file_of(out: Path, seed: int) -> Path:
    """Name the file that the image of a seed goes to: a subfolder holds a thousand, the first thousand have none."""
    first = seed - seed % PER_FOLDER
    return (out / f"{first:06d}" if first else out) / f"{seed:06d}.png"


def folders(out: Path) -> list[Path]:
    """List the subfolders of images."""
    return [path for path in out.glob("*") if path.name.isdecimal() and path.is_dir()]


def holds_images(out: Path) -> bool:
    """Return True where there are numbered images."""
    return any(path.stem.isdecimal() for folder in (out, *folders(out)) for path in folder.glob("*.png"))


def missing(out: Path, seeds: Iterable[int]) -> set[int]:
    """Find the seeds whose images are not there; each folder is read once."""
    there = {
        int(path.stem) for folder in (out, *folders(out)) for path in folder.glob("*.png") if path.stem.isdecimal()
    }
    return set(seeds) - there


def check_space(
    out: Path, subjects: dict[int, Subject], shape: tuple[int, int, int], factor: int, *, npz: bool, webdataset: bool
) -> None:
    """Raise SamplingError where the disk cannot hold what is missing, by the least that it takes.

    A PNG takes a quarter of its pixels or more, and a block of the disk; an archive all of them, a shard those files.
    """
    nearest = next(path for path in (out, *out.resolve().parents) if path.exists())
    pixels = 3 * shape[1] * shape[2] * factor**2 if factor > 1 else math.prod(shape)
    needed = len(missing(out, subjects)) * max(BLOCK, pixels // 4)
    needed += len(subjects) * (npz * pixels + webdataset * (pixels // 4))
    free = shutil.disk_usage(nearest).free
    if free < needed:
        raise SamplingError(
            f"{out} has {free / 1e9:.2g} GB left, and these images take at least {needed / 1e9:.2g} GB: make room, "
            "give another --out, or fewer --seeds"
        )


def check_places(out: Path, subjects: dict[int, Subject], names: Iterable[str]) -> None:
    """Raise SamplingError where an image, or a file of one of these names, cannot be written. Changes nothing.

    A user's folder of such a name would be put aside at the end.
    """
    there = [path for folder in (out, *folders(out)) for path in folder.glob("*.png") if path.stem.isdecimal()]
    files = [path for path in there if not path.is_file()] + [out / name for name in names]
    try:
        for folder in {file_of(out, seed).parent for seed in subjects}:
            check_folder(folder)
        for file in files:
            check_file(file)
    except OSError as error:
        raise SamplingError(f"{error}: move it, or give another --out") from error


def shard_name(number: int) -> str:
    """Name a shard in a folder of samples."""
    return f"shards/{number:06d}.tar"


def write_summary(out: Path, subjects: dict[int, Subject], *, npz: bool, webdataset: bool = False) -> str:
    """Write grid.png, samples.csv and, where asked for, samples.npz and shards, of the images of `subjects`.

    Returns what grid.png shows of them. Images are read one at a time: no memory grows with their number.
    """
    prompts = any(subject.prompt is not None for subject in subjects.values())
    with writing(out / "samples.csv") as unfinished, unfinished.open("w", newline="") as lines:
        writer = csv.writer(lines)
        writer.writerow(["file", "seed", "class_label", *(["prompt"] if prompts else [])])
        for seed, subject in subjects.items():
            row = [file_of(out, seed).relative_to(out), seed, subject.label]
            writer.writerow([*row, subject.prompt] if prompts else row)
    if npz:
        write_archive(out, subjects)
    if webdataset:
        write_shards(out, subjects)
    return write_grid(out, subjects)


def read_pixels(file: Path) -> np.ndarray:
    """Read an image as (H, W, C) uint8."""
    array = np.asarray(open_picture(file))
    return array if array.ndim == 3 else array[..., None]


def write_archive(out: Path, subjects: dict[int, Subject]) -> None:
    """Write samples.npz, as numpy.savez does of arr_0 (N, H, W, C) uint8, seeds and labels (-1: none)."""
    shape = read_pixels(file_of(out, next(iter(subjects)))).shape
    labels = [-1 if subject.label is None else subject.label for subject in subjects.values()]
    with writing(out / "samples.npz") as unfinished, zipfile.ZipFile(unfinished, "w") as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as member:
            header = {"descr": "|u1", "fortran_order": False, "shape": (len(subjects), *shape)}
            np.lib.format.write_array_header_1_0(member, header)
            for seed in subjects:
                member.write(read_pixels(file_of(out, seed)).tobytes())
        for name, numbers in (("seeds", list(subjects)), ("labels", labels)):
            with archive.open(f"{name}.npy", "w") as member:
                np.lib.format.write_array(member, np.asarray(numbers))


def write_shards(out: Path, subjects: dict[int, Subject]) -> None:
    """Write shards/000000.tar …, as WebDataset reads them: NAME.png, NAME.cls and NAME.txt, a thousand images each.

    They hold nothing of the time or the user: the same images make the same bytes. Those of an earlier request that
    had more go.
    """
    seeds = list(subjects)
    for first in range(0, len(seeds), PER_SHARD):
        with (
            writing(out / shard_name(first // PER_SHARD)) as unfinished,
            tarfile.open(unfinished, "w", format=tarfile.USTAR_FORMAT) as shard,
        ):
            for seed in seeds[first : first + PER_SHARD]:
                subject = subjects[seed]
                parts = {"png": file_of(out, seed).read_bytes()}
                if subject.label is not None:
                    parts["cls"] = str(subject.label).encode()
                if subject.prompt is not None:
                    parts["txt"] = subject.prompt.encode()
                for ending, contents in parts.items():
                    member = tarfile.TarInfo(f"{seed:06d}.{ending}")
                    member.size = len(contents)
                    shard.addfile(member, io.BytesIO(contents))
    for path in (out / "shards").glob("*.tar"):
        if path.stem.isdecimal() and int(path.stem) * PER_SHARD >= len(seeds):
            path.unlink()


def write_grid(out: Path, subjects: dict[int, Subject]) -> str:
    """Write grid.png, and return what it shows of how many images."""
    shape = read_pixels(file_of(out, next(iter(subjects)))).shape
    most = max(1, min(GRID, GRID_PIXELS // (shape[0] * shape[1])))
    labels = sorted({subject.label for subject in subjects.values() if subject.label is not None})[: min(SIDE, most)]
    if len(labels) < 2:
        chosen: list[int | None] = list(islice(subjects, most))
        columns, how = None, ""
    else:
        rows = min(SIDE, most // len(labels))
        of_class = {label: [seed for seed in subjects if subjects[seed].label == label][:rows] for label in labels}
        filled = zip_longest(*of_class.values())  # a row holds one image of each class, None where there is no more
        chosen = [seed for row in filled for seed in row]
        columns, how = len(labels), f", a class a column: {', '.join(map(str, labels))}"
    tiles = np.full((len(chosen), *shape), 255, np.uint8)
    for tile, seed in zip(tiles, chosen, strict=True):
        if seed is not None:
            tile[:] = read_pixels(file_of(out, seed))
    write_png(out / "grid.png", tile_pixels(torch.from_numpy(tiles), columns))
    shown = sum(seed is not None for seed in chosen)
    return f"{'all' if shown == len(subjects) else shown} of {len(subjects)} images{how}"
