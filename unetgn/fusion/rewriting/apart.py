"""Takes SiLU early where a norm and it are apart: in two branches, or in two iterations of a loop."""

from __future__ import annotations

import ast
import copy
from collections.abc import Iterator
from typing import Any

from unetgn.fusion.rewriting.calls import Forward, Swap, assign, count, early_call, late_call
from unetgn.fusion.rewriting.patterns import assignment, name_of, names_in

IS_EARLY = "unetgn_early_"  # before a name: whether SiLU has been taken of what the name stands for
_FIELDS = ("body", "orelse")
_HIDING = (
    *(ast.Lambda, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp, ast.Match),
    *(ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef),
)

Way = tuple[tuple[list[ast.stmt], int], ...]  # to a statement: the lists that it is in and its places, outermost first


def take_apart(forward: Forward, definition: ast.FunctionDef) -> None:
    """Make one call of a norm and the SiLU of its result, wherever that is, if nothing else ever reads the result.

    Before::

        for part in x:
            if part is None:
                h = self.norm(emb)
            else:
                h = self.conv(self.act(h))

    After::

        early_h = False
        for part in x:
            if part is None:
                h = norm_silu(self.norm, early(self.act), emb)
                early_h = True
            else:
                h = self.conv(late(self.act, h) if early_h else self.act(h))
                early_h = False
    """
    if forward.tries:  # a handler may read what the norm has made
        return
    for target in _candidates(forward, definition):
        activation = _activation(forward, definition, target)
        if activation is not None:
            definition.body = _taken_early(forward, definition.body, target, activation)
            definition.body.insert(0, assign(IS_EARLY + target, ast.Constant(False), definition.body[0]))


def _candidates(forward: Forward, definition: ast.FunctionDef) -> list[str]:
    """Return the names of norms' results that plain assignments alone bind, where no part of the forward hides them."""
    nodes = list(ast.walk(definition))[1:]
    stored = [node.id for node in nodes if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load)]
    plain = [(name, made) for name, made in (assignment(node) for node in nodes if isinstance(node, ast.stmt)) if name]
    hidden = forward.names.shared.union(*(names_in(node) for node in nodes if isinstance(node, _HIDING)))
    normed = dict.fromkeys(name for name, made in plain if forward.names.norm(made) is not None)
    names = [name for name, _ in plain]
    return [name for name in normed if stored.count(name) == names.count(name) and name not in hidden]


def _activation(forward: Forward, definition: ast.FunctionDef, target: str) -> ast.expr | None:
    """Return the one activation that a norm's result meets, where nothing else can meet it; else None."""
    found: dict[str, ast.expr] = {}
    for way in _ways(definition.body, ()):
        statements, place = way[-1]
        silu = _silu_alone(forward, statements[place], target)
        if silu is not None:
            found[ast.dump(silu[1])] = silu[1]
        elif _reads(statements[place], target) and not _is_made_before(forward, way, target):
            return None
    local = {
        node.id for node in ast.walk(definition) if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load)
    }
    activation = next(iter(found.values())) if len(found) == 1 else None
    return None if activation is None or names_in(activation) & local else activation


def _ways(statements: list[ast.stmt], way: Way) -> Iterator[Way]:
    """Yield the way to every statement."""
    for place, statement in enumerate(statements):
        here = (*way, (statements, place))
        yield here
        for nested in _nested(statement):
            yield from _ways(nested, here)


def _silu_alone(forward: Forward, statement: ast.stmt, target: str) -> tuple[Any, ast.expr] | None:
    """Return SiLU of the target and its activation, where a statement reads that only so, and as the last."""
    if not isinstance(statement, ast.Return) and assignment(statement)[0] != target:
        return None
    for node in ast.walk(statement):
        silu = forward.names.silu_of(node)
        if silu is not None and name_of(silu[1]) == target and count(node, target) == _reads(statement, target):
            return node, silu[0]
    return None


def _is_made_before(forward: Forward, way: Way, target: str) -> bool:
    """Return True where a statement always runs after another one that binds the target, and no norm comes between."""
    for statements, place in way:
        if not _has_norm(forward, statements[place], target):
            for earlier in reversed(statements[:place]):
                if _has_norm(forward, earlier, target):
                    break
                if assignment(earlier)[0] == target:
                    return True
    return False


def _has_norm(forward: Forward, statement: ast.stmt, target: str) -> bool:
    """Return True where a statement is, or holds, `target = self.norm(x)`."""
    return any(_is_norm(forward, node, target) for node in ast.walk(statement) if isinstance(node, ast.stmt))


def _is_norm(forward: Forward, statement: ast.stmt, target: str) -> bool:
    """Return True for `target = self.norm(x)`, unless x is SiLU of the target itself."""
    assigned, made = assignment(statement)
    is_norm = assigned == target and forward.names.norm(made) is not None
    return is_norm and _silu_alone(forward, statement, target) is None


def _taken_early(forward: Forward, statements: list[ast.stmt], target: str, activation: ast.expr) -> list[ast.stmt]:
    """Return the statements, in which norms take SiLU along and note it, and SiLU looks for the note."""
    done: list[ast.stmt] = []
    for statement in statements:
        for field in _FIELDS:
            if getattr(statement, field, None):
                setattr(statement, field, _taken_early(forward, getattr(statement, field), target, activation))
        assigned, made = assignment(statement)
        is_norm, silu = _is_norm(forward, statement, target), _silu_alone(forward, statement, target)
        if is_norm:
            statement = assign(target, forward.fuse(made, early_call(activation)), statement)
        elif silu is not None:
            late = late_call(activation, ast.Name(target, ast.Load()), silu[0])
            choice = ast.IfExp(ast.Name(IS_EARLY + target, ast.Load()), late, copy.copy(silu[0]))
            Swap(silu[0], choice).visit(statement)
        done.append(statement)
        if assigned == target:
            done.append(assign(IS_EARLY + target, ast.Constant(is_norm), statement))
    return done


def _nested(statement: ast.stmt) -> list[list[ast.stmt]]:
    return [getattr(statement, field) for field in _FIELDS if getattr(statement, field, None)]


def _reads(statement: ast.stmt, target: str) -> int:
    """Return how often a statement reads a name, without the statements in it."""
    within = sum(count(inner, target) for nested in _nested(statement) for inner in nested)
    is_bound = assignment(statement)[0] == target
    return count(statement, target) - within - is_bound
