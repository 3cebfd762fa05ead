"""What takes the place of one method of one module, and how it gets there and back below other libraries' hooks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import MethodType
from typing import Any

from torch import nn

from unetgn.fusion.reading import read

RECORD = "_unetgn_stand_in"


class StandIn:
    """Runs a function of the module in the place of `module.<method>`.

    The function is given, or else made by reading the method with the module's `norms` and `activations`. The stand-in
    is an attribute of the instance: the class, its name and `isinstance` stay what they were, and so do parameters,
    buffers and children. It is copied and pickled with its module; a function that was made by reading is made again.
    Once retired it runs the original, for whoever still holds it inside a wrapper of theirs.
    """

    def __init__(
        self,
        module: nn.Module,
        method: str,
        norms: tuple[str, ...],
        *,
        function: Callable[..., Any] | None = None,
        activations: frozenset[str] | None = None,
    ) -> None:
        self.module, self.method, self.norms, self.activations = module, method, norms, activations
        self.function = function or self._read()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(self.module, *args, **kwargs)

    @property
    def original(self) -> Any:
        """The method of the class, bound to the module."""
        return MethodType(getattr(type(self.module), self.method), self.module)

    @property
    def __wrapped__(self) -> Any:
        """Where `inspect.signature` looks."""
        return self.original

    def retire(self) -> None:
        """Run the class's own method from now on."""
        self.function = getattr(type(self.module), self.method)

    def _read(self) -> Callable[..., Any]:
        return read(getattr(type(self.module), self.method), frozenset(self.norms), self.activations or frozenset())

    def __getstate__(self) -> dict[str, Any]:
        is_read = self.activations is not None
        return {name: value for name, value in vars(self).items() if name != "function" or not is_read}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        if "function" not in state:
            self.function = self._read()


def stand_in_of(module: nn.Module) -> StandIn | None:
    """The stand-in at work in a module, if there is one."""
    return vars(module).get(RECORD)


def install(stand_in: StandIn) -> bool:
    """Put a stand-in where the original method is called from; False where somebody's wrapper hides that place."""
    module, method = stand_in.module, stand_in.method
    if method not in vars(module):
        vars(module)[method] = stand_in
    else:
        place = next((p for p in _places(module, method) if _is_original(p[0][p[1]], stand_in)), None)
        if place is None:
            return False
        place[0][place[1]] = stand_in
    vars(module)[RECORD] = stand_in
    return True


def remove(module: nn.Module) -> None:
    """Take the module's stand-in out of every place; what wraps it in a way that we cannot see runs the original."""
    stand_in = vars(module).pop(RECORD)
    for attributes, name in list(_places(module, stand_in.method)):
        if attributes[name] is stand_in:
            if attributes is vars(module) and name == stand_in.method:
                del attributes[name]
            else:
                attributes[name] = stand_in.original
    stand_in.retire()


def _places(module: nn.Module, method: str) -> Iterator[tuple[dict[str, Any], str]]:
    """Where a module's method may be held: the instance, accelerate's `_old_forward`, the hooks of diffusers."""
    for name in (method, "_old_forward"):
        if name in vars(module):
            yield vars(module), name
    for reference in getattr(vars(module).get("_diffusers_hook"), "_fn_refs", ()):
        for name in ("forward", "original_forward"):
            yield vars(reference), name


def _is_original(held: Any, stand_in: StandIn) -> bool:
    return getattr(held, "__func__", None) is stand_in.original.__func__
