"""Builds convolution, normalization and activation, and chooses among four normalizations."""

from typing import Literal, get_args

from torch import Tensor, nn

from unetgn.nn.conv import WeightStandardizedConv, check_spatial_dims, convolution
from unetgn.nn.fields import check_choice
from unetgn.nn.norm import GroupNormSiLU
from unetgn.ops.checks import check_activation, check_eps

NormKind = Literal["group", "instance", "layer", "batch"]


def make_norm(
    kind: NormKind,
    channels: int,
    *,
    spatial_dims: int | None = None,
    num_groups: int | None = None,
    eps: float = 1e-5,
    activation: str | None = None,
) -> nn.Module:
    """Build a normalization of (N, channels, *spatial) by its name, with a weight and a bias for each channel.

    - "group": `num_groups` groups, 32 unless given (Wu & He 2018, arXiv 1803.08494, equation 7);
    - "instance": one group a channel (Ulyanov et al. 2016, arXiv 1607.08022, section 2);
    - "layer": one group over (C, *spatial) (Ba et al. 2016, arXiv 1607.06450, section 3);
    - "batch": `torch.nn.BatchNorm1d` to `3d`, of `spatial_dims` axes, 2 unless given, with running statistics (Ioffe &
      Szegedy 2015, arXiv 1502.03167, algorithm 1).

    The first three are the fused core: statistics are those of the sample itself, in training and in evaluation.
    activation "silu" appends a SiLU, for every kind.
    Raises ValueError where kind is another word, num_groups does not divide the channels or is given to another kind
    than "group", spatial_dims is given to another than "batch" (the others work over any number of axes), or eps is
    negative or not finite.
    """
    check_choice("normalization", kind, get_args(NormKind))
    if num_groups is not None and kind != "group":
        raise ValueError(f"num_groups={num_groups} is for normalization 'group'; {kind!r} has no such choice")
    if spatial_dims is not None and kind != "batch":
        raise ValueError(f"spatial_dims={spatial_dims} is for normalization 'batch'; {kind!r} takes any number of axes")
    if kind != "batch":
        groups = {"group": 32 if num_groups is None else num_groups, "instance": channels, "layer": 1}
        return GroupNormSiLU(groups[kind], channels, eps, activation=activation)
    check_activation(activation)
    check_eps(eps)
    axes = check_spatial_dims(2 if spatial_dims is None else spatial_dims)
    batch_norm = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[axes - 1]
    norm = batch_norm(channels, eps)
    return norm if activation is None else nn.Sequential(norm, nn.SiLU())


class ConvNormAct(nn.Module):
    """Convolves, normalizes and applies SiLU: y = silu(norm(conv(x))).

    Shapes: (N, in_channels, *spatial) -> (N, out_channels, *spatial / stride), one, two or three spatial axes.
    `norm` and `num_groups` are those of `make_norm`; `standardize_weight` takes `WeightStandardizedConv`; activation
    None leaves the SiLU out. The convolution has no bias: the normalization's own follows it.
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
        num_groups: int | None = None,
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
        axes = spatial_dims if norm == "batch" else None
        self.norm = make_norm(norm, out_channels, spatial_dims=axes, num_groups=num_groups, activation=activation)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))
