"""Describes a kernel launch as data, and runs it.

A `Launch` is made once for all calls of the same sizes. It holds everything but the tensors. Which of the call's
tensors its kernel takes, and where its sizes stand, is worked out from the names of the kernel's arguments when it is
made; a call then costs two tuples and no look-up by name. Compiled kernels are kept with the recipe that they are of.
"""

from collections.abc import Callable, Iterable
from operator import itemgetter
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from unetgn.ops.arguments import Arguments

RECIPES = 4096  # calls of different sizes whose recipe is kept
KINDS = 64  # of each, by dtypes and strides

# The compiled kernel's launcher takes (three grid sizes, stream, function, metadata, launch metadata, two hooks,
# *arguments) in these versions of Triton.
_LAUNCHER_IS_KNOWN = triton.__version__.startswith(("3.6.", "3.7."))
_IS_AMD = torch.version.hip is not None

OptionalTensor = Tensor | None
Affine = tuple[
    OptionalTensor, OptionalTensor, OptionalTensor, OptionalTensor, OptionalTensor, int, int, int
]  # weight, bias, pre_bias, scale, shift; from sample to sample of the last three


class Launch(NamedTuple):
    """Holds a kernel, its grid of `programs` (below 2**31) and its sizes. `launch_of` makes one."""

    kernel: Callable[..., Any]
    programs: int
    select: Callable[[tuple[Any, ...]], tuple[Any, ...]]  # from the operands of a call, those that the kernel takes
    sizes: tuple[Any, ...]
    options: dict[str, int]  # num_warps and, in a cluster, num_ctas

    def values(self, operands: tuple[Any, ...]) -> tuple[Any, ...]:
        """Return the kernel's arguments in order."""
        return self.select(operands) + self.sizes


def launch_of(
    kernel: Callable[..., Any],
    operands: type[tuple[Any, ...]],
    programs: int,
    num_warps: int,
    num_ctas: int = 1,
    **sizes: Any,
) -> Launch:
    """Make a launch of `kernel`: its first arguments are named as fields of `operands`, the others as `sizes`.

    Raises TypeError where the names do not fit: an argument that is neither, a size that the kernel does not take, or a
    tensor behind a size.
    """
    names = kernel.arg_names  # type: ignore[attr-defined]
    known = operands._fields  # type: ignore[attr-defined]
    tensors = [name for name in names if name in known]
    if names != [*tensors, *(name for name in names if name in sizes)] or len(names) != len(tensors) + len(sizes):
        raise TypeError(
            f"{kernel.__name__} takes {', '.join(names)}; given are the sizes {', '.join(sizes)}, and from "
            f"{operands.__name__} {', '.join(tensors)}"
        )
    return Launch(
        kernel,
        programs,
        itemgetter(*map(known.index, tensors)),
        tuple(sizes[name] for name in names[len(tensors) :]),
        {"num_warps": num_warps} if num_ctas == 1 else {"num_warps": num_warps, "num_ctas": num_ctas},
    )


class Ready(NamedTuple):
    """Holds what a call needs to run its launches on kernels that are compiled and loaded."""

    hooks: tuple[list[Any], ...]  # Triton's hooks before the launch of each kernel
    launches: tuple[tuple[Any, ...], ...]  # launcher, programs, function, packed metadata, select, sizes


Kind = tuple[Any, ...]  # the dtypes of a call's tensors, and strides: with its sizes they decide what is compiled
Cache = dict[Kind, Ready]  # of one recipe, which belongs to one device


def kind_of(tensors: Iterable[Tensor | None], *strides: int) -> Kind | None:
    """Return the kind of a call with these tensors beside those that it allocates.

    None where a tensor is not aligned to 16 bytes, or lies in more memory than AMD's 32-bit addresses reach: Triton
    compiles such calls in other ways, which are left to it.
    """
    addresses = 0
    dtypes: list[torch.dtype | None] = []
    for tensor in tensors:
        if tensor is None:
            dtypes.append(None)
        else:
            addresses |= tensor.data_ptr()
            dtypes.append(tensor.dtype)
            if _IS_AMD and tensor.untyped_storage().nbytes() >= 2**31:
                return None
    return None if addresses % 16 else (*dtypes, *strides)


