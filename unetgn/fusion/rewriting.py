"""Rewrites a class's own forward so that a norm and the SiLU after it are one call.

Each rewriting keeps the meaning whatever the names stand for. `norm_silu(norm, act, x, …)` is defined as
`act(norm(x + pre_bias, …) * (1 + scale) + shift)`, its arguments are evaluated before it normalizes, and SiLU works on
each element by itself. A forward that does anything else between norm and activation is left as it is.

The docstrings of `Rewriter` show a forward before and after each rewriting. Names that the rewriting adds begin with
`unetgn_`, so that they meet no name of the forward; the examples leave that away.
"""

from __future__ import annotations

import ast
import copy
import functools
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F

from unetgn.fusion.activations import early, late
from unetgn.fusion.division import divide
from unetgn.fusion.norm_silu import norm_silu
from unetgn.fusion.patterns import (
    SILU,
    Names,
    addend,
    assignment,
    before_layouts,
    is_aside,
    is_step_aside,
    mentions,
    name_of,
    names_in,
    self_attribute,
)
from unetgn.fusion.source import compile_forward, parse_forward

NORM_SILU, PRE_BIAS, DIVIDE = "unetgn_norm_silu", "unetgn_pre_bias", "unetgn_divide"
SCALE, SHIFT = "unetgn_scale", "unetgn_shift"
EARLY, LATE = "unetgn_early", "unetgn_late"


@dataclass(frozen=True)
class Pairs:
    """Lists the norms of a forward that meet SiLU: those that can be fused, and what there is to say of some norms.

    norms: in source order. only: those of them that have other calls, too. instead: norms that cannot be fused,
    although a SiLU is near. Both as (norm, sentence).
    """

    norms: tuple[str, ...]
    only: tuple[tuple[str, str], ...]
    instead: tuple[tuple[str, str], ...]


@functools.cache
def rewrite_forward(
    forward: Callable[..., Any], norms: frozenset[str], activations: frozenset[str]
) -> Callable[..., Any]:
    """Return the rewritten `forward` of a class: a function of the module and what the forward takes, undecorated.

    `norms` and `activations` are the attributes of `self` that may be fused; functions that serve as activations
    (`F.silu`, a module's `nonlinearity`) are found through the forward's globals. Raises CannotRewriteError.
    """
    definition, original = parse_forward(forward)
    Rewriter(Names.of(original, norms, activations)).rewrite(definition)
    added = {NORM_SILU: norm_silu, SILU: F.silu, DIVIDE: divide, EARLY: early, LATE: late}
    return compile_forward(definition, original, added)


@functools.cache
def find_pairs(forward: Callable[..., Any], norms: frozenset[str], activations: frozenset[str]) -> Pairs:
    """Find those of `norms` that `rewrite_forward` would fuse; nothing of the forward is run.

    Raises CannotRewriteError.
    """
    definition, original = parse_forward(forward)
    rewriter = Rewriter(Names.of(original, norms, activations))
    rewriter.rewrite(definition)
    fused, left = rewriter.fused, list(_calls(definition, norms))
    only = tuple(
        (norm, f"only where SiLU comes right after it: {fused.count(norm)} of its {fused.count(norm) + calls} calls")
        for norm in dict.fromkeys(fused)
        if (calls := left.count(norm))
    )
    instead = tuple((norm, sentence) for norm, sentence in rewriter.instead.items() if norm not in fused)
    return Pairs(tuple(dict.fromkeys(fused)), only, instead)


