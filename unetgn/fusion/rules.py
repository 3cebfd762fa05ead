"""Knows the rules for blocks, and the classes and libraries whose own forwards `fuse` may rewrite.

A rule names its class by path, "diffusers.models.resnet.Conv1dBlock", so that nothing is imported for it, or is given
the class itself. It holds for every module whose class has or inherits *that class's own* forward. A subclass with a
forward of its own is another block, and the rule does not hold for it.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import nn

from unetgn.fusion.classes import ClassPredicate, inherits, matcher, owner_of
from unetgn.fusion.norms import child_norms
from unetgn.fusion.recognition import unknown_names
from unetgn.fusion.switches import names_without, switches_off

Function = TypeVar("Function", bound=Callable[..., Any])
Norms = Callable[[nn.Module], tuple[str, ...]]
Refuses = Callable[[nn.Module], str | None]


@dataclass(frozen=True)
class BlockRule:
    """Puts `function(block, …)` in the place of the block's `method`; `norms(block)` are the paths of those it fuses.

    It is not for a method that uses other names than `uses`, nor for a block of which `refuses(block)` says why not.
    Other names do no harm where a switch that is off keeps them from being used.
    """

    matches: ClassPredicate
    function: Callable[..., Any]
    norms: Norms
    method: str
    uses: frozenset[str] | None
    refuses: Refuses

    def why_not(self, block: nn.Module) -> str | None:
        """Return why this rule is not for a block of its class; None where it is."""
        if self.uses is None:
            return self.refuses(block)
        method = getattr(type(block), self.method)
        return unknown_names(method, self.uses, names_without(method, self.off(block))) or self.refuses(block)

    def off(self, block: nn.Module) -> tuple[str, ...]:
        """Return the switches of the block that the rule does not know, and that have to stay off for it."""
        return () if self.uses is None else switches_off(block, getattr(type(block), self.method), self.uses)


_rules: list[BlockRule] = []
_readable_classes: set[type] = set()
_readable_libraries: set[str] = set()


def rule(
    target: type[nn.Module] | str | ClassPredicate,
    *,
    norms: Iterable[str] | Norms | None = None,
    method: str = "forward",
    uses: Iterable[str] | None = None,
    refuses: Refuses = lambda block: None,
) -> Callable[[Function], Function]:
    """Register the decorated function: from now on `fuse` puts it in the place of the forward of `target`'s modules.

    The function gets the block and then what the forward gets, computes the same, and calls
    `unetgn.fusion.norm_silu(block.norm, block.act, x)` where the forward calls a norm and then SiLU::

        @unetgn.fuse.rule(MyBlock)
        def my_block(block, x, emb):
            return x + block.conv(norm_silu(block.norm, block.act, x, pre_bias=block.proj(emb)[:, :, None, None]))

    target: a class, its path, or a predicate of classes (for blocks that are copied from project to project).
    norms: the norms that it fuses, as paths within the block, or a function of the block that lists them; by default
    every norm that is a direct child. method: what it replaces, where that is not `forward`. uses: the names that the
    method, as the rule knows it, uses; an installed version whose method uses others has changed, and is left alone.
    refuses: a function of the block that says why the rule is not for it, or None.
    Raises TypeError or ValueError for a target, norms or a method that are none of these.
    """
    _check_target(target, method)
    if isinstance(norms, str):
        raise TypeError(f'norms takes several paths: norms=("{norms}",), not norms="{norms}"')
    listed = _lister(norms)
    known = None if uses is None else frozenset(uses)

    def register(function: Function) -> Function:
        _rules.append(BlockRule(matcher(target, method), function, listed, method, known, refuses))
        return function

    return register


def read(target: type[nn.Module] | str) -> Any:
    """Let `fuse` take the source of a class, or of every class of a library, for what runs, without proof.

    Of other classes `fuse` compiles the source file and looks whether that gives the code of the forward. It does not
    where the file was edited after its import, or a tool changed the code (as pytest changes the asserts of tests).
    target: a class, or the name by which the library is imported. Returns the target, so it decorates classes.
    Raises TypeError or ValueError for anything else.
    """
    if isinstance(target, str):
        if "." in target or not (target in sys.modules or importlib.util.find_spec(target)):
            raise ValueError(f"fuse.read takes a class or the name of an installed library, not {target!r}")
        register_library(target)
        return target
    _check_target(target, "forward")
    if not isinstance(target, type):
        raise TypeError(f"fuse.read takes a class or the name of an installed library, not {target!r}")
    _readable_classes.add(target)
    return target


def register_library(name: str) -> None:
    """Let `fuse` rewrite the forward of every class of a library, installed or not."""
    _readable_libraries.add(name)


def block_rule(cls: type) -> BlockRule | None:
    """Return the rule for modules of this class; the newest where there are several."""
    return next((rule for rule in reversed(_rules) if rule.matches(cls)), None)


def is_readable(cls: type) -> bool:
    """Return True where `fuse` may rewrite the class's forward."""
    library = owner_of(cls, "forward").__module__.partition(".")[0]
    return library in _readable_libraries or any(inherits(cls, known, "forward") for known in _readable_classes)


def _lister(norms: Iterable[str] | Norms | None) -> Norms:
    """Return the function of a block that lists the norms of a rule."""
    if norms is None:
        return lambda block: tuple(child_norms(block))
    if callable(norms):
        return norms
    names = tuple(norms)
    return lambda block: names


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
