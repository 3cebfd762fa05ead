"""Rewrites steps that follow each other: a norm, what may come between, and SiLU."""

from __future__ import annotations

import ast

from unetgn.fusion.rewriting.calls import Forward, Swap, assign, count, early_call, late_call
from unetgn.fusion.rewriting.patterns import (
    assignment,
    is_aside,
    is_layout,
    is_step_aside,
    mentions,
    name_of,
    names_in,
)


def fuse_with_norm_before(forward: Forward, done: list[ast.stmt], statement: ast.stmt) -> bool:
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
        h = norm_silu(self.norm, self.act, x, scale=operand(scale), shift=operand(emb))

    Steps between the two that only lay out the tensor come after. An activation that is not SiLU any more, or has
    a hook, comes where it was. Before::

        h = self.norm(x)
        h = h.unflatten(0, (2, -1)).permute(0, 2, 1, 3, 4)
        h = self.act(h)

    After::

        h = norm_silu(self.norm, early(self.act), x)
        h = h.unflatten(0, (2, -1)).permute(0, 2, 1, 3, 4)
        h = late(self.act, h)

    A module that hands on what it is given, such as dropout that drops nothing, may stand there, too: for as long as it
    does so. Before::

        h = self.norm(x)
        h = self.drop(h)
        h = self.act(h)

    After::

        h = norm_silu(self.norm, early(self.act, self.drop), x)
        h = self.drop(h)
        h = late(self.act, h, self.drop)
    """
    step = forward.names.activation_step(statement)
    if step is None:
        return False
    target, activation = step
    at, between = before_asides(forward, done, target)
    before, normed = assignment(done[at]) if at >= 0 else (None, None)
    if before != target:
        return False
    found = forward.names.modulation(normed)
    if found is None or name_of(found[0]) != target:
        if forward.names.norm(normed) is None and forward.names.cast_norm(normed) is None:
            return False
        is_next = at == len(done) - 1 and forward.names.norm(normed) is not None  # without a cast
        earlier = activation if is_next else early_call(activation, between)
        done[at] = assign(target, forward.fuse(normed, earlier), statement)
        if not is_next:
            done.append(_late_step(activation, target, statement, between))
        return True
    first = norm_aside(forward, done, at - 1, target)
    normed = assignment(done[first])[1] if first is not None else None
    if first is None or not is_aside(found.extras, target, normed, forward.aliases):
        return False
    is_next = at == len(done) - 1
    earlier = activation if is_next else early_call(activation, between)
    made = forward.fuse(normed, earlier, **found.handed_on())
    done[at] = assign(target, made, statement)
    del done[first]
    if not is_next:
        done.append(_late_step(activation, target, statement, between))
    return True


def before_asides(forward: Forward, statements: list[ast.stmt], target: str | None) -> tuple[int, list[ast.expr]]:
    """Return the index of the last statement that does not merely lay out the target or hand it on; 0 where all do.

    And the modules that hand it on after that.
    """
    at, between = len(statements) - 1, list[ast.expr]()
    while at > 0:
        module = forward.names.identity_step(statements[at], target)
        if module is None and not is_layout(statements[at], target):
            break
        between = between if module is None else [module, *between]
        at -= 1
    return at, between


def _late_step(activation: ast.expr, target: str, statement: ast.stmt, between: list[ast.expr]) -> ast.stmt:
    return assign(target, late_call(activation, ast.Name(target, ast.Load()), statement, between), statement)


def norm_aside(forward: Forward, done: list[ast.stmt], at: int, target: str | None) -> int | None:
    """Return where `target = self.norm(x)` is, at `at` or before steps that it may come after; else None."""
    first = next((place for place in range(at, -1, -1) if assignment(done[place])[0] == target), None)
    if first is None or target in forward.names.shared:
        return None
    normed = assignment(done[first])[1]
    steps = done[first + 1 : at + 1]
    is_norm = forward.names.norm(normed) is not None
    return first if is_norm and all(is_step_aside(step, target, normed) for step in steps) else None


def fuse_read_once(forward: Forward, done: list[ast.stmt], statement: ast.stmt) -> None:
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
    found = ((node, forward.names.silu_of(node)) for node in ast.walk(statement))
    for node, silu in found:
        target = name_of(silu[1]) if silu is not None else None
        if silu is None or target is None or target in forward.names.shared:
            continue
        first = next((place for place in range(len(done) - 1, -1, -1) if mentions(done[place], target)), None)
        if first is None:
            continue
        before, normed = assignment(done[first])
        if before != target or forward.names.norm(normed) is None or _binds(done[first + 1 :], silu[0]):
            continue
        inside = count(node, target)
        is_all = forward.mentioned[target] == inside + 1 and not mentions(normed, target)
        is_last = is_return or assignment(statement)[0] == target
        is_last = is_last and not forward.tries  # a handler may read what the norm has made
        is_last = is_last and count(statement.value, target) == inside  # type: ignore[attr-defined]
        if is_all or is_last:
            done[first] = assign(target, forward.fuse(normed, early_call(silu[0])), done[first])
            Swap(node, late_call(silu[0], ast.Name(target, ast.Load()), node)).visit(statement)
            return


def _binds(statements: list[ast.stmt], activation: ast.expr) -> bool:
    """Return True where one of the statements binds a name of the activation: before it, that may not be there yet."""
    names = (node for statement in statements for node in ast.walk(statement) if isinstance(node, ast.Name))
    return any(node.id in names_in(activation) for node in names if not isinstance(node.ctx, ast.Load))


def note_sum(forward: Forward, done: list[ast.stmt], statement: ast.stmt) -> None:
    """Note a SiLU of something that is made of the result of the norm right before it."""
    target, made = assignment(done[-1]) if done else (None, None)
    norm = forward.names.norm(made)
    for node in ast.walk(statement) if norm is not None else ():
        is_silu = forward.names.activation(node) is not None
        if is_silu and isinstance(node.args[0], ast.BinOp) and mentions(node.args[0], target):  # type: ignore[attr-defined]
            argument = ast.unparse(node.args[0])  # type: ignore[attr-defined]
            forward.instead[str(norm)] = f"SiLU is taken of `{argument}`, not of its result alone"
