"""Computes latent diffusion's spatial transformer: self-attention, cross-attention, a gated feed-forward layer."""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F

from unetgn.nn.attention import MultiHeadAttention, check_context, count_heads, pixels_to_tokens, tokens_to_pixels
from unetgn.nn.conv import convolution, zero_parameters
from unetgn.nn.fields import check_at_least, check_choice, freeze_lists
from unetgn.nn.grounding import gated_attention
from unetgn.nn.groups import NormConfig, build_norm
from unetgn.nn.norm import with_shortcut


@dataclass(frozen=True)
class TransformerConfig:
    """Configures spatial transformers in the place of plain self-attention."""

    context_dim: int | tuple[int, ...] | None = None
    """Sets the width of encoder_hidden_states, the same for all levels or one for each; None is a second self-attention
    in the place of cross-attention.
    """
    depth: int | tuple[int | tuple[int, ...], ...] = 1
    """Counts the transformer blocks in one spatial transformer: one number for all levels, or an entry for each level,
    which is one number or one for each block of the level. Levels without attention have an entry that is not read. At
    least one transformer of a network has a block: without any, the context would never be read.
    """
    linear_projection: bool = False
    """Puts linear layers around the blocks (Stable Diffusion 2, XL) where others have 1x1 convolutions."""
    cross_only: tuple[int, ...] = ()
    """Names the levels whose first attention reads the context too (the x4 upscaler)."""
    norm: NormConfig | None = None
    """Normalizes the input; None is attention.norm."""
    grounding: Literal["text", "text_image"] | None = None
    """Puts GLIGEN's layers between the attentions: they read boxes with texts, or with texts and images, which
    cross_attention_kwargs={"gligen": …} gives; without it they change nothing.
    """

    def __post_init__(self) -> None:
        freeze_lists(self)
        check_at_least(1, {"transformer.context_dim": self.context_dim})
        check_at_least(0, {"transformer.depth": self.depth})
        check_choice("transformer.grounding", self.grounding, ("text", "text_image", None))
        if self.grounding is not None and not isinstance(self.context_dim, int):
            raise ValueError(
                f"transformer.grounding={self.grounding!r} needs transformer.context_dim to be one number, the width "
                f"of what it reads; it is {self.context_dim}"
            )


class GEGLU(nn.Module):
    """Computes value * gelu(gate), the halves of one linear layer: (N, L, channels) -> (N, L, hidden).

    Shazeer 2020 (arXiv 2002.05202), section 2, equation 5, with the exact GELU.
    """

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.proj = nn.Linear(channels, 2 * hidden)

    def forward(self, tokens: Tensor) -> Tensor:
        value, gate = self.proj(tokens).chunk(2, dim=-1)
        return value * F.gelu(gate)

    def extra_repr(self) -> str:
        return f"{self.proj.in_features}, {self.proj.out_features // 2}, activation='gelu'"


