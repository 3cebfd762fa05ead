"""Decides by its code, and by trying it, whether somebody else's class or function computes SiLU or a group norm.

Projects carry copies of their own: a GroupNorm that computes in float32, a SiLU from before PyTorch had one. A copy is
tried where its code uses a few known names and no others. (An attribute would be another name, and with it another
instance could compute something else.) It is run on a few numbers, and taken for the original where it gives the
original's values. Nothing here reads or writes a registry.
"""

from __future__ import annotations

import contextlib
import copy
import dis
import functools
import inspect
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import CodeType, FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.utils._python_dispatch import _disable_current_modes

Settings = tuple[tuple[str, Any], ...]  # attributes of a module, by which its class decides what it computes
CASTING = frozenset({"super", "forward", "float", "float32", "torch", "th", "type", "type_as", "to", "dtype"})
CASTS = frozenset({"float", "type", "type_as", "to"})
PARTS = frozenset({"num_groups", "weight", "bias", "eps"})
ABSENT = (("weight",), ("bias",), ("weight", "bias"))  # of the parts, those that a norm may go without
CALLED = CASTING - {"super", "forward"} | PARTS | {"group_norm", "nn", "functional", "F"}
_ABSENT = object()
_STORES = frozenset({"STORE_ATTR", "STORE_SUBSCR", "STORE_GLOBAL", "DELETE_ATTR", "DELETE_SUBSCR", "STORE_SLICE"})
SIGMOID = frozenset({"torch", "th", "nn", "functional", "F", "sigmoid", "silu", "mul", "exp", "special", "expit"})


def has_own_call(module: nn.Module) -> bool:
    """Return True where the class of a module overrides what a call does around its forward."""
    cls: Any = type(module)
    return cls.__call__ is not nn.Module.__call__ or cls._call_impl is not nn.Module._call_impl


def is_bare(module: Any) -> bool:
    """Return True where calling the module runs its class's forward alone: no hooks, no forward of the instance.

    A class with a `__call__` of its own does not run its forward alone, nor does what is no module.
    """
    if not isinstance(module, nn.Module) or has_own_call(module):
        return False
    hooked = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return not (hooked or "forward" in module.__dict__ or torch_module._has_any_global_hook())


@functools.cache
def is_silu_function(function: Any) -> bool:
    """Return True where a function of one argument has SiLU's values."""
    return function is F.silu or (uses_only(function, SIGMOID) and _gives_silu(function))


def is_silu_forward(forward: Any) -> bool:
    """Return True where a forward has SiLU's values. It is tried without a module as `self`."""
    return uses_only(forward, SIGMOID) and _gives_silu(lambda x: forward(None, x))


def is_casting_group_norm(cls: type) -> bool:
    """Return True where a subclass of nn.GroupNorm casts its input and its result, and does nothing else."""
    return issubclass(cls, nn.GroupNorm) and uses_only(cls.forward, CASTING) and _gives_group_norm(cls)


def is_calling_group_norm(cls: Any) -> bool:
    """Return True where a class that is no nn.GroupNorm computes one of its num_groups, weight, bias and eps.

    Its forward calls group_norm, casts perhaps, and decides nothing but whether something is None.
    """
    forward: Any = getattr(cls, "forward", None)
    calls = {"group_norm", *PARTS} <= used_names(forward) and uses_only(forward, CALLED)
    if issubclass(cls, nn.GroupNorm) or not calls:
        return False
    return not any(map(_decides, codes(forward.__code__))) and _gives_group_norm(cls)


def used_names(method: Any) -> frozenset[str]:
    """Return the globals and attributes that the code of a method uses; none for what is not written in Python."""
    original = inspect.unwrap(method) if callable(method) else None
    if not isinstance(original, FunctionType):
        return frozenset()
    return frozenset(name for code in codes(original.__code__) for name in code.co_names)


def unknown_names(method: Callable[..., Any], known: frozenset[str], used: frozenset[str] | None = None) -> str | None:
    """Return why a rule that knows these names does not know the method any more; None where it does.

    `used` are the names that count, by default all that the method uses.
    """
    unknown = (used_names(method) if used is None else used) - known
    if not unknown:
        return None
    return f"{inspect.unwrap(method).__qualname__} uses {', '.join(sorted(unknown))}, which its rule does not know"


def uses_only(function: Any, names: frozenset[str]) -> bool:
    """Return True for a function in Python, without a wrapper around it, whose code uses these names alone.

    Nor may it keep anything from call to call: in an attribute, in a variable that it closes over, or in the default of
    an argument.
    """
    if not isinstance(function, FunctionType) or hasattr(function, "__wrapped__"):
        return False
    defaults = (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values())
    keeps = not set(function.__code__.co_freevars) <= {"__class__"}
    keeps = keeps or any(not isinstance(value, (int, float, str, type(None))) for value in defaults)
    keeps = keeps or any(
        step.opname in _STORES for code in codes(function.__code__) for step in dis.get_instructions(code)
    )
    return not keeps and used_names(function) <= names


