"""Knows which modules and functions compute SiLU.

The predicates `is_*` only read what the functions `register_*` have written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from types import FunctionType
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from unetgn.fusion.classes import forward_of
from unetgn.fusion.identities import hands_on
from unetgn.fusion.recognition import has_own_call, is_bare, is_silu_forward, is_silu_function, uses_only


def _always(act: nn.Module) -> bool:
    return True


# From a forward that computes SiLU to the condition on the modules for which it does.
_silu_forwards: dict[Callable[..., Any], Callable[[Any], bool]] = {nn.SiLU.forward: _always}
_silu_functions: set[Callable[..., Any]] = {F.silu}
# The forwards of libraries, by path: the names that they use, and the condition.
_known_silus: dict[str, tuple[frozenset[str], Callable[[Any], bool]]] = {}


def is_silu_module(module: nn.Module) -> bool:
    """Return True where the forward of the module's class computes SiLU, whatever hooks the module carries."""
    condition = _silu_forwards.get(forward_of(module))
    return condition is not None and condition(module) and not has_own_call(module)


def is_bare_silu(act: Callable[[Tensor], Tensor]) -> bool:
    """Return True where calling `act` computes SiLU and does nothing else."""
    if isinstance(act, nn.Module):
        return is_silu_module(act) and is_bare(act)
    return isinstance(act, FunctionType) and act in _silu_functions


def early(act: Callable[[Tensor], Tensor], *between: Any) -> Callable[[Tensor], Tensor]:
    """Return `act` where it is SiLU, which may be taken earlier than the forward does; else what changes nothing.

    `between` are the modules that the forward calls before `act`: they have to hand on what they are given.
    """
    return act if _may_be_early(act, between) else _unchanged


def late(act: Callable[[Tensor], Tensor], x: Tensor, *between: Any) -> Tensor:
    """Compute act(x) where `early` has put it off."""
    return x if _may_be_early(act, between) else act(x)


def _may_be_early(act: Callable[[Tensor], Tensor], between: tuple[Any, ...]) -> bool:
    return is_bare_silu(act) and all(is_bare(module) and hands_on(module) for module in between)


def _unchanged(x: Tensor) -> Tensor:
    return x


def register_known_silu(forward: str, *, uses: Iterable[str], where: Callable[[Any], bool] = _always) -> None:
    """Name a library's forward, by path, that uses these names and computes SiLU for modules of which `where` holds."""
    _known_silus[forward] = frozenset(uses), where


def register_silu_functions(module: nn.Module) -> frozenset[str]:
    """Return the attributes of a module that hold a function which computes SiLU, and register the functions."""
    return frozenset(name for name, value in vars(module).items() if register_silu_function(value))


def register_silu_function(function: Any) -> bool:
    """Return True for a function that computes SiLU, and register it."""
    found = isinstance(function, FunctionType) and is_silu_function(function)
    if found:
        _silu_functions.add(function)
    return found


def register_activation(cls: type[nn.Module]) -> None:
    """Register a class of module if it computes SiLU: if a library's rule names it, or its own name says so.

    A class that is called SiLU or Swish is believed only after a trial.
    """
    forward: Any = getattr(cls, "forward", None)  # the class of scripted modules has none
    if forward is None or forward in _silu_forwards:
        return
    known = _known_silus.get(f"{getattr(forward, '__module__', '')}.{getattr(forward, '__qualname__', '')}")
    if known is not None and uses_only(forward, known[0]):
        _silu_forwards[forward] = known[1]
    elif cls.__name__.lower() in ("silu", "swish") and is_silu_forward(forward):
        _silu_forwards[forward] = _always
