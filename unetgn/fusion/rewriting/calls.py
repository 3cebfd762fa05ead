"""Builds the calls that a rewriting puts into a forward, and notes what it has fused."""

from __future__ import annotations

import ast
import copy
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from unetgn.fusion.rewriting.aliases import Aliases
from unetgn.fusion.rewriting.names import Names
from unetgn.fusion.rewriting.patterns import name_of

NORM_SILU, PRE_BIAS, DIVIDE = "unetgn_norm_silu", "unetgn_pre_bias", "unetgn_divide"
SCALE, SHIFT = "unetgn_scale", "unetgn_shift"
EARLY, LATE = "unetgn_early", "unetgn_late"


@dataclass
class Forward:
    """Holds what the rewritings of one forward know of it, and what they have done.

    names: what its names stand for. aliases: which of them may hold the same. mentioned: how often each name occurs.
    tries: whether it has a `try`. fused: the norm of every call that is made one with SiLU. instead: of norms that are
    not, what SiLU is taken of.
    """

    names: Names
    aliases: Aliases
    mentioned: Counter[str]
    tries: bool
    fused: list[str] = field(default_factory=list)
    instead: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, names: Names, definition: ast.FunctionDef) -> Forward:
        """Look at a forward that is to be rewritten."""
        nodes = list(ast.walk(definition))
        mentioned = Counter(node.id for node in nodes if isinstance(node, ast.Name))
        return cls(names, Aliases.of(definition), mentioned, any(isinstance(node, ast.Try) for node in nodes))

    def fuse(self, normed: Any, activation: ast.expr, **extras: ast.expr) -> ast.Call:
        """Return the one call of a norm and its activation, and note the norm. A cast of its result comes after."""
        inner = self.names.cast_norm(normed)
        if inner is not None:
            normed.func.value = self.fuse(inner, activation)
            return normed
        self.fused.append(str(self.names.norm(normed)))
        keywords = [*normed.keywords, *(ast.keyword(name, value) for name, value in extras.items())]
        call = ast.Call(ast.Name(NORM_SILU, ast.Load()), [normed.func, activation, *normed.args], keywords)
        return ast.copy_location(call, normed)


class Swap(ast.NodeTransformer):
    """Puts one node in the place of another."""

    def __init__(self, old: ast.AST, new: ast.expr) -> None:
        self.old, self.new = old, new

    def visit(self, node: ast.AST) -> Any:
        return self.new if node is self.old else self.generic_visit(node)


def count(node: ast.AST, name: str | None) -> int:
    """Return how often a name occurs in a node."""
    return sum(name_of(part) == name for part in ast.walk(node))


def early_call(activation: ast.expr, between: Iterable[ast.expr] = ()) -> ast.expr:
    """Build `early(act, *between)`."""
    return ast.Call(ast.Name(EARLY, ast.Load()), copy.deepcopy([activation, *between]), [])


def late_call(activation: ast.expr, x: ast.expr, where: ast.AST, between: Iterable[ast.expr] = ()) -> ast.expr:
    """Build `late(act, x, *between)`."""
    arguments = [copy.deepcopy(activation), x, *copy.deepcopy([*between])]
    return ast.copy_location(ast.Call(ast.Name(LATE, ast.Load()), arguments, []), where)


def assign(target: str, value: ast.expr, where: ast.stmt) -> ast.stmt:
    """Build `target = value`, in the lines of a statement."""
    return ast.copy_location(ast.Assign([ast.Name(target, ast.Store())], value), where)
