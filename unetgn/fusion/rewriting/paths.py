"""Follows what a forward calls to the module that it is: through attributes, containers, loops and local names."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from unetgn.fusion.rewriting.patterns import name_of


class Binding(NamedTuple):
    """Holds what a local name stands for, as a path, in lines `first` to `last` of the file."""

    path: str
    first: float
    last: float


Bindings = Mapping[str, tuple[Binding, ...]]


def module_path(node: ast.AST, bound: Bindings) -> str | None:
    """Return `norms.a` for `self.norms.a`, `self.norms["a"]` or a name bound to it; `norms.*` for any other index."""
    if isinstance(node, ast.Name):
        line = getattr(node, "lineno", -1)
        return next((path for path, first, last in bound.get(node.id, ()) if first <= line <= last), None)
    if not isinstance(node, (ast.Attribute, ast.Subscript)) or isinstance(getattr(node, "slice", None), ast.Slice):
        return None
    part = node.attr if isinstance(node, ast.Attribute) else _index(node.slice)
    if name_of(node.value) == "self":
        return part if isinstance(node, ast.Attribute) else None
    within = module_path(node.value, bound)
    return None if within is None else f"{within}.{part}"


def _index(node: ast.expr) -> str:
    known = isinstance(node, ast.Constant) and (isinstance(node.value, str) or node.value in range(1 << 16))
    return str(node.value) if known else "*"  # type: ignore[attr-defined]


def matches(path: str, norm: str) -> bool:
    """Return True where a path, in which `*` stands for any one part, may be that of a norm."""
    parts, others = path.split("."), norm.split(".")
    return len(parts) == len(others) and all(part in ("*", other) for part, other in zip(parts, others, strict=True))


def bindings(definition: ast.FunctionDef) -> Bindings:
    """Return the paths of the local names that are bound to a part of self or to each of what a part holds.

    `norm = self.norms["a"]`, `norm, act = self.norm, self.act`, `for norm in self.norms` and such loops over `zip`,
    `enumerate`, `values` and `items`. Where a name is bound several times, those of loops count, in their bodies.
    """
    stored = _stored([definition.args, *definition.body])
    bound: dict[str, tuple[Binding, ...]] = {}
    pairs = [(*pair, 0.0, float("inf")) for node in ast.walk(definition) for pair in _bound_pairs(node)]
    pairs = [pair for pair in pairs if stored.count(pair[0]) == 1]
    for loop in (node for node in ast.walk(definition) if isinstance(node, ast.For)):
        inside, last = _stored(loop.body), loop.body[-1].end_lineno or loop.body[-1].lineno
        again = (pair for pair in _bound_pairs(loop) if stored.count(pair[0]) > 1 and pair[0] not in inside)
        pairs += [(*pair, loop.body[0].lineno, last) for pair in again]
    for _ in pairs:  # a name may be bound through another
        paths = [(name, module_path(value, bound), first, last) for name, value, first, last in pairs]
        found = [(name, Binding(path, first, last)) for name, path, first, last in paths if path is not None]
        bound = {name: tuple(binding for other, binding in found if other == name) for name, _ in found}
    return bound


def _stored(nodes: Iterable[ast.AST]) -> list[str]:
    """Return the names that are bound in nodes, each as often as it is."""
    within = [node for outer in nodes for node in ast.walk(outer)]
    names = [node.id for node in within if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load)]
    return names + [node.arg for node in within if isinstance(node, ast.arg)]


def _bound_pairs(node: ast.AST) -> Iterator[tuple[str, ast.expr]]:
    """Yield each name that a statement binds, and what to."""
    if isinstance(node, ast.Assign) and len(node.targets) == 1:
        yield from _matched(node.targets[0], node.value)
    elif isinstance(node, ast.For):
        yield from _matched(node.target, _element(node.iter))


def _matched(target: ast.expr, value: ast.expr | None) -> Iterator[tuple[str, ast.expr]]:
    if isinstance(target, ast.Name) and value is not None:
        yield target.id, value
    elif isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple) and len(target.elts) == len(value.elts):
        for one, other in zip(target.elts, value.elts, strict=True):
            yield from _matched(one, other)


def _element(node: ast.expr) -> ast.expr | None:
    """Return what an iteration over a node gives each time, as an expression."""
    if not isinstance(node, ast.Call):
        return ast.Subscript(node, ast.Name("*", ast.Load()), ast.Load())
    nothing = ast.Constant(None)
    if name_of(node.func) in ("zip", "enumerate") and node.args:
        parts = [_element(argument) or nothing for argument in node.args if not isinstance(argument, ast.Starred)]
        return ast.Tuple(parts if name_of(node.func) == "zip" else [nothing, parts[0]], ast.Load()) if parts else None
    if isinstance(node.func, ast.Attribute) and node.func.attr in ("values", "items") and not node.args:
        each = _element(node.func.value) or nothing
        return each if node.func.attr == "values" else ast.Tuple([nothing, each], ast.Load())
    return None