class Rewriter(ast.NodeTransformer):
    """Applies the rewritings to lists of statements, from the outermost inwards.

    `fused` notes the norm of every call that is made one with SiLU; `instead` says of norms what SiLU is taken of.
    """

    def __init__(self, names: Names) -> None:
        self.names = names
        self.fused: list[str] = []
        self._mentioned: Counter[str] = Counter()
        self._tries = False
        self.instead: dict[str, str] = {}

    def rewrite(self, definition: ast.FunctionDef) -> None:
        """Rewrite a function's body, in place."""
        for node in ast.walk(definition):
            if isinstance(node, ast.Call) and self.names.is_called_by_keyword(node):
                self._pass_by_position(node)
        self._tries = any(isinstance(node, ast.Try) for node in ast.walk(definition))
        self._mentioned.update(node.id for node in ast.walk(definition) if isinstance(node, ast.Name))
        definition.body = self._block(definition.body)

    def _block(self, statements: list[ast.stmt]) -> list[ast.stmt]:
        """Return the statements with every pair fused, in nested blocks too."""
        done: list[ast.stmt] = []
        for statement in self._sink_activations(statements):
            statement = self.visit(self._visit_blocks(self._push_norm(done, statement)))
            if not (self._take_in_condition(done, statement) or self._fuse_with_norm_before(done, statement)):
                self._fuse_read_once(done, statement)
                self._note_sum(done, statement)
                done.append(statement)
        return self._take_in_additions(done)

    def _visit_blocks(self, statement: ast.stmt) -> ast.stmt:
        for field in ("body", "orelse", "finalbody"):
            nested = getattr(statement, field, None)
            if nested:
                setattr(statement, field, self._block(nested))
        for handler in getattr(statement, "handlers", ()):
            handler.body = self._block(handler.body)
        return statement

    def _pass_by_position(self, call: ast.Call) -> None:
        """Pass the input of a norm or an activation by position, so that the rewritings below know the call.

        Before::

            h = self.norm(input=x)
            y = self.act(input=x)

        After::

            h = self.norm(x)
            y = self.act(x)
        """
        call.args = [keyword.value for keyword in call.keywords if keyword.arg == "input"]
        call.keywords = [keyword for keyword in call.keywords if keyword.arg != "input"]

    def visit_Call(self, node: ast.Call) -> ast.AST:
        """Make one call of an activation of a norm, within an expression.

        Before::

            h = self.conv(self.act(self.norm(x)))
            y = x + F.silu(self.norm(h), inplace=True)

        After::

            h = self.conv(norm_silu(self.norm, self.act, x))
            y = x + norm_silu(self.norm, F.silu, h)

        A scale-shift between the two goes in. Before::

            h = F.silu(torch.addcmul(emb, self.norm(x), scale + 1))

        After::

            h = norm_silu(self.norm, F.silu, x, shift=emb, scale=scale)
        """
        self.generic_visit(node)
        activation = self.names.activation(node)
        if activation is None:
            return node
        normed, extras = self.names.modulation(node.args[0]) or (node.args[0], {})
        if self.names.norm(normed) is None or not is_aside(extras, None, normed):
            return node
        return self._fuse(normed, activation, **extras)

    def visit_BinOp(self, node: ast.BinOp) -> ast.AST:
        """Leave out the division of a sum by a factor of the module that turns out to be 1.

        Before::

            y = (x + h) / self.output_scale_factor

        After::

            y = divide(x + h, self.output_scale_factor)
        """
        self.generic_visit(node)
        is_of_sum = isinstance(node.op, ast.Div) and isinstance(node.left, ast.BinOp)
        if is_of_sum and self_attribute(node.right) is not None:
            return ast.copy_location(ast.Call(ast.Name(DIVIDE, ast.Load()), [node.left, node.right], []), node)
        return node

    def _fuse_with_norm_before(self, done: list[ast.stmt], statement: ast.stmt) -> bool:
        """Make one call of a step `h = act(h)` and the norm that made `h`, last in `done`; return True where it is one.

        Before::

            h = self.norm(x)
            h = self.act(h)

        After::

            h = norm_silu(self.norm, self.act, x)

        SiLU may be written out. Before::

            h = self.norm(x)
            h *= torch.sigmoid(h)

        After::

            h = norm_silu(self.norm, silu, x)

        A scale-shift between the two goes in, where scale and shift are not made of what the norm has made. Before::

            h = self.norm(x)
            scale, emb = emb.chunk(2, dim=1)
            h = h * (1 + scale) + emb
            h = self.act(h)

        After::

            scale, emb = emb.chunk(2, dim=1)
            h = norm_silu(self.norm, self.act, x, scale=scale, shift=emb)

        Steps between the two that only lay out the tensor come after. An activation that is not SiLU any more, or has
        a hook, comes where it was. Before::

            h = self.norm(x)
            h = h.unflatten(0, (2, -1)).permute(0, 2, 1, 3, 4)
            h = self.act(h)

        After::

            h = norm_silu(self.norm, early(self.act), x)
            h = h.unflatten(0, (2, -1)).permute(0, 2, 1, 3, 4)
            h = late(self.act, h)
        """
        step = self.names.activation_step(statement)
        if step is None:
            return False
        target, activation = step
        at = before_layouts(done, target)
        before, normed = assignment(done[at]) if at >= 0 else (None, None)
        if before != target:
            return False
        found = self.names.modulation(normed)
        if found is None or name_of(found[0]) != target:
            if self.names.norm(normed) is None and self.names.cast_norm(normed) is None:
                return False
            is_next = at == len(done) - 1 and self.names.norm(normed) is not None  # without a cast
            done[at] = _assign(target, self._fuse(normed, activation if is_next else _early(activation)), statement)
            if not is_next:
                done.append(_assign(target, _late(activation, target, statement), statement))
            return True
        first = self._norm_aside(done, at - 1, target)
        normed = assignment(done[first])[1] if first is not None else None
        if first is None or not is_aside(found[1], target, normed):
            return False
        is_next = at == len(done) - 1
        made = self._fuse(normed, activation if is_next else _early(activation), **found[1])
        done[at] = _assign(target, made, statement)
        del done[first]
        if not is_next:
            done.append(_assign(target, _late(activation, target, statement), statement))
        return True

    def _norm_aside(self, done: list[ast.stmt], at: int, target: str | None) -> int | None:
        """Return where `target = self.norm(x)` is, at `at` or before steps that it may come after; else None."""
        first = next((place for place in range(at, -1, -1) if assignment(done[place])[0] == target), None)
        if first is None or target in self.names.shared:
            return None
        normed = assignment(done[first])[1]
        steps = done[first + 1 : at + 1]
        is_norm = self.names.norm(normed) is not None
        return first if is_norm and all(is_step_aside(step, target, normed) for step in steps) else None

    def _fuse_read_once(self, done: list[ast.stmt], statement: ast.stmt) -> None:
        """Make one call of a norm and the SiLU of its result later on, where nothing else reads that.

        Before::

            y = self.norm(x)
            skip = self.proj(x)
            return skip + self.act(y)

        After::

            y = norm_silu(self.norm, early(self.act), x)
            skip = self.proj(x)
            return skip + late(self.act, y)
        """
        is_plain = isinstance(statement, (ast.Assign, ast.Return, ast.Expr, ast.AugAssign))
        if not is_plain or any(isinstance(node, (ast.Lambda, ast.comprehension)) for node in ast.walk(statement)):
            return
        is_return = isinstance(statement, ast.Return)
        found = ((node, self.names.silu_of(node)) for node in ast.walk(statement))
        for node, silu in found:
            target = name_of(silu[1]) if silu is not None else None
            if silu is None or target is None or target in self.names.shared:
                continue
            first = next((place for place in range(len(done) - 1, -1, -1) if mentions(done[place], target)), None)
            if first is None:
                continue
            before, normed = assignment(done[first])
            if before != target or self.names.norm(normed) is None:
                continue
            inside = _count(node, target)
            is_all = self._mentioned[target] == inside + 1 and not mentions(normed, target)
            is_last = is_return or assignment(statement)[0] == target
            is_last = is_last and not self._tries  # a handler may read what the norm has made
            is_last = is_last and _count(statement.value, target) == inside  # type: ignore[attr-defined]
            if is_all or is_last:
                done[first] = _assign(target, self._fuse(normed, _early(silu[0])), done[first])
                _Swap(node, _late(silu[0], target, node)).visit(statement)
                return

    def _push_norm(self, done: list[ast.stmt], statement: ast.stmt) -> ast.stmt:
        """Move a norm into the `if` after it, where one branch begins with SiLU of its result.

        Before::

            h = self.norm(x)
            if emb is None:
                h = self.act(h)

        After::

            if emb is None:
                h = norm_silu(self.norm, self.act, x)
            else:
                h = self.norm(x)
        """
        if not (done and isinstance(statement, ast.If)):
            return statement
        target, normed = assignment(done[-1])
        if not (self.names.norm(normed) or self.names.cast_norm(normed)):
            return statement
        step = self.names.activation_step(statement.body[0])
        used = names_in(normed) - {"self"} | {target}
        if step is None or step[0] != target or names_in(statement.test) & used or target in self.names.shared:
            return statement
        norm = done.pop()
        statement.body.insert(0, norm)
        statement.orelse.insert(0, copy.deepcopy(norm))
        return statement

    def _take_in_condition(self, done: list[ast.stmt], statement: ast.stmt) -> bool:
        """Make one call of a norm, a scale-shift that is under a condition, and SiLU; return True where they are there.

        Before::

            h = self.norm(x)
            if emb is not None:
                scale, emb = emb
                h = h * (scale + 1) + emb
            h = self.act(h)

        After::

            scale_ = shift_ = None
            if emb is not None:
                scale, emb = emb
                scale_ = scale
                shift_ = emb
            h = norm_silu(self.norm, self.act, x, scale=scale_, shift=shift_)
        """
        step, branch = self.names.activation_step(statement), done[-1] if done else None
        if step is None or not isinstance(branch, ast.If) or branch.orelse:
            return False
        target = step[0]
        first = self._norm_aside(done, len(done) - 2, target)
        assigned, made = assignment(branch.body[-1])
        found = self.names.modulation(made) if assigned == target else None
        if first is None or found is None or name_of(found[0]) != target:
            return False
        normed = assignment(done[first])[1]
        steps = branch.body[:-1]
        is_before = all(is_step_aside(step, target, normed) for step in steps) and is_aside(found[1], target, normed)
        if not is_before or names_in(branch.test) & (names_in(normed) - {"self"} | {target}):
            return False
        names = {"scale": SCALE, "shift": SHIFT}
        branch.body = [*steps, *(_assign(names[name], value, branch.body[-1]) for name, value in found[1].items())]
        none: list[ast.expr] = [ast.Name(SCALE, ast.Store()), ast.Name(SHIFT, ast.Store())]
        start = ast.copy_location(ast.Assign(none, ast.Constant(None)), branch)
        extras = {"scale": ast.Name(SCALE, ast.Load()), "shift": ast.Name(SHIFT, ast.Load())}
        last = _assign(str(target), self._fuse(normed, step[1], **extras), done[first])
        done[first:] = [*done[first + 1 : -1], start, branch, last]
        return True

    def _note_sum(self, done: list[ast.stmt], statement: ast.stmt) -> None:
        """Note a SiLU of something that is made of the result of the norm right before it."""
        target, made = assignment(done[-1]) if done else (None, None)
        norm = self.names.norm(made)
        for node in ast.walk(statement) if norm is not None else ():
            is_silu = self.names.activation(node) is not None
            if is_silu and isinstance(node.args[0], ast.BinOp) and mentions(node.args[0], target):  # type: ignore[attr-defined]
                argument = ast.unparse(node.args[0])  # type: ignore[attr-defined]
                self.instead[str(norm)] = f"SiLU is taken of `{argument}`, not of its result alone"

    def _sink_activations(self, statements: list[ast.stmt]) -> list[ast.stmt]:
        """Move an activation after an `if` into its branches, where one of them ends in a norm.

        Before::

            if emb is None:
                h = self.norm(x)
            else:
                h = self.conv(x)
            h = self.act(h)

        After::

            if emb is None:
                h = norm_silu(self.norm, self.act, x)
            else:
                h = self.conv(x)
                h = self.act(h)
        """
        sunk: list[ast.stmt] = []
        for statement in statements:
            last = sunk[-1] if sunk else None
            step = self.names.activation_step(statement)
            if isinstance(statement, ast.If) and not statement.orelse and len(statement.body) == 1:
                step = self.names.activation_step(statement.body[0])  # under a condition
                step = None if step is None or mentions(statement.test, step[0]) else step
            if step is not None and isinstance(last, ast.If) and self._ends_in_norm([last], step[0]):
                for branch in (last.body, last.orelse):
                    branch.append(copy.deepcopy(statement))
            else:
                sunk.append(statement)
        return sunk

    def _ends_in_norm(self, statements: list[ast.stmt], target: str | None) -> bool:
        """Return True where a norm, with what may follow it, or an `if` with such a branch, comes last."""
        last = statements[before_layouts(statements, target)] if statements else None
        if isinstance(last, ast.If):
            return any(self._ends_in_norm(branch, target) for branch in (last.body, last.orelse))
        assigned, made = assignment(last)
        found = self.names.modulation(made)
        is_of_norm = any(self.names.norm(assignment(statement)[1]) is not None for statement in statements)
        is_norm = self.names.norm(made) is not None or self.names.cast_norm(made) is not None
        is_end = is_norm or (is_of_norm and found and name_of(found[0]) == target)
        return assigned == target and bool(is_end)

    def _take_in_additions(self, statements: list[ast.stmt]) -> list[ast.stmt]:
        """Take what is added right before the norm into the call, as its pre_bias, the first to be evaluated.

        It has to be added to what the norm gets, and nothing else in the call may mention that. Before::

            h = h + emb
            h = self.norm(h)
            h = self.act(h)

        After::

            h = norm_silu(self.norm, self.act, h, pre_bias=emb)

        The addition may be the last line of an `if`. Before::

            if emb is not None:
                h = h + self.proj(emb)
            h = self.act(self.norm(h))

        After::

            pre_bias = None
            if emb is not None:
                pre_bias = self.proj(emb)
            h = norm_silu(self.norm, self.act, h, pre_bias=pre_bias)
        """
        done: list[ast.stmt] = []
        for statement in statements:
            target, call = assignment(statement)
            if done and _is_fused_alone(call, target) and target not in self.names.shared:
                before = done[-1]
                added = addend(before, target)
                if added is not None:
                    done.pop()
                    call.keywords.insert(0, ast.keyword("pre_bias", added))
                elif isinstance(before, ast.If) and not before.orelse:
                    added = addend(before.body[-1], target)
                    if added is not None:
                        before.body[-1] = _assign(PRE_BIAS, added, before.body[-1])
                        done.insert(-1, _assign(PRE_BIAS, ast.Constant(None), before))
                        call.keywords.insert(0, ast.keyword("pre_bias", ast.Name(PRE_BIAS, ast.Load())))
            done.append(statement)
        return done

    def _fuse(self, normed: Any, activation: ast.expr, **extras: ast.expr) -> ast.Call:
        """Return the one call of a norm and its activation, and note the norm. A cast of its result comes after."""
        inner = self.names.cast_norm(normed)
        if inner is not None:
            normed.func.value = self._fuse(inner, activation)
            return normed
        self.fused.append(str(self.names.norm(normed)))
        keywords = [*normed.keywords, *(ast.keyword(name, value) for name, value in extras.items())]
        call = ast.Call(ast.Name(NORM_SILU, ast.Load()), [normed.func, activation, *normed.args], keywords)
        return ast.copy_location(call, normed)


