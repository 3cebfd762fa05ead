"""Says in which memory layout, and in which dtype, the operator works on a tensor.

An implementation is handed dense tensors in one of two layouts:

    contiguous      (N, C, *spatial), last axis fastest
    channels_last   the channel axis fastest, for two and three spatial axes

Where both readings fit (one channel, or one spatial element) the answer is *contiguous*: the elements lie in the same
order either way, and the kernels of that layout need the fewest assumptions.
"""

import torch
from torch import Tensor

CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}

ACCUMULATION_DTYPE = {  # of statistics and arithmetic, by the dtype of x
    torch.float16: torch.float32,
    torch.bfloat16: torch.float32,
    torch.float32: torch.float32,
    torch.float64: torch.float64,
}


def memory_format_of(x: Tensor) -> torch.memory_format:
    """Return the layout in which the operator works on x (N, C, *spatial), and that of its result.

    It is `torch.contiguous_format`, `torch.channels_last` (four axes) or `torch.channels_last_3d` (five). A tensor
    that is dense in neither layout (a slice, an expanded or a transposed tensor) is read as channels_last where its
    channels are neighbours in memory, else as contiguous.
    """
    if x.is_contiguous():
        return torch.contiguous_format
    channels_last = CHANNELS_LAST.get(x.dim(), torch.contiguous_format)
    return channels_last if x.stride(1) == 1 and x.size(1) > 1 else torch.contiguous_format


def is_channels_last(x: Tensor) -> bool:
    """Return True where the operator works on x with the channel axis fastest."""
    return memory_format_of(x) != torch.contiguous_format
