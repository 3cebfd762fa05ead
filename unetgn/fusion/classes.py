"""Finds classes by path and by the methods that they define, so that a rule can name a class that is not imported."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

ClassPredicate = Callable[[type], bool]


def forward_of(module: object) -> Any:
    """Return the forward of a module's class; None for a scripted module, whose class has none to give."""
    return getattr(type(module), "forward", None)


def owner_of(cls: type, method: str) -> type:
    """Return the class that defines a method which `cls` has or inherits."""
    return next(owner for owner in cls.__mro__ if method in vars(owner))


def path_of(cls: type) -> str:
    """Return module and name of a class, as rules write them."""
    return f"{cls.__module__}.{cls.__qualname__}"


def inherits(cls: type, base: type, method: str) -> bool:
    """Return True where `cls` is `base`, or a subclass that takes the method over from it or from above it."""
    return issubclass(cls, base) and owner_of(cls, method) is owner_of(base, method)


def matcher(target: type | str | ClassPredicate, method: str) -> ClassPredicate:
    """Return the predicate of the classes that a target stands for: a class, its path, or a predicate already."""
    if isinstance(target, str):
        return lambda cls: hasattr(cls, method) and path_of(owner_of(cls, method)) == target
    if isinstance(target, type):
        return lambda cls: inherits(cls, target, method)
    return target
