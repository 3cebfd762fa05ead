"""Checks the fields of configurations. Messages name the field and say what would be right."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from unetgn.messages import short


def freeze_lists(config: Any) -> None:
    """Turn lists in a frozen dataclass into tuples: it is hashable then, and equal to the one read from JSON."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if isinstance(value, list):
            object.__setattr__(config, field.name, _tuple(value))


def _tuple(value: Any) -> Any:
    return tuple(_tuple(item) for item in value) if isinstance(value, (list, tuple)) else value


def check_kind(name: str, value: Any, kind: type) -> None:
    """Raise TypeError where `value` is no `kind`."""
    if not isinstance(value, kind):
        raise TypeError(f"{name} must be a {kind.__name__}, got {short(value)}")


def check_each(name: str, values: Any, what: str) -> None:
    """Raise TypeError where `values` is one number, but one for each `what` is wanted."""
    if isinstance(values, (int, float)):
        raise TypeError(f"{name} must name one number for each {what}, got {short(values)}")


def check_choice(name: str, value: Any, choices: Sequence[Any]) -> None:
    """Raise ValueError where `value` is not one of `choices`."""
    if value not in choices:
        listed = " or ".join(map(repr, choices)) if len(choices) < 3 else f"one of {tuple(choices)}"
        raise ValueError(f"{name} must be {listed}, got {short(value)}")


def check_at_least(least: float, numbers: Mapping[str, Any]) -> None:
    """Raise ValueError where a number, or one of a tuple of numbers, is below `least` or not finite. None passes."""
    for name, value in numbers.items():
        if not all(least <= number < math.inf for number in _numbers(value)):
            raise ValueError(f"{name} must be at least {least}, got {value}")


def _numbers(value: Any) -> list[Any]:
    if isinstance(value, tuple):
        return [number for item in value for number in _numbers(item)]
    return [] if value is None else [value]


def check_positive(name: str, factor: float) -> None:
    """Raise ValueError where a factor is not finite and above 0."""
    if not 0 < factor < math.inf:
        raise ValueError(f"{name} must be a finite number above 0, got {factor}")


def check_kernel(name: str, size: int) -> None:
    """Raise ValueError where a kernel size is even: the kernel has no middle and would change the size of an image."""
    if size < 1 or size % 2 == 0:
        raise ValueError(f"{name} must be odd, so that the kernel keeps the size of an image, got {size}")
