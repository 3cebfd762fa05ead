"""Which modules compute group normalization or SiLU, under whatever class name.

Projects carry copies of their own: a GroupNorm that computes in float32, a SiLU from before PyTorch had one. A copy
whose code uses a few known names and nothing else (no attribute, so no state that another instance could have
otherwise) is run once, on a few numbers; if it gives the values of nn.GroupNorm or of SiLU, it is taken for one.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from types import CodeType, FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as torch_module


def _always(act: nn.Module) -> bool:
    return True


# The forwards that compute nn.GroupNorm's values; those that compute SiLU's, for modules of which a condition holds.
GROUP_NORM_FORWARDS: set[Callable[..., Any]] = {nn.GroupNorm.forward}
SILU_FORWARDS: dict[Callable[..., Any], Callable[[Any], bool]] = {nn.SiLU.forward: _always}
# How to take SiLU into other norms: from the forward of a class to a function fold(norm, x, …).
FOLDS: dict[Callable[..., Any], Callable[..., Tensor]] = {}

UPCASTING = frozenset({"super", "forward", "float", "float32", "torch", "th", "type", "type_as", "to", "dtype"})
SIGMOID = frozenset({"torch", "th", "nn", "functional", "F", "sigmoid", "silu"})
_known_silus: dict[str, tuple[frozenset[str], Callable[[Any], bool]]] = {}


def is_bare(module: nn.Module) -> bool:
    """Whether calling the module does nothing but run its class's forward: no hooks, no forward of the instance."""
    hooked = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return not (hooked or "forward" in module.__dict__ or torch_module._has_any_global_hook())


def is_silu(act: Callable[[Tensor], Tensor]) -> bool:
    """Whether calling `act` computes SiLU and nothing else."""
    if isinstance(act, nn.Module):
        condition = SILU_FORWARDS.get(type(act).forward)
        return condition is not None and condition(act) and is_bare(act)
    return act is F.silu


def is_foldable(norm: nn.Module) -> bool:
    """Whether SiLU can be taken into this class of norm."""
    return type(norm).forward in GROUP_NORM_FORWARDS or type(norm).forward in FOLDS


def know_silu(forward: str, *, uses: Iterable[str], where: Callable[[Any], bool] = _always) -> None:
    """Name a forward, by path, that uses these names and computes SiLU for the modules of which `where` holds."""
    _known_silus[forward] = frozenset(uses), where


def learn_silu(module: nn.Module) -> bool:
    """Whether the module computes SiLU. Only a class that is known or of that name is tried, the latter without a
    module as `self`."""
    forward = type(module).forward
    if forward not in SILU_FORWARDS:
        known = _known_silus.get(f"{forward.__module__}.{getattr(forward, '__qualname__', '')}")
        is_named = type(module).__name__.lower() in ("silu", "swish")
        if known is not None and _uses_only(forward, known[0]):
            SILU_FORWARDS[forward] = known[1]
        elif is_named and _uses_only(forward, SIGMOID) and _gives_silu(lambda x: forward(None, x)):
            SILU_FORWARDS[forward] = _always
    return forward in SILU_FORWARDS and SILU_FORWARDS[forward](module)


def learn_group_norm(norm: nn.Module) -> bool:
    """Whether the norm's class computes group normalization. Only a subclass that does no more than cast is tried."""
    forward = type(norm).forward
    is_candidate = forward not in GROUP_NORM_FORWARDS and isinstance(norm, nn.GroupNorm)
    if is_candidate and _uses_only(forward, UPCASTING) and _gives_group_norm(type(norm)):
        GROUP_NORM_FORWARDS.add(forward)
    return forward in GROUP_NORM_FORWARDS


def computes_silu(function: Any) -> bool:
    """Whether a function, of one argument and known names, has SiLU's values."""
    return function is F.silu or (_uses_only(function, SIGMOID) and _gives_silu(function))


def used_names(method: Any) -> frozenset[str]:
    """The globals and attributes that the code of a method uses; empty for what is not written in Python."""
    original = inspect.unwrap(method) if callable(method) else None
    if not isinstance(original, FunctionType):
        return frozenset()
    return frozenset(name for code in codes(original.__code__) for name in code.co_names)


def codes(code: CodeType) -> Iterator[CodeType]:
    """A function's code, and that of the functions within it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from codes(constant)


def _uses_only(function: Any, names: frozenset[str]) -> bool:
    """Whether it is a function in Python, without a wrapper around it, whose code uses these names alone."""
    is_plain = isinstance(function, FunctionType) and not hasattr(function, "__wrapped__")
    return is_plain and used_names(function) <= names and set(function.__code__.co_freevars) <= {"__class__"}


def _gives_silu(function: Callable[[Tensor], Tensor]) -> bool:
    probe = torch.linspace(-6, 6, 25, dtype=torch.float64)
    try:
        values, halves = function(probe.clone()), function(probe.bfloat16())
        same = values.dtype == probe.dtype and torch.allclose(values, F.silu(probe), rtol=1e-12, atol=0)
        return same and halves.dtype == torch.bfloat16
    except Exception:  # whatever somebody else's function may raise: it is no SiLU then
        return False


def _gives_group_norm(cls: type[nn.Module]) -> bool:
    plain = nn.GroupNorm(2, 4, dtype=torch.float32, device="cpu")
    with torch.no_grad():
        plain.weight.copy_(torch.tensor([1.0, 2.0, 3.0, 4.0]))
        plain.bias.copy_(torch.tensor([0.0, 1.0, 0.0, -1.0]))
        x = torch.linspace(-3, 5, 24, dtype=torch.float32, device="cpu").view(1, 4, 6)
        expected = plain(x)
        plain.__class__ = cls  # type: ignore[assignment]
        try:
            values, halves = plain(x), plain(x.bfloat16())
            same = values.dtype == x.dtype and torch.allclose(values, expected, rtol=1e-5, atol=1e-5)
            return same and halves.dtype == torch.bfloat16
        except Exception:  # whatever somebody else's forward may raise: it is no group norm then
            return False
