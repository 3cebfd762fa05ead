"""Parses the source of a class's own forward, and compiles what has been made of it.

Other people's forwards are not copied into this repository: each release of a library may change them. Instead the
source of the installed forward is parsed, rewritten (`rewriting/`) and compiled.
"""

from __future__ import annotations
import __future__

import ast
import functools
import inspect
from collections.abc import Callable, Mapping
from types import CellType, CodeType, FunctionType
from typing import Any

from unetgn.fusion.recognition import codes


class CannotRewriteError(Exception):
    """Says why a forward has no copy: its source is missing, or means something else outside of its class."""


def parse_forward(forward: Callable[..., Any]) -> tuple[ast.FunctionDef, FunctionType]:
    """Parse the source of a forward; return it, and the function within its decorators that the source is of.

    Raises CannotRewriteError where there is no source, or the function uses names private to its class, or assigns to
    globals, to variables that it closes over, or to self.
    """
    original = inspect.unwrap(forward)
    if not isinstance(original, FunctionType):
        raise CannotRewriteError(f"{forward!r} is not written in Python")
    try:
        text, first_line = _source(original)
        definition = _first_statement("".join(inspect.getblock(text[first_line - 1 :])))
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

    It has the original's globals, closure, defaults, file name and line numbers. Changes the definition.
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
    cells = dict(zip(original.__code__.co_freevars, original.__closure__ or (), strict=True))
    outer = [name for name in (*added, *cells) if name not in _parameters(definition)]
    maker = ast.parse(f"def make({', '.join(outer)}): return None").body[0]
    assert isinstance(maker, ast.FunctionDef)
    maker.body = [definition, ast.Return(ast.Name(definition.name, ast.Load()))]
    module = ast.fix_missing_locations(ast.Module([maker], type_ignores=[]))
    future = original.__code__.co_flags & __future__.annotations.compiler_flag
    compiled = compile(module, original.__code__.co_filename, "exec", flags=future, dont_inherit=True)
    made: dict[str, Any] = {}
    exec(compiled, {}, made)
    code = made["make"](*outer).__code__
    closure = tuple(cells[name] if name in cells else CellType(added[name]) for name in code.co_freevars)
    function = FunctionType(code, original.__globals__, original.__name__, original.__defaults__, closure)
    function.__kwdefaults__ = original.__kwdefaults__
    return function


@functools.cache
def why_source_is_in_doubt(forward: Callable[..., Any]) -> str | None:
    """Return why the source that is found may be another than that of a forward; None where it compiles to its code.

    A file that was edited after its import, or code that a tool has changed, is found out in this way.
    """
    try:
        _, original = parse_forward(forward)
        known = original.__code__ in _codes("".join(_source(original)[0]))
    except CannotRewriteError as error:
        return str(error)
    except (OSError, SyntaxError) as error:
        return f"the source of {forward!r} cannot be read ({error})"
    return None if known else "what is in its source file is not what runs"


@functools.cache
def _source(function: FunctionType) -> tuple[list[str], int]:
    """Return the lines of a function's file and the number of its first line. Read once: what was looked at is used."""
    lines, index = inspect.findsource(function)
    return lines, index + 1


@functools.lru_cache(maxsize=8)
def _codes(text: str) -> frozenset[CodeType]:
    """Return the code of every function in the text of a file."""
    return frozenset(codes(compile(text, "file", "exec", dont_inherit=True)))


def _first_statement(source: str) -> ast.stmt:
    """Parse the first statement of a source, which may be indented.

    Taking the indentation away would change strings of several lines, and fail for a comment that stands further left.
    """
    if not source[:1].isspace():
        return ast.parse(source).body[0]
    around = ast.parse(f"if True:\n{source}").body[0]
    assert isinstance(around, ast.If)
    ast.increment_lineno(around, -1)
    return around.body[0]


def _parameters(definition: ast.FunctionDef) -> frozenset[str]:
    return frozenset(node.arg for node in ast.walk(definition.args) if isinstance(node, ast.arg))


def _is_bound(node: ast.AST) -> bool:
    """Return True for names that mean something else outside of the class body, and for assignments to outer names."""
    name = node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""
    is_private = name.startswith("__") and not name.endswith("__")
    is_self_set = isinstance(node, ast.Name) and name == "self" and not isinstance(node.ctx, ast.Load)
    return is_private or is_self_set or isinstance(node, (ast.Global, ast.Nonlocal))
