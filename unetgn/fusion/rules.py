"""What `fuse` knows: rules for blocks and for norms, and the libraries whose forwards it may read.

A rule names its class by path, "diffusers.models.resnet.Conv1dBlock", so that nothing is imported for it, or is given
the class itself. It holds for every module whose class has or inherits *that class's own* forward. A subclass with a
forward of its own is another block, and the rule does not hold for it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor, nn

from unetgn.fusion.recognition import FOLDS, learn_group_norm, used_names

Function = TypeVar("Function", bound=Callable[..., Any])
Norms = Callable[[nn.Module], tuple[str, ...]]


@dataclass(frozen=True)
class BlockRule:
    """`function(block, …)` takes the place of the block's `method`; `norms(block)` are the paths of those it fuses."""

    matches: Callable[[type], bool]
    function: Callable[..., Any]
    norms: Norms
    method: str
    uses: frozenset[str] | None


@dataclass(frozen=True)
class NormRule:
    """`function(norm, x, …)` computes SiLU(norm(x, …)) for a class that wraps or extends nn.GroupNorm."""

    matches: Callable[[type], bool]
    function: Callable[..., Tensor]
    uses: frozenset[str]


_blocks: list[BlockRule] = []
_norms: list[NormRule] = []
_refused_norms: dict[str, str] = {}
_readable: set[type | str] = set()


def rule(
    target: type[nn.Module] | str | Callable[[type], bool],
    *,
    norms: Iterable[str] | Norms | None = None,
    method: str = "forward",
    uses: Iterable[str] | None = None,
) -> Callable[[Function], Function]:
    """Decorator: from now on `fuse` puts the decorated function in the place of the forward of `target`'s modules.

    The function gets the block and then what the forward gets, computes the same, and calls
    `unetgn.fusion.joined(block.norm, block.act, x)` where the forward calls a norm and then SiLU::

        @unetgn.fuse.rule(MyBlock)
        def my_block(block, x, emb):
            return x + block.conv(norm_silu(block.norm, block.act, x, pre_bias=block.proj(emb)[:, :, None, None]))

    target: a class, its path, or a predicate of classes (for blocks that are copied from project to project).
    norms: the norms that it fuses, as paths within the block, or a function of the block that lists them; by default
    every norm that is a direct child. method: what it replaces, where that is not `forward`. uses: the names that the
    method, as the rule knows it, uses; an installed version whose method uses others has changed, and is left alone.
    """
    if norms is None:
        listed: Norms = direct_norms
    elif callable(norms):
        listed = norms
    else:
        listed = _constant(tuple(norms))
    known = None if uses is None else frozenset(uses)

    def register(function: Function) -> Function:
        _blocks.append(BlockRule(_matcher(target, method), function, listed, method, known))
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

    Enough for a block that calls `self.norm(x)` and right after it SiLU. Returns the target, so it decorates classes.
    """
    _readable.add(target)
    return target


def block_rule(cls: type) -> BlockRule | None:
    """The rule for modules of this class; the newest where there are several."""
    return next((known for known in reversed(_blocks) if known.matches(cls)), None)


def is_readable(cls: type) -> bool:
    """Whether the class's forward is one that `fuse` may read."""
    owner = owner_of(cls, "forward")
    return owner in _readable or owner.__module__.partition(".")[0] in _readable


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
            unknown = unknown_names(forward, known.uses)
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
    """The names of the direct children that are norms."""
    return tuple(name for name, child in block.named_children() if is_norm(child))


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
        return lambda cls: hasattr(cls, method) and owner_of(cls, method) is owner_of(target, method)
    return target


def _constant(names: tuple[str, ...]) -> Norms:
    return lambda block: names
