"""Recomputing in the backward pass instead of keeping, in three grades."""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

CheckpointGrade = Literal["none", "activations", "blocks"]


def recomputed(function: Callable[..., Tensor], *inputs: Tensor | None, enabled: bool, random: bool = False) -> Tensor:
    """function(*inputs), keeping only `inputs` for the backward pass where `enabled` and gradients are recorded.

    The backward pass runs `function` again up to the last tensor that it needs. A function that ends in a convolution
    needs that convolution's input but not its output, so the convolution is not computed twice: what is recomputed is
    what came before it. `random` keeps the random state, for a function with dropout.
    torch.utils.checkpoint, non-reentrant, with its early stop.
    """
    if enabled and torch.is_grad_enabled():
        return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=random)
    return function(*inputs)
