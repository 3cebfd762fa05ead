"""What the U-Net is given, checked before torch complains in words of its own or broadcasts without a word.

All checks look at shapes and dtypes alone, which costs nothing on a GPU and leaves no trace in a compiled graph.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from unetgn.unet_config import UNetConfig


def check_sample(sample: Tensor, config: UNetConfig) -> None:
    """Raise ValueError where `sample` is not (N, in_channels, *spatial) with at least one pixel."""
    if sample.ndim != 2 + config.spatial_dims or sample.shape[1] != config.in_channels:
        axes = ", ".join("DHW"[-config.spatial_dims :])
        raise ValueError(f"sample must be (N, {config.in_channels}, {axes}), got {tuple(sample.shape)}")
    if min(sample.shape[2:]) == 0:
        raise ValueError(f"sample must have at least one pixel along each axis, got {tuple(sample.shape)}")


def is_other_dtype(tensor: Tensor, dtype: torch.dtype) -> bool:
    """Whether `tensor` cannot meet weights of `dtype`; under autocast the layers convert it."""
    return tensor.dtype != dtype and not torch.is_autocast_enabled(tensor.device.type)


def check_rows(name: str, rows: Tensor, batch: int, width: int | None, field: str) -> Tensor:
    """`rows` themselves. Raises ValueError where they are not (batch, width), `field` being what sets the width."""
    if rows.ndim != 2 or rows.shape[0] != batch or rows.shape[1] != width:
        raise ValueError(f"{name} must be ({batch}, {width}), its width being {field}, got {tuple(rows.shape)}")
    return rows


def add_residuals(hidden: Sequence[Tensor], residuals: Sequence[Tensor], place: str) -> list[Tensor]:
    """hidden + residuals, one by one. Raises ValueError where their number or a shape differs."""
    if len(residuals) != len(hidden):
        raise ValueError(f"{len(hidden)} skip connections need as many additional residuals, got {len(residuals)}")
    for index, (tensor, residual) in enumerate(zip(hidden, residuals, strict=True)):
        if residual.shape != tensor.shape:
            raise ValueError(
                f"the additional residual {index} of the {place} must be {tuple(tensor.shape)}, "
                f"got {tuple(residual.shape)}"
            )
    return [tensor + residual for tensor, residual in zip(hidden, residuals, strict=True)]
