"""Takes what is added right before a norm into the call that fuses it."""

from __future__ import annotations

import ast
from typing import Any

from unetgn.fusion.rewriting.calls import NORM_SILU, PRE_BIAS, Forward, assign
from unetgn.fusion.rewriting.patterns import addend, assignment, mentions, name_of, operand


def take_in_additions(forward: Forward, statements: list[ast.stmt]) -> list[ast.stmt]:
    """Take what is added right before the norm into the call, as its pre_bias, the first to be evaluated.

    It has to be added to what the norm gets, and nothing else may hold that or be mentioned with it. Before::

        h = self.conv(x)
        h = h + emb
        h = self.norm(h)
        h = self.act(h)

    After::

        h = self.conv(x)
        h = norm_silu(self.norm, self.act, h, pre_bias=operand(emb))

    The addition may be the last line of an `if`. Before::

        h = self.conv(x)
        if emb is not None:
            h = h + self.proj(emb)
        h = self.act(self.norm(h))

    After::

        h = self.conv(x)
        pre_bias = None
        if emb is not None:
            pre_bias = operand(self.proj(emb))
        h = norm_silu(self.norm, self.act, h, pre_bias=pre_bias)
    """
    done: list[ast.stmt] = []
    for statement in statements:
        target, call = assignment(statement)
        if done and _is_fused_alone(forward, call, target):
            before = done[-1]
            added = _addend(forward, before, target)
            if added is not None:
                done.pop()
                call.keywords.insert(0, ast.keyword("pre_bias", added))
            elif isinstance(before, ast.If) and not before.orelse:
                added = _addend(forward, before.body[-1], target)
                if added is not None:
                    before.body[-1] = assign(PRE_BIAS, added, before.body[-1])
                    done.insert(-1, assign(PRE_BIAS, ast.Constant(None), before))
                    call.keywords.insert(0, ast.keyword("pre_bias", ast.Name(PRE_BIAS, ast.Load())))
        done.append(statement)
    return done


def _addend(forward: Forward, statement: ast.stmt, target: str | None) -> ast.expr | None:
    """Return what a statement adds to the target, where nothing else holds that: the sum is then not made at all."""
    added = addend(statement, target)
    return None if added is None or forward.aliases.is_held(str(target), statement) else operand(added)


def _is_fused_alone(forward: Forward, node: Any, target: str | None) -> bool:
    """Return True for `norm_silu(norm, act, target)`, with scale and shift at most, that leave the target alone."""
    if not isinstance(node, ast.Call) or name_of(node.func) != NORM_SILU or len(node.args) != 3:
        return False
    values = [keyword.value for keyword in node.keywords]
    is_known = (
        all(keyword.arg in ("scale", "shift") for keyword in node.keywords) and target not in forward.names.shared
    )
    is_alone = is_known and name_of(node.args[2]) == target and not any(mentions(value, target) for value in values)
    return is_alone and not forward.aliases.may_change(values, [target])
