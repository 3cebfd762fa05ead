"""Knows what the names in a forward stand for: its norms, its SiLUs, and the scale-shift between them."""

from __future__ import annotations

import ast
import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import CellType, FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from unetgn.fusion.activations import register_silu_function
from unetgn.fusion.recognition import codes
from unetgn.fusion.rewriting.paths import Bindings, matches, module_path
from unetgn.fusion.rewriting.patterns import (
    Modulation,
    assignment,
    modulation,
    name_of,
)

GROUP_NORMS = (F.group_norm, torch.group_norm)
OWN = "group_norm()"  # stands among the norms of a forward for the function that it calls, or that of nn.GroupNorm
SILU = "unetgn_silu"  # stands for torch.nn.functional.silu in a rewritten forward
AMBIGUOUS = frozenset({"pre_bias", "scale", "shift", None})  # keywords of norm_silu itself; None: **keywords


@dataclass(frozen=True)
class Parts:
    """Names the attributes of a module that count when its forward is rewritten.

    norms: those that may be fused. activations: what computes SiLU. identities: modules that hand on what they get.
    cls: the class of the module, which decides whose forward `super().forward` is.
    """

    norms: frozenset[str]
    activations: frozenset[str] = frozenset()
    identities: frozenset[str] = frozenset()
    cls: type | None = None


