"""Writes and reads the manifest of a checkpoint: what it has beside tensors, with checksums of all files and itself."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from unetgn import __version__
from unetgn.json_files import read_object
from unetgn.messages import plain, said, short
from unetgn.training.errors import CheckpointError, CheckpointFormatError, reason

MANIFEST = "manifest.json"
# Of what is written; 4 had no adapters and noise scales, 3 no averages, 2 no checksum of the manifest, 1 no number and
# the keys of its time.
FORMAT = 5
CHECKSUM = "manifest_sha256"


def write_manifest(folder: Path, keys: dict[str, Any]) -> None:
    """Write the manifest into a checkpoint's folder."""
    keys = {"format": FORMAT, **keys}
    text = json.dumps({**keys, CHECKSUM: checksum(keys)}, indent=1) + "\n"
    (folder / MANIFEST).write_text(text, encoding="utf-8")


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read the keys of a checkpoint's manifest, checked.

    Raises OSError where it cannot be read, CheckpointError where it is missing or damaged, CheckpointFormatError where
    another version of unetgn wrote it.
    """
    if not (folder / MANIFEST).exists():
        raise CheckpointError(f"{folder} is no checkpoint: it has no {MANIFEST}")
    try:
        keys = read_object(folder / MANIFEST, finite=False)  # sums of gradient norms may be infinite in float16
    except ValueError as error:
        raise CheckpointError(f"{folder} is damaged: {said(error)}") from error
    number = keys.pop("format", 1)
    if isinstance(number, bool) or number not in range(1, FORMAT + 1):
        version = keys.get("unetgn_version")
        writer = f"unetgn {plain(version)}" if isinstance(version, str) else "the unetgn that wrote it"
        raise CheckpointFormatError(
            f"{folder} has format {short(number)}, but this is unetgn {__version__}, which reads formats 1 to {FORMAT}"
            f": use {writer}, or a newer one"
        )
    if number >= 3 and keys.pop(CHECKSUM, None) != checksum({"format": number, **keys}):
        raise CheckpointError(f"{folder} is damaged: {MANIFEST} is not what was written (its {CHECKSUM} differs)")
    try:
        keys = from_format_1(keys) if number == 1 else keys
    except (KeyError, TypeError) as error:
        raise CheckpointError(
            f"{folder} is damaged: {MANIFEST} has format 1, but not its keys ({reason(error)})"
        ) from error
    check(folder, keys)
    return keys


def checksum(keys: dict[str, Any]) -> str:
    """Return the sha256 of the keys, in their order and without a space."""
    return hashlib.sha256(json.dumps(keys, separators=(",", ":")).encode()).hexdigest()


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


def is_count(value: object) -> bool:
    """Return True for an integer from 0 to what a float counts exactly."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**53


def is_number(value: object) -> bool:
    """Return True for a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def is_text(value: object) -> bool:
    """Return True for a string."""
    return isinstance(value, str)


def is_scaler(value: object) -> bool:
    """Return True for the state of a loss scale: numbers of float32, all but the tracker above 0; or None."""
    if value is None or value == {}:  # a scaler that is switched off
        return True
    names = {"scale", "growth_factor", "backoff_factor", "growth_interval", "_growth_tracker"}
    if not isinstance(value, dict) or value.keys() != names or not all(map(is_number, value.values())):
        return False
    counts = value["growth_interval"], value["_growth_tracker"]
    if not all(is_count(count) and count < 2**31 for count in counts):
        return False
    return all(0 < value[name] < 2**128 for name in names - {"_growth_tracker"})


def is_sums(value: object) -> bool:
    """Return True for pairs of floats, or with norms of parts fours of them: an int may be of any size.

    A gradient norm may be infinite where float16's loss scale is looked for.
    """
    return isinstance(value, list) and all(
        isinstance(pair, list) and len(pair) in (2, 4) and all(isinstance(number, float) for number in pair)
        for pair in value
    )


def is_digests(value: object) -> bool:
    """Return True for sha256 digests by the names of plain files."""
    return isinstance(value, dict) and all(
        re.fullmatch(r"\w[\w.]*", name) and isinstance(digest, str) and re.fullmatch(r"[0-9a-f]{64}", digest)
        for name, digest in value.items()
    )


SCHEMA: dict[str, Callable[[Any], bool]] = {
    "step": is_count,
    "world_size": lambda value: is_count(value) and value > 0,
    "images": is_text,
    "ema_step": is_count,
    "scaler": is_scaler,
    "window_sums": is_sums,
    "window_steps": is_count,
    "torch_version": is_text,
    "unetgn_version": is_text,
    "sha256": is_digests,
}


def check(folder: Path, keys: dict[str, Any]) -> None:
    """Raise CheckpointError where keys are missing, unknown, or of another type or range."""
    if keys.keys() != SCHEMA.keys():
        wrong = sorted(keys.keys() ^ SCHEMA.keys())[:5]
        raise CheckpointError(
            f"{folder} is damaged: {MANIFEST} has other keys than it should ({plain(', '.join(wrong))})"
        )
    for name, is_right in SCHEMA.items():
        if not is_right(keys[name]):
            raise CheckpointError(f"{folder} is damaged: {MANIFEST} has as {name} {short(keys[name])}")
