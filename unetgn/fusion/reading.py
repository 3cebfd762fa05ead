"""Reads a class's own forward and rewrites it so that a norm and the SiLU after it become one call.

Other people's forwards are not copied here: each release of a library may change them. Instead the source of the
installed forward is parsed, and three rewritings are applied. Each keeps the meaning whatever the names stand for,
because `norm_silu(norm, act, x, …)` is defined as `act(norm(x + pre_bias, …) * (1 + scale) + shift)`:

1. `a = self.norm(a)`, then `a = self.act(a)` (or `act(self.norm(a))`) becomes `a = norm_silu(self.norm, self.act, a)`;
   a step `a = a * (1 + s) + t` between the two goes in as `scale=s, shift=t`.
2. `a = a + e` right before, on its own or as the last line of an `if`, goes in as `pre_bias=e`.
3. Where branches of an `if` end in a norm and the activation follows the `if`, the activation moves into the branches.

A forward that does anything else between norm and activation has no such pair, and stays as it is.
"""

from __future__ import annotations

import ast
import copy
import functools
import inspect
import textwrap
from collections.abc import Callable, Mapping
from types import FunctionType
from typing import Any

import torch.nn.functional as F

from unetgn.fusion.joined import norm_silu
from unetgn.fusion.recognition import computes_silu

JOIN, SILU, PRE_BIAS = "unetgn_norm_silu", "unetgn_silu", "unetgn_pre_bias"
SILU_NAMES = frozenset({"silu", "swish", "nonlinearity"})
EXTRAS = frozenset({"pre_bias", "scale", "shift"})


class CannotReadError(Exception):
    """The source of a forward is not there, or is bound to its class in a way in which a copy could not be."""


@functools.cache
def read(forward: Callable[..., Any], norms: frozenset[str], activations: frozenset[str]) -> Callable[..., Any]:
    """The rewritten `forward` of a class, a function of the module and what the forward takes.

    `norms` and `activations` are the attributes of `self` that may be joined; functions that serve as activations
    (`F.silu`, a module's `nonlinearity`) are found through the forward's globals. Raises CannotReadError where there is
    no source, or the function closes over variables (as `super()` does).
    """
    return _rewrite(forward, norms, activations)[0]()


@functools.cache
def find_pairs(forward: Callable[..., Any], norms: frozenset[str], activations: frozenset[str]) -> tuple[str, ...]:
    """Those of `norms` that `read` would join with a SiLU, in source order; nothing of the forward is run."""
    return _rewrite(forward, norms, activations)[1]


def _rewrite(
    forward: Callable[..., Any], norms: frozenset[str], activations: frozenset[str]
) -> tuple[Callable[[], Callable[..., Any]], tuple[str, ...]]:
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
    if not isinstance(definition, ast.FunctionDef) or any(map(_is_private, ast.walk(definition))):
        raise CannotReadError(f"{original.__qualname__} is not a plain function, or uses names private to its class")
    joiner = _Joiner(norms, activations, original.__globals__)
    definition.body = joiner.block(definition.body)
    ast.increment_lineno(definition, first_line - 1)
    return functools.partial(_compile, definition, original), tuple(dict.fromkeys(joiner.joined))


def _is_private(node: ast.AST) -> bool:
    return isinstance(node, ast.Attribute) and node.attr.startswith("__") and not node.attr.endswith("__")


def _compile(definition: ast.FunctionDef, original: FunctionType) -> Callable[..., Any]:
    """The function that `definition` describes, with the original's globals, file name and line numbers."""
    definition.returns = None
    for node in ast.walk(definition.args):
        if isinstance(node, ast.arg):
            node.annotation = None  # may name a type that is imported for type checkers only
    maker = ast.parse(f"def make({JOIN}, {SILU}): return None").body[0]
    assert isinstance(maker, ast.FunctionDef)
    maker.body = [definition, ast.Return(ast.Name(definition.name, ast.Load()))]
    module = ast.fix_missing_locations(ast.Module([maker], type_ignores=[]))
    made: dict[str, Any] = {}
    exec(compile(module, original.__code__.co_filename, "exec", dont_inherit=True), original.__globals__, made)
    return made["make"](norm_silu, F.silu)