@dataclass(frozen=True)
class Names:
    """Says what the names in a forward stand for.

    parts are attributes of self. outer are the values of the names that are not local. shared are the local names that
    inner functions see, too. bound are those local names that stand for one attribute of self, or for one of the
    modules that it holds.
    """

    parts: Parts
    outer: Mapping[str, Any]
    shared: frozenset[str]
    bound: Bindings = field(default_factory=dict)

    @classmethod
    def of(cls, function: FunctionType, parts: Parts) -> Names:
        """Return the names of a forward whose module has these parts."""
        shared = {name for code in codes(function.__code__) for name in code.co_cellvars}
        local = shared.union(*(code.co_varnames for code in codes(function.__code__)))
        outer = {name: value for name, value in function.__globals__.items() if name not in local}
        closure = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
        outer |= {name: cell.cell_contents for name, cell in closure if cell != CellType()}
        return cls(parts, outer, frozenset(shared))

    def norm(self, node: Any) -> str | None:
        """Return `norm` where the node is `self.norm(x, …)` with one of the norms that may be fused.

        `norms.a` for `self.norms["a"](x)`, and `norms.*` where it may be any that `self.norms` holds.
        """
        if not isinstance(node, ast.Call) or not node.args or AMBIGUOUS & {keyword.arg for keyword in node.keywords}:
            return None
        path = self.path(node.func)
        if path is not None and any(matches(path, norm) for norm in self.parts.norms):
            return path
        return OWN if OWN in self.parts.norms and self._is_own(node) else None

    def path(self, node: ast.AST) -> str | None:
        """Return the path of what a node stands for within self, or None where it is nothing of self."""
        return module_path(node, self.bound)

    def cast_norm(self, node: Any) -> Any:
        """Return the call of the norm in `super().forward(x.float()).to(x.dtype)`, whose result is cast; else None."""
        is_cast = isinstance(node, ast.Call) and len(node.args) == 1 and not node.keywords
        if not is_cast or not (_is_method(node, "to") or _is_method(node, "type")):
            return None
        is_dtype = isinstance(node.args[0], ast.Attribute) and node.args[0].attr == "dtype"
        return node.func.value if is_dtype and self.norm(node.func.value) == OWN else None

    def _is_own(self, node: ast.Call) -> bool:
        """Return True for a call of `F.group_norm`, or of `super().forward` where that is nn.GroupNorm's."""
        if any(isinstance(argument, ast.Starred) for argument in node.args):
            return False
        if any(self._value(node.func) is function for function in GROUP_NORMS):
            return True
        cls: Any = self.outer.get("__class__")
        is_super = ast.unparse(node.func) == "super().forward" and isinstance(cls, type)
        return is_super and getattr(super(cls, cls), "forward", None) is nn.GroupNorm.forward

    def activation(self, node: Any) -> ast.expr | None:
        """Return `act` where the node is `act(x)`: an attribute of self, or a function that computes SiLU.

        `F.silu(x, inplace=…)` is one, too: x is the norm's result and nobody else's.
        """
        if not isinstance(node, ast.Call) or len(node.args) != 1:
            return None
        if self.path(node.func) in self.parts.activations:
            return None if node.keywords else node.func
        function = self._silu_function(node.func)
        if function is None or not node.keywords:
            return node.func if function is not None else None
        return _with_inplace(node) if function is F.silu and _is_only_inplace(node.keywords) else None

    def identity(self, node: Any) -> tuple[ast.expr, ast.expr] | None:
        """Return `drop` and `y` where the node is `self.drop(y)` with a module that hands on what it is given."""
        is_call = isinstance(node, ast.Call) and len(node.args) == 1 and not node.keywords
        return (node.func, node.args[0]) if is_call and self.path(node.func) in self.parts.identities else None

    def identity_step(self, statement: ast.stmt, target: str | None) -> ast.expr | None:
        """Return `drop` where the statement is `target = self.drop(target)`, of such a module."""
        assigned, made = assignment(statement)
        found = self.identity(made) if target is not None and assigned == target else None
        return found[0] if found is not None and name_of(found[1]) == target else None

    def activation_step(self, statement: ast.stmt) -> tuple[str, ast.expr] | None:
        """Return `a` and `act` where the statement is `a = act(a)`, `a = a * torch.sigmoid(a)` or that with `*=`."""
        target, made = assignment(statement)
        if isinstance(statement, ast.AugAssign):
            target, made = name_of(statement.target), ast.BinOp(statement.target, statement.op, statement.value)
        if target is None:
            return None
        activation = self.activation(made)
        if activation is not None:
            return (target, activation) if name_of(made.args[0]) == target else None
        return (target, ast.Name(SILU, ast.Load())) if self.written_out(made) == target else None

    def silu_of(self, node: Any) -> tuple[ast.expr, Any] | None:
        """Return `act` and `y` where the node is SiLU of y: a call, or `y * torch.sigmoid(y)` of a name."""
        activation = self.activation(node)
        if activation is not None:
            return activation, node.args[0]
        name = self.written_out(node)
        return None if name is None else (ast.Name(SILU, ast.Load()), ast.Name(name, ast.Load()))

    def is_called_by_keyword(self, call: ast.Call) -> bool:
        """Return True for `norm(input=x)`, `act(input=x)` and `F.silu(input=x, inplace=…)`."""
        is_known = self.path(call.func) in self.parts.norms | self.parts.activations or self._silu_function(call.func)
        names = {keyword.arg for keyword in call.keywords}
        return bool(is_known) and not call.args and {"input"} <= names <= {"input", "inplace"}

    def written_out(self, node: Any) -> str | None:
        """Return `y` where the node is `y * torch.sigmoid(y)`, `y.sigmoid() * y`, `y.mul(y.sigmoid())` and the like."""
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
            sides = (node.left, node.right)
        elif isinstance(node, ast.Call) and len(node.args) == 1 and not node.keywords and _is_method(node, "mul"):
            sides = (node.func.value, node.args[0])  # type: ignore[attr-defined]
        else:
            return None
        for plain, gate in (sides, sides[::-1]):
            name = name_of(plain)
            if name is not None and self._is_sigmoid(gate, name):
                return name
        return None

    def _is_sigmoid(self, node: Any, name: str) -> bool:
        """Return True for `torch.sigmoid(name)` and `name.sigmoid()`."""
        if not isinstance(node, ast.Call) or node.keywords:
            return False
        if not node.args:
            return _is_method(node, "sigmoid") and name_of(node.func.value) == name  # type: ignore[attr-defined]
        is_of_name = [name_of(argument) for argument in node.args] == [name]
        return is_of_name and any(self._value(node.func) is known for known in (torch.sigmoid, F.sigmoid))

    def _silu_function(self, node: ast.expr) -> FunctionType | None:
        """Return the function with SiLU's values that `F.silu` or `nonlinearity` stands for, if it does."""
        function = self._value(node)
        return function if register_silu_function(function) else None

    def modulation(self, node: Any) -> Modulation | None:
        """Return `y` and scale `s`, shift `t`, where the node is `y * (1 + s) + t` or `torch.addcmul(t, y, 1 + s)`.

        Sums and products may be the other way round.
        """
        if isinstance(node, ast.Call) and len(node.args) == 3 and not node.keywords:
            is_known = self._value(node.func) is torch.addcmul
            return modulation(node.args[0], node.args[1:] if is_known else [], is_call=True)
        if not (isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add)):
            return None
        for product, shift in ((node.left, node.right), (node.right, node.left)):
            if isinstance(product, ast.BinOp) and isinstance(product.op, ast.Mult):
                found = modulation(shift, [product.left, product.right])
                if found is not None:
                    return found
        return None

    def _value(self, node: ast.expr) -> Any:
        """Return what a name such as `F.silu` stands for; None where it is no name, or a local one."""
        path = ast.unparse(node).split(".") if isinstance(node, (ast.Name, ast.Attribute)) else [""]
        if path[0] not in self.outer:
            return None
        try:
            return functools.reduce(lambda owner, name: getattr(owner, name, None), path[1:], self.outer[path[0]])
        except Exception:  # a package that loads its parts when they are asked for may raise anything
            return None


def _is_only_inplace(keywords: list[ast.keyword]) -> bool:
    """Return True where there is only `inplace=True` or `inplace=self.inplace`, which nothing is lost with."""
    is_value = all(isinstance(keyword.value, (ast.Constant, ast.Name, ast.Attribute)) for keyword in keywords)
    return is_value and [keyword.arg for keyword in keywords] == ["inplace"]


def _with_inplace(call: ast.Call) -> ast.expr:
    """Return the function of a call, `(F.silu, self.inplace)[0]` where its keyword has to be looked up and may fail."""
    value = call.keywords[0].value
    if isinstance(value, ast.Constant):
        return call.func
    both = ast.Tuple([call.func, value], ast.Load())
    return ast.copy_location(ast.Subscript(both, ast.Constant(0), ast.Load()), call)


def _is_method(call: ast.Call, name: str) -> bool:
    return isinstance(call.func, ast.Attribute) and call.func.attr == name
