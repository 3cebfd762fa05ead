"""Halving and doubling the resolution: convolution, average or nearest, filter taps; any size of input."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unetgn.nn.checkpointing import recomputed
from unetgn.nn.conv import check_spatial_dims, convolution

ResampleKind = Literal["conv", "resblock", "plain"]
_AVERAGES = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)
_CONVOLUTIONS = (F.conv1d, F.conv2d, F.conv3d)
_TRANSPOSED = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)
_BOX = (1.0, 1.0)


@dataclass(frozen=True)
class ResampleConfig:
    """How a U-Net changes resolution between levels.

    Raises ValueError where the taps are not an even number of positive sum, or a stride is not 1 or 2.
    """

    kind: ResampleKind = "conv"
    """With "conv", a strided 3x3 convolution down, nearest and a 3x3 convolution up (DDPM, Stable Diffusion); with
    "resblock", inside a residual block (ADM, EDM); with "plain", mean and nearest without parameters.
    """
    padding: Literal["both", "end"] = "both"
    """Of the strided convolution: "both" sides by one, or only the "end" (DDPM's original code)."""
    taps: tuple[float, ...] = _BOX
    """The filter of "resblock" and "plain"; (1, 1) is mean and nearest, (1, 3, 3, 1) NCSN++'s."""
    strides: tuple[int, ...] | None = None
    """The factor for each spatial axis; None is 2 for all."""

    def __post_init__(self) -> None:
        if len(self.taps) < 2 or len(self.taps) % 2 or sum(self.taps) <= 0:
            raise ValueError(f"resample.taps must be an even number of taps with a positive sum, got {self.taps}")
        if self.strides is not None and not set(self.strides) <= {1, 2}:
            raise ValueError(f"resample.strides must be 1 or 2 for each axis, got {self.strides}")
        if self.taps != _BOX and self.strides is not None and set(self.strides) != {2}:
            raise ValueError(f"resample.taps={self.taps} work with stride 2 along all axes, got {self.strides}")

    def axis_strides(self, spatial_dims: int) -> tuple[int, ...]:
        """The factor for each axis. Raises ValueError where `strides` names another number of axes."""
        strides = (2,) * spatial_dims if self.strides is None else self.strides
        if len(strides) != spatial_dims:
            raise ValueError(f"resample.strides={strides} must name one factor for each of {spatial_dims} axes")
        return strides


def filter_kernel(taps: Sequence[float], spatial_dims: int) -> Tensor:
    """The normalized outer product of `taps` over the axes: (1, 1, *[len(taps)] * spatial_dims), of sum 1."""
    line = torch.tensor(taps, dtype=torch.float64)
    kernel = line
    for _ in range(spatial_dims - 1):
        kernel = kernel[..., None] * line
    return (kernel / kernel.sum()).to(torch.get_default_dtype())[None, None]


class Resample(nn.Module):
    """Halves ("down") or doubles ("up") each spatial axis without learned parameters.

    Shapes: (N, C, *spatial) -> (N, C, *ceil(spatial / 2)) down; up to 2 * spatial, or to `size`.
    Taps (1, 1) take the mean of each pair, or the nearest neighbour; an odd last pixel is a mean of itself. Longer taps
    filter with zeros beyond the border (StyleGAN2's upfirdn, as in NCSN++), in a buffer `kernel` that is part of the
    state dict. A given size that is larger than twice the input is an error.
    """

    kernel: Tensor | None

    def __init__(
        self, direction: Literal["down", "up"], *, spatial_dims: int = 2, config: ResampleConfig | None = None
    ) -> None:
        super().__init__()
        config = config or ResampleConfig()
        if direction not in ("down", "up"):
            raise ValueError(f"direction must be 'down' or 'up', got {direction!r}")
        self.direction = direction
        self.spatial_dims = check_spatial_dims(spatial_dims)
        self.strides = config.axis_strides(spatial_dims)
        self.margin = (len(config.taps) - 1) // 2
        filtered = config.taps != _BOX
        self.register_buffer("kernel", filter_kernel(config.taps, spatial_dims) if filtered else None)

    def forward(self, x: Tensor, *, size: Sequence[int] | None = None) -> Tensor:
        if self.direction == "down":
            if size is not None:
                raise ValueError(f"size={tuple(size)} is for upsampling; downsampling halves what it is given")
            return self._mean(x) if self.kernel is None else self._filter_down(x, self.kernel)
        target = [length * stride for length, stride in zip(x.shape[2:], self.strides, strict=True)]
        size = target if size is None else list(size)
        if self.kernel is None:
            return F.interpolate(x, size=size, mode="nearest")
        return self._filter_up(x, self.kernel, size)

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
            if length > doubled.shape[axis]:
                raise ValueError(f"cannot upsample {tuple(x.shape[2:])} by filter taps to {tuple(size)}")
            doubled = doubled.narrow(axis, 0, length)
        return doubled

    def extra_repr(self) -> str:
        return f"{self.direction}, strides={self.strides}"


class Downsample(nn.Module):
    """A 3x3 convolution with stride 2: (N, C, *spatial) -> (N, out_channels, *spatial / 2).

    Padding "both" rounds an odd size up; "end" (zeros behind only, as in DDPM's original code) rounds it down and needs
    at least two pixels along each axis, else a ValueError says so.
    """

    def __init__(
        self,
        channels: int,
        out_channels: int | None = None,
        *,
        spatial_dims: int = 2,
        config: ResampleConfig | None = None,
    ) -> None:
        super().__init__()
        config = config or ResampleConfig()
        self.pad_end = config.padding == "end"
        self.strides = config.axis_strides(spatial_dims)
        padding = 0 if self.pad_end else 1
        self.conv = convolution(spatial_dims, channels, out_channels or channels, stride=self.strides, padding=padding)

    def forward(self, x: Tensor) -> Tensor:
        if self.pad_end:
            if min(x.shape[2:]) < 2:
                raise ValueError(f"resample.padding='end' cannot halve {tuple(x.shape[2:])} pixels; use 'both'")
            padding: list[int] = []
            for stride in reversed(self.strides):
                padding += [0, 1] if stride == 2 else [1, 1]
            x = F.pad(x, padding)
        return self.conv(x)


class Upsample(nn.Module):
    """Nearest neighbour to twice the size, or to a given size, then a 3x3 convolution.

    Shapes: (N, C, *spatial) -> (N, out_channels, *size), size 2 * spatial unless given.
    `recompute` enlarges the input again in the backward pass instead of keeping it.
    """

    recompute = False

    def __init__(
        self,
        channels: int,
        out_channels: int | None = None,
        *,
        spatial_dims: int = 2,
        config: ResampleConfig | None = None,
    ) -> None:
        super().__init__()
        strides = (config or ResampleConfig()).strides
        self.enlarge = Resample("up", spatial_dims=spatial_dims, config=ResampleConfig(strides=strides))
        self.conv = convolution(spatial_dims, channels, out_channels or channels)

    def forward(self, x: Tensor, *, size: Sequence[int] | None = None) -> Tensor:
        return recomputed(lambda small: self.conv(self.enlarge(small, size=size)), x, enabled=self.recompute)


class InputBranch(nn.Module):
    """NCSN++'s residual input branch: the running image, convolved and halved, joins the main path.

    (x + filter(conv(image))) / sqrt(2), a 3x3 convolution padded so that the filter needs no border of its own.
    Shapes: x (N, out_channels, *ceil(spatial / 2)), image (N, image_channels, *spatial) -> x's shape.
    Song et al. 2021 (arXiv 2011.13456), appendix H; the order of operations is that of NVlabs/edm.
    """

    kernel: Tensor

    def __init__(
        self, image_channels: int, out_channels: int, *, spatial_dims: int = 2, config: ResampleConfig | None = None
    ) -> None:
        super().__init__()
        taps = (config or ResampleConfig()).taps
        self.margin = (len(taps) - 1) // 2
        self.conv = convolution(spatial_dims, image_channels, out_channels, padding=1 + self.margin)
        self.register_buffer("kernel", filter_kernel(taps, spatial_dims))
        self._convolve = _CONVOLUTIONS[spatial_dims - 1]

    def forward(self, x: Tensor, image: Tensor) -> Tensor:
        image = self.conv(image)
        padding: list[int] = []
        for length in reversed(image.shape[2:]):  # padded by the even number 2 * margin: odd where the image was
            padding += [0, length % 2]
        kernel = self.kernel.to(image.dtype).expand(image.shape[1], *self.kernel.shape[1:])
        image = self._convolve(F.pad(image, padding), kernel, stride=2, groups=image.shape[1])
        return (x + image) * 0.5**0.5
