"""Puts another function inside the decorators that are around a forward, and keeps the decorators.

diffusers scales LoRA layers in a decorator around `UNet2DConditionModel.forward`, projects write `@torch.no_grad()`,
tools patch a class with a counting wrapper. Each is a closure that holds the function it wraps. The same closure over
another function does the same around it.
"""

from __future__ import annotations

from collections.abc import Callable
from types import CellType, FunctionType
from typing import Any


class CannotWrapError(Exception):
    """Says that a wrapper keeps the function that it wraps elsewhere than in a variable of its closure."""


def rewrap(method: Callable[..., Any], function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `function` as the innermost function of `method` is wrapped; return itself where nothing is around that.

    Raises CannotWrapError where a wrapper is no function, or does not close over what it wraps.
    """
    wrapped = getattr(method, "__wrapped__", None)
    if wrapped is None:
        return function
    cells = method.__closure__ or () if isinstance(method, FunctionType) else ()
    if not isinstance(method, FunctionType) or not any(_holds(cell, wrapped) for cell in cells):
        name = getattr(wrapped, "__qualname__", repr(wrapped))
        raise CannotWrapError(f"{name} is wrapped in a way that hides it: fuse first, wrap then")
    inner = rewrap(wrapped, function)
    closure = tuple(CellType(inner) if _holds(cell, wrapped) else cell for cell in cells)
    wrapper = FunctionType(method.__code__, method.__globals__, method.__name__, method.__defaults__, closure)
    wrapper.__kwdefaults__ = method.__kwdefaults__
    wrapper.__dict__.update(method.__dict__, __wrapped__=inner)
    return wrapper


def _holds(cell: CellType, wrapped: Any) -> bool:
    try:
        return cell.cell_contents is wrapped
    except ValueError:  # an empty cell
        return False
