"""Reads JSON files that may be anybody's: one error in one line for whatever is in them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, NoReturn

LIMIT = 2**20  # bytes: configurations and manifests have a few thousand


def read_object(path: Path, *, limit: int = LIMIT, finite: bool = True) -> dict[str, Any]:
    """Read the JSON object in a file of at most `limit` bytes.

    Raises OSError where it cannot be read, ValueError where it is no ordinary file, larger, not JSON, nested beyond
    what Python's parser takes, no object, or (unless told otherwise) holds numbers that are not `finite`: NaN, 1e999.
    """
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} is no file")  # reading a pipe would wait for ever
    size = path.stat().st_size
    if size > limit:
        raise ValueError(f"{path} has {size} bytes; at most {limit} are read")
    try:
        hooks: dict[str, Any] = {"parse_constant": refuse, "parse_float": finite_number} if finite else {}
        keys = json.loads(path.read_text(encoding="utf-8"), **hooks)
    except RecursionError:
        raise ValueError(f"{path} is nested too deeply") from None
    except ValueError as error:  # not UTF-8, not JSON, an integer of thousands of digits
        raise ValueError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(keys, dict):
        raise ValueError(f"{path} holds a {type(keys).__name__}, but an object of keys is needed")
    return keys


def finite_number(text: str) -> float:
    """Return the number that is written. Raises ValueError where it is beyond float64."""
    number = float(text)
    return number if math.isfinite(number) else refuse(text)


def refuse(text: str) -> NoReturn:
    """Raise ValueError for a number that is none."""
    raise ValueError(f"{text} is not a finite number")
