"""Rewrites around an `if`: a norm before it, an activation after it, a scale-shift in it."""

from __future__ import annotations

import ast
import copy

from unetgn.fusion.rewriting.calls import SCALE, SHIFT, Forward, assign
from unetgn.fusion.rewriting.patterns import (
    assignment,
    is_aside,
    is_step_aside,
    mentions,
    name_of,
    names_in,
)
from unetgn.fusion.rewriting.steps import before_asides, norm_aside


def push_norm(forward: Forward, done: list[ast.stmt], statement: ast.stmt) -> ast.stmt:
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
    if not (forward.names.norm(normed) or forward.names.cast_norm(normed)):
        return statement
    step = forward.names.activation_step(statement.body[0])
    used = names_in(normed) - {"self"} | {target}
    if step is None or step[0] != target or names_in(statement.test) & used or target in forward.names.shared:
        return statement
    if forward.aliases.may_change([statement.test], used):
        return statement
    norm = done.pop()
    statement.body.insert(0, norm)
    statement.orelse.insert(0, copy.deepcopy(norm))
    return statement


def take_in_condition(forward: Forward, done: list[ast.stmt], statement: ast.stmt) -> bool:
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
            scale_ = operand(scale)
            shift_ = operand(emb)
        h = norm_silu(self.norm, self.act, x, scale=scale_, shift=shift_)
    """
    step, branch = forward.names.activation_step(statement), done[-1] if done else None
    if step is None or not isinstance(branch, ast.If) or branch.orelse:
        return False
    target = step[0]
    first = norm_aside(forward, done, len(done) - 2, target)
    assigned, made = assignment(branch.body[-1])
    found = forward.names.modulation(made) if assigned == target else None
    if first is None or found is None or name_of(found[0]) != target:
        return False
    normed = assignment(done[first])[1]
    steps = branch.body[:-1]
    is_before = all(is_step_aside(step, target, normed) for step in steps)
    is_before = is_before and is_aside(found.extras, target, normed, forward.aliases)
    used = names_in(normed) - {"self"} | {target}
    if not is_before or names_in(branch.test) & used or forward.aliases.may_change([branch.test], used):
        return False
    names = {"scale": SCALE, "shift": SHIFT}
    branch.body = [*steps, *(assign(names[name], value, branch.body[-1]) for name, value in found.handed_on().items())]
    none: list[ast.expr] = [ast.Name(SCALE, ast.Store()), ast.Name(SHIFT, ast.Store())]
    start = ast.copy_location(ast.Assign(none, ast.Constant(None)), branch)
    extras = {"scale": ast.Name(SCALE, ast.Load()), "shift": ast.Name(SHIFT, ast.Load())}
    last = assign(str(target), forward.fuse(normed, step[1], **extras), done[first])
    done[first:] = [*done[first + 1 : -1], start, branch, last]
    return True


def sink_activations(forward: Forward, statements: list[ast.stmt]) -> list[ast.stmt]:
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

    A module that hands on what it is given and stands before the activation goes along.
    """
    sunk: list[ast.stmt] = []
    for place, statement in enumerate(statements):
        last = sunk[-1] if sunk else None
        step = forward.names.activation_step(_first_not_handed_on(forward, statements[place:]))
        if isinstance(statement, ast.If) and not statement.orelse and len(statement.body) == 1:
            step = forward.names.activation_step(statement.body[0])  # under a condition
            step = None if step is None or mentions(statement.test, step[0]) else step
        if step is not None and isinstance(last, ast.If) and _ends_in_norm(forward, [last], step[0]):
            for branch in (last.body, last.orelse):
                branch.append(copy.deepcopy(statement))
        else:
            sunk.append(statement)
    return sunk


def _first_not_handed_on(forward: Forward, statements: list[ast.stmt]) -> ast.stmt:
    """Return the first statement, or where that hands on what it assigns to, the first that does something else."""
    target = assignment(statements[0])[0]
    others = (statement for statement in statements if forward.names.identity_step(statement, target) is None)
    return next(others, statements[0])


def _ends_in_norm(forward: Forward, statements: list[ast.stmt], target: str | None) -> bool:
    """Return True where a norm, with what may follow it, or an `if` with such a branch, comes last."""
    last = statements[before_asides(forward, statements, target)[0]] if statements else None
    if isinstance(last, ast.If):
        return any(_ends_in_norm(forward, branch, target) for branch in (last.body, last.orelse))
    assigned, made = assignment(last)
    found = forward.names.modulation(made)
    is_of_norm = any(forward.names.norm(assignment(statement)[1]) is not None for statement in statements)
    is_norm = forward.names.norm(made) is not None or forward.names.cast_norm(made) is not None
    is_end = is_norm or (is_of_norm and found and name_of(found[0]) == target)
    return assigned == target and bool(is_end)
