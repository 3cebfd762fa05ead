"""Knows the group norms of other people's models, and which of them can take in the SiLU after them.

The predicates `is_*` only read what the functions `register_*` and the decorator `norm_rule` have written.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unetgn.fusion.classes import ClassPredicate, forward_of, matcher, owner_of, path_of
from unetgn.fusion.recognition import (
    CASTS,
    Settings,
    dtypes_of_group_norm,
    has_own_call,
    is_calling_group_norm,
    is_casting_group_norm,
    settings_of_group_norm,
    unknown_names,
    used_names,
)

Function = TypeVar("Function", bound=Callable[..., Any])


@dataclass(frozen=True)
class NormRule:
    """Computes SiLU(norm(x, …)) by `function(norm, x, …)`, for a class that wraps or extends nn.GroupNorm.

    It holds for a forward that uses the names `uses` and no others.
    """

    matches: ClassPredicate
    function: Callable[..., Tensor]
    uses: frozenset[str]

    def why_not(self, cls: type[nn.Module]) -> str | None:
        """Return why this rule is not for the forward of a class that it matches; None where it is."""
        if hasattr(cls.forward, "__wrapped__"):
            return f"{owner_of(cls, 'forward').__name__}'s forward is wrapped"
        return unknown_names(cls.forward, self.uses)


_group_norm_forwards: set[Callable[..., Any]] = {nn.GroupNorm.forward}
# Of those that cast: the dtypes of input and parameters that they take.
_casting: dict[Callable[..., Any], frozenset[tuple[torch.dtype, torch.dtype]]] = {}
# From the forward of another norm to the function that computes it and SiLU.
_fused_forwards: dict[Callable[..., Any], Callable[..., Tensor]] = {}
# Of forwards that compute group norm for some modules: what attributes these have.
_settings: dict[Callable[..., Any], set[Settings]] = {}
_FUNCTIONS = (F.group_norm, torch.group_norm)
_scaling: set[Callable[..., Tensor]] = set()  # functions of rules that have the keywords scale and shift
_rules: list[NormRule] = []
_reasons: dict[str, str] = {}  # of norms into which SiLU cannot be taken, by path


def is_norm(module: nn.Module) -> bool:
    """Return True for somebody else's group norm: nn.GroupNorm, a subclass, or a class with a rule or a refusal."""
    return _is_norm_class(type(module))


def is_other_norm(module: nn.Module) -> bool:
    """Return True for a group norm that is no nn.GroupNorm: a module without children that calls the function."""
    own = type(module).__module__.partition(".")[0] == "unetgn"
    return not (own or module._modules or is_norm(module)) and "group_norm" in used_names(forward_of(module))


def is_plain_group_norm(norm: nn.Module) -> bool:
    """Return True where the forward of the norm's class computes nn.GroupNorm and nothing else, for such a module."""
    forward = forward_of(norm)
    if forward in _group_norm_forwards:
        return True
    return any(all(getattr(norm, name, None) == value for name, value in s) for s in _settings.get(forward, ()))


def dtypes_taken(norm: nn.Module) -> frozenset[tuple[torch.dtype, torch.dtype]] | None:
    """Return the dtypes of input and parameters that a norm takes whose class casts one of them; None for others."""
    return _casting.get(forward_of(norm))


def is_group_norm_function(function: Any) -> bool:
    """Return True for torch's group_norm as a function, and for nn.GroupNorm.forward bound to a module."""
    return function in _FUNCTIONS or getattr(function, "__func__", None) is nn.GroupNorm.forward


