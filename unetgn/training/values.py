"""Reads the value of a key as its writer meant it: `1e5` steps, channels `32,64` or `(32,64)`, `True`, `none`.

YAML has one way to write each of these, and takes the others for text.
"""

from __future__ import annotations

import types
import typing
from dataclasses import is_dataclass
from typing import Any

import yaml

TRUTH = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
NOTHING = ("none", "null", "~")
BRACKETS = str.maketrans("()", "[]")


def as_meant(kind: Any, value: Any) -> Any:
    """Turn what YAML, or a command line, has for a value of the type `kind` into what was meant; else leave it."""
    kinds = typing.get_args(kind) if typing.get_origin(kind) in (typing.Union, types.UnionType) else (kind,)
    if isinstance(value, dict):
        keys = next((typing.get_type_hints(one) for one in kinds if is_dataclass(one)), {})
        return {key: as_meant(keys[key], item) if key in keys else item for key, item in value.items()}
    if isinstance(value, str) and value.strip().lower() in NOTHING and type(None) in kinds:
        return None
    if str in kinds or any(typing.get_origin(one) is typing.Literal for one in kinds):
        return value  # a text is what it is
    if bool in kinds:
        return TRUTH.get(str(value).strip().lower(), value)
    sequence = next((one for one in kinds if typing.get_origin(one) is tuple), None)
    number = as_number(value) if int in kinds or float in kinds else value
    if isinstance(number, float) and int in kinds and float not in kinds and number.is_integer():
        number = int(number)
    if sequence is None or (not isinstance(number, (str, list, tuple)) and int in kinds):
        return number
    items = as_list(number)
    inner = typing.get_args(sequence)
    return [as_meant(inner[0] if inner[-1] is Ellipsis else inner[min(i, len(inner) - 1)], item)
            for i, item in enumerate(items)] if items is not None else value  # fmt: skip


def as_number(value: Any) -> Any:
    """Turn a text into the number that Python reads in it, such as 1e5 or 1_000; else leave it."""
    for read in (int, float) if isinstance(value, str) else ():
        try:
            return read(value)
        except ValueError:
            continue
    return value


def as_list(value: Any) -> list[Any] | None:
    """Turn `32,64`, `(32,64)` and `[32,64]`, or one value alone, into a list; None where it is neither."""
    if not isinstance(value, str):
        return list(value) if isinstance(value, (list, tuple)) else None if value is None else [value]
    text = value.translate(BRACKETS).strip()
    try:
        items = yaml.safe_load(text)
        return items if isinstance(items, list) else yaml.safe_load(f"[{text}]")
    except yaml.YAMLError:
        pass
    try:
        return yaml.safe_load(f"[{text}]")
    except yaml.YAMLError:
        return None


def fits(kind: Any, value: Any) -> bool:
    """Return True where a value of YAML, read as it was meant, is of the type `kind`."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return any(fits(one, value) for one in inner)
    if origin is typing.Literal:
        return value in inner
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            return False
        kinds = inner[:1] * len(value) if inner[-1] is Ellipsis else inner
        return len(kinds) == len(value) and all(map(fits, kinds, value))
    if kind in (int, float):
        return isinstance(value, (int, kind)) and not isinstance(value, bool)
    return isinstance(value, dict) if is_dataclass(kind) else isinstance(value, kind)


WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", type(None): "null"}


def in_words(kind: Any) -> str:
    """Say what a key of the type `kind` takes: "a whole number, or null"."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return ", or ".join(map(in_words, inner))
    if origin is typing.Literal:
        return " or ".join(map(str, inner)) if len(inner) < 3 else f"one of {', '.join(map(str, inner))}"
    if origin is tuple and inner[-1] is Ellipsis:
        return f"a list, of each: {in_words(inner[0])}"
    if origin is tuple:
        return f"a list of {len(inner)}: {', '.join(map(in_words, inner))}"
    return WORDS.get(kind, "keys of its own")
