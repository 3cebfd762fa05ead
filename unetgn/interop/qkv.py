"""Unpacks query, key and value rows: three orders are in use, and no file says which is its own.

A packed projection has 3 * heads * width rows. Their order is (q/k/v, head, width) in guided-diffusion's "new" order,
(head, q/k/v, width) in its legacy order, which CompVis shares, and (head, width, q/k/v) in EDM.
"""

from collections.abc import Callable
from typing import Literal

from torch import Tensor

Order = Literal["new", "legacy", "edm"]


def unpack(order: Order, heads: int, part: Literal[0, 1, 2]) -> Callable[[Tensor], Tensor]:
    """Return a function from packed rows to those of the query (0), key (1) or value (2), in the order (head, width).

    Weights (3C, C, 1, ...) become (C, C); biases (3C,) become (C,).
    """

    def rows(packed: Tensor) -> Tensor:
        flat = packed.flatten(1) if packed.ndim > 1 else packed
        tail = flat.shape[1:]
        if order == "new":
            return flat.view(3, -1, *tail)[part]
        if order == "legacy":
            return flat.view(heads, 3, -1, *tail)[:, part].flatten(0, 1)
        return flat.view(heads, -1, 3, *tail)[:, :, part].flatten(0, 1)

    return rows


def as_matrix(weight: Tensor) -> Tensor:
    """Turn the weight of a 1x1 convolution, (C_out, C_in, 1, ...), into that of a linear layer; keep biases."""
    return weight.flatten(1) if weight.ndim > 1 else weight
