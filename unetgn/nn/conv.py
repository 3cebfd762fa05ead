"""Convolves over one, two or three spatial axes, with or without standardized weights."""

from typing import Any

import torch
from torch import Tensor, nn

from unetgn.nn.fields import check_kernel

_CONVOLUTIONS: dict[int, type[nn.Conv1d] | type[nn.Conv2d] | type[nn.Conv3d]] = {
    1: nn.Conv1d,
    2: nn.Conv2d,
    3: nn.Conv3d,
}


def check_spatial_dims(spatial_dims: int) -> int:
    """Return `spatial_dims`. Raises ValueError where it is not 1, 2 or 3."""
    if spatial_dims not in _CONVOLUTIONS:
        raise ValueError(f"spatial_dims must be 1, 2 or 3, got {spatial_dims!r}")
    return spatial_dims


def convolution(
    spatial_dims: int,
    in_channels: int,
    out_channels: int,
    kernel_size: int = 3,
    *,
    stride: int | tuple[int, ...] = 1,
    padding: int | None = None,
    bias: bool = True,
) -> nn.Module:
    """Build `torch.nn.Conv1d`, `Conv2d` or `Conv3d`. Padding None keeps the size at stride 1; kernels are odd for that.

    Shapes: (N, in_channels, *spatial) -> (N, out_channels, *spatial at stride 1).
    Raises ValueError where spatial_dims is not 1, 2 or 3, or the kernel is even.
    """
    layer = _CONVOLUTIONS[check_spatial_dims(spatial_dims)]
    check_kernel("kernel_size", kernel_size)
    padding = kernel_size // 2 if padding is None else padding
    # one stride for all axes, or one for each: torch's annotations know the two-dimensional case only
    arguments: dict[str, Any] = {"stride": stride, "padding": padding, "bias": bias}
    return layer(in_channels, out_channels, kernel_size, **arguments)


def zero_parameters(module: nn.Module) -> nn.Module:
    """Set all parameters of `module` to zero, and return it: a residual branch that starts as the identity."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
    return module


def standardize_weight(weight: Tensor, eps: float = 1e-5) -> Tensor:
    """Return W_hat = (W - mean) / sqrt(var + eps) over each output channel's weights, variance biased.

    weight: (out_channels, in_channels, *kernel) -> the same shape. Qiao et al. 2019 (arXiv 1903.10520), equation 5.
    """
    axes = tuple(range(1, weight.ndim))
    variance, mean = torch.var_mean(weight, dim=axes, keepdim=True, correction=0)
    return (weight - mean) * torch.rsqrt(variance + eps)


class WeightStandardizedConv(nn.Module):
    """Convolves with a weight that is standardized in each forward pass, over one, two or three spatial axes.

    y = conv(x, W_hat) + bias with W_hat of `standardize_weight`; parameters are named as in `torch.nn.Conv2d`.
    Shapes: (N, in_channels, *spatial) -> (N, out_channels, *spatial / stride).
    Made for batches too small for batch normalization, together with group normalization: Qiao et al. 2019
    (arXiv 1903.10520). Raises ValueError where spatial_dims is not 1, 2 or 3, or the kernel is even.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        *,
        spatial_dims: int = 2,
        stride: int = 1,
        bias: bool = True,
        eps: float = 1e-5,
    ) -> None:
        super().__init__()
        plain = convolution(spatial_dims, in_channels, out_channels, kernel_size, bias=bias)
        parameters = dict(plain.named_parameters())
        self.weight: nn.Parameter = parameters["weight"]
        self.bias: nn.Parameter | None = parameters.get("bias")
        self.stride = stride
        self.padding = kernel_size // 2
        self.eps = eps
        self.in_channels, self.out_channels, self.kernel_size = in_channels, out_channels, kernel_size
        self._convolve = (nn.functional.conv1d, nn.functional.conv2d, nn.functional.conv3d)[spatial_dims - 1]

    def forward(self, x: Tensor) -> Tensor:
        weight = standardize_weight(self.weight, self.eps)
        return self._convolve(x, weight, self.bias, stride=self.stride, padding=self.padding)

    def extra_repr(self) -> str:
        sizes = f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}"
        return f"{sizes}, bias={self.bias is not None}, eps={self.eps}"
