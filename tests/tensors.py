"""Draws tensors and weights for tests; each is a function of its seed alone."""

from typing import TypeVar

import torch
from torch import Tensor, nn

Module = TypeVar("Module", bound=nn.Module)


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Draw a normal tensor."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def randomized(module: Module, seed: int = 0, *, dtype: torch.dtype = torch.float32) -> Module:
    """Draw every parameter anew, so that none is zero or one by initialisation, and convert to `dtype`.

    Matrices and kernels keep the size of what they map; vectors are around 1.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            drawn = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(drawn / max(1, parameter[0].numel()) ** 0.5 if parameter.ndim > 1 else 1 + 0.1 * drawn)
    return module.to(dtype)
