"""The rewriting of a forward's source, statement by statement.

Each step keeps the meaning whatever the names stand for, because `norm_silu(norm, act, x, …)` is defined as
`act(norm(x + pre_bias, …) * (1 + scale) + shift)`, evaluates its arguments before it normalizes, and SiLU works on each
element by itself:

1. `a = self.norm(a)`, then `a = self.act(a)` (or `act(self.norm(a))`) becomes `a = norm_silu(self.norm, self.act, a)`;
   a step `a = a * (1 + s) + t` between the two goes in as `scale=s, shift=t`, where s and t do not mention a;
   steps such as `a = a.permute(…)` between the two, which only lay a out otherwise, come after.
2. `a = a + e` right before, on its own or as the last line of an `if`, goes in as `pre_bias=e`, where the norm gets a
   alone and nothing else in the call mentions it.
3. Where branches of an `if` end in a norm and the activation follows the `if`, the activation moves into the branches.

A forward that does anything else between norm and activation has no such pair, and stays as it is.
"""

from __future__ import annotations

import ast
import copy
import functools
from collections.abc import Callable, Mapping
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F

from unetgn.fusion.recognition import computes_silu

JOIN, SILU, PRE_BIAS = "unetgn_norm_silu", "unetgn_silu", "unetgn_pre_bias"
SILU_NAMES = frozenset({"silu", "swish", "nonlinearity"})
AMBIGUOUS = frozenset({"pre_bias", "scale", "shift", None})  # keywords of norm_silu itself; None: **keywords
LAYOUTS = frozenset(
    {"permute", "transpose", "movedim", "flatten", "unflatten", "view", "reshape", "contiguous", "squeeze", "unsqueeze"}
)


