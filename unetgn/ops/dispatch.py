"""Which implementation computes the operator: chosen from the device, or by name to find a fault.

    auto        triton for tensors on NVIDIA and AMD GPUs where Triton is installed, else aten
    triton      the fused kernels (with TRITON_INTERPRET=1 on CPU tensors too, slowly)
    aten        PyTorch's own kernels, on any device
    reference   the definition, in plain PyTorch

`with unetgn.ops.implementation("reference"): ...` chooses for a block of code, the environment variable
UNETGN_IMPLEMENTATION for a process.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from types import ModuleType

import torch
from torch import Tensor

from unetgn.ops import aten, reference
from unetgn.ops.layout import accumulation_dtype, memory_format_of
from unetgn.ops.reference import Gradients, Needs

IMPLEMENTATIONS = ("auto", "triton", "aten", "reference")
_VARIABLE = "UNETGN_IMPLEMENTATION"


def _checked(name: str, source: str) -> str:
    if name not in IMPLEMENTATIONS:
        raise ValueError(f"{source}: unknown implementation {name!r}; choose one of {', '.join(IMPLEMENTATIONS)}")
    return name


_chosen = _checked(os.environ.get(_VARIABLE) or "auto", f"environment variable {_VARIABLE}")


@contextmanager
def implementation(name: str) -> Iterator[None]:
    """Compute the operator with the named implementation inside the `with` block: auto, triton, aten or reference.

    The choice holds for the whole process, not for one thread. It is taken when the operator is called, and the
    backward pass of a call uses the implementation of its forward pass. A compiled function is compiled again when the
    choice changes. Raises ValueError for another name; the call itself raises RuntimeError where the named
    implementation cannot run on its tensors.
    """
    global _chosen
    before, _chosen = _chosen, _checked(name, "unetgn.ops.implementation")
    try:
        yield
    finally:
        _chosen = before


def chosen() -> str:
    """The name in force."""
    return _chosen


def resolve(name: str, x: Tensor) -> ModuleType:
    """The module whose `forward` and `backward` compute the operator on x."""
    if name == "reference":
        return reference
    if name == "triton" or (name == "auto" and x.is_cuda and _HAS_TRITON):
        return _triton(x)
    return aten


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


def forward(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    activation: bool,
    pre_bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    implementation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """y in the dtype and layout of x (see `layout`); mean and rstd (N, G) in the dtype of the arithmetic."""
    if x.numel() == 0:
        return allocate(x, num_groups)
    dense = x.contiguous(memory_format=memory_format_of(x))
    compute = resolve(implementation, x).forward
    return compute(dense, num_groups, weight, bias, eps, activation, pre_bias, scale, shift)


def backward(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    activation: bool,
    pre_bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    needs: Needs,
    implementation: str,
) -> Gradients:
    """Gradients of (x, weight, bias, pre_bias, scale, shift), None where not needed; dx in dtype and layout as x."""
    if x.numel() == 0:
        inputs = (x, weight, bias, pre_bias, scale, shift)
        zeros = (torch.zeros_like(t) if t is not None and need else None for t, need in zip(inputs, needs, strict=True))
        return tuple(zeros)  # type: ignore[return-value]
    layout = memory_format_of(x)
    dense, dy = x.contiguous(memory_format=layout), dy.contiguous(memory_format=layout)
    compute = resolve(implementation, x).backward
    return compute(dy, dense, mean, rstd, num_groups, weight, bias, activation, pre_bias, scale, shift, needs)


def allocate(x: Tensor, num_groups: int) -> tuple[Tensor, Tensor, Tensor]:
    """y, mean and rstd as the operator returns them, their values not computed: zero statistics, y as it comes."""
    y = torch.empty_like(x, memory_format=memory_format_of(x))
    mean = x.new_zeros((x.shape[0], num_groups), dtype=accumulation_dtype(x))
    return y, mean, torch.zeros_like(mean)
