"""Computes again in the backward pass what the forward pass did not keep, in three grades."""

from collections.abc import Callable
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

Result = TypeVar("Result", bound=Tensor | tuple[Tensor, ...])
CheckpointGrade = Literal["none", "activations", "blocks"]


def recomputed(function: Callable[..., Result], *inputs: Any, random: bool = False) -> Result:
    """Return function(*inputs), keeping only `inputs` for the backward pass where gradients are recorded.

    The backward pass runs `function` again, up to the last tensor that it needs. A function that ends in a convolution
    needs the convolution's input, not its output: the convolution is not computed twice. `random` restores the random
    state, for a function with dropout. It is torch.utils.checkpoint, non-reentrant, with its early stop.
    Chen et al. 2016 (arXiv 1604.06174).
    """
    if torch.is_grad_enabled():
        return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=random)
    return function(*inputs)
