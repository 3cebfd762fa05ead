"""Halves and doubles the resolution: by convolution, average or nearest, or filter taps; any size of input."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unetgn.nn.conv import check_spatial_dims, convolution
from unetgn.nn.fields import check_choice, check_each, freeze_lists
from unetgn.nn.remaking import remade, unkept

ResampleKind = Literal["conv", "resblock", "plain"]
PaddingKind = Literal["both", "end"]
BOX = (1.0, 1.0)
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


class InputBranch(nn.Module):
    """Computes (x + filter(conv(image))) / sqrt(2): the running image joins the main path, as in NCSN++.

    The 3x3 convolution is padded so that the filter, which halves the image, needs no border of its own.
    Shapes: x (N, out_channels, *ceil(spatial / 2)), image (N, image_channels, *spatial) -> x's shape.
    Song et al. 2021 (arXiv 2011.13456), appendix H; the order of operations is that of NVlabs/edm.
    """

    kernel: Tensor

    def __init__(
        self, image_channels: int, out_channels: int, *, spatial_dims: int = 2, taps: Sequence[float] = BOX
    ) -> None:
        super().__init__()
        check_taps(taps, None)
        self.margin = (len(taps) - 1) // 2
        self.conv = convolution(spatial_dims, image_channels, out_channels, padding=1 + self.margin)
        self.register_buffer("kernel", filter_kernel(taps, spatial_dims))
        self.taps = tuple(taps)
        self._convolve = _CONVOLUTIONS[spatial_dims - 1]

    def forward(self, x: Tensor, image: Tensor) -> Tensor:
        image = self.conv(image)
        padding: list[int] = []
        for length in reversed(image.shape[2:]):  # padded by the even number 2 * margin: odd where the image was
            padding += [0, length % 2]
        kernel = self.kernel.to(image.dtype).expand(image.shape[1], *self.kernel.shape[1:])
        image = self._convolve(F.pad(image, padding), kernel, stride=2, groups=image.shape[1])
        return (x + image) * 0.5**0.5

    def extra_repr(self) -> str:
        return f"taps={self.taps}"