class _Joiner(ast.NodeTransformer):
    """Applies the three rewritings to lists of statements, from the outermost inwards."""

    def __init__(self, norms: frozenset[str], activations: frozenset[str], scope: Mapping[str, Any]) -> None:
        self.norms, self.activations, self.scope = norms, activations, scope
        self.joined: list[str] = []

    def block(self, statements: list[ast.stmt]) -> list[ast.stmt]:
        """The statements with every pair joined, in nested blocks too."""
        done: list[ast.stmt] = []
        for statement in self._sink_activations(statements):
            statement = self.visit(self._visit_blocks(statement))
            joined = self._join_with_last(done, statement)
            if joined is not None:
                done.pop()
                statement = joined
            done.append(statement)
        return _take_in_additions(done)

    def _visit_blocks(self, statement: ast.stmt) -> ast.stmt:
        for field in ("body", "orelse", "finalbody"):
            nested = getattr(statement, field, None)
            if nested:
                setattr(statement, field, self.block(nested))
        for handler in getattr(statement, "handlers", ()):
            handler.body = self.block(handler.body)
        return statement

    def visit_Call(self, node: ast.Call) -> ast.AST:
        """`act(self.norm(a))` in one expression."""
        self.generic_visit(node)
        activation = self._activation(node)
        if activation is not None and self._norm_name(node.args[0]) is not None:
            return self._join(node.args[0], activation)
        return node

    def _join_with_last(self, done: list[ast.stmt], statement: ast.stmt) -> ast.stmt | None:
        """`statement`, where it is `a = act(a)` and the norm that made `a` comes right before it: both as one."""
        target, made = _assignment(statement)
        activation = self._activation(made)
        if target is None or activation is None or _name(made.args[0]) != target:
            return None
        before, normed = _assignment(done[-1]) if done else (None, None)
        extras = _scale_shift(normed, target) if before == target else None
        if extras is not None:
            before, normed = _assignment(done[-2]) if len(done) > 1 else (None, None)
        if before != target or self._norm_name(normed) is None:
            return None
        if extras is not None:
            done.pop()
        return _assign(target, self._join(normed, activation, **(extras or {})), statement)

    def _sink_activations(self, statements: list[ast.stmt]) -> list[ast.stmt]:
        sunk: list[ast.stmt] = []
        for statement in statements:
            target, made = _assignment(statement)
            is_step = target is not None and self._activation(made) is not None and _name(made.args[0]) == target
            if is_step and sunk and isinstance(sunk[-1], ast.If) and self._ends_in_norm(sunk[-1], target):
                for branch in (sunk[-1].body, sunk[-1].orelse):
                    branch.append(copy.deepcopy(statement))
            else:
                sunk.append(statement)
        return sunk

    def _ends_in_norm(self, statement: ast.stmt, target: str | None) -> bool:
        if isinstance(statement, ast.If):
            branches = (statement.body, statement.orelse)
            return any(branch and self._ends_in_norm(branch[-1], target) for branch in branches)
        assigned, made = _assignment(statement)
        is_end = self._norm_name(made) is not None or _scale_shift(made, target) is not None
        return assigned == target and is_end

    def _norm_name(self, node: Any) -> str | None:
        """`norm` where the node is `self.norm(x, …)` with one of the norms that may be joined."""
        if not isinstance(node, ast.Call) or not node.args or EXTRAS & {keyword.arg for keyword in node.keywords}:
            return None
        attribute = _self_attribute(node.func)
        return attribute if attribute in self.norms else None

    def _activation(self, node: Any) -> ast.expr | None:
        """The activation where the node is `act(x)`: an attribute of self, or a function that computes SiLU."""
        if not isinstance(node, ast.Call) or len(node.args) != 1 or node.keywords:
            return None
        if _self_attribute(node.func) in self.activations:
            return node.func
        return ast.Name(SILU, ast.Load()) if _is_silu_function(node.func, self.scope) else None

    def _join(self, normed: Any, activation: ast.expr, **extras: ast.expr) -> ast.Call:
        self.joined.append(normed.func.attr)
        keywords = [*normed.keywords, *(ast.keyword(name, value) for name, value in extras.items())]
        call = ast.Call(ast.Name(JOIN, ast.Load()), [normed.func, activation, *normed.args], keywords)
        return ast.copy_location(call, normed)