def codes(code: CodeType) -> Iterator[CodeType]:
    """Yield a function's code, and that of the functions within it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from codes(constant)


@contextmanager
def trial() -> Iterator[None]:
    """Compute with numbers inside the block, also where the caller works with fake or meta tensors."""
    with _disable_current_modes(), torch.device("cpu"), torch.no_grad():
        yield


def _decides(code: CodeType) -> bool:
    """Return True where code has a branch that depends on anything else than on something being None."""
    jumps = (step.opname for step in dis.get_instructions(code) if "JUMP" in step.opname)
    return any("NONE" not in name and name not in ("JUMP_FORWARD", "JUMP_ABSOLUTE") for name in jumps)


def _gives_silu(function: Callable[[Tensor], Tensor]) -> bool:
    with trial():
        probe = torch.cat([torch.linspace(-6, 6, 25), torch.tensor([-1e3, -50.0, 1e-3, 50.0, 1e3])]).double()
        try:
            values, halves = function(probe.clone()), function(probe.bfloat16())
            same = values.dtype == probe.dtype and torch.allclose(values, F.silu(probe), rtol=1e-12, atol=0)
            return same and halves.dtype == torch.bfloat16
        except Exception:  # somebody else's function may raise anything: it is no SiLU then
            return False


def _gives_group_norm(cls: type, settings: Settings = ()) -> bool:
    with trial():
        plain = nn.GroupNorm(2, 4, eps=0.3, dtype=torch.float32)
        plain.weight.copy_(torch.tensor([1.0, 2.0, 3.0, 4.0]))
        plain.bias.copy_(torch.tensor([0.0, 1.0, 0.0, -1.0]))
        x = torch.linspace(-3, 5, 48, dtype=torch.float32).square().view(2, 4, 6)
        try:
            full = _is_same(cls, plain, x, settings) and _is_same(cls, plain, x.view(2, 4, 2, 3), settings)
            halves = _is_same(cls, plain, x.bfloat16(), settings)
        except Exception:  # somebody else's forward may raise anything: it is no group norm then
            return False
        rare = [(copy.deepcopy(plain).double(), x.double()), *((_without(plain, names), x) for names in ABSENT)]
        return full and halves and all(_is_same_or_raises(cls, norm, values, settings) for norm, values in rare)


def settings_of_group_norm(norm: nn.GroupNorm) -> Settings | None:
    """Return the attributes with which a norm's class casts and does nothing else; None where it does something else.

    They are numbers, words and None, which its forward uses beside the names of casts and of SiLU. A method that it
    uses too may do anything, but with these attributes it must not be called (as in ComfyUI's code).
    """
    cls, known = type(norm), CASTING | SIGMOID
    own = {name: inspect.getattr_static(norm, name, _ABSENT) for name in used_names(cls.forward) - known - PARTS}
    own = {name: value for name, value in own.items() if value is not _ABSENT}  # read without running a property
    methods = {name for name, value in own.items() if inspect.isfunction(value)}
    settings = tuple(sorted((name, own[name]) for name in own.keys() - methods))
    is_plain = all(isinstance(value, (int, float, str, type(None))) for _, value in settings)
    if not is_plain or not uses_only(cls.forward, known | own.keys()):
        return None
    try:
        same = _gives_group_norm(cls, settings + tuple((name, _call) for name in methods))
    except _CalledError:
        return None
    return settings if same else None


class _CalledError(BaseException):
    """Says that what was not to be called was; no trial, which takes any Exception for an answer, catches it."""


def _call(*arguments: Any, **keywords: Any) -> None:
    raise _CalledError


def dtypes_of_group_norm(cls: type, settings: Settings = ()) -> frozenset[tuple[torch.dtype, torch.dtype]]:
    """Return the dtypes of input and parameters with which a class that computes group norm does not raise."""
    with trial():
        taken = set()
        for given, own in itertools.product((torch.float32, torch.float64, torch.bfloat16, torch.float16), repeat=2):
            with contextlib.suppress(Exception):  # it was not written for these
                if (
                    _as_module_of(cls, nn.GroupNorm(2, 4, dtype=own), settings)(torch.ones(1, 4, 2, dtype=given)).dtype
                    == given
                ):
                    taken.add((given, own))
        return frozenset(taken)


def _without(norm: nn.GroupNorm, names: tuple[str, ...]) -> nn.GroupNorm:
    norm = copy.deepcopy(norm)
    for name in names:
        setattr(norm, name, None)
    return norm


def _is_same_or_raises(cls: type, plain: nn.GroupNorm, x: Tensor, settings: Settings) -> bool:
    try:
        return _is_same(cls, plain, x, settings)
    except Exception:  # it was not written for that: nothing is computed otherwise than before
        return True


def _is_same(cls: type, plain: nn.GroupNorm, x: Tensor, settings: Settings) -> bool:
    """Return True where a module of a class with the parts of a norm gives its values and dtype, to x's accuracy."""
    expected, result = plain(x), _as_module_of(cls, plain, settings)(x)
    tolerance = 1e-5 if x.dtype != torch.bfloat16 else 5e-2
    return result.dtype == x.dtype and torch.allclose(result, expected, rtol=tolerance, atol=tolerance)


def _as_module_of(cls: Any, norm: nn.GroupNorm, settings: Settings) -> Any:
    """Make a module of a class with the parts of a norm, without running its constructor."""
    if issubclass(cls, nn.GroupNorm):
        module: Any = copy.deepcopy(norm)
        module.__class__ = cls
        vars(module).update(settings)
        return module
    module = nn.Identity()
    module.__class__ = cls
    for name in PARTS:
        setattr(module, name, getattr(norm, name))
    return module