def _is_fused_alone(node: Any, target: str | None) -> bool:
    """Return True for `norm_silu(norm, act, target)`, with scale and shift at most, that do not mention the target."""
    if not isinstance(node, ast.Call) or name_of(node.func) != NORM_SILU or len(node.args) != 3:
        return False
    is_known = all(keyword.arg in ("scale", "shift") for keyword in node.keywords)
    return is_known and name_of(node.args[2]) == target and not any(mentions(k.value, target) for k in node.keywords)


def _calls(definition: ast.FunctionDef, norms: frozenset[str]) -> Iterator[str]:
    """Yield the norm of every call of a norm, or that is handed one, besides the calls that fuse it."""
    for node in ast.walk(definition):
        if isinstance(node, ast.Call) and name_of(node.func) != NORM_SILU:
            yield from (name for part in (node.func, *node.args) if (name := self_attribute(part)) in norms)


class _Swap(ast.NodeTransformer):
    """Puts one node in the place of another."""

    def __init__(self, old: ast.AST, new: ast.expr) -> None:
        self.old, self.new = old, new

    def visit(self, node: ast.AST) -> Any:
        return self.new if node is self.old else self.generic_visit(node)


def _count(node: ast.AST, name: str | None) -> int:
    return sum(name_of(part) == name for part in ast.walk(node))


def _early(activation: ast.expr) -> ast.expr:
    return ast.Call(ast.Name(EARLY, ast.Load()), [activation], [])


def _late(activation: ast.expr, target: str, where: ast.AST) -> ast.expr:
    arguments = [copy.deepcopy(activation), ast.Name(target, ast.Load())]
    return ast.copy_location(ast.Call(ast.Name(LATE, ast.Load()), arguments, []), where)


def _assign(target: str, value: ast.expr, where: ast.stmt) -> ast.stmt:
    return ast.copy_location(ast.Assign([ast.Name(target, ast.Store())], value), where)
