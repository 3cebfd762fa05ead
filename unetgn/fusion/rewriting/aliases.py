"""Knows which names of a forward may hold the same memory, so that no call that may write to it changes its place.

A ReLU in place, handed one name of a tensor, changes what all other names of it hold.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

_FACTS = frozenset({"dtype", "shape", "device", "ndim", "requires_grad"})  # attributes of a tensor that hold no memory
_BINDINGS = (ast.Assign, ast.AnnAssign, ast.AugAssign, ast.NamedExpr, ast.For, ast.withitem, ast.comprehension)

Place = tuple[int, int]  # first and last line


@dataclass(frozen=True)
class Aliases:
    """Holds which local names occur together in a statement that binds a name: each may hold a part of the other.

    hidden: the forward puts something into an attribute or a container, or has inner functions, so that a call may
    reach any tensor. What two parameters hold is taken for different memory. made: of each name the places where a call
    or a sum binds it, and mentioned: where it occurs. loops: first and last line of each.
    """

    tied: dict[str, frozenset[str]]
    hidden: bool
    made: dict[str, list[Place]]
    mentioned: dict[str, list[Place]]
    loops: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, definition: ast.FunctionDef) -> Aliases:
        """Read the body of a forward."""
        nodes = list(ast.walk(definition))
        local = {node.id for node in nodes if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load)}
        local |= {node.arg for node in ast.walk(definition.args) if isinstance(node, ast.arg)} - {"self"}
        groups = {name: {name} for name in local}
        for node in nodes:
            if isinstance(node, _BINDINGS):
                together = set(_holding(_bound(node))) & local
                merged = set().union(*(groups[name] for name in together))
                groups.update(dict.fromkeys(merged, merged))
        stores = any(
            isinstance(node, (ast.Attribute, ast.Subscript)) and isinstance(node.ctx, ast.Store) for node in nodes
        )
        inner = any(isinstance(node, (ast.Lambda, ast.FunctionDef)) for node in nodes if node is not definition)
        tied = {name: frozenset(group) for name, group in groups.items()}
        return cls(tied, stores or inner, *_uses(nodes))

    def is_held(self, name: str, statement: ast.stmt) -> bool:
        """Return True where something else may hold, later on, the tensor that a name stands for before a statement.

        It holds nothing but what a call or a sum has made, where the name has not been used since.
        """
        before = max((place for place in self.made.get(name, ()) if place[0] < statement.lineno), default=None)
        if before is None or any(first <= statement.lineno <= last and before[0] < first for first, last in self.loops):
            return True
        return any(before[1] < place[0] < statement.lineno for place in self.mentioned.get(name, ()))

    def may_change(self, values: Iterable[ast.AST], names: Iterable[str | None]) -> bool:
        """Return True where a call in one of the values may write to what one of the names holds."""
        calling = [value for value in values if any(isinstance(part, ast.Call) for part in ast.walk(value))]
        reached = {other for value in calling for name in _holding(value) for other in self.tied.get(name, ())}
        return bool(calling) and (self.hidden or not reached.isdisjoint(set(names)))


def _uses(nodes: list[Any]) -> tuple[dict[str, list[Place]], dict[str, list[Place]], tuple[tuple[int, int], ...]]:
    """Return where names are made, and mentioned, as first and last line; and the lines of the loops."""
    made: dict[str, list[Place]] = {}
    mentioned: dict[str, list[Place]] = {}
    for node in nodes:
        if isinstance(node, ast.Name):
            mentioned.setdefault(node.id, []).append((node.lineno, node.lineno))
        is_plain = isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name)
        if is_plain and _is_new(node.value):
            made.setdefault(node.targets[0].id, []).append((node.lineno, node.end_lineno or node.lineno))
    loops = [node for node in nodes if isinstance(node, (ast.For, ast.While))]
    return made, mentioned, tuple((loop.lineno, loop.end_lineno or loop.lineno) for loop in loops)


def _is_new(node: ast.AST) -> bool:
    """Return True for a sum, and for a call that is no method of a local name, as a view of it is."""
    if isinstance(node, ast.Call):
        base: Any = node.func
        while isinstance(base, (ast.Attribute, ast.Subscript, ast.Call)):
            base = base.func if isinstance(base, ast.Call) else base.value
        return isinstance(node.func, ast.Name) or (isinstance(base, ast.Name) and base.id == "self")
    return isinstance(node, ast.BinOp)


def _bound(node: Any) -> ast.AST:
    """Return what binds a name, without the statements under it."""
    if isinstance(node, ast.For):
        return ast.Tuple([node.target, node.iter], ast.Load())
    return node


def _holding(node: ast.AST) -> Iterator[str]:
    """Yield the names that occur in a node otherwise than for a fact such as their dtype."""
    if isinstance(node, ast.Attribute) and node.attr in _FACTS:
        return
    if isinstance(node, ast.Name):
        yield node.id
    for child in ast.iter_child_nodes(node):
        yield from _holding(child)
