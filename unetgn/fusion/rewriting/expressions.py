"""Rewrites within one expression: an activation of a norm, a division by 1."""

from __future__ import annotations

import ast
from typing import Any

from unetgn.fusion.rewriting.calls import DIVIDE, Forward, early_call, late_call
from unetgn.fusion.rewriting.patterns import Modulation, is_aside, self_attribute


class Expressions(ast.NodeTransformer):
    """Applies the rewritings of expressions to a statement."""

    def __init__(self, forward: Forward) -> None:
        self.forward = forward

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

            h = norm_silu(self.norm, F.silu, x, shift=tensor(emb), scale=tensor(scale))

        So may a module that hands on what it is given stand between them, for as long as it does so. Before::

            h = self.act(self.drop(self.norm(x)))

        After::

            h = late(self.act, self.drop(norm_silu(self.norm, early(self.act, self.drop), x)), self.drop)
        """
        self.generic_visit(node)
        activation = self.forward.names.activation(node)
        if activation is None:
            return node
        handed_on = self._take_in_identities(node, activation)
        if handed_on is not None:
            return handed_on
        found = self.forward.names.modulation(node.args[0]) or Modulation(node.args[0], {})
        normed, extras = found.normed, found.extras
        if self.forward.names.norm(normed) is None or not is_aside(extras, None, normed, self.forward.aliases):
            return node
        return self.forward.fuse(normed, activation, **found.handed_on())

    def _take_in_identities(self, node: ast.Call, activation: ast.expr) -> ast.expr | None:
        """Make one call of an activation and a norm, within modules that hand on; None where it is none."""
        between: list[ast.expr] = []
        around: Any = node
        while (found := self.forward.names.identity(around.args[0])) is not None:
            around, between = around.args[0], [found[0], *between]
        normed = around.args[0]
        if not between or self.forward.names.norm(normed) is None:
            return None
        around.args[0] = self.forward.fuse(normed, early_call(activation, between))
        return late_call(activation, node.args[0], node, between)

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


def pass_by_position(call: ast.Call) -> None:
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
