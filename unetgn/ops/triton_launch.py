"""A kernel launch as data, and what the launches of one call have in common."""

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from unetgn.ops.layout import accumulation_dtype, is_channels_last
from unetgn.ops.triton_device import Device
from unetgn.ops.triton_plan import Problem


@dataclass(frozen=True)
class Launch:
    """`kernel` on a grid of `programs`. The offline compile tests read the same objects that a GPU is given."""

    kernel: Callable[..., Any]
    programs: int
    arguments: dict[str, Any]
    num_warps: int
    num_ctas: int = 1

    def run(self) -> None:
        options = {"num_warps": self.num_warps}
        if self.num_ctas > 1:
            options["num_ctas"] = self.num_ctas
        self.kernel[(self.programs,)](**self.arguments, **options)  # type: ignore[index]


def run(launches: Sequence[Launch], x: Tensor) -> None:
    """Run launches in order, on the device of x, which need not be the current one."""
    elsewhere = x.is_cuda and x.device.index != torch.cuda.current_device()
    with torch.cuda.device(x.device) if elsewhere else nullcontext():
        for launch in launches:
            launch.run()


@dataclass(frozen=True)
class Call:
    """The sizes of a call, the device it runs on, and its small tensors as the kernels read them."""

    problem: Problem
    channels_last: bool
    device: Device
    accumulate: torch.dtype
    activation: bool
    weight: Tensor | None
    bias: Tensor | None
    pre_bias: Tensor | None
    scale: Tensor | None
    shift: Tensor | None

    @property
    def affine(self) -> dict[str, Any]:
        """The arguments of kernels that compute gamma' and beta'."""
        return {
            "weight": self.weight,
            "bias": self.bias,
            "scale": self.scale,
            "shift": self.shift,
            "scale_stride": _row_stride(self.scale),
            "shift_stride": _row_stride(self.shift),
        }

    @property
    def pre(self) -> dict[str, Any]:
        """The arguments of kernels that add pre_bias."""
        return {"pre_bias": self.pre_bias, "pre_bias_stride": _row_stride(self.pre_bias)}

    @property
    def hold(self) -> bool:
        """The opaque identity (`triton_elements.hold`) is for 16-bit tiles, on NVIDIA, and not for the interpreter."""
        return self.problem.itemsize == 2 and self.device.nvidia and not self.device.interpreted

    def statistics(self, x: Tensor) -> Tensor:
        """An empty (N, G) tensor in the type of the arithmetic."""
        return x.new_empty((self.problem.samples, self.problem.groups), dtype=self.accumulate)


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
    return Call(
        problem=Problem(
            samples=x.shape[0],
            channels=x.shape[1],
            groups=num_groups,
            spatial=math.prod(x.shape[2:]),
            itemsize=x.element_size(),
        ),
        channels_last=is_channels_last(x),
        device=device,
        accumulate=accumulation_dtype(x),
        activation=activation,
        weight=None if weight is None else weight.contiguous(),
        bias=None if bias is None else bias.contiguous(),
        pre_bias=_dense_rows(pre_bias),
        scale=_dense_rows(scale),
        shift=_dense_rows(shift),
    )


def _dense_rows(values: Tensor | None) -> Tensor | None:
    """An (N, C) tensor, copied where neighbours in a row are not neighbours in memory: it is small."""
    if values is None or values.stride(1) == 1 or values.size(1) == 1:
        return values
    return values.contiguous()


def _row_stride(values: Tensor | None) -> int:
    return 0 if values is None else values.stride(0)
