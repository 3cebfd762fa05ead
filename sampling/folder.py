"""Keeps the folder that samples go to: whose it is, what is in it, what sums it up."""

from __future__ import annotations

import csv
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from training.data.pictures import open_picture
from training.files import write_json, write_png, writing
from unetgn.pipelines.pictures import to_grid

GRID = 256  # images in grid.png at most


class SamplingError(Exception):
    """Says that what was asked for cannot be sampled, why, and what would do."""


@dataclass(frozen=True)
class Request:
    """Holds everything that decides what an image looks like, beside its seed and its subject."""

    network: str  # sha256 of the weights
    scheduler: str
    steps: int
    guidance_scale: float
    image_size: int
    autoencoder: str | None = None  # sha256 of the weights; None where the network makes images
    text_encoder: str | None = None  # likewise; None where the network reads no text


@dataclass(frozen=True)
class Subject:
    """Says what an image is to show: a class, a text, both, or nothing in particular."""

    label: int | None = None
    prompt: str | None = None


def claim(out: Path, request: Request, subjects: dict[int, Subject]) -> None:
    """Write request.json, which says what the images in the folder are made of.

    It replaces the request.json of an earlier request, unless the folder holds numbered images. These must be of the
    same request; their subjects stay in the file. Raises SamplingError where they are of another request, or where
    request.json is missing or damaged.
    """
    file = out / "request.json"
    asked = asdict(request)
    now = {**asked, "subjects": {str(seed): asdict(subject) for seed, subject in subjects.items()}}
    if any(path.stem.isdigit() for path in out.glob("*.png")):
        before = read_request(file)
        differences = [f"{key} was {before.get(key)!r} and is {asked[key]!r}" for key in asked
                       if before.get(key) != asked[key]]  # fmt: skip
        there = before.get("subjects", {})
        differences += [
            f"the {what} of seed {seed} was {there[seed][key]!r} and is {subject[key]!r}"
            for seed, subject in now["subjects"].items()
            for key, what in (("label", "class"), ("prompt", "prompt"))
            if seed in there and there[seed][key] != subject[key]
        ]
        if differences:
            raise SamplingError(f"{out} holds images made otherwise: {'; '.join(differences[:4])}. Give another --out")
        now["subjects"] = there | now["subjects"]
    write_json(file, now)


def read_request(file: Path) -> dict[str, Any]:
    """Read what the images beside the file were made of. Raises SamplingError where it is missing or damaged."""
    if not file.exists():
        raise SamplingError(f"{file.parent} holds numbered images that were not made here: give another --out")
    try:
        request = json.loads(file.read_text())
        if {"label", "prompt"} <= set.intersection(*(set(subject) for subject in request["subjects"].values())):
            return request
        reason = "a subject lacks its label or prompt"
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = str(error)
    raise SamplingError(
        f"{file} is damaged ({reason}), so that nobody knows how the images beside it were made: delete these, or give "
        "another --out"
    )


def file_of(out: Path, seed: int) -> Path:
    """Name the file that the image of a seed goes to."""
    return out / f"{seed:06d}.png"


def write_summary(out: Path, subjects: dict[int, Subject], *, npz: bool) -> None:
    """Write grid.png, samples.csv and, where asked for, samples.npz, of the images of `subjects`."""
    rows = [
        {"file": file_of(out, seed).name, "seed": seed, "class_label": subject.label}
        | ({} if subject.prompt is None else {"prompt": subject.prompt})
        for seed, subject in subjects.items()
    ]
    with writing(out / "samples.csv") as unfinished, unfinished.open("w", newline="") as lines:
        writer = csv.DictWriter(lines, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    arrays = [np.asarray(open_picture(file_of(out, seed))) for seed in subjects]
    pixels = np.stack([array if array.ndim == 3 else array[..., None] for array in arrays])
    first = torch.from_numpy(pixels[:GRID]).permute(0, 3, 1, 2).float() / 127.5 - 1
    write_png(out / "grid.png", to_grid(first))
    if npz:
        labels = [-1 if subject.label is None else subject.label for subject in subjects.values()]
        with writing(out / "samples.npz") as unfinished, unfinished.open("wb") as archive:
            np.savez(archive, arr_0=pixels, seeds=list(subjects), labels=labels)