def run(launches: Iterable[Launch], operands: tuple[Any, ...], x: Tensor, ready: Cache, kind: Kind | None) -> None:
    """Run launches in order, on the device of x, which need not be the current one.

    The first call of a kind goes through Triton, which compiles and loads the kernels; `ready` keeps them, and later
    calls launch them without Triton's search for them (some 10 µs each). Calls go through Triton, too, while it has
    launch hooks (those of profilers), without a `kind`, in its interpreter, and where its version is none that is known
    here. Its settings count for what is not compiled yet.
    """
    if x.is_cuda and x.get_device() != torch.cuda.current_device():
        with torch.cuda.device(x.device):
            _run(launches, operands, ready, kind)
    else:
        _run(launches, operands, ready, kind)


def _run(launches: Iterable[Launch], operands: tuple[Any, ...], ready: Cache, kind: Kind | None) -> None:
    found = None if kind is None else ready.get(kind)
    runtime = triton.knobs.runtime
    hooked = _is_set(runtime.launch_enter_hook) or _is_set(runtime.launch_exit_hook)
    if found is not None and not hooked and not any(found.hooks):
        active = triton.runtime.driver.active
        stream = active.get_current_stream(active.get_current_device())
        for launcher, programs, function, metadata, select, sizes in found.launches:
            launcher(programs, 1, 1, stream, function, metadata, None, None, None, *select(operands), *sizes)
        return
    kernels = [
        launch.kernel[(launch.programs,)](*launch.values(operands), **launch.options)  # type: ignore[index]
        for launch in launches
    ]
    if kind is not None and found is None and _LAUNCHER_IS_KNOWN and all(map(_is_compiled, kernels)):
        if len(ready) >= KINDS:
            ready.clear()
        ready[kind] = Ready(
            tuple(launch.kernel.pre_run_hooks for launch in launches),  # type: ignore[attr-defined]
            tuple(
                (kernel.run, launch.programs, kernel.function, kernel.packed_metadata, launch.select, launch.sizes)
                for kernel, launch in zip(kernels, launches, strict=True)
            ),
        )


def _is_set(hook: Any) -> bool:
    """Return True where Triton would call something: a function, or a chain that is not empty."""
    return hook is not None and bool(getattr(hook, "calls", True))


def _is_compiled(kernel: Any) -> bool:
    """Return True for what Triton's launch returns; in its interpreter, and before a kernel is loaded, it is none."""
    return isinstance(kernel, triton.compiler.CompiledKernel) and kernel.function is not None


def affine_operands(arguments: Arguments) -> Affine:
    """Return weight, bias, pre_bias, scale and shift as kernels read them, and the last three's strides."""
    weight, bias = arguments.weight, arguments.bias
    weight = None if weight is None else weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    pre_bias, scale, shift = arguments.pre_bias, arguments.scale, arguments.shift
    if pre_bias is None and scale is None and shift is None:
        return weight, bias, None, None, None, 0, 0, 0
    pre_bias, scale, shift = map(_dense_rows, (pre_bias, scale, shift))
    return weight, bias, pre_bias, scale, shift, _row_stride(pre_bias), _row_stride(scale), _row_stride(shift)


def _dense_rows(values: Tensor | None) -> Tensor | None:
    """Copy an (N, C) tensor whose neighbours in a row are not neighbours in memory: it is small."""
    if values is None or values.stride(1) == 1 or values.size(1) == 1:
        return values
    return values.contiguous()


def _row_stride(values: Tensor | None) -> int:
    return 0 if values is None else values.stride(0)
