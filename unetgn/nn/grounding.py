"""Grounds transformers in boxes, by GLIGEN's layers (Li et al. 2023, arXiv 2301.07093, section 3.2).

They are diffusers' own: its pipelines switch them off after some steps, and know them by their class.
"""

from typing import Literal

from torch import nn

Grounding = Literal["text", "text_image"]


def gated_attention(channels: int, context_dim: int, *, num_heads: int) -> nn.Module:
    """Build the layer between a transformer's two attentions, which reads boxes.

    It maps tokens (N, L, channels) and objects (N, K, context_dim) to x + tanh(a) attention(norm([x, linear(objects)]))
    and then x + tanh(b) ff(norm(x)), with learned numbers a and b that start at 0.
    """
    from diffusers.models.attention import GatedSelfAttentionDense  # diffusers takes as long to import as torch

    return GatedSelfAttentionDense(channels, context_dim, num_heads, channels // num_heads)


def box_embedding(context_dim: int, kind: Grounding) -> nn.Module:
    """Build the layer that makes objects (N, K, context_dim) of boxes (N, K, 4), masks (N, K) and embeddings.

    These are the arguments `boxes`, `masks`, and for "text" `positive_embeddings` (N, K, context_dim); for "text_image"
    `phrases_embeddings`, `image_embeddings` and a mask of each, which give 2 K objects.
    """
    from diffusers.models.embeddings import GLIGENTextBoundingboxProjection

    feature = {"text": "text-only", "text_image": "text-image"}[kind]
    return GLIGENTextBoundingboxProjection(positive_len=context_dim, out_dim=context_dim, feature_type=feature)