class FeedForward(nn.Module):
    """Widens four times by GEGLU, and back: (N, L, channels) -> the same. Named net.0.proj and net.2 (diffusers).

    Rombach et al. 2022 (arXiv 2112.10752), appendix E.2.1; the gated layer is Shazeer's (arXiv 2002.05202).
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.net = nn.Sequential(GEGLU(channels, 4 * channels), nn.Identity(), nn.Linear(4 * channels, channels))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.net(tokens)

    def extra_repr(self) -> str:
        channels, hidden = self.net[2].out_features, self.net[2].in_features
        return f"{channels}, hidden={hidden}, activation='geglu'"


class TransformerBlock(nn.Module):
    """Applies self-attention, cross-attention and feed-forward, each after a layer normalization, with a shortcut.

    Shapes: tokens (N, L, channels), context (N, M, context_dim) -> (N, L, channels).
    `bias` and `context_bias`, (N, keys), are added to the scores of the first attention's keys and of the context's.
    With `cross_only` the first attention reads the context as well. With `grounded` a gated layer follows that, which
    reads `objects` (N, K, context_dim) where they are given (`unetgn.nn.grounding`). `images` are for IP-Adapters
    (`unetgn.nn.image_prompts`). Parameters are named as in diffusers' BasicTransformerBlock.
    Raises ValueError where the heads do not divide the channels, or `cross_only` or `grounded` has no context.
    Rombach et al. 2022 (arXiv 2112.10752), appendix E.2.1.
    """

    def __init__(
        self,
        channels: int,
        *,
        num_heads: int,
        context_dim: int | None,
        cross_only: bool = False,
        grounded: bool = False,
        qk_norm: bool = False,
        upcast: bool = False,
    ) -> None:
        super().__init__()
        check_cross_only(cross_only, context_dim)
        if grounded and context_dim is None:
            raise ValueError("transformer.grounding needs transformer.context_dim, the width of what it reads")
        self.cross_only = cross_only
        first_context = context_dim if cross_only else None
        self.norm1 = nn.LayerNorm(channels)
        self.attn1 = MultiHeadAttention(
            channels, num_heads=num_heads, context_dim=first_context, qk_norm=qk_norm, upcast=upcast
        )
        self.norm2 = nn.LayerNorm(channels)
        self.attn2 = MultiHeadAttention(
            channels, num_heads=num_heads, context_dim=context_dim, qk_norm=qk_norm, upcast=upcast
        )
        self.norm3 = nn.LayerNorm(channels)
        self.ff = FeedForward(channels)
        self.fuser = None
        if grounded and context_dim is not None:
            self.fuser = gated_attention(channels, context_dim, num_heads=num_heads)

    def forward(
        self,
        tokens: Tensor,
        context: Tensor | None,
        bias: Tensor | None = None,
        context_bias: Tensor | None = None,
        objects: Tensor | None = None,
        *images: Tensor,
    ) -> Tensor:
        tokens = tokens + self.attn1(self.norm1(tokens), context if self.cross_only else None, bias)
        if self.fuser is not None and objects is not None:
            tokens = self.fuser(tokens, objects)
        tokens = tokens + self.attn2(self.norm2(tokens), context, bias if context is None else context_bias, images)
        return tokens + self.ff(self.norm3(tokens))

    def extra_repr(self) -> str:
        return f"cross_only={self.cross_only}"


def check_cross_only(cross_only: bool, context_dim: int | None, depth: int = 1) -> None:
    """Raise ValueError where `cross_only` has no context to attend to, or no block that would."""
    if cross_only and context_dim is None:
        raise ValueError("transformer.cross_only needs transformer.context_dim: there is no context to attend to")
    if cross_only and depth == 0:
        raise ValueError("transformer.cross_only needs a transformer block, but depth is 0")


class SpatialTransformer(nn.Module):
    """Computes x + proj_out(blocks(proj_in(norm(x)), context)): `depth` transformer blocks over the pixels of x.

    Shapes: x (N, channels, *spatial), context (N, M, context_dim) -> x's shape; one to three spatial axes. `bias`
    (N, pixels) and `context_bias` (N, M) are masks: what is added to scores, as in `TransformerBlock`.
    Give `num_heads` or `head_dim`; neither is one head. The blocks are `inner_channels` wide, None is `channels`.
    Projections are 1x1 convolutions over `spatial_dims` axes, 2
    unless given, or linear layers (`linear_projection`), for any number of axes. context_dim None takes no context.
    With `zero_init` the block starts as the identity. `grounded` is for the blocks, and `objects` and `images` with it.
    Raises ValueError where heads or groups do not divide the channels, a context is missing, of another shape, or not
    expected, or spatial_dims is given beside linear layers; TypeError where norm is no NormConfig.
    Rombach et al. 2022 (arXiv 2112.10752), appendix E.2.1.
    """

    def __init__(
        self,
        channels: int,
        *,
        num_heads: int | None = None,
        head_dim: int | None = None,
        inner_channels: int | None = None,
        context_dim: int | None = None,
        depth: int = 1,
        spatial_dims: int | None = None,
        linear_projection: bool = False,
        cross_only: bool = False,
        grounded: bool = False,
        norm: NormConfig | None = NormConfig(eps=1e-6),  # noqa: B008 - frozen
        qk_norm: bool = False,
        upcast: bool = False,
        zero_init: bool = True,
    ) -> None:
        super().__init__()
        check_at_least(0, {"transformer.depth": depth})
        check_cross_only(cross_only, context_dim, depth)
        if grounded and depth == 0:
            raise ValueError("grounded=True needs a transformer block, but depth is 0")
        if linear_projection and spatial_dims is not None:
            raise ValueError(f"spatial_dims={spatial_dims} is for convolutions, but linear_projection is True")
        inner = channels if inner_channels is None else inner_channels
        heads = count_heads(inner, num_heads=num_heads, head_dim=head_dim)
        self.channels, self.inner_channels, self.heads = channels, inner, heads
        self.context_dim = context_dim
        self.linear_projection = linear_projection
        self.norm = build_norm(norm, channels)
        self.proj_in = _projection(channels, inner, spatial_dims, linear_projection)
        self.transformer_blocks = nn.ModuleList(
            TransformerBlock(
                inner,
                num_heads=heads,
                context_dim=context_dim,
                cross_only=cross_only,
                grounded=grounded,
                qk_norm=qk_norm,
                upcast=upcast,
            )
            for _ in range(depth)
        )
        self.proj_out = _projection(inner, channels, spatial_dims, linear_projection)
        if zero_init:
            zero_parameters(self.proj_out)

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        bias: Tensor | None = None,
        context_bias: Tensor | None = None,
        objects: Tensor | None = None,
        *images: Tensor,
    ) -> Tensor:
        if self.context_dim is not None:
            check_context(context, x.shape[0], self.context_dim)
        elif context is not None:
            raise ValueError("encoder_hidden_states were given, but transformer.context_dim is None")
        hidden, x = with_shortcut(self.norm, x)
        if self.linear_projection:
            tokens = self.proj_in(pixels_to_tokens(hidden))
        else:
            tokens = pixels_to_tokens(self.proj_in(hidden))
        for block in self.transformer_blocks:
            tokens = block(tokens, context, bias, context_bias, objects, *images)
        if self.linear_projection:
            return x + tokens_to_pixels(self.proj_out(tokens), x)
        return x + self.proj_out(tokens_to_pixels(tokens, x))

    def extra_repr(self) -> str:
        context = "" if self.context_dim is None else f", context_dim={self.context_dim}"
        heads = (
            f"heads={self.heads}, head_dim={self.inner_channels // self.heads}, depth={len(self.transformer_blocks)}"
        )
        return f"{self.channels}{context}, {heads}, linear_projection={self.linear_projection}"


def _projection(channels: int, out_channels: int, spatial_dims: int | None, linear: bool) -> nn.Module:
    if linear:
        return nn.Linear(channels, out_channels)
    return convolution(2 if spatial_dims is None else spatial_dims, channels, out_channels, 1)