def _take_in_additions(statements: list[ast.stmt]) -> list[ast.stmt]:
    """Rewriting 2: `a = a + e` before `a = norm_silu(norm, act, a)` becomes its pre_bias."""
    done: list[ast.stmt] = []
    for statement in statements:
        target, call = _assignment(statement)
        if done and isinstance(call, ast.Call) and _name(call.func) == JOIN and _name(call.args[2]) == target:
            before = done[-1]
            added = _addend(before, target)
            if added is not None:
                done.pop()
                call.keywords.append(ast.keyword("pre_bias", added))
            elif isinstance(before, ast.If) and not before.orelse:
                added = _addend(before.body[-1], target)
                if added is not None:
                    before.body[-1] = _assign(PRE_BIAS, added, before.body[-1])
                    done.insert(-1, _assign(PRE_BIAS, ast.Constant(None), before))
                    call.keywords.append(ast.keyword("pre_bias", ast.Name(PRE_BIAS, ast.Load())))
        done.append(statement)
    return done


def _addend(statement: ast.stmt, target: str | None) -> ast.expr | None:
    """`e` where the statement is `target = target + e`."""
    assigned, made = _assignment(statement)
    is_step = target is not None and assigned == target
    is_sum = isinstance(made, ast.BinOp) and isinstance(made.op, ast.Add) and _name(made.left) == target
    return made.right if is_step and is_sum else None


def _scale_shift(node: Any, target: str | None) -> dict[str, ast.expr] | None:
    """`s` and `t` where the node is `target * (1 + s) + t`, or with `s + 1`."""
    product = node.left if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add) else None
    is_product = isinstance(product, ast.BinOp) and isinstance(product.op, ast.Mult) and _name(product.left) == target
    factor: Any = product.right if is_product else None  # type: ignore[union-attr]
    if isinstance(factor, ast.BinOp) and isinstance(factor.op, ast.Add):
        for one, scale in ((factor.left, factor.right), (factor.right, factor.left)):
            if isinstance(one, ast.Constant) and one.value == 1:
                return {"scale": scale, "shift": node.right}
    return None


def _is_silu_function(node: ast.expr, scope: Mapping[str, Any]) -> bool:
    """Whether a name such as `F.silu` or `nonlinearity` stands for a function with SiLU's values."""
    path = ast.unparse(node).split(".") if isinstance(node, (ast.Name, ast.Attribute)) else [""]
    if path[-1] not in SILU_NAMES or path[0] not in scope:
        return False
    function = functools.reduce(lambda owner, name: getattr(owner, name, None), path[1:], scope[path[0]])
    return isinstance(function, FunctionType) and (function is F.silu or computes_silu(function))


def _assignment(statement: ast.stmt) -> tuple[str | None, Any]:
    """Name and value, where a statement assigns to one plain name."""
    if isinstance(statement, ast.Assign) and len(statement.targets) == 1:
        return _name(statement.targets[0]), statement.value
    return None, None


def _name(node: ast.AST) -> str | None:
    return node.id if isinstance(node, ast.Name) else None


def _self_attribute(node: ast.AST) -> str | None:
    return node.attr if isinstance(node, ast.Attribute) and _name(node.value) == "self" else None


def _assign(target: str, value: ast.expr, where: ast.stmt) -> ast.stmt:
    return ast.copy_location(ast.Assign([ast.Name(target, ast.Store())], value), where)
