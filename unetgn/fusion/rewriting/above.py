"""Follows a forward into the one that it calls by `super().forward`, as subclasses do that add to a block."""

from __future__ import annotations

import ast
from typing import Any

from unetgn.fusion.rewriting.calls import Forward
from unetgn.fusion.rewriting.names import Names
from unetgn.fusion.rewriting.patterns import name_of

ABOVE = "unetgn_above"  # stands for the rewritten forward of the class above


def class_below(names: Names, node: Any) -> type | None:
    """Return the class whose `super().forward` a node calls, or `super(Theirs, self).forward`; None for other nodes."""
    if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "forward"):
        return None
    of: Any = node.func.value
    if not isinstance(of, ast.Call) or name_of(of.func) != "super" or "super" in names.outer or of.keywords:
        return None
    if not of.args:
        found = names.outer.get("__class__")
    else:
        is_of_self = len(of.args) == 2 and name_of(of.args[1]) == "self"
        found = names.outer.get(name_of(of.args[0]) or "") if is_of_self else None
    return found if isinstance(found, type) else None


def call_above(forward: Forward, definition: ast.FunctionDef, below: type, norms: tuple[str, ...]) -> None:
    """Call the rewritten forward of the class above, `above(self, x)` for `super().forward(x)`; note its norms."""
    for node in ast.walk(definition):
        if class_below(forward.names, node) is below:
            assert isinstance(node, ast.Call)
            node.func, node.args = ast.Name(ABOVE, ast.Load()), [ast.Name("self", ast.Load()), *node.args]
            forward.fused.extend(norms)
