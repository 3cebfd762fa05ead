"""Memory layouts: which ones an implementation meets, and how values of channels and groups spread over a tensor.

An implementation is handed dense tensors in one of two layouts:

    contiguous      (N, C, *spatial), last axis fastest
    channels_last   the channel axis fastest, for two and three spatial axes

Where both readings fit (one channel, or one spatial element) the answer is *contiguous*: the elements lie in the same
order either way, and the kernels of that layout need the fewest assumptions.
"""

from functools import lru_cache

import torch
from torch import Tensor

CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def memory_format_of(x: Tensor) -> torch.memory_format:
    """The layout in which the operator works on x (N, C, *spatial) and in which it returns its result.

    Returns `torch.contiguous_format`, `torch.channels_last` (four axes) or `torch.channels_last_3d` (five). A tensor
    that is dense in neither layout (a slice, an expanded or a transposed tensor) is read as channels_last where its
    channels are neighbours in memory, else as contiguous.
    """
    if x.is_contiguous():
        return torch.contiguous_format
    channels_last = CHANNELS_LAST.get(x.dim(), torch.contiguous_format)
    return channels_last if x.stride(1) == 1 and x.size(1) > 1 else torch.contiguous_format


def is_channels_last(x: Tensor) -> bool:
    """True where the operator works on x with the channel axis fastest."""
    return memory_format_of(x) != torch.contiguous_format


@lru_cache(maxsize=1024)
def channels_last_strides(shape: torch.Size) -> tuple[int, ...]:
    """The strides of a dense channels_last tensor of that shape.

    Those of an axis of one element are arbitrary in a tensor, and yet PyTorch's own kernels read the layout from them.
    """
    strides, step = [], shape[1]
    for size in reversed(shape[2:]):
        strides.append(step)
        step *= size
    return step, 1, *reversed(strides)


def accumulation_dtype(x: Tensor) -> torch.dtype:
    """The dtype of statistics and arithmetic: float64 for a float64 x, float32 for every other one."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def of_channel(values: Tensor, num_channels: int) -> Tensor:
    """Repeat values of groups (N, G) for each channel of the group: (N, C)."""
    n, num_groups = values.shape
    return values.unsqueeze(2).expand(n, num_groups, num_channels // num_groups).reshape(n, num_channels)
