"""Parses the source of a class's own forward, and compiles what has been made of it.

Other people's forwards are not copied into this repository: each release of a library may change them. Instead the
source of the installed forward is parsed, rewritten (`rewriting.py`) and compiled.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable, Mapping
from types import FunctionType
from typing import Any


class CannotRewriteError(Exception):
    """Says why a forward has no copy: its source is missing, or means something else outside of its class."""


def parse_forward(forward: Callable[..., Any]) -> tuple[ast.FunctionDef, FunctionType]:
    """Parse the source of a forward; return it, and the function within its decorators that the source is of.

    Raises CannotRewriteError where there is no source, or the function closes over variables (as `super()` does), or
    uses names private to its class, or assigns to globals or to self.
    """
    original = inspect.unwrap(forward)
    if not isinstance(original, FunctionType):
        raise CannotRewriteError(f"{forward!r} is not written in Python")
    if original.__code__.co_freevars:
        raise CannotRewriteError(f"{original.__qualname__} closes over {', '.join(original.__code__.co_freevars)}")
    try:
        lines, first_line = inspect.getsourcelines(original)
        definition = ast.parse(textwrap.dedent("".join(lines))).body[0]
    except (OSError, TypeError, SyntaxError) as error:
        raise CannotRewriteError(f"the source of {original.__qualname__} cannot be read ({error})") from error
    if not isinstance(definition, ast.FunctionDef) or any(map(_is_bound, ast.walk(definition))):
        raise CannotRewriteError(f"{original.__qualname__} is not a plain method, or uses names private to its class")
    if original.__code__.co_varnames[:1] != ("self",):
        raise CannotRewriteError(f"the first parameter of {original.__qualname__} is not called self")
    ast.increment_lineno(definition, first_line - 1)
    return definition, original


def compile_forward(definition: ast.FunctionDef, original: FunctionType, added: Mapping[str, Any]) -> FunctionType:
    """Compile a rewritten forward, without decorators, in which the names in `added` stand for their values.

    It has the original's globals, defaults, file name and line numbers. Changes the definition.
    """
    definition.returns, definition.decorator_list = None, []
    for node in ast.walk(definition.args):
        if isinstance(node, ast.arg):
            node.annotation = None  # may name a type that is imported for type checkers only
    # A default may name what only the class body knows: the values come from the original, below.
    definition.args.defaults = [ast.Constant(None) for _ in definition.args.defaults]
    definition.args.kw_defaults = [
        None if default is None else ast.Constant(None) for default in definition.args.kw_defaults
    ]
    maker = ast.parse(f"def make({', '.join(added)}): return None").body[0]
    assert isinstance(maker, ast.FunctionDef)
    maker.body = [definition, ast.Return(ast.Name(definition.name, ast.Load()))]
    module = ast.fix_missing_locations(ast.Module([maker], type_ignores=[]))
    made: dict[str, Any] = {}
    exec(compile(module, original.__code__.co_filename, "exec", dont_inherit=True), original.__globals__, made)
    function: FunctionType = made["make"](**added)
    function.__defaults__, function.__kwdefaults__ = original.__defaults__, original.__kwdefaults__
    return function


def _is_bound(node: ast.AST) -> bool:
    """Return True for names that mean something else outside of the class body, and for assignments to outer names."""
    name = node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""
    is_private = name.startswith("__") and not name.endswith("__")
    is_self_set = isinstance(node, ast.Name) and name == "self" and not isinstance(node.ctx, ast.Load)
    return is_private or is_self_set or isinstance(node, (ast.Global, ast.Nonlocal))
