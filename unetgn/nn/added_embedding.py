"""Embeds texts and images that condition a network beside its class: Kandinsky's and DeepFloyd IF's layers.

Parameters are named as in diffusers. What they give is added to the embedding, or becomes the context.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unetgn.nn.attention import count_heads

IMAGE_TOKENS = {"text_image": 10, "image": 32}  # of a context that an image embedding becomes
HINT_CHANNELS = 4  # that a hint adds to the sample, at an eighth of its resolution


class AttentionPooling(nn.Module):
    """Pools tokens by attention from their mean, with a learned position added, to that and to all of them.

    Shapes: tokens (N, M, channels) -> (N, channels). Raises ValueError where the heads do not divide the channels.
    Radford et al. 2021 (arXiv 2103.00020), section 2.4, for images; here for the tokens of a text.
    """

    def __init__(self, channels: int, *, num_heads: int) -> None:
        super().__init__()
        self.heads = count_heads(channels, num_heads=num_heads)
        self.positional_embedding = nn.Parameter(torch.randn(1, channels) / channels**0.5)
        self.q_proj = nn.Linear(channels, channels)
        self.k_proj = nn.Linear(channels, channels)
        self.v_proj = nn.Linear(channels, channels)

    def forward(self, tokens: Tensor) -> Tensor:
        mean = tokens.mean(dim=1, keepdim=True) + self.positional_embedding
        tokens = torch.cat([mean, tokens], dim=1)
        query, key, value = (
            part.unflatten(2, (self.heads, -1)).transpose(1, 2)
            for part in (self.q_proj(mean), self.k_proj(tokens), self.v_proj(tokens))
        )
        return F.scaled_dot_product_attention(query, key, value).flatten(1)

    def extra_repr(self) -> str:
        return f"{self.q_proj.in_features}, heads={self.heads}"


class TextEmbedding(nn.Module):
    """Computes norm2(proj(pool(norm1(tokens)))): the tokens of a text (N, M, text_dim) -> (N, channels).

    Saharia et al. 2022 (arXiv 2205.11487), section 2.2, as DeepFloyd IF does it.
    """

    def __init__(self, text_dim: int, channels: int, *, num_heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(text_dim)
        self.pool = AttentionPooling(text_dim, num_heads=num_heads)
        self.proj = nn.Linear(text_dim, channels)
        self.norm2 = nn.LayerNorm(channels)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.norm2(self.proj(self.pool(self.norm1(tokens))))


class ImageEmbedding(nn.Module):
    """Computes norm(proj(image)): the embedding of an image (N, image_dim) -> (N, channels) (Kandinsky 2.2)."""

    def __init__(self, image_dim: int, channels: int) -> None:
        super().__init__()
        self.image_proj = nn.Linear(image_dim, channels)
        self.image_norm = nn.LayerNorm(channels)

    def forward(self, image: Tensor) -> Tensor:
        return self.image_norm(self.image_proj(image))


class TextImageEmbedding(nn.Module):
    """Computes norm(proj(text)) + proj(image): pooled embeddings (N, dim) each -> (N, channels) (Kandinsky 2.1)."""

    def __init__(self, dim: int, channels: int) -> None:
        super().__init__()
        self.text_proj = nn.Linear(dim, channels)
        self.text_norm = nn.LayerNorm(channels)
        self.image_proj = nn.Linear(dim, channels)

    def forward(self, text: Tensor, image: Tensor) -> Tensor:
        return self.image_proj(image) + self.text_norm(self.text_proj(text))


class HintEmbedding(ImageEmbedding):
    """Embeds an image as `ImageEmbedding` does, and turns a hint into channels of the sample (Kandinsky's ControlNet).

    `hint` maps a picture (N, 3, 8 H, 8 W) to (N, 4, H, W), by eight convolutions with SiLU between them.
    """

    def __init__(self, image_dim: int, channels: int) -> None:
        super().__init__(image_dim, channels)
        layers: list[nn.Module] = []
        width = 3
        for out, stride in ((16, 1), (16, 1), (32, 2), (32, 1), (96, 2), (96, 1), (256, 2)):
            layers += [nn.Conv2d(width, out, 3, padding=1, stride=stride), nn.SiLU()]
            width = out
        self.input_hint_block = nn.Sequential(*layers, nn.Conv2d(width, HINT_CHANNELS, 3, padding=1))

    def hint(self, picture: Tensor) -> Tensor:
        return self.input_hint_block(picture)


class ImageProjection(nn.Module):
    """Turns the embedding of an image into a context: (N, image_dim) -> norm of (N, tokens, context_dim)."""

    def __init__(self, image_dim: int, context_dim: int) -> None:
        super().__init__()
        self.tokens = IMAGE_TOKENS["image"]
        self.image_embeds = nn.Linear(image_dim, self.tokens * context_dim)
        self.norm = nn.LayerNorm(context_dim)

    def forward(self, image: Tensor) -> Tensor:
        return self.norm(self.image_embeds(image).unflatten(1, (self.tokens, -1)))


class TextImageProjection(nn.Module):
    """Makes a context of an image and a text: the image's tokens, then the text's.

    Shapes: text (N, M, text_dim), image (N, context_dim) -> (N, 10 + M, context_dim).
    """

    def __init__(self, text_dim: int, context_dim: int) -> None:
        super().__init__()
        self.tokens = IMAGE_TOKENS["text_image"]
        self.image_embeds = nn.Linear(context_dim, self.tokens * context_dim)
        self.text_proj = nn.Linear(text_dim, context_dim)

    def forward(self, text: Tensor, image: Tensor) -> Tensor:
        return torch.cat([self.image_embeds(image).unflatten(1, (self.tokens, -1)), self.text_proj(text)], dim=1)
