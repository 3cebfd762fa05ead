"""A kernel launch as data, and what the launches of one call have in common."""

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from unetgn.ops.layout import accumulation_dtype, is_channels_last
from unetgn.ops.triton.device import Device
from unetgn.ops.triton.problem import Problem

RECIPES = 4096  # kinds of calls whose recipe is kept


# Named tuples, not dataclasses: several of these are made in each call, and a tuple takes a fifth of the time.
class Launch(NamedTuple):
    """`kernel` on a grid of `programs` (below 2**31), with its arguments in order. The offline compile tests read the
    same objects that a GPU is given."""

    kernel: Callable[..., Any]
    programs: int
    values: tuple[Any, ...]
    num_warps: int
    num_ctas: int = 1

    @property
    def arguments(self) -> dict[str, Any]:
        """The arguments by name."""
        return dict(zip(self.kernel.arg_names, self.values, strict=True))  # type: ignore[attr-defined]

    def run(self) -> None:
        options = {"num_warps": self.num_warps}
        if self.num_ctas > 1:
            options["num_ctas"] = self.num_ctas
        self.kernel[(self.programs,)](*self.values, **options)  # type: ignore[index]


class Stage(NamedTuple):
    """A launch without its tensors. Every kernel takes tensors and their strides first, then `sizes`, which follow from
    the sizes of the call alone."""

    kernel: Callable[..., Any]
    programs: int
    sizes: tuple[Any, ...]
    num_warps: int
    num_ctas: int = 1

    def launch(self, *tensors: Tensor | int | None) -> Launch:
        """With its tensors (or None for those that are absent) and strides, in the order of the kernel's arguments."""
        return Launch(self.kernel, self.programs, (*tensors, *self.sizes), self.num_warps, self.num_ctas)


def run(launches: Sequence[Launch], x: Tensor) -> None:
    """Run launches in order, on the device of x, which need not be the current one."""
    elsewhere = x.is_cuda and x.device.index != torch.cuda.current_device()
    with torch.cuda.device(x.device) if elsewhere else nullcontext():
        for launch in launches:
            launch.run()


class Call(NamedTuple):
    """The sizes of a call, the device it runs on, and its small tensors as the kernels read them."""

    problem: Problem
    channels_last: bool
    device: Device
    activation: bool
    affine: tuple[Tensor | None, ...]  # weight, bias, pre_bias, scale, shift
    strides: tuple[int, int, int]  # from sample to sample of pre_bias, scale, shift

    @property
    def pre_bias(self) -> Tensor | None:
        return self.affine[2]


def call_of(
    x: Tensor,
    num_groups: int,
    activation: bool,
    device: Device,
    weight: Tensor | None,
    bias: Tensor | None,
    pre_bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
) -> Call:
    """Sizes and operands of a call on x, (N, C, *spatial), dense in one of the two layouts."""
    weight = None if weight is None else weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    pre_bias, scale, shift = _dense_rows(pre_bias), _dense_rows(scale), _dense_rows(shift)
    return Call(
        _problem(x.shape, num_groups, x.element_size()),
        is_channels_last(x),
        device,
        activation,
        (weight, bias, pre_bias, scale, shift),
        (_row_stride(pre_bias), _row_stride(scale), _row_stride(shift)),
    )


def empty_statistics(x: Tensor, num_groups: int) -> Tensor:
    """An (N, G) tensor in the type of the arithmetic."""
    return x.new_empty((x.shape[0], num_groups), dtype=accumulation_dtype(x))


@lru_cache(RECIPES)
def _problem(shape: torch.Size, num_groups: int, itemsize: int) -> Problem:
    return Problem(shape[0], shape[1], num_groups, math.prod(shape[2:]), itemsize)


def _dense_rows(values: Tensor | None) -> Tensor | None:
    """An (N, C) tensor, copied where neighbours in a row are not neighbours in memory: it is small."""
    if values is None or values.stride(1) == 1 or values.size(1) == 1:
        return values
    return values.contiguous()


def _row_stride(values: Tensor | None) -> int:
    return 0 if values is None else values.stride(0)
