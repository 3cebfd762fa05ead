"""What `fuse` knows: rules for blocks and for norms, and the libraries whose forwards it may read.

A rule names its class by path, "diffusers.models.resnet.Conv1dBlock", so that nothing is imported for it, or is given
the class itself. It holds for every module whose class has or inherits *that class's own* forward. A subclass with a
forward of its own is another block, and the rule does not hold for it.
"""

from __future__ import annotations

import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor, nn

from unetgn.fusion.recognition import FOLDS, learn_group_norm, used_names

Function = TypeVar("Function", bound=Callable[..., Any])
Norms = Callable[[nn.Module], tuple[str, ...]]
Refuses = Callable[[nn.Module], str | None]


@dataclass(frozen=True)
class BlockRule:
    """`function(block, …)` takes the place of the block's `method`; `norms(block)` are the paths of those it fuses.

    It is not for a method that uses other names than `uses`, nor for a block of which `refuses(block)` says why not.
    """

    matches: Callable[[type], bool]
    function: Callable[..., Any]
    norms: Norms
    method: str
    uses: frozenset[str] | None
    refuses: Refuses

    def why_not(self, block: nn.Module) -> str | None:
        """Why this rule is not for a block of its class; None where it is."""
        method = getattr(type(block), self.method)
        unknown = unknown_names(method, self.uses) if self.uses is not None else None
        return unknown or self.refuses(block)


@dataclass(frozen=True)
class NormRule:
    """`function(norm, x, …)` computes SiLU(norm(x, …)) for a class that wraps or extends nn.GroupNorm."""

    matches: Callable[[type], bool]
    function: Callable[..., Tensor]
    uses: frozenset[str]


_blocks: list[BlockRule] = []
_norms: list[NormRule] = []
_refused_norms: dict[str, str] = {}
_readable: set[type] = set()
_readable_libraries: set[str] = set()


def rule(
    target: type[nn.Module] | str | Callable[[type], bool],
    *,
    norms: Iterable[str] | Norms | None = None,
    method: str = "forward",
    uses: Iterable[str] | None = None,
    refuses: Refuses = lambda block: None,
) -> Callable[[Function], Function]:
    """Decorator: from now on `fuse` puts the decorated function in the place of the forward of `target`'s modules.

    The function gets the block and then what the forward gets, computes the same, and calls
    `unetgn.fusion.norm_silu(block.norm, block.act, x)` where the forward calls a norm and then SiLU::

        @unetgn.fuse.rule(MyBlock)
        def my_block(block, x, emb):
            return x + block.conv(norm_silu(block.norm, block.act, x, pre_bias=block.proj(emb)[:, :, None, None]))

    target: a class, its path, or a predicate of classes (for blocks that are copied from project to project).
    norms: the norms that it fuses, as paths within the block, or a function of the block that lists them; by default
    every norm that is a direct child. method: what it replaces, where that is not `forward`. uses: the names that the
    method, as the rule knows it, uses; an installed version whose method uses others has changed, and is left alone.
    refuses: of a block, why the rule is not for it, or None. Raises TypeError or ValueError for what is none of these.
    """
    _check_target(target, method)
    if isinstance(norms, str):
        raise TypeError(f'norms takes several paths: norms=("{norms}",), not norms="{norms}"')
    if norms is None:
        listed: Norms = direct_norms
    elif callable(norms):
        listed = norms
    else:
        listed = _constant(tuple(norms))
    known = None if uses is None else frozenset(uses)

    def register(function: Function) -> Function:
        _blocks.append(BlockRule(_matcher(target, method), function, listed, method, known, refuses))
        return function

    return register


def norm_rule(target: str | Callable[[type], bool], *, uses: Iterable[str]) -> Callable[[Function], Function]:
    """Decorator: the function computes SiLU of what the forward of `target`'s norms computes."""

    def register(function: Function) -> Function:
        _norms.append(NormRule(_matcher(target, "forward"), function, frozenset(uses)))
        return function

    return register


def refuse_norm(target: str, reason: str) -> None:
    """Name a class of norm into which SiLU cannot be taken, and say why, for the report."""
    _refused_norms[target] = reason


def read(target: type[nn.Module] | str) -> Any:
    """Let `fuse` read the forward of a class, or of every class of a library, and join what it finds there.

    Enough for a block that calls `self.norm(x)` and right after it SiLU. `target`: a class, or the name by which the
    library is imported. Returns the target, so it decorates classes. Raises TypeError or ValueError for anything else.
    """
    if isinstance(target, str):
        if "." in target or not (target in sys.modules or importlib.util.find_spec(target)):
            raise ValueError(f"fuse.read takes a class or the name of an installed library, not {target!r}")
        read_library(target)
        return target
    _check_target(target, "forward")
    if not isinstance(target, type):
        raise TypeError(f"fuse.read takes a class or the name of an installed library, not {target!r}")
    _readable.add(target)
    return target


