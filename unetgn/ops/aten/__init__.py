"""Computes the operator with PyTorch's own kernels: for CPU, MPS and every device without Triton.

Two ways lead through it, forward and backward:

    native     PyTorch's group norm, where it keeps the layout and is exact and fast. PyTorch takes a weight and a bias
               for each channel (C,) only; scale and shift (N, C) differ between samples. So with these a contiguous
               (N, C, L) is viewed as one sample of N * C channels in N * G groups, which has the same groups.
    plain      tensor operations, for any layout; forward they are centred, for any mean

16-bit tensors are computed in float32, so that z is rounded once and cannot overflow on the way.
"""

from unetgn.ops.aten.differentiate import backward
from unetgn.ops.aten.normalize import forward

__all__ = ["backward", "forward"]
