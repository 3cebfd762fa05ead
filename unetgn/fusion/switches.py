"""Finds the switches of a block that are off, and what its code uses as long as they are.

A copy of a known block often has one more option: `if self.skip_t_emb: ... else: ...`. Where it is off, what it would
turn on is not run, and the block is the known one.
"""

from __future__ import annotations

import ast
from collections.abc import Callable
from typing import Any

from torch import nn

from unetgn.fusion.recognition import used_names
from unetgn.fusion.source import CannotRewriteError, parse_forward


def switches_off(block: nn.Module, method: Callable[..., Any], known: frozenset[str]) -> tuple[str, ...]:
    """Return the names that a method uses beside the known ones and that are False on this block, in order."""
    return tuple(sorted(name for name in used_names(method) - known if vars(block).get(name) is False))


def names_without(method: Callable[..., Any], off: tuple[str, ...]) -> frozenset[str]:
    """Return the globals and attributes that the code of a method uses where these attributes of `self` are False."""
    if not off:
        return used_names(method)
    try:
        definition, _ = parse_forward(method)
    except CannotRewriteError:
        return used_names(method)
    nodes = list(ast.walk(_Off(frozenset(off)).visit(definition)))
    attributes = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    names = {node.id for node in nodes if isinstance(node, ast.Name)}
    return used_names(method) & (attributes | names)  # without local names


class _Off(ast.NodeTransformer):
    """Leaves out what is not run where attributes of `self` are False."""

    def __init__(self, off: frozenset[str]) -> None:
        self.off = off

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        if isinstance(node.value, ast.Name) and node.value.id == "self" and node.attr in self.off:
            return ast.Constant(False)
        return self.generic_visit(node)

    def visit_UnaryOp(self, node: ast.UnaryOp) -> ast.AST:
        self.generic_visit(node)
        if isinstance(node.op, ast.Not) and isinstance(node.operand, ast.Constant):
            return ast.Constant(not node.operand.value)
        return node

    def visit_BoolOp(self, node: ast.BoolOp) -> ast.AST:
        self.generic_visit(node)
        decides = isinstance(node.op, ast.Or)  # True decides an `or`, False an `and`
        for value in node.values:
            if isinstance(value, ast.Constant) and bool(value.value) is decides:
                return ast.Constant(decides)
        node.values = [value for value in node.values if not isinstance(value, ast.Constant)]
        return node if node.values else ast.Constant(not decides)

    def visit_If(self, node: ast.If) -> Any:
        self.generic_visit(node)
        return self._taken(node, node.body, node.orelse)

    def visit_IfExp(self, node: ast.IfExp) -> Any:
        self.generic_visit(node)
        return self._taken(node, node.body, node.orelse)

    def _taken(self, node: Any, body: Any, orelse: Any) -> Any:
        if not isinstance(node.test, ast.Constant):
            return node
        return body if node.test.value else orelse
