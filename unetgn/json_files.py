"""Reads JSON files that may be anybody's: one error in one line for whatever is in them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, NoReturn

from unetgn.messages import said

LIMIT = 2**20  # bytes: configurations and manifests have a few thousand
DEEPEST = 50  # objects and lists within each other: who copies or prints what is deeper runs out of Python's stack
SPARSE = 16  # bytes of text for each object or list: an empty one has three, and takes two hundred in memory


def read_object(path: Path, *, limit: int = LIMIT, finite: bool = True) -> dict[str, Any]:
    """Read the JSON object in a file of at most `limit` bytes.

    Raises OSError where it cannot be read, ValueError where it is no ordinary file, or for what `parse_object` refuses.
    """
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} is no file")  # reading a pipe would wait for ever
    with path.open("rb") as file:
        return parse_object(file.read(limit + 1), str(path), limit=limit, finite=finite)


def parse_object(text: bytes, name: str, *, limit: int = LIMIT, finite: bool = True) -> dict[str, Any]:
    """Parse a JSON object; `name` is what errors call it. Raises ValueError for what `parse` refuses, and no object."""
    keys = parse(text, name, limit=limit, finite=finite)
    if not isinstance(keys, dict):
        raise ValueError(f"{name} holds a {type(keys).__name__}, but an object of keys is needed")
    return keys


def parse(text: bytes, name: str, *, limit: int = LIMIT, finite: bool = True) -> Any:
    """Parse JSON of at most `limit` bytes; `name` is what errors call it.

    Raises ValueError where it is larger, not JSON, holds more objects and lists than it has room for, or one in another
    more than DEEPEST times, or (unless told otherwise) has numbers that are not `finite`: NaN, 1e999.
    """
    if len(text) > limit:
        raise ValueError(f"{name} has more than {limit} bytes, which is the most that is read")
    if (parts := text.count(b"{") + text.count(b"[")) > limit // SPARSE:
        raise ValueError(f"{name} holds {parts} objects and lists; at most {limit // SPARSE} are read")
    try:
        hooks: dict[str, Any] = {"parse_constant": refuse, "parse_float": finite_number} if finite else {}
        value = json.loads(text.decode(), **hooks)
    except RecursionError:
        raise ValueError(f"{name} is nested too deeply") from None
    except ValueError as error:  # not UTF-8, not JSON, an integer of thousands of digits
        raise ValueError(f"{name} cannot be read as JSON: {said(error)}") from None
    check_depth(value, name)
    return value


def check_depth(value: Any, name: str) -> None:
    """Raise ValueError where objects and lists are within each other more than DEEPEST times."""
    level = [value] if isinstance(value, (dict, list)) else []
    for _ in range(DEEPEST):
        level = [inner for outer in level for inner in (outer.values() if isinstance(outer, dict) else outer)
                 if isinstance(inner, (dict, list))]  # fmt: skip
    if level:
        raise ValueError(f"{name} is nested too deeply: at most {DEEPEST} objects and lists within each other are read")


def finite_number(text: str) -> float:
    """Return the number that is written. Raises ValueError where it is beyond float64."""
    number = float(text)
    return number if math.isfinite(number) else refuse(text)


def refuse(text: str) -> NoReturn:
    """Raise ValueError for a number that is none."""
    raise ValueError(f"{text} is not a finite number")
