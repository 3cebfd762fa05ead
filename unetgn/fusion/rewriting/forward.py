"""Takes a forward through all rewritings: finds its pairs of a norm and SiLU, and compiles what fuses them."""

from __future__ import annotations

import ast
import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import FunctionType
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import nn

from unetgn.fusion.activations import early, late
from unetgn.fusion.division import divide
from unetgn.fusion.norm_silu import norm_silu
from unetgn.fusion.operands import operand, tensor
from unetgn.fusion.rewriting.above import ABOVE, call_above, class_below
from unetgn.fusion.rewriting.additions import take_in_additions
from unetgn.fusion.rewriting.apart import take_apart
from unetgn.fusion.rewriting.branches import push_norm, sink_activations, take_in_condition
from unetgn.fusion.rewriting.calls import DIVIDE, EARLY, LATE, NORM_SILU, Forward
from unetgn.fusion.rewriting.expressions import Expressions, pass_by_position
from unetgn.fusion.rewriting.names import OWN, SILU, Names, Parts
from unetgn.fusion.rewriting.paths import bindings, matches
from unetgn.fusion.rewriting.patterns import OPERAND, TENSOR, name_of
from unetgn.fusion.rewriting.steps import fuse_read_once, fuse_with_norm_before, note_sum
from unetgn.fusion.rules import is_readable
from unetgn.fusion.source import CannotRewriteError, compile_forward, parse_forward, why_source_is_in_doubt
from unetgn.fusion.wrappers import CannotWrapError, rewrap


@dataclass(frozen=True)
class Pairs:
    """Lists the norms of a forward that meet SiLU: those that can be fused, and what there is to say of some norms.

    norms: in source order. only: those of them that have other calls, too. instead: norms that cannot be fused,
    although a SiLU is near. Both as (norm, sentence).
    """

    norms: tuple[str, ...]
    only: tuple[tuple[str, str], ...]
    instead: tuple[tuple[str, str], ...]


class Above(NamedTuple):
    """Holds the forward that another one calls by `super().forward` in class `below`, and its pairs."""

    below: type
    forward: FunctionType
    pairs: Pairs


@functools.cache
def rewrite_forward(forward: Callable[..., Any], parts: Parts) -> Callable[..., Any]:
    """Return the rewritten `forward` of a class: a function of the module and what the forward takes, undecorated.

    Functions that serve as activations (`F.silu`, a module's `nonlinearity`) are found through the forward's globals.
    Raises CannotRewriteError.
    """
    definition, original = parse_forward(forward)
    names = Names.of(original, parts)
    above = _forward_above(names, definition)
    rewrite(names, definition, above)
    added = {NORM_SILU: norm_silu, SILU: F.silu, DIVIDE: divide, EARLY: early, LATE: late}
    added |= {OPERAND: operand, TENSOR: tensor}
    if above is not None:
        added[ABOVE] = rewrap(above.forward, rewrite_forward(above.forward, parts))
    return compile_forward(definition, original, added)


@functools.cache
def find_pairs(forward: Callable[..., Any], parts: Parts) -> Pairs:
    """Find those of the norms that `rewrite_forward` would fuse; nothing of the forward is run.

    Raises CannotRewriteError.
    """
    definition, original = parse_forward(forward)
    names, norms = Names.of(original, parts), parts.norms
    above = _forward_above(names, definition)
    rewritten = rewrite(names, definition, above)
    fused = [norm for path in rewritten.fused for norm in _named(path, norms)]
    left = _calls(rewritten.names, definition)
    limits = {} if above is None else dict(above.pairs.only)
    only = ((norm, limits.get(norm) or _limit(norm, rewritten.fused, left)) for norm in dict.fromkeys(fused))
    found = ((norm, sentence) for path, sentence in rewritten.instead.items() for norm in _named(path, norms))
    instead = tuple((norm, sentence) for norm, sentence in found if norm not in fused)
    return Pairs(tuple(dict.fromkeys(fused)), tuple((norm, limit) for norm, limit in only if limit), instead)


def _forward_above(names: Names, definition: ast.FunctionDef) -> Above | None:
    """Return what `super().forward` of a forward is in the module's class, where there is something in it to fuse."""
    below = {class_below(names, node) for node in ast.walk(definition)} - {None}
    cls, owner = names.parts.cls, below.pop() if len(below) == 1 else None
    if cls is None or owner is None or not issubclass(cls, owner):
        return None
    forward = getattr(super(owner, cls), "forward", None)
    if not isinstance(forward, FunctionType) or forward is nn.Module.forward:
        return None
    defining = next(base for base in cls.__mro__ if vars(base).get("forward") is forward)
    if not is_readable(defining) and why_source_is_in_doubt(forward) is not None:
        return None
    try:
        rewrap(forward, forward)
        pairs = find_pairs(forward, replace(names.parts, norms=names.parts.norms - {OWN}))
    except (CannotRewriteError, CannotWrapError):
        return None
    return Above(owner, forward, pairs) if pairs.norms else None


def _limit(norm: str, fused: list[str], left: list[str]) -> str:
    """Say where a norm is not fused, of paths of calls that are fused and that are left; nothing where it always is."""
    if norm not in fused and norm != OWN:
        return "only where SiLU comes right after it: the forward takes it from a container by a name or number"
    calls = left.count(norm)
    of_all = f"{fused.count(norm)} of its {fused.count(norm) + calls} calls"
    return f"only where SiLU comes right after it: {of_all}" if calls else ""


def rewrite(names: Names, definition: ast.FunctionDef, above: Above | None = None) -> Forward:
    """Rewrite a function's body, in place, from the outermost statements inwards; return what was done."""
    for node in ast.walk(definition):
        if isinstance(node, ast.Call) and names.is_called_by_keyword(node):
            pass_by_position(node)
    forward = Forward.of(replace(names, bound=bindings(definition)), definition)
    definition.body = _block(forward, definition.body)
    take_apart(forward, definition)
    if above is not None:
        call_above(forward, definition, above.below, above.pairs.norms)
    return forward


def _block(forward: Forward, statements: list[ast.stmt]) -> list[ast.stmt]:
    """Return the statements with every pair fused, in nested blocks too."""
    done: list[ast.stmt] = []
    for statement in sink_activations(forward, statements):
        statement = Expressions(forward).visit(_visit_blocks(forward, push_norm(forward, done, statement)))
        if not (take_in_condition(forward, done, statement) or fuse_with_norm_before(forward, done, statement)):
            fuse_read_once(forward, done, statement)
            note_sum(forward, done, statement)
            done.append(statement)
    return take_in_additions(forward, done)


def _visit_blocks(forward: Forward, statement: ast.stmt) -> ast.stmt:
    for field in ("body", "orelse", "finalbody"):
        nested = getattr(statement, field, None)
        if nested:
            setattr(statement, field, _block(forward, nested))
    for handler in getattr(statement, "handlers", ()):
        handler.body = _block(forward, handler.body)
    return statement


def _calls(names: Names, definition: ast.FunctionDef) -> list[str]:
    """Return the path of everything that is called, or handed to a call, besides the calls that fuse a norm."""
    calls = (node for node in ast.walk(definition) if isinstance(node, ast.Call) and name_of(node.func) != NORM_SILU)
    paths = (names.path(part) for call in calls for part in (call.func, *call.args))
    return [path for path in paths if path is not None]


def _named(path: str, norms: frozenset[str]) -> list[str]:
    """Return the norms that a path may stand for."""
    return sorted(norm for norm in norms if matches(path, norm))
