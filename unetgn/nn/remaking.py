"""Makes tensors again in the backward pass from what they were made of, which is kept in their place.

A concatenation with a skip connection is one: the encoder keeps the skip connection anyway.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from contextvars import ContextVar, Token
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from unetgn.ops.dispatch import is_transformed

Hooks = tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]


def remade(function: Callable[..., Tensor], *inputs: Tensor) -> AbstractContextManager[Tensor]:
    """Give function(*inputs) to a `with` block, in which `unkept` makes autograd keep `inputs` in its place.

    That is worth it where the inputs are smaller, or kept anyway, and `function` takes little time: it is run again in
    the backward pass, once for all operations that would have kept its result. Values and gradients are the same to the
    bit, of any order. Where gradients are not recorded by autograd itself (compilers, `torch.func` transforms, tracers,
    tensor subclasses), or `function` changes the dtype, the block has a plain result.
    """
    result = function(*inputs)
    return _Remade(function, inputs, result) if _is_recorded(inputs, result) else nullcontext(result)


def unkept(x: Tensor) -> AbstractContextManager[Any]:
    """Keep, for all that the block does to x, what x was made of: where x is what the `remade` around it gave.

    An x that somebody changed in place, or put another in its place of, is kept as ever. So it is where somebody has
    set hooks for saved tensors in between: torch.utils.checkpoint has, and keeps nothing that is inside.
    """
    if torch.compiler.is_compiling():
        return nullcontext()
    current = _current.get()
    return nullcontext() if current is None or not current.is_result(x) else current.hooks()


def _is_recorded(inputs: tuple[Tensor, ...], result: Tensor) -> bool:
    return (
        torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and all(type(value) is Tensor and value.dtype == result.dtype for value in inputs)
        and result.requires_grad
        and not is_transformed()
        and not torch.jit.is_tracing()
        and torch._C._autograd._saved_tensors_hooks_is_enabled()  # type: ignore[attr-defined]  # PyTorch has no stub
    )


def _outer_hooks() -> Hooks | None:
    return torch._C._autograd._top_saved_tensors_default_hooks(True)


class _Kept(torch.autograd.Function):
    """Keeps tensors for the backward pass as any operation does: under the hooks of others, and with their versions."""

    @staticmethod
    def forward(ctx: Any, *inputs: Tensor) -> Tensor:
        ctx.save_for_backward(*inputs)
        return inputs[0].new_empty(0)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        raise AssertionError("nothing is computed from it")


class _Remade:
    """Holds what a tensor was made of; in its `with` block the tensor itself, too.

    PyTorch has one pair of hooks at a time: ours hand to those around what is not the tensor.
    """

    def __init__(self, function: Callable[..., Tensor], inputs: tuple[Tensor, ...], result: Tensor) -> None:
        self.function = function
        self.outer = _outer_hooks()
        self.kept = _Kept.apply(*inputs)  # its node goes with it
        self.result: Tensor | None = result
        self.version = result._version
        self.again: Tensor | None = None
        self.takers = self.taken = 0

    def __enter__(self) -> Tensor:
        assert self.result is not None
        self.token: Token[_Remade | None] = _current.set(self)
        return self.result

    def __exit__(self, *exception: object) -> None:
        _current.reset(self.token)
        self.result = None

    def is_result(self, x: Tensor) -> bool:
        """Return True where x is the tensor, unchanged, and nobody has set hooks since."""
        return self._has(x) and _outer_hooks() == self.outer

    def _has(self, x: Tensor) -> bool:
        """Return True where x is the tensor, unchanged, or one of the same memory, as operators return their input."""
        result = self.result
        if x is not result and (
            result is None
            or type(x) is not Tensor
            or x.dtype != result.dtype
            or x.shape != result.shape
            or x.stride() != result.stride()
            or x.data_ptr() != result.data_ptr()
        ):
            return False
        return x._version == self.version

    def hooks(self) -> saved_tensors_hooks:
        """Make the hooks that keep the inputs in the place of the tensor."""
        return saved_tensors_hooks(self._pack, _unpack)

    def _pack(self, tensor: Tensor) -> Callable[[], Tensor]:
        if self._has(tensor):
            self.takers += 1
            return self._take
        if self.outer is not None:
            pack, unpack = self.outer
            return partial(unpack, pack(tensor))
        return partial(_unchanged, tensor.detach(), tensor._version)  # detached, as it may be an output of the node

    def _take(self) -> Tensor:
        """Make the tensor for the first that takes it, and forget it with the last."""
        tensor = self.again
        if tensor is None:
            with torch.no_grad():
                tensor = self.function(*self.kept.grad_fn.saved_tensors)
        self.taken += 1
        self.again = tensor if self.taken % self.takers else None
        return tensor


_current: ContextVar[_Remade | None] = ContextVar("remade", default=None)


def _unpack(packed: Callable[[], Tensor]) -> Tensor:
    return packed()


def _unchanged(tensor: Tensor, version: int) -> Tensor:
    """Return what was kept. Raises RuntimeError where it has been changed since: PyTorch does not look behind hooks."""
    if tensor._version != version:
        raise RuntimeError(
            "one of the variables needed for gradient computation has been modified by an inplace operation: "
            f"[{tensor.type()} {list(tensor.shape)}] is at version {tensor._version}; expected version {version}"
        )
    return tensor
