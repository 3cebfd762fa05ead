"""Says who looks at a call of the operator: a compiler, a tracer, a transform, a dispatch mode, a tensor subclass.

Whatever depends on that asks here: which way a call takes, and whether numbers of a tensor may be looked at.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from unetgn.ops.arguments import Arguments

_ORDINARY = (Tensor, torch.nn.Parameter)


def is_plain(x: Tensor) -> bool:
    """Return True where x may go straight to an implementation.

    It holds its own numbers then, and no compiler, dispatch mode (FLOP counter, fake tensors, selective checkpointing)
    or subclass that computes in another way (fake tensors, DTensor) looks at it.
    """
    return _is_ordinary(x) and not torch.compiler.is_compiling() and not torch._C._len_torch_dispatch_stack()


def is_transformed() -> bool:
    """Return True where a `torch.func` transform or forward-mode differentiation is under way.

    The operator is evaluated by its definition then, which PyTorch can differentiate and map to any depth.
    """
    return _torch_func_is_active() or forward_ad._current_level >= 0


def has_values(x: Tensor) -> bool:
    """Return True where the program may look at numbers of x, and go another way for others.

    That is on the CPU alone, where it does not have to wait for them, and where nobody records or maps the call.
    """
    return x.is_cpu and is_plain(x) and not is_transformed() and not torch.jit.is_tracing()


def without_subclass(arguments: Arguments) -> Arguments:
    """Return the arguments with ordinary tensors for those whose subclass changes only how PyTorch's functions are called.

    Such a subclass (`__torch_function__` without `__torch_dispatch__`, as MONAI's MetaTensor) has had its say before
    the operator computes, and must not meet the tensors that are saved for the backward pass.
    """
    return Arguments._make(map(_without_subclass, arguments))


def _without_subclass(value: Any) -> Any:
    if isinstance(value, Tensor) and type(value) not in _ORDINARY and _is_ordinary(value):
        return Tensor.as_subclass(value, Tensor)
    return value


def _is_ordinary(x: Tensor) -> bool:
    return type(x) in _ORDINARY or type(x).__torch_dispatch__ is Tensor.__torch_dispatch__


def _torch_func_is_active() -> bool:
    return torch._C._are_functorch_transforms_active()


# As `torch.compiler.assume_constant_result` marks it, which imports the compiler: a second and a half for each process.
# A compiler guards on the transforms that it compiles under.
_torch_func_is_active._dynamo_marked_constant = True  # type: ignore[attr-defined]
