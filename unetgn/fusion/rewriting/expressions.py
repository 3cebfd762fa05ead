"""Rewrites within one expression: an activation of a norm, a division by 1."""

from __future__ import annotations

import ast

from unetgn.fusion.rewriting.calls import DIVIDE, Forward
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
        """
        self.generic_visit(node)
        activation = self.forward.names.activation(node)
        if activation is None:
            return node
        found = self.forward.names.modulation(node.args[0]) or Modulation(node.args[0], {})
        normed, extras = found.normed, found.extras
        if self.forward.names.norm(normed) is None or not is_aside(extras, None, normed, self.forward.aliases):
            return node
        return self.forward.fuse(normed, activation, **found.handed_on())

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
