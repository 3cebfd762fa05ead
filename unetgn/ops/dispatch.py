"""Chooses the implementation that computes the operator, from the device or by name, and calls it.

    auto        triton for tensors on NVIDIA and AMD GPUs where Triton is installed, else aten
    triton      the fused kernels (with TRITON_INTERPRET=1 on CPU tensors too, slowly)
    aten        PyTorch's own kernels, on any device
    reference   the definition, in plain PyTorch

`with unetgn.ops.implementation("reference"): ...` chooses for a block of code, the environment variable
UNETGN_IMPLEMENTATION for a process.

Here is asked, too, who looks at a call (a compiler, a tracer, a transform, a dispatch mode, a tensor subclass): that
says which way it takes, and whether numbers of a tensor may be looked at.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from unetgn.ops import aten, reference
from unetgn.ops.arguments import Arguments, Gradients, Needs, tensors_of
from unetgn.ops.checks import has_maps
from unetgn.ops.layout import ACCUMULATION_DTYPE, memory_format_of

IMPLEMENTATIONS = ("auto", "triton", "aten", "reference")
_VARIABLE = "UNETGN_IMPLEMENTATION"


def _checked(name: str, source: str) -> str:
    if name not in IMPLEMENTATIONS:
        raise ValueError(f"{source}: unknown implementation {name!r}; choose one of {', '.join(IMPLEMENTATIONS)}")
    return name


_default = _checked(os.environ.get(_VARIABLE) or "auto", f"environment variable {_VARIABLE}")
_choice = ContextVar(_VARIABLE, default=_default)
# The choices in force in the whole process, for compilers: they cannot read a context variable, nor guard on one.
_in_force = [_default]


@contextmanager
def implementation(name: str) -> Iterator[None]:
    """Compute the operator with the named implementation inside the `with` block: auto, triton, aten or reference.

    The choice holds for the code that the block runs, not for other threads or tasks. It is taken when the operator is
    called, and the backward pass of a call uses the implementation of its forward pass. A compiled function is compiled
    again when the choice changes; where several threads choose at a time, it follows the latest of them. Raises
    ValueError for another name; the call itself raises RuntimeError where the named implementation cannot run on its
    tensors.
    """
    _in_force.append(_checked(name, "unetgn.ops.implementation"))
    token = None if torch.compiler.is_compiling() else _choice.set(name)
    try:
        yield
    finally:
        del _in_force[len(_in_force) - 1 - _in_force[::-1].index(name)]  # the latest of this name: another stays inside
        if token is not None:
            _choice.reset(token)


def chosen() -> str:
    """Return the name in force. ONNX has no fused operator: what is exported to it is the definition."""
    if not torch.compiler.is_compiling():
        return _choice.get()
    return "reference" if torch.onnx.is_in_onnx_export() else _in_force[-1]


def resolve(name: str, x: Tensor) -> ModuleType:
    """Return the module whose `forward` and `backward` compute the operator on x."""
    if name == "reference":
        return reference
    return _triton(x) if is_triton(name, x) else aten


def is_triton(name: str, x: Tensor) -> bool:
    """Return True where the implementation of that name is Triton's kernels for x."""
    return name == "triton" or (name == "auto" and x.is_cuda and _HAS_TRITON)


_HAS_TRITON = find_spec("triton") is not None
_triton_module: ModuleType | None = None


