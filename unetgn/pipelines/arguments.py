"""Checks of what kind the arguments of a pipeline are, before anything is made of them.

This file needs nothing of ours: saved pipelines carry it (`unetgn.pipelines.pipeline`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor


def as_number(value: Any) -> int | float | None:
    """Return a number as Python has it, of Python's, NumPy's or torch's; None for what is none, such as a truth."""
    if isinstance(value, (Tensor, np.ndarray, np.generic)):
        value = value.item() if value.ndim == 0 else None
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def check_number(name: str, value: Any, *, optional: bool) -> None:
    """Raise TypeError where the argument `name` is no number, or None that is not `optional`."""
    if as_number(value) is None and not (optional and value is None):
        raise TypeError(f"{name} is {told(value)}; a number is needed")


def check_whole(name: str, value: Any, *, optional: bool) -> None:
    """Raise TypeError where the argument `name` is no whole number, or None that is not `optional`."""
    if not isinstance(as_number(value), int) and not (optional and value is None):
        raise TypeError(f"{name} is {told(value)}; a whole number is needed")


def check_pair(name: str, value: Any) -> None:
    """Raise TypeError where the argument `name` is neither None nor two numbers."""
    if value is None:
        return
    if not isinstance(value, (tuple, list)) or len(value) != 2 or any(as_number(one) is None for one in value):
        raise TypeError(f"{name} is {told(value)}; two numbers are needed")


def check_tensor(name: str, value: Any) -> None:
    """Raise TypeError where the argument `name` is neither None nor a tensor of floats, ValueError where not finite."""
    if value is None:
        return
    if not isinstance(value, Tensor) or not value.is_floating_point():
        raise TypeError(f"{name} is {told(value)}; a tensor of floats is needed")
    if not torch.isfinite(value).all():
        raise ValueError(f"{name} has values that are not finite")


def check_texts(name: str, value: Any, *, several: bool = True) -> None:
    """Raise TypeError where the argument `name` is neither None nor a text, nor, where `several` may be, a list."""
    if value is None or isinstance(value, str):
        return
    if not several or not isinstance(value, Sequence) or not all(isinstance(text, str) for text in value):
        raise TypeError(f"{name} is {told(value)}; a text{' or a list of texts' if several else ''} is needed")


def told(value: Any) -> str:
    """Write a value for a message, a tensor or an array by its kind and shape."""
    if isinstance(value, Tensor) or (isinstance(value, np.ndarray) and value.ndim):
        return f"a {type(value).__name__} of {value.dtype}, shape {tuple(value.shape)}"
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:100]}…"