def own_arguments(function: Any, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
    """Return num_groups, weight, bias and eps of a call of one of these functions."""
    module = getattr(function, "__self__", None)
    if isinstance(module, nn.GroupNorm):
        return module.num_groups, module.weight, module.bias, module.eps
    return _own_arguments(*args, **kwargs)


def _own_arguments(
    num_groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5, cudnn_enabled: bool = True
) -> tuple[Any, ...]:
    return num_groups, weight, bias, eps


def calls_group_norm(module: nn.Module) -> bool:
    """Return True where the forward of a module may call group_norm, or nn.GroupNorm's forward, by itself."""
    forward = forward_of(module)
    is_subclass = isinstance(module, nn.GroupNorm) and not is_fusable(module)
    return is_subclass or ("group_norm" in used_names(forward) and not is_plain_group_norm(module))


def takes_scale(norm: nn.Module) -> bool:
    """Return True where the function of the norm's rule takes in a scale-shift, too."""
    return _fused_forwards.get(forward_of(norm)) in _scaling


def is_fusable(norm: nn.Module) -> bool:
    """Return True where SiLU can be taken into this class of norm."""
    return not has_own_call(norm) and (is_plain_group_norm(norm) or fused_forward(norm) is not None)


def fused_forward(norm: nn.Module) -> Callable[..., Tensor] | None:
    """Return the function that computes SiLU(norm(x, …)), where the norm's class has a rule that holds."""
    return _fused_forwards.get(forward_of(norm))


def why_not_fused(norm: nn.Module) -> str | None:
    """Return why SiLU cannot be taken into this norm; None where it can."""
    if is_fusable(norm):
        return None
    if has_own_call(norm):
        return f"{type(norm).__name__} has a __call__ of its own"
    owner = owner_of(type(norm), "forward")
    if is_other_norm(norm):
        return (
            f"{owner.__name__} calls group_norm itself, and is not shown to compute torch.nn.GroupNorm: subclass that"
        )
    rule = _rule_for(type(norm))
    if path_of(owner) in _reasons or rule is None:
        return _reasons.get(path_of(owner), f"{owner.__name__} has a forward of its own in place of GroupNorm's")
    return rule.why_not(type(norm))


def norm_rule(target: str | ClassPredicate, *, uses: Iterable[str]) -> Callable[[Function], Function]:
    """Register the decorated function: it computes SiLU of what the forward of `target`'s norms computes."""

    def register(function: Function) -> Function:
        if {"scale", "shift"} <= set(inspect.signature(function).parameters):
            _scaling.add(function)
        _rules.append(NormRule(matcher(target, "forward"), function, frozenset(uses)))
        return function

    return register


def register_unfusable(target: str, reason: str) -> None:
    """Name a class of norm, by path, into which SiLU cannot be taken, and say why, for the report."""
    _reasons[target] = reason


def register_norm(cls: type[nn.Module]) -> None:
    """Register a class if it is a norm that can take in SiLU: by trial, or by the newest rule for it."""
    forward: Any = getattr(cls, "forward", None)
    if forward is None or forward in _group_norm_forwards or forward in _fused_forwards:
        return
    if is_calling_group_norm(cls):
        _group_norm_forwards.add(forward)
        if used_names(forward) & CASTS:
            _casting[forward] = dtypes_of_group_norm(cls)
    if forward in _group_norm_forwards or not _is_norm_class(cls):
        return
    rule = _rule_for(cls)
    if is_casting_group_norm(cls):
        _group_norm_forwards.add(cls.forward)
        _casting[cls.forward] = dtypes_of_group_norm(cls)
    elif rule is not None and path_of(owner_of(cls, "forward")) not in _reasons and rule.why_not(cls) is None:
        _fused_forwards[cls.forward] = rule.function


def register_norm_with_settings(norm: nn.Module) -> None:
    """Register a module whose class takes an activation in or leaves it out, as an attribute says, and leaves it out.

    The class is believed for modules whose attributes, of the names that its forward uses, are those of this one.
    """
    if not isinstance(norm, nn.GroupNorm) or has_own_call(norm) or is_fusable(norm):
        return
    settings = settings_of_group_norm(norm)
    if settings is not None:
        forward = forward_of(norm)
        _settings.setdefault(forward, set()).add(settings)
        _casting[forward] = _casting.get(forward, frozenset()) | dtypes_of_group_norm(type(norm), settings)


def children(block: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return the direct children with their names, a child with two names twice (`named_children` gives it once)."""
    return [(name, child) for name, child in block._modules.items() if child is not None]


def child_norms(block: nn.Module) -> dict[str, nn.Module]:
    """Return the direct children that are norms; under all of its names where one module has several."""
    return {name: child for name, child in children(block) if is_norm(child)}


def held_norms(block: nn.Module) -> dict[str, nn.Module]:
    """Return the norms within containers that have no forward, as nn.ModuleDict and nn.ModuleList, by their paths."""
    found: dict[str, nn.Module] = {}
    for name, child in children(block):
        if forward_of(child) is nn.Module.forward:
            within = child_norms(child) | held_norms(child)
            found |= {f"{name}.{path}": norm for path, norm in within.items()}
    return found


def _is_norm_class(cls: type[nn.Module]) -> bool:
    if cls.__module__.partition(".")[0] == "unetgn":
        return False
    if issubclass(cls, nn.GroupNorm) or getattr(cls, "forward", None) in _group_norm_forwards:
        return True
    return path_of(owner_of(cls, "forward")) in _reasons or _rule_for(cls) is not None


def _rule_for(cls: type[nn.Module]) -> NormRule | None:
    return next((rule for rule in reversed(_rules) if rule.matches(cls)), None)
