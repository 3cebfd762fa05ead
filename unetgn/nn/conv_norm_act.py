"""Convolution, normalization, activation; and the choice among four normalizations."""

from typing import Literal

from torch import Tensor, nn

from unetgn.nn.conv import WeightStandardizedConv, check_spatial_dims, convolution
from unetgn.nn.norm import GroupNormSiLU

NormKind = Literal["group", "instance", "layer", "batch"]


def make_norm(
    kind: NormKind,
    channels: int,
    *,
    spatial_dims: int = 2,
    num_groups: int = 32,
    eps: float = 1e-5,
    activation: str | None = None,
) -> nn.Module:
    """A normalization of (N, channels, *spatial) by its name, with a weight and a bias for each channel.

    - "group": `num_groups` groups; "instance": one group a channel; "layer": one group over (C, *spatial). All three
      are the fused core, so their statistics are those of the sample itself, in training and in evaluation.
    - "batch": `torch.nn.BatchNorm`, with running statistics.

    activation "silu" appends a SiLU, for every kind. num_groups is read by "group" alone.
    Raises ValueError where kind is another word, or num_groups does not divide the channels.
    """
    groups = {"group": num_groups, "instance": channels, "layer": 1}
    if kind in groups:
        return GroupNormSiLU(groups[kind], channels, eps, activation=activation)
    if kind != "batch":
        raise ValueError(f"normalization must be 'group', 'instance', 'layer' or 'batch', got {kind!r}")
    if activation not in (None, "silu"):
        raise ValueError(f"activation must be 'silu' or None, got {activation!r}")
    batch_norm = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[check_spatial_dims(spatial_dims) - 1]
    norm = batch_norm(channels, eps)
    return norm if activation is None else nn.Sequential(norm, nn.SiLU())


class ConvNormAct(nn.Module):
    """Convolution, then normalization, then SiLU: y = silu(norm(conv(x))).

    Shapes: (N, in_channels, *spatial) -> (N, out_channels, *spatial / stride), one, two or three spatial axes.
    `norm` is a kind of `make_norm`; `standardize_weight` takes `WeightStandardizedConv`; activation None leaves the
    SiLU out. The convolution has no bias: the normalization's own follows it.
    Raises ValueError where spatial_dims is not 1, 2 or 3, the kernel is even, or `make_norm` does.
    The order is that of Ioffe & Szegedy 2015 (arXiv 1502.03167), section 3.2; with standardized weights and groups that
    of Qiao et al. 2019 (arXiv 1903.10520).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        *,
        spatial_dims: int = 2,
        stride: int = 1,
        norm: NormKind = "group",
        num_groups: int = 32,
        activation: str | None = "silu",
        standardize_weight: bool = False,
    ) -> None:
        super().__init__()
        if standardize_weight:
            self.conv: nn.Module = WeightStandardizedConv(
                in_channels, out_channels, kernel_size, spatial_dims=spatial_dims, stride=stride, bias=False
            )
        else:
            self.conv = convolution(spatial_dims, in_channels, out_channels, kernel_size, stride=stride, bias=False)
        self.norm = make_norm(
            norm, out_channels, spatial_dims=spatial_dims, num_groups=num_groups, activation=activation
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))
