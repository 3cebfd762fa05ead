"""What configuration dataclasses check about their fields: messages name the field and say what would be right."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any


def freeze_lists(config: Any) -> None:
    """Lists in the fields of a frozen dataclass become tuples: it is hashable then, and equal to the one from JSON."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if isinstance(value, list):
            object.__setattr__(config, field.name, _tuple(value))


def _tuple(value: Any) -> Any:
    return tuple(_tuple(item) for item in value) if isinstance(value, (list, tuple)) else value


def check_choice(name: str, value: Any, choices: Sequence[Any]) -> None:
    """Raise ValueError where `value` is not one of `choices`."""
    if value not in choices:
        listed = " or ".join(map(repr, choices)) if len(choices) < 3 else f"one of {tuple(choices)}"
        raise ValueError(f"{name} must be {listed}, got {value!r}")


def check_at_least(least: float, numbers: Mapping[str, Any]) -> None:
    """Raise ValueError where a number, or one of a tuple of numbers, is below `least` or not finite; None is none."""
    for name, value in numbers.items():
        if not all(least <= number < math.inf for number in _numbers(value)):
            raise ValueError(f"{name} must be at least {least}, got {value}")


def _numbers(value: Any) -> list[Any]:
    if isinstance(value, tuple):
        return [number for item in value for number in _numbers(item)]
    return [] if value is None else [value]


def check_positive(name: str, factor: float) -> None:
    """Raise ValueError where a factor would silence what it multiplies, turn its sign, or is not finite."""
    if not 0 < factor < math.inf:
        raise ValueError(f"{name} must be a finite number above 0, got {factor}")


def check_kernel(name: str, size: int) -> None:
    """Raise ValueError where a kernel has no middle: an even one would change the size of an image."""
    if size < 1 or size % 2 == 0:
        raise ValueError(f"{name} must be odd, so that the kernel keeps the size of an image, got {size}")