class Joiner(ast.NodeTransformer):
    """Applies the three rewritings to lists of statements, from the outermost inwards.

    `scope`: what names stand for, other than local ones. `shared`: local names that inner functions see, too.
    `joined` notes the norm of every call that is made one with SiLU; `instead` says of norms what SiLU is taken of.
    """

    def __init__(
        self, norms: frozenset[str], activations: frozenset[str], scope: Mapping[str, Any], shared: frozenset[str]
    ) -> None:
        self.norms, self.activations, self.scope, self.shared = norms, activations, scope, shared
        self.joined: list[str] = []
        self.instead: dict[str, str] = {}

    def rewrite(self, definition: ast.FunctionDef) -> None:
        """Join every pair in a function's body, in place."""
        for node in ast.walk(definition):
            if isinstance(node, ast.Call) and self._is_of_input_by_name(node):
                node.args = [keyword.value for keyword in node.keywords if keyword.arg == "input"]
                node.keywords = [keyword for keyword in node.keywords if keyword.arg != "input"]
        definition.body = self._block(definition.body)

    def _block(self, statements: list[ast.stmt]) -> list[ast.stmt]:
        """The statements with every pair joined, in nested blocks too."""
        done: list[ast.stmt] = []
        for statement in self._sink_activations(statements):
            statement = self.visit(self._visit_blocks(statement))
            if not self._join_with_last(done, statement):
                self._note_sum(done, statement)
                done.append(statement)
        return _take_in_additions(done, self.shared)

    def _visit_blocks(self, statement: ast.stmt) -> ast.stmt:
        for field in ("body", "orelse", "finalbody"):
            nested = getattr(statement, field, None)
            if nested:
                setattr(statement, field, self._block(nested))
        for handler in getattr(statement, "handlers", ()):
            handler.body = self._block(handler.body)
        return statement

    def visit_Call(self, node: ast.Call) -> ast.AST:
        """`act(self.norm(a))` in one expression."""
        self.generic_visit(node)
        activation = self._activation(node)
        if activation is not None and self._norm_name(node.args[0]) is not None:
            return self._join(node.args[0], activation)
        return node

    def _join_with_last(self, done: list[ast.stmt], statement: ast.stmt) -> bool:
        """Make `a = act(a)` one with the norm that made `a` before it, in `done`; whether that could be."""
        step = self._step(statement)
        if step is None:
            return False
        target, activation = step
        at = len(done) - 1
        while at > 0 and _is_layout(done[at], target):
            at -= 1
        before, normed = _assignment(done[at]) if at >= 0 else (None, None)
        extras = _scale_shift(normed, target) if before == target else None
        if extras is not None:
            before, normed = _assignment(done[at - 1]) if at > 0 and target not in self.shared else (None, None)
        if before != target or self._norm_name(normed) is None:
            return False
        joined = _assign(target, self._join(normed, activation, **(extras or {})), statement)
        done[at - 1 if extras else at : at + 1] = [joined]
        return True

    def _note_sum(self, done: list[ast.stmt], statement: ast.stmt) -> None:
        """Note a SiLU of something that is made of the result of the norm right before it."""
        target, made = _assignment(done[-1]) if done else (None, None)
        norm = self._norm_name(made)
        for node in ast.walk(statement) if norm is not None else ():
            is_silu = self._activation(node) is not None
            if is_silu and isinstance(node.args[0], ast.BinOp) and _mentions(node.args[0], target):  # type: ignore[attr-defined]
                argument = ast.unparse(node.args[0])  # type: ignore[attr-defined]
                self.instead[str(norm)] = f"SiLU is taken of `{argument}`, not of its result alone"

    def _sink_activations(self, statements: list[ast.stmt]) -> list[ast.stmt]:
        sunk: list[ast.stmt] = []
        for statement in statements:
            step, last = self._step(statement), sunk[-1] if sunk else None
            if step is not None and isinstance(last, ast.If) and self._ends_in_norm([last], step[0]):
                for branch in (last.body, last.orelse):
                    branch.append(copy.deepcopy(statement))
            else:
                sunk.append(statement)
        return sunk

    def _ends_in_norm(self, statements: list[ast.stmt], target: str | None) -> bool:
        """Whether a norm, with what may follow it, or an `if` with such a branch, comes last."""
        at = len(statements) - 1
        while at > 0 and _is_layout(statements[at], target):
            at -= 1
        last = statements[at] if statements else None
        if isinstance(last, ast.If):
            return any(self._ends_in_norm(branch, target) for branch in (last.body, last.orelse))
        assigned, made = _assignment(last)
        is_end = self._norm_name(made) is not None or _scale_shift(made, target) is not None
        return assigned == target and is_end

    def _norm_name(self, node: Any) -> str | None:
        """`norm` where the node is `self.norm(x, …)` with one of the norms that may be joined."""
        if not isinstance(node, ast.Call) or not node.args or AMBIGUOUS & {keyword.arg for keyword in node.keywords}:
            return None
        attribute = self_attribute(node.func)
        return attribute if attribute in self.norms else None

    def _step(self, statement: ast.stmt) -> tuple[str, ast.expr] | None:
        """Name and activation where the statement is `a = act(a)`, `a = a * torch.sigmoid(a)` or that with `*=`."""
        target, made = _assignment(statement)
        if isinstance(statement, ast.AugAssign):
            target, made = _name(statement.target), ast.BinOp(statement.target, statement.op, statement.value)
        if target is None:
            return None
        activation = self._activation(made)
        if activation is not None:
            return (target, activation) if _name(made.args[0]) == target else None
        return (target, ast.Name(SILU, ast.Load())) if self._is_written_out(made, target) else None

    def _is_written_out(self, node: Any, target: str) -> bool:
        """Whether the node is `target * torch.sigmoid(target)`."""
        if not (isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult) and _name(node.left) == target):
            return False
        gate = node.right
        is_gate = isinstance(gate, ast.Call) and [_name(argument) for argument in gate.args] == [target]
        return is_gate and not gate.keywords and _stands_for(gate.func, self.scope) is torch.sigmoid  # type: ignore[attr-defined]

    def _activation(self, node: Any) -> ast.expr | None:
        """The activation where the node is `act(x)`: an attribute of self, or a function that computes SiLU.

        `F.silu(x, inplace=…)` is one, too: x is the norm's result and nobody else's.
        """
        if not isinstance(node, ast.Call) or len(node.args) != 1:
            return None
        if self_attribute(node.func) in self.activations:
            return None if node.keywords else node.func
        function = _silu_function(node.func, self.scope)
        is_plain = not node.keywords or (function is F.silu and _is_only_inplace(node.keywords))
        return ast.Name(SILU, ast.Load()) if function is not None and is_plain else None

    def _is_of_input_by_name(self, call: ast.Call) -> bool:
        """Whether the call is `norm(input=x)`, `act(input=x)` or `F.silu(input=x, inplace=…)`."""
        is_known = self_attribute(call.func) in self.norms | self.activations or _silu_function(call.func, self.scope)
        names = {keyword.arg for keyword in call.keywords}
        return bool(is_known) and not call.args and {"input"} <= names <= {"input", "inplace"}

    def _join(self, normed: Any, activation: ast.expr, **extras: ast.expr) -> ast.Call:
        self.joined.append(normed.func.attr)
        keywords = [*normed.keywords, *(ast.keyword(name, value) for name, value in extras.items())]
        call = ast.Call(ast.Name(JOIN, ast.Load()), [normed.func, activation, *normed.args], keywords)
        return ast.copy_location(call, normed)


def self_attribute(node: ast.AST) -> str | None:
    """`name` where the node is `self.name`."""
    return node.attr if isinstance(node, ast.Attribute) and _name(node.value) == "self" else None


