"""Leaves out divisions by 1, which blocks write for the sake of a factor that few networks set."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def divide(x: Any, by: Any) -> Any:
    """Compute x / by; that is x itself where x is a tensor of floating-point numbers and `by` the number 1.

    x has to be a result that nothing else holds, such as a sum: no other tensor is then changed where this one is. The
    bits are those of the division, which would read and write all of x, forward and backward.
    """
    is_one = type(by) in (int, float) and by == 1
    return x if is_one and isinstance(x, Tensor) and x.is_floating_point() else x / by
