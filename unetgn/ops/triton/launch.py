"""Describes a kernel launch as data.

A `Launch` is made once for all calls of the same sizes. It holds everything but the tensors. Which of the call's
tensors its kernel takes, and where its sizes stand, is worked out from the names of the kernel's arguments when it is
made; a call then costs two tuples and no look-up by name. `recipe` runs launches.
"""

from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any, NamedTuple

Strides = tuple[int, int, int]  # from sample to sample of pre_bias, scale and shift


class Launch(NamedTuple):
    """Holds a kernel, its grid of `programs` (below 2**31) and its sizes. `launch_of` makes one."""

    kernel: Callable[..., Any]
    programs: int
    select: Callable[[Sequence[Any]], tuple[Any, ...]]  # from the operands of a call, those that the kernel takes
    sizes: tuple[Any, ...]
    options: dict[str, int]  # num_warps and, in a cluster, num_ctas

    def values(self, operands: Sequence[Any]) -> tuple[Any, ...]:
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
