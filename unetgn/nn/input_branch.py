"""Lets the image, smaller with each level, join the main path of an encoder."""

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from unetgn.nn.conv import convolution
from unetgn.nn.resample import BOX, check_taps, filter_kernel

_CONVOLUTIONS = (F.conv1d, F.conv2d, F.conv3d)


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
