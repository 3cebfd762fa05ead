"""Takes what attention reads beside pixels and context: masks, as in diffusers' UNet2DConditionModel, and boxes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from unetgn.unet.config import UNetConfig
from unetgn.unet.inputs import check_tensors

MASKED = -10000.0  # what a masked key's scores get: diffusers' number, which half precision holds


class Beside(NamedTuple):
    """Holds what is added to the scores of keys, (N, keys), None where all are read, GLIGEN's objects, and images.

    `mask` is for the pixels that a transformer's first attention reads, or the context where it reads that; in
    attention with added keys it is for the context, before `context_mask`, which is for the context everywhere.
    `images` are IP-Adapters', (N, T, context_dim) each.
    """

    mask: Tensor | None = None
    context_mask: Tensor | None = None
    objects: Tensor | None = None
    images: tuple[Tensor, ...] = ()


NOTHING = Beside()


def read_masks(
    config: UNetConfig, attention_mask: Tensor | None, context_mask: Tensor | None, context: Tensor | None, like: Tensor
) -> Beside:
    """Turn masks, 1 (True) for a key that is read and 0 for one that is not, into (mask - 1) * 10000 of `like`'s dtype.

    `context` is what attention reads, after its projection. Raises ValueError where a mask has another shape, or
    nothing reads it.
    """
    if attention_mask is None and context_mask is None:
        return NOTHING
    check_tensors(attention_mask=attention_mask, encoder_attention_mask=context_mask)
    if attention_mask is not None and config.transformer is None and config.attention.context_dim is None:
        raise ValueError("attention_mask was given, but this network has no transformer or added context to read it")
    if context_mask is not None and context is None:
        raise ValueError("encoder_attention_mask was given, but attention reads no context: there is nothing to mask")
    length = None if context is None else context.shape[1]
    own = _added(attention_mask, "attention_mask", None, like)
    return Beside(own, _added(context_mask, "encoder_attention_mask", length, like))


def embed_boxes(
    position_net: nn.Module | None, attention_kwargs: Mapping[str, Any] | None, batch: int
) -> Tensor | None:
    """Make GLIGEN's objects (N, K, context_dim) of cross_attention_kwargs["gligen"], where that is given.

    Its entries are the arguments of `unetgn.nn.grounding.box_embedding`. Raises ValueError where the network reads no
    boxes, or there are boxes of another number of samples.
    """
    given = (attention_kwargs or {}).get("gligen")
    if given is None:
        return None
    if position_net is None:
        raise ValueError("cross_attention_kwargs has 'gligen', but transformer.grounding is None: nothing reads boxes")
    try:
        objects = position_net(**given)
    except TypeError as error:
        raise ValueError(f"cross_attention_kwargs['gligen'] has {sorted(given)}: {error}") from error
    if objects.shape[0] != batch:
        raise ValueError(
            f"cross_attention_kwargs['gligen'] has boxes of {objects.shape[0]} samples, sample has {batch}"
        )
    return objects


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
