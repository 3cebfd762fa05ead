"""Names the activations that a network may have; SiLU is the one that is fused with the norm before it."""

from collections.abc import Callable
from typing import Literal, get_args

from torch import Tensor
from torch.nn import functional as F

Activation = Literal["silu", "gelu", "relu", "mish"]
ACTIVATIONS: tuple[Activation, ...] = get_args(Activation)
_FUNCTIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "relu": F.relu,
    "mish": F.mish,
}


def activate(x: Tensor, name: Activation) -> Tensor:
    """Apply an activation: x * sigmoid(x), x * Phi(x) (the exact GELU), max(x, 0), or x * tanh(softplus(x))."""
    return _FUNCTIONS[name](x)
