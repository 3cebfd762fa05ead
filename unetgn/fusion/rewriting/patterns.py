"""Recognizes statements and expressions in the parsed source of a forward, and what may change places in it.

Nothing here changes the source.
"""

from __future__ import annotations

import ast
from typing import Any, NamedTuple

from unetgn.fusion.rewriting.aliases import Aliases

LAYOUTS = frozenset(
    {"permute", "transpose", "movedim", "flatten", "unflatten", "view", "reshape", "contiguous", "squeeze", "unsqueeze"}
)

VIEWS = LAYOUTS | {"chunk", "split", "unbind", "expand", "tensor_split"}
OPERAND, TENSOR = "unetgn_operand", "unetgn_tensor"
_PLAIN = (
    *(ast.Name, ast.Attribute, ast.Subscript, ast.Slice, ast.Constant, ast.Call, ast.keyword, ast.Tuple, ast.UnaryOp),
    *(ast.expr_context, ast.unaryop),
)


def addend(statement: ast.stmt, target: str | None) -> ast.expr | None:
    """Return `e` where the statement is `target = target + e`."""
    assigned, made = assignment(statement)
    is_step = target is not None and assigned == target
    is_sum = isinstance(made, ast.BinOp) and isinstance(made.op, ast.Add) and name_of(made.left) == target
    return made.right if is_step and is_sum else None


class Modulation(NamedTuple):
    """Holds `y`, and scale and shift, in the order in which they are evaluated; is_call: of torch.addcmul."""

    normed: Any
    extras: dict[str, ast.expr]
    is_call: bool = False

    def handed_on(self) -> dict[str, ast.expr]:
        """Return scale and shift as they are handed to the operator: what the forward refuses is refused."""
        check = tensor if self.is_call else operand
        return {name: check(value) for name, value in self.extras.items()}


def modulation(shift: ast.expr, product: list[ast.expr], *, is_call: bool = False) -> Modulation | None:
    """Return `y`, and scale `s` with the shift, where the product is of `y` and `1 + s`."""
    for plain, factor in (product, product[::-1]) if product else ():
        if isinstance(factor, ast.BinOp) and isinstance(factor.op, ast.Add):
            for one, scale in ((factor.left, factor.right), (factor.right, factor.left)):
                if isinstance(one, ast.Constant) and one.value == 1:
                    extras = {"scale": scale, "shift": shift}
                    in_order = dict(sorted(extras.items(), key=lambda extra: place_of(extra[1])))
                    return Modulation(plain, in_order, is_call)
    return None


def operand(value: ast.expr) -> ast.expr:
    """Build `operand(value)`, which raises for None, as the sum or product does that is left out."""
    return ast.copy_location(ast.Call(ast.Name(OPERAND, ast.Load()), [value], []), value)


def tensor(value: ast.expr) -> ast.expr:
    """Build `tensor(value)`, which raises for all that is no tensor."""
    return ast.copy_location(ast.Call(ast.Name(TENSOR, ast.Load()), [value], []), value)


def place_of(node: Any) -> tuple[int, int]:
    """Return line and column of a node: in which order parts of a statement are evaluated."""
    return node.lineno, node.col_offset


def is_aside(extras: dict[str, ast.expr], target: str | None, norm: Any, aliases: Aliases) -> bool:
    """Return True where scale and shift may be made before the norm: they have nothing to do with it.

    They may not mention what it makes, nor call anything with what it is given, by this or another name, which might be
    changed in place; nor may there be calls on both sides, such as of dropout, that would change places.
    """
    values = extras.values()
    if any(map(_calls, norm.args)) and any(_calls(value) and place_of(value) < place_of(norm) for value in values):
        return False
    is_changed = aliases.may_change(values, names_in(norm) - {"self"})
    return not is_changed and not any(target in names_in(value) for value in values)


def _calls(node: ast.AST) -> bool:
    return any(isinstance(part, ast.Call) for part in ast.walk(node))


def is_step_aside(statement: ast.stmt, target: str | None, norm: Any) -> bool:
    """Return True for `scale, shift = emb.chunk(2, dim=1)` and the like, which a norm may come after as well as before.

    It makes views of what has nothing to do with the norm: `VIEWS` alone are called.
    """
    if not isinstance(statement, ast.Assign):
        return False
    stored = names_in(ast.Tuple([*statement.targets], ast.Store()))
    is_plain = all(
        isinstance(part, (ast.Name, ast.Tuple, ast.expr_context)) for t in statement.targets for part in ast.walk(t)
    )
    parts = list(ast.walk(statement.value))
    known = all(isinstance(part, _PLAIN) for part in parts)
    calls = (part.func for part in parts if isinstance(part, ast.Call))
    views = all(isinstance(call, ast.Attribute) and call.attr in VIEWS for call in calls)
    used = names_in(norm) - {"self"} | {target}
    return is_plain and known and views and not (stored | names_in(statement.value)) & used


def names_in(node: ast.AST) -> set[str | None]:
    """Return the names that occur in a node."""
    return {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}


def is_layout(statement: ast.stmt, target: str | None) -> bool:
    """Return True for `target = target.permute(…)`, or several such methods in a row, of the target alone."""
    assigned, made = assignment(statement)
    if assigned is None or assigned != target or not isinstance(made, ast.Call):
        return False
    while isinstance(made, ast.Call) and isinstance(made.func, ast.Attribute) and made.func.attr in LAYOUTS:
        if any(mentions(part, target) for part in (*made.args, *made.keywords)):
            return False
        made = made.func.value
    return name_of(made) == target


def mentions(node: ast.AST, name: str | None) -> bool:
    """Return True where a name occurs in the node."""
    return any(name_of(part) == name for part in ast.walk(node))


def assignment(statement: ast.stmt | None) -> tuple[str | None, Any]:
    """Return name and value, where a statement assigns to one plain name."""
    if isinstance(statement, ast.Assign) and len(statement.targets) == 1:
        return name_of(statement.targets[0]), statement.value
    return None, None


def name_of(node: ast.AST) -> str | None:
    """Return `name` where the node is that name."""
    return node.id if isinstance(node, ast.Name) else None


def self_attribute(node: ast.AST) -> str | None:
    """Return `name` where the node is `self.name`."""
    return node.attr if isinstance(node, ast.Attribute) and name_of(node.value) == "self" else None
