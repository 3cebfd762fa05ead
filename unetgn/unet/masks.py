"""Takes masks of attention, as diffusers' UNet2DConditionModel reads them: what is added to scores before softmax."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from unetgn.unet.config import UNetConfig
from unetgn.unet.inputs import check_tensors

MASKED = -10000.0  # what a masked key's scores get: diffusers' number, which half precision holds


class Masks(NamedTuple):
    """Holds what is added to the scores of keys, (N, keys), or None where all are read.

    `own` is for the pixels that a transformer's first attention reads, or the context where it reads that; in attention
    with added keys it is for the context, before `context`, which is for the context everywhere.
    """

    own: Tensor | None = None
    context: Tensor | None = None


NO_MASKS = Masks()


def read_masks(
    config: UNetConfig, attention_mask: Tensor | None, context_mask: Tensor | None, context: Tensor | None, like: Tensor
) -> Masks:
    """Turn masks, 1 (True) for a key that is read and 0 for one that is not, into (mask - 1) * 10000 of `like`'s dtype.

    `context` is what attention reads, after its projection. Raises ValueError where a mask has another shape, or
    nothing reads it.
    """
    if attention_mask is None and context_mask is None:
        return NO_MASKS
    check_tensors(attention_mask=attention_mask, encoder_attention_mask=context_mask)
    if attention_mask is not None and config.transformer is None and config.attention.context_dim is None:
        raise ValueError("attention_mask was given, but this network has no transformer or added context to read it")
    if context_mask is not None and context is None:
        raise ValueError("encoder_attention_mask was given, but attention reads no context: there is nothing to mask")
    length = None if context is None else context.shape[1]
    return Masks(
        _added(attention_mask, "attention_mask", None, like),
        _added(context_mask, "encoder_attention_mask", length, like),
    )


def _added(mask: Tensor | None, name: str, length: int | None, like: Tensor) -> Tensor | None:
    if mask is None:
        return None
    batch = like.shape[0]
    if mask.ndim != 2 or mask.shape[0] != batch or (length is not None and mask.shape[1] != length):
        keys = "keys" if length is None else str(length)
        raise ValueError(
            f"{name} must be ({batch}, {keys}), 1 for what is read and 0 for what is not, got {tuple(mask.shape)}"
        )
    return (1 - mask.to(like.dtype)) * MASKED
