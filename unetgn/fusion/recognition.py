"""Which modules compute group normalization or SiLU, under whatever class name.

Projects carry copies of their own: a GroupNorm that computes in float32, a SiLU from before PyTorch had one. Such a
class is run once, on a few numbers; if it gives the values of nn.GroupNorm or of SiLU, it is taken for one.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

# The forwards that compute nn.GroupNorm's values, and those that compute SiLU's.
GROUP_NORM_FORWARDS: set[Callable[..., Any]] = {nn.GroupNorm.forward}
SILU_FORWARDS: set[Callable[..., Any]] = {nn.SiLU.forward}
# How to take SiLU into other norms: from the forward of a class to a function fold(norm, x, …).
FOLDS: dict[Callable[..., Any], Callable[..., Tensor]] = {}

UPCASTING = frozenset({"super", "forward", "float", "float32", "torch", "th", "type", "type_as", "to", "dtype"})


def is_bare(module: nn.Module) -> bool:
    """Whether calling the module does nothing but run its class's forward: no hooks, no forward of the instance."""
    hooked = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return not (hooked or "forward" in module.__dict__ or torch_module._has_any_global_hook())


def is_silu(act: Callable[[Tensor], Tensor]) -> bool:
    """Whether calling `act` computes SiLU and nothing else."""
    if isinstance(act, nn.Module):
        return type(act).forward in SILU_FORWARDS and is_bare(act)
    return act is F.silu


def is_foldable(norm: nn.Module) -> bool:
    """Whether SiLU can be taken into this class of norm."""
    return type(norm).forward in GROUP_NORM_FORWARDS or type(norm).forward in FOLDS


def learn_silu(module: nn.Module) -> bool:
    """Whether the module's class computes SiLU. Only a class of that name that holds no state is tried."""
    forward = type(module).forward
    is_candidate = (
        type(module).__name__.lower() in ("silu", "swish") and vars(module).keys() == vars(nn.Module()).keys()
    )
    if forward not in SILU_FORWARDS and is_candidate and computes_silu(lambda x: forward(module, x)):
        SILU_FORWARDS.add(forward)
    return forward in SILU_FORWARDS


def learn_group_norm(norm: nn.Module) -> bool:
    """Whether the norm's class computes group normalization. Only a subclass that does no more than cast is tried."""
    forward = type(norm).forward
    if forward not in GROUP_NORM_FORWARDS and isinstance(norm, nn.GroupNorm) and used_names(forward) <= UPCASTING:
        plain = nn.GroupNorm(2, 4)
        with torch.no_grad():
            plain.weight.copy_(torch.tensor([1.0, 2.0, 3.0, 4.0]))
            plain.bias.copy_(torch.tensor([0.0, 1.0, 0.0, -1.0]))
            x = torch.linspace(-3, 5, 24).view(1, 4, 6)
            expected = plain(x)
            plain.__class__ = type(norm)
            if torch.allclose(plain(x), expected, rtol=1e-5, atol=1e-5):
                GROUP_NORM_FORWARDS.add(forward)
    return forward in GROUP_NORM_FORWARDS


def computes_silu(function: Callable[[Tensor], Tensor]) -> bool:
    """Whether a function has SiLU's values."""
    probe = torch.linspace(-6, 6, 25, dtype=torch.float64)
    return torch.allclose(function(probe), F.silu(probe), rtol=1e-12, atol=0)


def used_names(method: Any) -> frozenset[str]:
    """The globals and attributes that the code of a method uses; empty for what is not written in Python."""
    original = inspect.unwrap(method) if callable(method) else None
    return frozenset(original.__code__.co_names) if isinstance(original, FunctionType) else frozenset()
