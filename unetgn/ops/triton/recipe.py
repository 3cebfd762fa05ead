"""Holds the recipe of a pass, launches and the memory that they share, and runs it.

A recipe is all that follows from sizes; it is made once for equal calls. Compiled kernels are kept with the recipe that
they are of. Warm calls hand them addresses in place of tensors: Triton's launcher would ask each tensor for its own,
and the driver whether that is one, in every launch anew.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from unetgn.ops.triton.launch import Launch, Strides

RECIPES = 4096  # calls of different sizes whose recipe is kept
KINDS = 64  # of each, by dtypes and strides
ALIGNMENT = 128  # bytes, of the tensors between the launches: a line of the cache

# The compiled kernel's launcher takes (three grid sizes, stream, function, metadata, launch metadata, two hooks,
# *arguments) in these versions of Triton, and takes a whole number for an address.
_LAUNCHER_IS_KNOWN = triton.__version__.startswith(("3.6.", "3.7."))
_IS_AMD = torch.version.hip is not None

Shape = tuple[int, ...]


class Part(NamedTuple):
    """Says where a tensor lies that launches hand on to each other: all of a recipe share one piece of memory."""

    start: int  # in elements, a multiple of ALIGNMENT bytes
    shape: Shape


class Scratch:
    """Holds how that piece of memory is divided: each call of `part` adds a tensor."""

    def __init__(self, itemsize: int) -> None:
        self.elements = 0  # of the dtype of the arithmetic, so far
        self._step = ALIGNMENT // max(itemsize, 4)

    def part(self, shape: Shape) -> Part:
        """Return where a tensor of that shape lies."""
        part = Part(-(-self.elements // self._step) * self._step, shape)
        self.elements = part.start + math.prod(shape)
        return part


class Ready(NamedTuple):
    """Holds what a call needs to run its launches on kernels that are compiled and loaded."""

    hooks: tuple[list[Any], ...]  # Triton's hooks before the launch of each kernel
    launches: tuple[tuple[Any, ...], ...]  # launcher, programs, function, packed metadata, select, sizes
    offsets: tuple[int | None, ...]  # of the tensors between the launches, in bytes


Kind = tuple[Any, ...]  # the dtypes of a call's tensors, and strides: with its sizes they decide what is compiled
Cache = dict[Kind, Ready]  # of one recipe, which belongs to one device


@dataclass(frozen=True)
class Recipe:
    """Holds the launches of a pass, in order, and the memory that they share. It follows from sizes alone.

    The operands of a launch are, in this order: the tensors of the call, `parts`, and the strides of its rows.
    """

    launches: tuple[Launch, ...]
    elements: int  # of the memory for `parts`, in the dtype of the arithmetic
    parts: tuple[Part | None, ...]
    ready: Cache = field(default_factory=dict, compare=False)

    def operands(self, tensors: Sequence[Tensor | None], memory: Tensor | None, strides: Strides) -> tuple[Any, ...]:
        """Return what Triton is given: tensors, and views of that memory."""
        views = (
            None if p is None or memory is None else memory.narrow(0, p.start, math.prod(p.shape)).view(p.shape)
            for p in self.parts
        )
        return (*tensors, *views, *strides)

    def offsets(self, itemsize: int) -> tuple[int | None, ...]:
        """Return where the parts begin, in bytes."""
        return tuple(None if part is None else part.start * itemsize for part in self.parts)


def run(recipe: Recipe, tensors: Sequence[Tensor | None], memory: Tensor | None, strides: Strides) -> None:
    """Run a recipe's launches, in order, on the device of x, the first tensor, which need not be the current one.

    The first call of a kind goes through Triton, which compiles and loads the kernels; `ready` keeps them, and later
    calls launch them without Triton's search for them (some 10 µs each). Calls go through Triton, too, while it has
    launch hooks (those of profilers), in its interpreter, and where its version is none that is known here. Its
    settings count for what is not compiled yet.
    """
    x: Any = tensors[0]
    device = x.get_device()
    if x.is_cuda and device != torch.cuda.current_device():
        with torch.cuda.device(device):
            return run(recipe, tensors, memory, strides)
    kind, addresses = kind_of(tensors, strides)
    ready = None if kind is None else recipe.ready.get(kind)
    runtime = triton.knobs.runtime  # whose hooks are None, functions, or chains of these
    enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
    if ready is None or getattr(enter, "calls", enter) or getattr(leave, "calls", leave) or any(ready.hooks):
        return _run_through_triton(recipe, tensors, memory, strides, kind)
    stream = triton.runtime.driver.active.get_current_stream(device)
    base = 0 if memory is None else memory.data_ptr()
    for offset in ready.offsets:
        addresses.append(None if offset is None else base + offset)
    addresses += strides
    for launcher, programs, function, metadata, select, sizes in ready.launches:
        launcher(programs, 1, 1, stream, function, metadata, None, None, None, *select(addresses), *sizes)


def kind_of(tensors: Sequence[Tensor | None], strides: Strides) -> tuple[Kind | None, list[int | None]]:
    """Return the kind of a call with these tensors, and their addresses.

    The kind is None where a tensor is not aligned to 16 bytes, or lies in more memory than AMD's 32-bit addresses
    reach: Triton compiles such calls in other ways, which are left to it.
    """
    together = 0
    addresses: list[int | None] = []
    dtypes: list[torch.dtype | None] = []
    for tensor in tensors:
        if tensor is None:
            addresses.append(None)
            dtypes.append(None)
        else:
            address = tensor.data_ptr()
            together |= address
            addresses.append(address)
            dtypes.append(tensor.dtype)
    if together % 16 or (_IS_AMD and any(t is not None and t.untyped_storage().nbytes() >= 2**31 for t in tensors)):
        return None, addresses
    return (*dtypes, *strides), addresses


def _run_through_triton(
    recipe: Recipe, tensors: Sequence[Tensor | None], memory: Tensor | None, strides: Strides, kind: Kind | None
) -> None:
    operands = recipe.operands(tensors, memory, strides)
    kernels = [
        launch.kernel[(launch.programs,)](*launch.select(operands), *launch.sizes, **launch.options)  # type: ignore[index]
        for launch in recipe.launches
    ]
    ready = recipe.ready
    if kind is None or kind in ready or not _LAUNCHER_IS_KNOWN or not all(map(_is_compiled, kernels)):
        return
    if len(ready) >= KINDS:
        ready.clear()
    ready[kind] = Ready(
        tuple(launch.kernel.pre_run_hooks for launch in recipe.launches),  # type: ignore[attr-defined]
        tuple(
            (kernel.run, launch.programs, kernel.function, kernel.packed_metadata, launch.select, launch.sizes)
            for kernel, launch in zip(kernels, recipe.launches, strict=True)
        ),
        recipe.offsets(0 if memory is None else memory.element_size()),
    )


def _is_compiled(kernel: Any) -> bool:
    """Return True for what Triton's launch returns; in its interpreter, and before a kernel is loaded, it is none."""
    return isinstance(kernel, triton.compiler.CompiledKernel) and kernel.function is not None
