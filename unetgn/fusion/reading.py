"""Reads a class's own forward and makes the forward in which a norm and the SiLU after it are one call.

Other people's forwards are not copied here: each release of a library may change them. Instead the source of the
installed forward is parsed, rewritten (`joining.py`) and compiled with the original's globals, defaults and lines.
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import torch.nn.functional as F

from unetgn.fusion.joined import norm_silu
from unetgn.fusion.joining import JOIN, SILU, Joiner, self_attribute
from unetgn.fusion.recognition import codes


class CannotReadError(Exception):
    """The source of a forward is not there, or is bound to its class in a way in which a copy could not be."""


@dataclass(frozen=True)
class Pairs:
    """What reading finds in a forward: the norms that it joins, and what there is to say of some norms.

    joined: in source order. only: those of them that have other calls, too. instead: norms that are not joined,
    although a SiLU is near. Both as (norm, sentence).
    """

    joined: tuple[str, ...]
    only: tuple[tuple[str, str], ...]
    instead: tuple[tuple[str, str], ...]


@functools.cache
def read(forward: Callable[..., Any], norms: frozenset[str], activations: frozenset[str]) -> Callable[..., Any]:
    """The rewritten `forward` of a class, a function of the module and what the forward takes, without decorators.

    `norms` and `activations` are the attributes of `self` that may be joined; functions that serve as activations
    (`F.silu`, a module's `nonlinearity`) are found through the forward's globals. Raises CannotReadError where there is
    no source, or the function closes over variables (as `super()` does).
    """
    definition, original = _definition(forward)
    _joiner(norms, activations, original).rewrite(definition)
    return _compile(definition, original)


@functools.cache
def find_pairs(forward: Callable[..., Any], norms: frozenset[str], activations: frozenset[str]) -> Pairs:
    """Those of `norms` that `read` would join with a SiLU; nothing of the forward is run. Raises CannotReadError."""
    definition, original = _definition(forward)
    joiner = _joiner(norms, activations, original)
    joiner.rewrite(definition)
    joined, left = list(joiner.joined), list(_calls(definition, norms))
    only = tuple(
        (norm, f"only where SiLU comes right after it: {joined.count(norm)} of its {joined.count(norm) + calls} calls")
        for norm in dict.fromkeys(joined)
        if (calls := left.count(norm))
    )
    instead = tuple((norm, sentence) for norm, sentence in joiner.instead.items() if norm not in joined)
    return Pairs(tuple(dict.fromkeys(joined)), only, instead)


def _definition(forward: Callable[..., Any]) -> tuple[ast.FunctionDef, FunctionType]:
    """The parsed source of a forward, and the function within its decorators that the source is of."""
    original = inspect.unwrap(forward)
    if not isinstance(original, FunctionType):
        raise CannotReadError(f"{forward!r} is not written in Python")
    if original.__code__.co_freevars:
        raise CannotReadError(f"{original.__qualname__} closes over {', '.join(original.__code__.co_freevars)}")
    try:
        lines, first_line = inspect.getsourcelines(original)
        definition = ast.parse(textwrap.dedent("".join(lines))).body[0]
    except (OSError, TypeError, SyntaxError) as error:
        raise CannotReadError(f"the source of {original.__qualname__} cannot be read ({error})") from error
    if not isinstance(definition, ast.FunctionDef) or any(map(_is_bound, ast.walk(definition))):
        raise CannotReadError(f"{original.__qualname__} is not a plain method, or uses names private to its class")
    if original.__code__.co_varnames[:1] != ("self",):
        raise CannotReadError(f"the first parameter of {original.__qualname__} is not called self")
    ast.increment_lineno(definition, first_line - 1)
    return definition, original


def _is_bound(node: ast.AST) -> bool:
    """Names that mean something else, or nothing, outside of the class body; assignments to globals or to self."""
    name = node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""
    is_private = name.startswith("__") and not name.endswith("__")
    is_self_set = isinstance(node, ast.Name) and name == "self" and not isinstance(node.ctx, ast.Load)
    return is_private or is_self_set or isinstance(node, (ast.Global, ast.Nonlocal))


def _joiner(norms: frozenset[str], activations: frozenset[str], original: FunctionType) -> Joiner:
    shared = {name for code in codes(original.__code__) for name in code.co_cellvars}
    local = shared.union(*(code.co_varnames for code in codes(original.__code__)))
    scope = {name: value for name, value in original.__globals__.items() if name not in local}
    return Joiner(norms, activations, scope, frozenset(shared))


def _calls(definition: ast.FunctionDef, norms: frozenset[str]) -> Iterator[str]:
    """The norm of every call of a norm, or that is handed one, besides the calls that join it."""
    for node in ast.walk(definition):
        if isinstance(node, ast.Call) and not (isinstance(node.func, ast.Name) and node.func.id == JOIN):
            yield from (name for part in (node.func, *node.args) if (name := self_attribute(part)) in norms)


def _compile(definition: ast.FunctionDef, original: FunctionType) -> Callable[..., Any]:
    """The function that `definition` describes, with the original's globals, defaults, file name and line numbers."""
    definition.returns, definition.decorator_list = None, []
    for node in ast.walk(definition.args):
        if isinstance(node, ast.arg):
            node.annotation = None  # may name a type that is imported for type checkers only
    # A default may name what only the class body knows: the values come from the original, below.
    definition.args.defaults = [ast.Constant(None) for _ in definition.args.defaults]
    definition.args.kw_defaults = [
        None if default is None else ast.Constant(None) for default in definition.args.kw_defaults
    ]
    maker = ast.parse(f"def make({JOIN}, {SILU}): return None").body[0]
    assert isinstance(maker, ast.FunctionDef)
    maker.body = [definition, ast.Return(ast.Name(definition.name, ast.Load()))]
    module = ast.fix_missing_locations(ast.Module([maker], type_ignores=[]))
    made: dict[str, Any] = {}
    exec(compile(module, original.__code__.co_filename, "exec", dont_inherit=True), original.__globals__, made)
    function = made["make"](norm_silu, F.silu)
    function.__defaults__, function.__kwdefaults__ = original.__defaults__, original.__kwdefaults__
    return function
