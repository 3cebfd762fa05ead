"""Takes what is added right before a norm into the call that fuses it."""

from __future__ import annotations

import ast
from typing import Any

from unetgn.fusion.rewriting.calls import NORM_SILU, PRE_BIAS, Forward, assign
from unetgn.fusion.rewriting.patterns import addend, assignment, mentions, name_of


def take_in_additions(forward: Forward, statements: list[ast.stmt]) -> list[ast.stmt]:
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
        if done and _is_fused_alone(call, target) and target not in forward.names.shared:
            before = done[-1]
            added = addend(before, target)
            if added is not None:
                done.pop()
                call.keywords.insert(0, ast.keyword("pre_bias", added))
            elif isinstance(before, ast.If) and not before.orelse:
                added = addend(before.body[-1], target)
                if added is not None:
                    before.body[-1] = assign(PRE_BIAS, added, before.body[-1])
                    done.insert(-1, assign(PRE_BIAS, ast.Constant(None), before))
                    call.keywords.insert(0, ast.keyword("pre_bias", ast.Name(PRE_BIAS, ast.Load())))
        done.append(statement)
    return done


def _is_fused_alone(node: Any, target: str | None) -> bool:
    """Return True for `norm_silu(norm, act, target)`, with scale and shift at most, that do not mention the target."""
    if not isinstance(node, ast.Call) or name_of(node.func) != NORM_SILU or len(node.args) != 3:
        return False
    is_known = all(keyword.arg in ("scale", "shift") for keyword in node.keywords)
    return is_known and name_of(node.args[2]) == target and not any(mentions(k.value, target) for k in node.keywords)