def _triton(x: Tensor) -> ModuleType:
    global _triton_module
    if not x.is_cuda and not (x.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"):
        raise RuntimeError(
            f"the triton implementation of group_norm_silu was asked for, but x is on {x.device}; it runs on CUDA and "
            f"ROCm devices (and on the CPU with TRITON_INTERPRET=1). Choose 'auto' or 'aten' with "
            f"unetgn.ops.implementation or {_VARIABLE}"
        )
    if not _HAS_TRITON:
        raise RuntimeError(
            "the triton implementation of group_norm_silu was asked for, but Triton is not installed; install triton, "
            f"or choose 'auto' or 'aten' with unetgn.ops.implementation or {_VARIABLE}"
        )
    if _triton_module is None:
        from unetgn.ops.triton import entry

        _triton_module = entry
    return _triton_module


ORDINARY = (Tensor, torch.nn.Parameter)


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
    """Return the arguments with ordinary tensors for those of a subclass that does not compute in a way of its own.

    Such a subclass (`__torch_function__` without `__torch_dispatch__`, as MONAI's MetaTensor) has had its say before
    the operator computes; the backward pass must not meet methods that it overrides.
    """
    return Arguments._make(map(_without_subclass, arguments))


def _without_subclass(value: Any) -> Any:
    if isinstance(value, Tensor) and type(value) not in ORDINARY and _is_ordinary(value):
        return Tensor.as_subclass(value, Tensor)
    return value


def _is_ordinary(x: Tensor) -> bool:
    return type(x) in ORDINARY or type(x).__torch_dispatch__ is Tensor.__torch_dispatch__


def _torch_func_is_active() -> bool:
    return torch._C._are_functorch_transforms_active()


# As `torch.compiler.assume_constant_result` marks it, which imports the compiler: a second and a half for each process.
# A compiler guards on the transforms that it compiles under.
_torch_func_is_active._dynamo_marked_constant = True  # type: ignore[attr-defined]


def forward(arguments: Arguments) -> tuple[Tensor, Tensor, Tensor]:
    """Compute y in the dtype and layout of x (see `layout`), and mean and rstd (N, G) in the dtype of the arithmetic.

    Implementations meet an x with elements, dense in one of the two layouts, and maps (`has_maps`) dense in the same.
    y shares no memory with x, and is no view.
    """
    x = arguments.x
    if x.numel() == 0:
        return allocate(x, arguments.num_groups)
    if not x.is_contiguous() or has_maps(arguments):  # asked first, for it is quick
        arguments = _dense(arguments, memory_format_of(x))
    y, mean, rstd = resolve(arguments.implementation, x).forward(arguments)
    # A view that comes out of an autograd function cannot be changed in place, as y of nn.GroupNorm can.
    return y.data if y._is_view() else y, mean, rstd


def backward(
    dy: Tensor,
    arguments: Arguments,
    mean: Tensor,
    rstd: Tensor,
    needs: Needs,
    dshortcut: Tensor | None = None,
) -> Gradients:
    """Compute the gradients that `needs` asks for; dx in the dtype and layout of x, those of maps in its layout.

    `dshortcut`, in the shape and dtype of x, is added to dx.
    """
    x = arguments.x
    if x.numel() == 0:
        given = zip(tensors_of(arguments), needs, strict=True)
        return Gradients._make(None if t is None or not need else torch.zeros_like(t) for t, need in given)
    if x.is_contiguous() and not has_maps(arguments):
        layout, dy = torch.contiguous_format, dy.contiguous()
    else:
        layout = memory_format_of(x)
        arguments, dy = _dense(arguments, layout), dy.contiguous(memory_format=layout)
    if dshortcut is not None:
        dshortcut = dshortcut.contiguous(memory_format=layout) if needs.x else None
    return resolve(arguments.implementation, x).backward(dy, arguments, mean, rstd, needs, dshortcut)


def _dense(arguments: Arguments, layout: torch.memory_format) -> Arguments:
    """Return the arguments with x and maps copied where they are not dense in that layout, x's own."""
    x = arguments.x
    dense = x.contiguous(memory_format=layout)
    if has_maps(arguments):
        maps = (None if t is None else t.contiguous(memory_format=layout) for t in (arguments.scale, arguments.shift))
        scale, shift = maps
        return arguments._replace(x=dense, scale=scale, shift=shift)
    return arguments if dense is x else arguments._replace(x=dense)


def allocate(x: Tensor, num_groups: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return y, mean and rstd as the operator returns them, not computed: zero statistics, y as it comes."""
    y = torch.empty_like(x, memory_format=memory_format_of(x))
    mean = x.new_zeros((x.shape[0], num_groups), dtype=ACCUMULATION_DTYPE[x.dtype])
    return y, mean, torch.zeros_like(mean)