def read_library(name: str) -> None:
    """Let `fuse` read every class of a library, installed or not."""
    _readable_libraries.add(name)


def block_rule(cls: type) -> BlockRule | None:
    """The rule for modules of this class; the newest where there are several."""
    return next((known for known in reversed(_blocks) if known.matches(cls)), None)


def is_readable(cls: type) -> bool:
    """Whether the class's forward is one that `fuse` may read."""
    library = owner_of(cls, "forward").__module__.partition(".")[0]
    return library in _readable_libraries or any(_inherits(cls, known, "forward") for known in _readable)


def is_norm(module: nn.Module) -> bool:
    """Whether the module is some group norm of somebody else's: nn.GroupNorm, a subclass, or a class with a rule."""
    cls = type(module)
    if cls.__module__.partition(".")[0] == "unetgn":
        return False
    is_known = path_of(owner_of(cls, "forward")) in _refused_norms or any(known.matches(cls) for known in _norms)
    return isinstance(module, nn.GroupNorm) or is_known


def why_not_folded(norm: nn.Module) -> str | None:
    """Why SiLU cannot be taken into this norm; None where it can, and then `norm_silu` knows how."""
    forward = type(norm).forward
    if forward in FOLDS or learn_group_norm(norm):
        return None
    owner = owner_of(type(norm), "forward")
    if path_of(owner) in _refused_norms:
        return _refused_norms[path_of(owner)]
    for known in reversed(_norms):
        if known.matches(type(norm)):
            is_wrapped = hasattr(forward, "__wrapped__")
            unknown = f"{owner.__name__}'s forward is wrapped" if is_wrapped else unknown_names(forward, known.uses)
            if unknown is None:
                FOLDS[forward] = known.function
            return unknown
    return f"{owner.__name__} has a forward of its own in place of GroupNorm's"


def unknown_names(method: Callable[..., Any], known: frozenset[str]) -> str | None:
    """Why a rule that knows these names does not know the method any more; None where it does."""
    unknown = used_names(method) - known
    if not unknown:
        return None
    return f"{inspect.unwrap(method).__qualname__} uses {', '.join(sorted(unknown))}, which its rule does not know"


def direct_norms(block: nn.Module) -> tuple[str, ...]:
    """The names of the direct children that are norms; all of its names where one module has several."""
    return tuple(name for name, child in children(block) if is_norm(child))


def children(block: nn.Module) -> list[tuple[str, nn.Module]]:
    """The direct children with their names, a child with two names twice (`named_children` gives it once)."""
    return [(name, child) for name, child in block._modules.items() if child is not None]


def owner_of(cls: type, method: str) -> type:
    """The class of the method resolution order that defines a method."""
    return next(owner for owner in cls.__mro__ if method in vars(owner))


def path_of(cls: type) -> str:
    """Module and name of a class, as rules write them."""
    return f"{cls.__module__}.{cls.__qualname__}"


def _matcher(target: type | str | Callable[[type], bool], method: str) -> Callable[[type], bool]:
    if isinstance(target, str):
        return lambda cls: hasattr(cls, method) and path_of(owner_of(cls, method)) == target
    if isinstance(target, type):
        return lambda cls: _inherits(cls, target, method)
    return target


def _inherits(cls: type, base: type, method: str) -> bool:
    """Whether `cls` is `base`, or a subclass that has the method from it or from above it."""
    return issubclass(cls, base) and owner_of(cls, method) is owner_of(base, method)


def _check_target(target: Any, method: str) -> None:
    if isinstance(target, nn.Module):
        raise TypeError(f"a rule is for a class: {type(target).__name__}, not an instance of it")
    if isinstance(target, type):
        if not issubclass(target, nn.Module):
            raise TypeError(f"a rule is for a subclass of torch.nn.Module, which {target.__name__} is not")
        if not hasattr(target, method):
            raise ValueError(f"{target.__name__} has no method {method!r} for a rule to take the place of")
    elif not (isinstance(target, str) or callable(target)):
        raise TypeError(f"a rule is for a class, its path or a predicate of classes, not {target!r}")


def _constant(names: tuple[str, ...]) -> Norms:
    return lambda block: names
