"""Checks the inputs of the U-Net, before torch complains in its own words or broadcasts without one.

All checks look at shapes and dtypes alone: they cost nothing on a GPU and leave no trace in a compiled graph.
"""

from collections.abc import Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from unetgn.nn.embedding import feature_dtype
from unetgn.unet.config import UNetConfig


def check_tensors(**given: Any) -> None:
    """Raise TypeError, naming the argument, where one is neither a tensor nor None."""
    for name, value in given.items():
        if isinstance(value, torch.fx.Proxy):
            raise TypeError(
                f"torch.fx.symbolic_trace cannot follow this network, which looks at the shape of {name}; "
                "torch.export.export and make_fx can"
            )
        if value is not None and not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")


def as_timesteps(timestep: Tensor | float | int, batch: int, sample: Tensor) -> Tensor:
    """Return (N,) timesteps on the sample's device, from a number, one element or N. Raises TypeError for else."""
    if not isinstance(timestep, Tensor):
        if not isinstance(timestep, Real):
            raise TypeError(f"timestep must be a number or a tensor, got {timestep!r}")
        timestep = torch.tensor(timestep, dtype=feature_dtype(sample.dtype), device=sample.device)
    timesteps = timestep.to(sample.device).reshape(-1)
    count = timesteps.shape[0]
    if count != batch and count != 1:  # `in` would compare symbolic sizes by identity
        raise ValueError(f"timestep must be a number or one for each of {batch} samples, got {count}")
    return timesteps.expand(batch)


def check_sample(sample: Tensor, config: UNetConfig) -> None:
    """Raise ValueError where `sample` is not (N, in_channels, *spatial) with at least one pixel."""
    if sample.ndim != 2 + config.spatial_dims or sample.shape[1] != config.sample_channels:
        axes = ", ".join("DHW"[-config.spatial_dims :])
        raise ValueError(f"sample must be (N, {config.sample_channels}, {axes}), got {tuple(sample.shape)}")
    if min(sample.shape[2:]) == 0:
        raise ValueError(f"sample must have at least one pixel along each axis, got {tuple(sample.shape)}")


def is_other_dtype(tensor: Tensor, dtype: torch.dtype) -> bool:
    """Return True where `tensor` cannot meet weights of `dtype`; under autocast the layers convert it."""
    return tensor.dtype != dtype and not torch.is_autocast_enabled(tensor.device.type)


def check_rows(name: str, rows: Tensor, batch: int, width: int | None, field: str) -> Tensor:
    """Return `rows`. Raises ValueError where they are not (batch, width); `field` names what sets the width."""
    if rows.ndim != 2 or rows.shape[0] != batch or rows.shape[1] != width:
        raise ValueError(f"{name} must be ({batch}, {width}), its width being {field}, got {tuple(rows.shape)}")
    return rows


def add_residuals(skips: Sequence[Tensor], residuals: Sequence[Tensor]) -> list[Tensor]:
    """Add ControlNet's residuals to the skip connections. Raises ValueError where their number or a shape differs."""
    name = "down_block_additional_residuals"
    if len(residuals) != len(skips):
        raise ValueError(f"{name} must be one for each of {len(skips)} skip connections, got {len(residuals)}")
    pairs = zip(skips, residuals, strict=True)
    return [add_residual(skip, residual, f"{name}[{index}]") for index, (skip, residual) in enumerate(pairs)]


def add_residual(hidden: Tensor, residual: Tensor, name: str) -> Tensor:
    """Return hidden + residual. Raises ValueError, naming the argument `name`, where its shape is another."""
    check_tensors(**{name: residual})
    if residual.shape != hidden.shape:
        raise ValueError(f"{name} must be {tuple(hidden.shape)}, got {tuple(residual.shape)}")
    return hidden + residual