def _take_in_additions(statements: list[ast.stmt], shared: frozenset[str]) -> list[ast.stmt]:
    """Rewriting 2: `a = a + e` before `a = norm_silu(norm, act, a)` becomes its pre_bias, the first to be evaluated."""
    done: list[ast.stmt] = []
    for statement in statements:
        target, call = _assignment(statement)
        if done and _is_joined_alone(call, target) and target not in shared:
            before = done[-1]
            added = _addend(before, target)
            if added is not None:
                done.pop()
                call.keywords.insert(0, ast.keyword("pre_bias", added))
            elif isinstance(before, ast.If) and not before.orelse:
                added = _addend(before.body[-1], target)
                if added is not None:
                    before.body[-1] = _assign(PRE_BIAS, added, before.body[-1])
                    done.insert(-1, _assign(PRE_BIAS, ast.Constant(None), before))
                    call.keywords.insert(0, ast.keyword("pre_bias", ast.Name(PRE_BIAS, ast.Load())))
        done.append(statement)
    return done


def _is_joined_alone(node: Any, target: str | None) -> bool:
    """Whether the node is `norm_silu(norm, act, target)`, with scale and shift at most, that do not mention target."""
    if not isinstance(node, ast.Call) or _name(node.func) != JOIN or len(node.args) != 3:
        return False
    is_known = all(keyword.arg in ("scale", "shift") for keyword in node.keywords)
    return is_known and _name(node.args[2]) == target and not any(_mentions(k.value, target) for k in node.keywords)


def _addend(statement: ast.stmt, target: str | None) -> ast.expr | None:
    """`e` where the statement is `target = target + e`."""
    assigned, made = _assignment(statement)
    is_step = target is not None and assigned == target
    is_sum = isinstance(made, ast.BinOp) and isinstance(made.op, ast.Add) and _name(made.left) == target
    return made.right if is_step and is_sum else None


def _scale_shift(node: Any, target: str | None) -> dict[str, ast.expr] | None:
    """`s` and `t` where the node is `target * (1 + s) + t`, or with `s + 1`, and neither mentions the target."""
    product = node.left if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add) else None
    is_product = isinstance(product, ast.BinOp) and isinstance(product.op, ast.Mult) and _name(product.left) == target
    factor: Any = product.right if is_product else None  # type: ignore[union-attr]
    if isinstance(factor, ast.BinOp) and isinstance(factor.op, ast.Add):
        for one, scale in ((factor.left, factor.right), (factor.right, factor.left)):
            is_one = isinstance(one, ast.Constant) and one.value == 1
            if is_one and not _mentions(scale, target) and not _mentions(node.right, target):
                return {"scale": scale, "shift": node.right}
    return None


def _is_layout(statement: ast.stmt, target: str | None) -> bool:
    """Whether the statement is `target = target.permute(…)`, or several such methods in a row, of the target alone."""
    assigned, made = _assignment(statement)
    if assigned is None or assigned != target or not isinstance(made, ast.Call):
        return False
    while isinstance(made, ast.Call) and isinstance(made.func, ast.Attribute) and made.func.attr in LAYOUTS:
        if any(_mentions(part, target) for part in (*made.args, *made.keywords)):
            return False
        made = made.func.value
    return _name(made) == target


def _silu_function(node: ast.expr, scope: Mapping[str, Any]) -> Callable[..., Any] | None:
    """The function with SiLU's values that a name such as `F.silu` or `nonlinearity` stands for, if it does."""
    is_named = ast.unparse(node).rpartition(".")[2] in SILU_NAMES
    function = _stands_for(node, scope) if is_named else None
    return function if isinstance(function, FunctionType) and computes_silu(function) else None


def _stands_for(node: ast.expr, scope: Mapping[str, Any]) -> Any:
    """What a name such as `F.silu` stands for in the scope; None where it is none, or a local one."""
    path = ast.unparse(node).split(".") if isinstance(node, (ast.Name, ast.Attribute)) else [""]
    if path[0] not in scope:
        return None
    return functools.reduce(lambda owner, name: getattr(owner, name, None), path[1:], scope[path[0]])


def _is_only_inplace(keywords: list[ast.keyword]) -> bool:
    """Whether there is only `inplace=True` or `inplace=self.inplace`, which nothing is lost with."""
    is_value = all(isinstance(keyword.value, (ast.Constant, ast.Name, ast.Attribute)) for keyword in keywords)
    return is_value and [keyword.arg for keyword in keywords] == ["inplace"]


def _mentions(node: ast.AST, name: str | None) -> bool:
    return any(_name(part) == name for part in ast.walk(node))


def _assignment(statement: ast.stmt | None) -> tuple[str | None, Any]:
    """Name and value, where a statement assigns to one plain name."""
    if isinstance(statement, ast.Assign) and len(statement.targets) == 1:
        return _name(statement.targets[0]), statement.value
    return None, None


def _name(node: ast.AST) -> str | None:
    return node.id if isinstance(node, ast.Name) else None


def _assign(target: str, value: ast.expr, where: ast.stmt) -> ast.stmt:
    return ast.copy_location(ast.Assign([ast.Name(target, ast.Store())], value), where)
