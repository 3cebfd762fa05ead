"""Puts a stand-in in the place of one method of one module, and takes it out again, below other libraries' hooks.

A fused module has these attributes on the instance: the method itself, bound to the module; the StandIn, which says
what it is; and two methods through which a copy of the module gets a stand-in that is bound to the copy. (A plain copy
takes over the attributes of the instance as they are, and so would run the forward of the module it was copied from.)
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from types import MethodType
from typing import Any

from torch import nn

from unetgn.fusion.rewriting.forward import rewrite_forward
from unetgn.fusion.rewriting.names import Parts
from unetgn.fusion.wrappers import rewrap

RECORD = "_unetgn_stand_in"


@dataclass(frozen=True)
class StandIn:
    """Says what runs in the place of `method`: `function`, or without one what rewriting makes of the method.

    `norms` are the paths of the norms that it fuses; `only` says of some of them that not every call is fused.
    `parts` is what rewriting may use; `off` are attributes that have to be False. Modules that are fused alike have
    equal stand-ins.
    """

    method: str
    norms: tuple[str, ...]
    function: Callable[..., Any] | None = None
    parts: Parts | None = None
    only: tuple[tuple[str, str], ...] = ()
    off: tuple[str, ...] = ()

    def function_for(self, method: Callable[..., Any]) -> Callable[..., Any]:
        """Return the function of the module, within the decorators of the class's method. Raises CannotWrapError."""
        parts = replace(self.parts or Parts(frozenset()), norms=frozenset(self.norms))
        return rewrap(method, self.function or rewrite_forward(method, parts))


def stand_in_of(module: nn.Module) -> StandIn | None:
    """Return the stand-in at work in a module, if there is one."""
    return vars(module).get(RECORD)


def install(module: nn.Module, stand_in: StandIn) -> bool:
    """Put a stand-in where the original method is called from; return False where a wrapper hides that place.

    The class, its name and `isinstance` stay what they were, and so do parameters, buffers and children.
    Raises CannotWrapError where the class's own method is wrapped so that nothing can be put inside.
    """
    original = getattr(type(module), stand_in.method)
    bound = MethodType(_runner(original, stand_in), module)
    attributes = vars(module)
    if stand_in.method in attributes:
        held = (place for place in _places(module, stand_in.method) if _is_known(place[0][place[1]], original))
        place = next(held, None)
        if place is None:
            return False
        place[0][place[1]] = bound
    else:
        attributes[stand_in.method] = bound
    attributes[RECORD] = stand_in
    for name, copying in COPYING.items():
        attributes[name] = MethodType(copying, module)
    return True


def remove(module: nn.Module) -> None:
    """Take a module's stand-in out of every place; a wrapper that holds it out of our sight runs the original then."""
    stand_in = vars(module)[RECORD]
    for name in (RECORD, *COPYING):
        vars(module).pop(name, None)
    for attributes, name in list(_places(module, stand_in.method)):
        if _is_ours(attributes[name]):
            if attributes is vars(module) and name == stand_in.method:
                del attributes[name]
            else:
                attributes[name] = MethodType(getattr(type(module), stand_in.method), module)


@functools.cache
def _runner(original: Callable[..., Any], stand_in: StandIn) -> Callable[..., Any]:
    """Return the function that is bound to modules. It runs the original where the module has no record (any more).

    A wrapper of somebody else's may hold it for longer than the module does. A switch may be turned on later.
    """
    function = stand_in.function_for(original)
    off = stand_in.off

    @functools.wraps(original)
    def run(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        is_as_fused = RECORD in self.__dict__ and not (off and any(getattr(self, name) for name in off))
        return (function if is_as_fused else original)(self, *args, **kwargs)

    del run.__wrapped__  # accelerate unwraps a forward down to the innermost, which would be the original
    run.__signature__ = inspect.signature(original)  # type: ignore[attr-defined]
    vars(run)[RECORD] = True
    return run


def _places(module: nn.Module, method: str) -> Iterator[tuple[dict[str, Any], str]]:
    """Yield where a module's method may be held: the instance, accelerate's `_old_forward`, the hooks of diffusers."""
    for name in (method, "_old_forward"):
        if name in vars(module):
            yield vars(module), name
    for reference in getattr(vars(module).get("_diffusers_hook"), "_fn_refs", ()):
        for name in ("forward", "original_forward"):
            yield vars(reference), name


def _is_ours(held: Any) -> bool:
    return RECORD in getattr(getattr(held, "__func__", None), "__dict__", ())


def _is_known(held: Any, original: Any) -> bool:
    return getattr(held, "__func__", None) is original or _is_ours(held)


def _detached(attributes: dict[str, Any], cls: type) -> dict[str, Any]:
    """Return the attributes of a fused module as they were before it was fused, and the StandIn."""
    before = {name: value for name, value in attributes.items() if name not in COPYING}
    method = before[RECORD].method
    if _is_ours(before.get(method)):
        del before[method]
    if _is_ours(before.get("_old_forward")):
        before["_old_forward"] = MethodType(getattr(cls, method), before["_old_forward"].__self__)
    return before


def _replicate(module: nn.Module) -> nn.Module:
    """Replace `_replicate_for_data_parallel` of a fused module."""
    replica = type(module)._replicate_for_data_parallel(module)
    replica.__dict__ = _detached(vars(replica), type(module))
    install(replica, vars(replica).pop(RECORD))
    return replica


def _reduce(module: nn.Module, protocol: Any) -> Any:
    """Replace `__reduce_ex__` of a fused module, which `copy`, `deepcopy` and `pickle` ask for."""
    reduced: Any = type(module).__reduce_ex__(module, protocol)
    if len(reduced) < 3 or not isinstance(reduced[2], dict) or RECORD not in reduced[2]:
        return reduced  # its class has a way of its own
    make, arguments, state, *rest = reduced
    return _blank, (make, arguments), _detached(state, type(module)), *rest


COPYING: dict[str, Callable[..., Any]] = {"__reduce_ex__": _reduce, "_replicate_for_data_parallel": _replicate}


def _blank(make: Callable[..., nn.Module], arguments: tuple[Any, ...]) -> nn.Module:
    """Make a module without its state, which it will be given through `__setstate__`."""
    module = make(*arguments)
    vars(module)["__setstate__"] = MethodType(_fuse_from_state, module)
    return module


def _fuse_from_state(module: nn.Module, state: dict[str, Any]) -> None:
    del vars(module)["__setstate__"]
    stand_in = state.pop(RECORD)
    type(module).__setstate__(module, state)
    install(module, stand_in)
