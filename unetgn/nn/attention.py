"""Attends with several heads: pixels to pixels, and pixels to a context."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unetgn.nn.conv import zero_parameters
from unetgn.nn.fields import check_at_least, check_choice, freeze_lists
from unetgn.nn.groups import NormConfig, build_norm
from unetgn.nn.image_prompts import ImagePrompts
from unetgn.nn.norm import with_shortcut


def count_heads(channels: int, *, num_heads: int | None = None, head_dim: int | None = None) -> int:
    """Count the heads for `channels`: num_heads, or channels / head_dim, or one where neither is given.

    Raises ValueError where both are given, or the channels do not divide.
    """
    if num_heads is not None and head_dim is not None:
        raise ValueError(f"num_heads={num_heads} and head_dim={head_dim} contradict each other: give one of them")
    name, value = ("head_dim", head_dim) if head_dim is not None else ("num_heads", num_heads)
    if value is None:
        return 1
    if value < 1 or channels % value:
        raise ValueError(f"{name}={value} does not divide {channels} channels")
    return value if head_dim is None else channels // value


CONTEXT_NORMS = (None, "layer_norm", "group_norm")


@dataclass(frozen=True)
class AttentionConfig:
    """Configures all attention layers of a network."""

    num_heads: int | tuple[int, ...] | None = None
    """Counts the heads of all levels, or of each; without it and head_dim there is one head (DDPM)."""
    head_dim: int | None = None
    """Sets the width of a head, instead of num_heads."""
    norm: NormConfig | None = None
    """Normalizes the input; None takes the network's. (Stable Diffusion's transformers have another eps.)"""
    narrow: bool = False
    """Rounds down where heads do not divide a level's width, so that attention is narrower than its layer (diffusers);
    otherwise that is an error.
    """
    qk_norm: bool = False
    """Divides queries and keys by their root mean square in each head."""
    upcast: bool = False
    """Computes in float32 what arrives in 16 bits."""
    zero_init: bool = True
    """Starts the last layer at zero, so that attention starts as the identity (DDPM)."""
    context_dim: int | tuple[int, ...] | None = None
    """Sets the width of encoder_hidden_states whose keys and values join those of the pixels (`AddedKVAttention`), the
    same for all levels or one for each; None reads no context.
    """
    context_norm: Literal["layer_norm", "group_norm"] | None = None
    """Normalizes that context in each layer, over its width or in 32 groups; None does not."""
    cross_only: tuple[int, ...] = ()
    """Names the levels at which only that context is attended to."""

    def __post_init__(self) -> None:
        freeze_lists(self)
        widths = ("num_heads", "head_dim", "context_dim")
        check_at_least(1, {f"attention.{name}": getattr(self, name) for name in widths})
        check_choice("attention.context_norm", self.context_norm, CONTEXT_NORMS)
        if self.context_dim is None and (self.context_norm is not None or self.cross_only):
            raise ValueError(
                f"attention.context_norm={self.context_norm!r} and attention.cross_only={self.cross_only} are for a "
                "context: give attention.context_dim"
            )
        if self.num_heads is not None and self.head_dim is not None:
            raise ValueError(
                f"attention.num_heads={self.num_heads} and attention.head_dim={self.head_dim} contradict each other: "
                "give one of them"
            )


def check_context(context: Tensor | None, batch: int, context_dim: int) -> None:
    """Raise ValueError where a context is not (batch, length, context_dim)."""
    if context is None or context.ndim != 3 or context.shape[0] != batch or context.shape[2] != context_dim:
        given = "None" if context is None else str(tuple(context.shape))
        raise ValueError(f"encoder_hidden_states must be (N, length, {context_dim}) with N = {batch}, got {given}")


def check_bias(bias: Tensor | None, key: Tensor) -> None:
    """Raise ValueError where what is added to scores is not one number for each sample and key, (N, M)."""
    if bias is not None and bias.shape != key.shape[:2]:
        raise ValueError(
            f"a mask of attention must be {tuple(key.shape[:2])}, one number for each sample and key, got "
            f"{tuple(bias.shape)}"
        )


class _Attention(nn.Module):
    """Projects tokens and attends; subclasses say what the tokens are."""

    image_prompts: ImagePrompts | None

    def __init__(
        self,
        channels: int,
        *,
        num_heads: int | None = None,
        head_dim: int | None = None,
        inner_channels: int | None = None,
        context_dim: int | None = None,
        bias: bool = False,
        qk_norm: bool = False,
        upcast: bool = False,
    ) -> None:
        super().__init__()
        inner = channels if inner_channels is None else inner_channels
        self.heads = count_heads(inner, num_heads=num_heads, head_dim=head_dim)
        self.context_dim = context_dim
        self.upcast = upcast
        self.to_q = nn.Linear(channels, inner, bias=bias)
        source_dim = channels if context_dim is None else context_dim
        self.to_k = nn.Linear(source_dim, inner, bias=bias)
        self.to_v = nn.Linear(source_dim, inner, bias=bias)
        self.to_out = nn.ModuleList([nn.Linear(inner, channels)])
        self.norm_q = nn.RMSNorm(inner // self.heads, eps=1e-6) if qk_norm else None
        self.norm_k = nn.RMSNorm(inner // self.heads, eps=1e-6) if qk_norm else None
        self.register_module("image_prompts", None)  # what an IP-Adapter adds: `unetgn.nn.image_prompts`

    def attend(
        self, tokens: Tensor, context: Tensor | None = None, bias: Tensor | None = None, images: Sequence[Tensor] = ()
    ) -> Tensor:
        """Map (N, L, channels) and an optional context (N, M, context_dim) to (N, L, channels).

        `images`, (N, T, context_dim) each, are what IP-Adapters read, where there are any.
        """
        source, query = tokens if context is None else context, self.to_q(tokens)
        mixed = self.read(query, self.to_k(source), self.to_v(source), bias)
        if self.image_prompts is not None:
            for scale, key, value in self.image_prompts(images):
                mixed = mixed + scale * self.read(query, key, value)
        return self.to_out[0](mixed)

    def mix(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None) -> Tensor:
        """Mix values (N, M, inner) by projected queries (N, L, inner) and keys, and project: (N, L, channels)."""
        return self.to_out[0](self.read(query, key, value, bias))

    def read(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None) -> Tensor:
        """Compute softmax(q k^T / sqrt(d)) v in each head: queries (N, L, inner), keys and values (N, M, inner).

        Returns (N, L, inner). `bias` (N, M) is added to the scores of each key. Raises ValueError where it has another
        shape.
        """
        check_bias(bias, key)
        query, key, value = (
            part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in (query, key, value)
        )  # (N, heads, length, width)
        if self.norm_q is not None and self.norm_k is not None:
            query, key = self.norm_q(query), self.norm_k(key)
        dtype = value.dtype
        if self.upcast and dtype in (torch.float16, torch.bfloat16):
            query, key, value = query.float(), key.float(), value.float()
        added = None if bias is None else bias[:, None, None].to(query.dtype)
        return F.scaled_dot_product_attention(query, key, value, added).to(dtype).transpose(1, 2).flatten(2)

    def extra_repr(self) -> str:
        channels, inner = self.to_q.in_features, self.to_q.out_features
        context = "" if self.context_dim is None else f", context_dim={self.context_dim}"
        upcast = ", upcast=True" if self.upcast else ""
        return f"{channels}{context}, heads={self.heads}, head_dim={inner // self.heads}{upcast}"


class MultiHeadAttention(_Attention):
    """Computes softmax(q k^T / sqrt(d)) v over tokens, with heads of width d = channels / heads.

    Shapes: tokens (N, L, channels), context (N, M, context_dim) -> (N, L, channels). Without a context the tokens
    attend to themselves. `bias` (N, M) is added to the scores of each key: a mask. `qk_norm` divides queries and keys
    by their root mean square in each head, with a learned gain (Dehghani et al. 2023, arXiv 2302.05442, in its RMS
    form); `upcast` computes in float32 what arrives in 16 bits. Parameters are named as in diffusers' Attention: to_q,
    to_k, to_v, to_out.0. `image_prompts` is None, or reads `images` for IP-Adapters (`unetgn.nn.image_prompts`).
    Raises ValueError where the heads do not divide the channels.
    Vaswani et al. 2017 (arXiv 1706.03762), equation 1; several heads: section 3.2.2.
    """

    def forward(
        self, tokens: Tensor, context: Tensor | None = None, bias: Tensor | None = None, images: Sequence[Tensor] = ()
    ) -> Tensor:
        return self.attend(tokens, context, bias, images)


def pixels_to_tokens(x: Tensor) -> Tensor:
    """Turn (N, C, *spatial) into contiguous (N, L, C), L pixels: three projections then keep one copy, not three."""
    return x.flatten(2).transpose(1, 2).contiguous()


def tokens_to_pixels(tokens: Tensor, like: Tensor) -> Tensor:
    """Turn (N, L, C) into (N, C, *spatial of `like`)."""
    return tokens.transpose(1, 2).unflatten(2, like.shape[2:])


class SelfAttention(_Attention):
    """Computes (x + to_out(attention(norm(x)))) * residual_scale, over all pixels.

    Shapes: (N, channels, *spatial) -> the same, one to three spatial axes. Give `num_heads` or `head_dim`; neither is
    one head. `inner_channels` is the width of all heads together, None `channels`. `norm` None leaves the group
    normalization out. With `zero_init` the block starts as the identity.
    Raises ValueError where heads or groups do not divide the channels, TypeError where norm is no NormConfig.
    Ho et al. 2020 (arXiv 2006.11239), appendix B; several heads after Dhariwal & Nichol 2021 (arXiv 2105.05233),
    section 3.
    """

    def __init__(
        self,
        channels: int,
        *,
        num_heads: int | None = None,
        head_dim: int | None = None,
        inner_channels: int | None = None,
        norm: NormConfig | None = NormConfig(),  # noqa: B008 - frozen
        qk_norm: bool = False,
        upcast: bool = False,
        residual_scale: float = 1.0,
        zero_init: bool = True,
    ) -> None:
        super().__init__(
            channels,
            num_heads=num_heads,
            head_dim=head_dim,
            inner_channels=inner_channels,
            bias=True,
            qk_norm=qk_norm,
            upcast=upcast,
        )
        self.residual_scale = residual_scale
        self.group_norm = build_norm(norm, channels)
        if zero_init:
            zero_parameters(self.to_out)

    def forward(self, x: Tensor) -> Tensor:
        hidden, x = with_shortcut(self.group_norm, x)
        total = x + tokens_to_pixels(self.attend(pixels_to_tokens(hidden)), x)
        return total if self.residual_scale == 1.0 else total * self.residual_scale

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, residual_scale={self.residual_scale:.4g}"


class CrossAttention(_Attention):
    """Computes x + to_out(attention(norm(x), context)): pixels attend to the tokens of a context.

    It is one layer without the rest of `SpatialTransformer`; heads, `norm`, `qk_norm`, `upcast` and `zero_init` are
    those of `SelfAttention`. Shapes: x (N, channels, *spatial), context (N, M, context_dim) -> x's shape.
    Raises ValueError where heads or groups do not divide the channels, or the context has another shape.
    Rombach et al. 2022 (arXiv 2112.10752), section 3.3.
    """

    context_dim: int

    def __init__(
        self,
        channels: int,
        context_dim: int,
        *,
        num_heads: int | None = None,
        head_dim: int | None = None,
        norm: NormConfig | None = NormConfig(),  # noqa: B008 - frozen
        qk_norm: bool = False,
        upcast: bool = False,
        zero_init: bool = True,
    ) -> None:
        super().__init__(
            channels, num_heads=num_heads, head_dim=head_dim, context_dim=context_dim, qk_norm=qk_norm, upcast=upcast
        )
        self.group_norm = build_norm(norm, channels)
        if zero_init:
            zero_parameters(self.to_out)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        check_context(context, x.shape[0], self.context_dim)
        hidden, x = with_shortcut(self.group_norm, x)
        return x + tokens_to_pixels(self.attend(pixels_to_tokens(hidden), context), x)


class AddedKVAttention(_Attention):
    """Computes x + to_out(attention(norm(x), [context, norm(x)])): pixels attend to a context and to each other.

    The context has projections of its own for its keys and values; `context_norm` normalizes it first, over its width
    ("layer_norm") or in 32 groups of its width and all tokens ("group_norm"). With `cross_only` the context alone is
    attended to. Heads, `norm`, `qk_norm`, `upcast` and `zero_init` are those of `SelfAttention`.
    Shapes: x (N, channels, *spatial), context (N, M, context_dim) -> x's shape. `bias` (N, M) is added to the scores of
    the context: a mask.
    Raises ValueError where heads or groups do not divide the channels, or the context has another shape.
    Nichol et al. 2021 (arXiv 2112.10741), section 4.1; parameters are named as in diffusers' Attention.
    """

    context_dim: int

    def __init__(
        self,
        channels: int,
        context_dim: int,
        *,
        num_heads: int | None = None,
        head_dim: int | None = None,
        context_norm: Literal["layer_norm", "group_norm"] | None = None,
        cross_only: bool = False,
        norm: NormConfig | None = NormConfig(),  # noqa: B008 - frozen
        qk_norm: bool = False,
        upcast: bool = False,
        zero_init: bool = True,
    ) -> None:
        super().__init__(channels, num_heads=num_heads, head_dim=head_dim, bias=True, qk_norm=qk_norm, upcast=upcast)
        check_choice("context_norm", context_norm, CONTEXT_NORMS)
        self.context_dim, self.cross_only, self.context_norm = context_dim, cross_only, context_norm
        self.add_k_proj = nn.Linear(context_dim, channels)
        self.add_v_proj = nn.Linear(context_dim, channels)
        if cross_only:
            del self.to_k, self.to_v
        self.norm_cross: nn.Module | None = None
        if context_norm == "layer_norm":
            self.norm_cross = nn.LayerNorm(context_dim)
        elif context_norm == "group_norm":
            self.norm_cross = build_norm(NormConfig(num_groups=32), context_dim)
        self.group_norm = build_norm(norm, channels)
        if zero_init:
            zero_parameters(self.to_out)

    def forward(self, x: Tensor, context: Tensor, bias: Tensor | None = None) -> Tensor:
        check_context(context, x.shape[0], self.context_dim)
        check_bias(bias, context)
        hidden, x = with_shortcut(self.group_norm, x)
        tokens = pixels_to_tokens(hidden)
        context = self._normalized(context)
        key, value = self.add_k_proj(context), self.add_v_proj(context)
        if not self.cross_only:
            key = torch.cat([key, self.to_k(tokens)], dim=1)
            value = torch.cat([value, self.to_v(tokens)], dim=1)
            bias = None if bias is None else F.pad(bias, (0, tokens.shape[1]))  # pixels are read always
        return x + tokens_to_pixels(self.mix(self.to_q(tokens), key, value, bias), x)

    def _normalized(self, context: Tensor) -> Tensor:
        if self.norm_cross is None:
            return context
        if self.context_norm == "group_norm":
            return self.norm_cross(context.transpose(1, 2)).transpose(1, 2)
        return self.norm_cross(context)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, context_norm={self.context_norm!r}, cross_only={self.cross_only}"
