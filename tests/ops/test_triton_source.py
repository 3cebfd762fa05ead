"""Tests the source of the kernels for what only some versions of Triton accept; nothing is imported or compiled."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import unetgn.ops

KERNELS = Path(unetgn.ops.__file__).parent / "triton" / "kernels"
FUNCTIONS = [
    node
    for path in sorted(KERNELS.glob("*.py"))
    for node in ast.walk(ast.parse(path.read_text()))
    if isinstance(node, ast.FunctionDef)
]


def none_returned(function: ast.FunctionDef) -> bool:
    """Return True for a function that assigns None to what it returns, or returns None itself."""
    returned = {node.value.id for node in returns(function) if isinstance(node.value, ast.Name)}
    assigned = (node for node in ast.walk(function) if isinstance(node, ast.Assign) and is_none(node.value))
    names = {target.id for node in assigned for target in node.targets if isinstance(target, ast.Name)}
    return bool(names & returned) or any(is_none(node.value) for node in returns(function))


def returns(function: ast.FunctionDef) -> Iterator[ast.Return]:
    return (node for node in ast.walk(function) if isinstance(node, ast.Return))


def is_none(value: ast.expr | None) -> bool:
    return isinstance(value, ast.Constant) and value.value is None


OPTIONAL = {function.name for function in FUNCTIONS if none_returned(function)}


def test_functions_that_may_return_none_are_seen() -> None:
    assert "advance" in OPTIONAL


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.name)
def test_no_tuple_that_is_returned_may_hold_none(function: ast.FunctionDef) -> None:
    """Triton 3.6 asks each element for its type, and None has none there."""
    optional = {name for node in ast.walk(function) for name in optional_names(node)}
    for node in returns(function):
        for element in node.value.elts if isinstance(node.value, ast.Tuple) else ():
            assert not is_none(element)
            assert not (isinstance(element, ast.Name) and element.id in optional)
            assert not is_call_of_optional(element)


def optional_names(node: ast.AST) -> list[str]:
    """Return the names that are assigned here what a function returns that may return None."""
    if not isinstance(node, ast.Assign) or not is_call_of_optional(node.value):
        return []
    return [target.id for target in node.targets if isinstance(target, ast.Name)]


def is_call_of_optional(value: ast.expr) -> bool:
    return isinstance(value, ast.Call) and isinstance(value.func, ast.Name) and value.func.id in OPTIONAL
