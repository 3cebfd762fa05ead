"""Follows what a forward calls to the module that it is: through attributes, containers, loops and local names."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping

from unetgn.fusion.rewriting.patterns import name_of


def module_path(node: ast.AST, bound: Mapping[str, str]) -> str | None:
    """Return `norms.a` for `self.norms.a`, `self.norms["a"]` or a name bound to it; `norms.*` for any other index."""
    if isinstance(node, ast.Name):
        return bound.get(node.id)
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


def bindings(definition: ast.FunctionDef) -> dict[str, str]:
    """Return the paths of the local names that are bound once, to a part of self or to each of what a part holds.

    `norm = self.norms["a"]`, `norm, act = self.norm, self.act`, `for norm in self.norms` and such loops over `zip`,
    `enumerate`, `values` and `items`.
    """
    nodes = list(ast.walk(definition))
    stored = [node.id for node in nodes if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load)]
    stored += [node.arg for node in ast.walk(definition.args) if isinstance(node, ast.arg)]
    pairs = [pair for node in nodes for pair in _bound_pairs(node)]
    bound: dict[str, str] = {}
    for _ in pairs:  # a name may be bound through another
        found = ((target, module_path(value, bound)) for target, value in pairs)
        bound |= {name: path for name, path in found if path is not None and stored.count(name) == 1}
    return bound


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
