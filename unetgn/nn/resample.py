"""Halves and doubles the resolution: by convolution, average or nearest, or filter taps; any size of input.

What is only a copy (padded, enlarged, and in decoders concatenated) is not kept for the backward pass, which makes it
again: `remade` and `unkept`. The encoder keeps a skip connection anyway.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from contextvars import ContextVar, Token
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F

from unetgn.nn.conv import check_spatial_dims, convolution
from unetgn.nn.fields import check_choice, check_each, freeze_lists
from unetgn.ops.dispatch import is_transformed

ResampleKind = Literal["conv", "resblock", "plain"]
PaddingKind = Literal["both", "end"]
BOX = (1.0, 1.0)
Hooks = tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]  # that pack what is saved, and unpack it
_AVERAGES = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)
_CONVOLUTIONS = (F.conv1d, F.conv2d, F.conv3d)
_TRANSPOSED = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)


@dataclass(frozen=True)
class ResampleConfig:
    """Configures how a U-Net changes resolution between levels.

    Raises ValueError where a word is unknown, taps are not an even number of positive sum, or a stride is not 1 or 2.
    """

    kind: ResampleKind = "conv"
    """Resamples with "conv" by a strided 3x3 convolution down, and by nearest and a 3x3 convolution up (DDPM, Stable
    Diffusion); with "resblock" inside a residual block (ADM, EDM); with "plain" by mean and nearest, no parameters.
    """
    padding: PaddingKind = "both"
    """Pads the strided convolution by one at "both" sides, or only at the "end" (DDPM's original code)."""
    taps: tuple[float, ...] = BOX
    """Filters in "resblock" and "plain"; (1, 1) is mean and nearest, (1, 3, 3, 1) NCSN++'s."""
    strides: tuple[int, ...] | None = None
    """Sets the factor for each spatial axis; None is 2 for all."""

    def __post_init__(self) -> None:
        freeze_lists(self)
        check_choice("resample.kind", self.kind, get_args(ResampleKind))
        check_choice("resample.padding", self.padding, get_args(PaddingKind))
        check_taps(self.taps, self.strides)


def check_taps(taps: Sequence[float], strides: Sequence[int] | None) -> None:
    """Raise ValueError where taps are not an even number of positive sum, or do not go with the strides.

    Raises TypeError where either is one number instead of several.
    """
    check_each("resample.taps", taps, "tap")
    check_each("resample.strides", strides, "axis")
    if len(taps) < 2 or len(taps) % 2 or not 0 < sum(taps) < math.inf:
        raise ValueError(f"resample.taps must be an even number of taps with a positive sum, got {tuple(taps)}")
    if strides is not None and not set(strides) <= {1, 2}:
        raise ValueError(f"resample.strides must be 1 or 2 for each axis, got {tuple(strides)}")
    if tuple(taps) != BOX and strides is not None and set(strides) != {2}:
        raise ValueError(f"resample.taps={tuple(taps)} work with stride 2 along all axes, got {tuple(strides)}")


def axis_strides(strides: Sequence[int] | None, spatial_dims: int) -> tuple[int, ...]:
    """Return the factor for each axis; None is 2. Raises ValueError where `strides` names another number of axes."""
    strides = (2,) * check_spatial_dims(spatial_dims) if strides is None else tuple(strides)
    if len(strides) != spatial_dims:
        raise ValueError(f"resample.strides={strides} must name one factor for each of {spatial_dims} axes")
    return strides


def filter_kernel(taps: Sequence[float], spatial_dims: int) -> Tensor:
    """Compute the outer product of `taps` over the axes, of sum 1: (1, 1, *[len(taps)] * spatial_dims)."""
    line = torch.tensor(taps, dtype=torch.float64)
    kernel = line
    for _ in range(spatial_dims - 1):
        kernel = kernel[..., None] * line
    return (kernel / kernel.sum()).to(torch.get_default_dtype())[None, None]


def _enlarged_size(x: Tensor, strides: Sequence[int], size: Sequence[int] | None, *, spare: int) -> list[int]:
    """Return `size`, or the usual one for None. Raises where it does not fit, by more than `spare` pixels an axis."""
    usual = [length * stride for length, stride in zip(x.shape[2:], strides, strict=True)]
    if size is None:
        return usual
    if isinstance(size, int):
        raise TypeError(f"size must name one length for each of {len(strides)} axes, got {size}")
    if len(size) != len(strides):
        raise ValueError(f"size={tuple(size)} must name one length for each of {len(strides)} axes")
    largest = [length + spare * (stride - 1) for length, stride in zip(usual, strides, strict=True)]
    if any(length > most for length, most in zip(size, largest, strict=True)):
        raise ValueError(f"cannot upsample {tuple(x.shape[2:])} to {tuple(size)}: {tuple(largest)} is the largest")
    return list(size)


def _nearest(x: Tensor, size: Sequence[int], strides: Sequence[int]) -> Tensor:
    """Enlarge x by the nearest neighbour to `size`, which is about `strides` times its own.

    On a CPU, eager and contiguous, copies take a fraction of the time of PyTorch's own kernel.
    """
    if x.device.type == "cpu" and not torch.compiler.is_compiling() and x.is_contiguous():
        pixels = zip(size, x.shape[2:], strides, strict=True)
        if all(length == before * stride for length, before, stride in pixels):
            return _repeat_pixels(x, strides)
    return F.interpolate(x, size=size, mode="nearest")


def _repeat_pixels(x: Tensor, strides: Sequence[int]) -> Tensor:
    """Repeat each pixel `strides` times along its axes, by copies.

    The last axis comes first: its pixels lie side by side, so that it is the slow one, and x is smallest then.
    """
    for axis, stride in reversed(list(enumerate(strides, start=2))):
        if stride > 1:
            x = torch.stack([x] * stride, axis + 1).flatten(axis, axis + 1)
    return x


class Resample(nn.Module):
    """Halves ("down") or doubles ("up") each spatial axis without learned parameters.

    Shapes: (N, C, *spatial) -> (N, C, *ceil(spatial / 2)) down; up to 2 * spatial, or to `size`.
    Taps (1, 1) take the mean of each pair, or the nearest neighbour; an odd last pixel is a mean of itself. Longer taps
    filter with zeros beyond the border (StyleGAN2's upfirdn, as in NCSN++), in a buffer `kernel` that is part of the
    state dict. `strides` leaves out axes with 1. A given size may be one pixel more than twice the input without longer
    taps (a size that was halved and rounded down comes back), and at most twice with them; else a ValueError says so.
    Song et al. 2021 (arXiv 2011.13456), appendix H; Karras et al. 2020 (arXiv 1912.04958), appendix B.
    """

    kernel: Tensor | None

    def __init__(
        self,
        direction: Literal["down", "up"],
        *,
        spatial_dims: int = 2,
        strides: Sequence[int] | None = None,
        taps: Sequence[float] = BOX,
    ) -> None:
        super().__init__()
        check_choice("direction", direction, ("down", "up"))
        check_taps(taps, strides)
        self.direction = direction
        self.spatial_dims = spatial_dims
        self.strides = axis_strides(strides, spatial_dims)
        self.taps = tuple(taps)
        self.margin = (len(taps) - 1) // 2
        self.register_buffer("kernel", None if tuple(taps) == BOX else filter_kernel(taps, spatial_dims))

    def forward(self, x: Tensor, *, size: Sequence[int] | None = None) -> Tensor:
        if self.direction == "down":
            if size is not None:
                raise ValueError(f"size={size} is for upsampling; downsampling halves what it is given")
            return self._mean(x) if self.kernel is None else self._filter_down(x, self.kernel)
        size = _enlarged_size(x, self.strides, size, spare=1 if self.kernel is None else 0)
        return _nearest(x, size, self.strides) if self.kernel is None else self._filter_up(x, self.kernel, size)

    def _mean(self, x: Tensor) -> Tensor:
        return _AVERAGES[self.spatial_dims - 1](x, self.strides, self.strides, ceil_mode=True)

    def _filter_down(self, x: Tensor, kernel: Tensor) -> Tensor:
        padding = []
        for length in reversed(x.shape[2:]):  # one more zero behind an odd length, so that the result is rounded up
            padding += [self.margin, self.margin + length % 2]
        weight = kernel.to(x.dtype).expand(x.shape[1], *kernel.shape[1:])
        return _CONVOLUTIONS[self.spatial_dims - 1](F.pad(x, padding), weight, stride=2, groups=x.shape[1])

    def _filter_up(self, x: Tensor, kernel: Tensor, size: Sequence[int]) -> Tensor:
        weight = (kernel * 2**self.spatial_dims).to(x.dtype).expand(x.shape[1], *kernel.shape[1:])
        upsample = _TRANSPOSED[self.spatial_dims - 1]
        doubled = upsample(x, weight, stride=2, padding=self.margin, groups=x.shape[1])
        for axis, length in enumerate(size, start=2):
            doubled = doubled.narrow(axis, 0, length)
        return doubled

    def extra_repr(self) -> str:
        return f"{self.direction!r}, strides={self.strides}, taps={self.taps}"


class Downsample(nn.Module):
    """Convolves 3x3 with stride 2: (N, C, *spatial) -> (N, out_channels, *spatial / 2).

    Padding "both" rounds an odd size up. "end" (zeros behind only, as in DDPM's original code) rounds it down; it needs
    two pixels along each axis and an axis that is halved, else a ValueError says so. `strides` leaves out axes with 1.
    Ho et al. 2020 (arXiv 2006.11239), appendix B; padding at the end is that of the authors' code
    (hojonathanho/diffusion, diffusion_tf/models/unet.py).
    """

    def __init__(
        self,
        channels: int,
        out_channels: int | None = None,
        *,
        spatial_dims: int = 2,
        strides: Sequence[int] | None = None,
        padding: PaddingKind = "both",
    ) -> None:
        super().__init__()
        check_choice("resample.padding", padding, get_args(PaddingKind))
        check_taps(BOX, strides)
        self.pad_end = padding == "end"
        self.strides = axis_strides(strides, spatial_dims)
        if self.pad_end and 2 not in self.strides:
            raise ValueError(f"resample.padding='end' is for axes that are halved; strides={self.strides} halve none")
        margin = 0 if self.pad_end else 1
        width = channels if out_channels is None else out_channels
        self.conv = convolution(spatial_dims, channels, width, stride=self.strides, padding=margin)

    def forward(self, x: Tensor) -> Tensor:
        if not self.pad_end:
            return self.conv(x)
        if min(x.shape[2:]) < 2:
            raise ValueError(f"resample.padding='end' cannot halve {tuple(x.shape[2:])} pixels; use 'both'")
        padding: list[int] = []
        for stride in reversed(self.strides):
            padding += [0, 1] if stride == 2 else [1, 1]
        with remade(partial(F.pad, pad=padding), x) as padded, unkept(padded):
            return self.conv(padded)

    def extra_repr(self) -> str:
        return f"strides={self.strides}, padding={'end' if self.pad_end else 'both'!r}"


class Upsample(nn.Module):
    """Enlarges to twice the size by nearest neighbour, or to a given size, then convolves 3x3.

    Shapes: (N, C, *spatial) -> (N, out_channels, *size), size 2 * spatial unless given, at most one pixel more.
    `strides` leaves out axes with 1. The backward pass enlarges x again: the larger one is not kept.
    Ho et al. 2020 (arXiv 2006.11239), appendix B; nearest neighbour, then convolution: Odena et al. 2016
    (doi 10.23915/distill.00003).
    """

    def __init__(
        self,
        channels: int,
        out_channels: int | None = None,
        *,
        spatial_dims: int = 2,
        strides: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        check_taps(BOX, strides)
        self.strides = axis_strides(strides, spatial_dims)
        self.conv = convolution(spatial_dims, channels, channels if out_channels is None else out_channels)

    def forward(self, x: Tensor, *, size: Sequence[int] | None = None) -> Tensor:
        size = _enlarged_size(x, self.strides, size, spare=1)
        with remade(partial(_nearest, size=size, strides=self.strides), x) as enlarged, unkept(enlarged):
            return self.conv(enlarged)

    def extra_repr(self) -> str:
        return f"strides={self.strides}"


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
