"""Computes the features of a set of images, over all processes, and keeps those of real images for the next time."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from unetgn.json_files import parse_object
from unetgn.messages import said
from unetgn.sampling.extractors import Extractor
from unetgn.sampling.sets import Pictures
from unetgn.training.files import writing
from unetgn.training.processes import ask_main

logger = logging.getLogger(__name__)

BATCH = 64  # images that the extractor sees together
KEY = "features"  # of the file's metadata, which are JSON


def compute_features(
    extractor: Extractor, pictures: Pictures, accelerator: Accelerator, *, batch: int = BATCH
) -> np.ndarray:
    """Compute features (N, D) float32, each process its share; every process has all of them then."""
    rank, world = accelerator.process_index, accelerator.num_processes
    mine = np.asarray(pictures.numbers)[rank::world]
    parts = [
        extractor(
            torch.from_numpy(np.stack([pictures.bytes_of(int(number)) for number in mine[start : start + batch]]))
        )
        for start in range(0, len(mine), batch)
    ]
    share = torch.cat(parts).numpy() if parts else None
    shares = [share] if world == 1 else gather_object([share])
    width = next(found.shape[1] for found in shares if found is not None)
    features = np.empty((len(pictures), width), np.float32)
    for place, found in enumerate(shares):
        if found is not None:
            features[place::world] = found
    return features


def kept_features(
    extractor: Extractor, pictures: Pictures, accelerator: Accelerator, *, folder: Path, batch: int = BATCH
) -> tuple[np.ndarray, str]:
    """Read the features of real images where they were kept, or compute and keep them. Returns their images' digest.

    They are kept under a sha256 of all pixels and of the extractor, and read only where their own sha256 is right.
    """
    images = ask_main(accelerator, lambda: digest_pixels(pictures))
    key = hashlib.sha256(f"{images} {extractor.digest}".encode()).hexdigest()
    file = folder / f"{key}.safetensors"
    features = ask_main(accelerator, lambda: read_kept(file, key, len(pictures)))
    if features is None:
        features = compute_features(extractor, pictures, accelerator, batch=batch)
        if accelerator.is_main_process:
            keep(file, key, features)
    return features, images


def digest_pixels(pictures: Pictures) -> str:
    """Compute a sha256 of the pixels of all images, in their order."""
    total = hashlib.sha256()
    for number in pictures.numbers:
        image = pictures.bytes_of(int(number))
        total.update(f"{image.shape}".encode())
        total.update(image.tobytes())
    return total.hexdigest()


def digest_features(features: np.ndarray) -> str:
    """Compute a sha256 of features."""
    return hashlib.sha256(np.ascontiguousarray(features, "<f4").tobytes()).hexdigest()


def read_kept(file: Path, key: str, count: int) -> np.ndarray | None:
    """Read features that were kept, None where there are none, or the file is not what was written, which is said."""
    if not file.is_file():
        return None
    try:
        with safe_open(file, "np") as opened:
            facts, features = parse_object((opened.metadata() or {})[KEY].encode(), KEY), opened.get_tensor("features")
        if facts["key"] != key or features.dtype != np.float32 or features.ndim != 2 or len(features) != count:
            raise ValueError("it is of other images or another extractor")
        if facts["sha256"] != digest_features(features):
            raise ValueError("its sha256 differs")
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        logger.warning("features in %s are damaged (%s): they are computed anew", file, said(error))
        return None
    return features


def keep(file: Path, key: str, features: np.ndarray) -> None:
    """Write features for the next time; where that is not possible, say so."""
    facts = {"key": key, "sha256": digest_features(features)}
    try:
        with writing(file) as unfinished:
            save_file({"features": features}, unfinished, metadata={KEY: json.dumps(facts)})
    except (OSError, SafetensorError) as error:
        logger.warning("features of the real images are not kept for the next time: %s", said(error))


def default_folder() -> Path:
    """Name the folder where features are kept: unetgn/features in the user's cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()) / "unetgn" / "features"
