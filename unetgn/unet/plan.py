"""Plans the blocks of a U-Net from its description: which width, skip connection and attention each one has."""

import dataclasses
from dataclasses import dataclass
from typing import Literal

from unetgn.nn.attention import count_heads
from unetgn.nn.groups import NormConfig
from unetgn.nn.resample import ResampleKind
from unetgn.unet.description import AttentionKind, UNetDescription


@dataclass(frozen=True)
class AttentionPlan:
    """Describes an attention layer; `depth` None is one layer of attention, else a transformer of that many blocks.

    Without a transformer, a `context_dim` adds the context's keys and values to those of the pixels.
    """

    num_heads: int
    inner_channels: int
    norm: NormConfig | None
    residual_scale: float
    depth: int | None = None
    context_dim: int | None = None
    cross_only: bool = False
    context_norm: str | None = None

    @property
    def kind(self) -> AttentionKind:
        """Name the kind of attention that it is."""
        if self.depth is not None:
            return "transformer"
        return "self" if self.context_dim is None else "added"


@dataclass(frozen=True)
class BlockPlan:
    """Describes a residual block and the attention behind it. `in_channels` counts those of the skip connection."""

    in_channels: int
    out_channels: int
    skip: bool
    residual_scale: float
    attention: AttentionPlan | None


@dataclass(frozen=True)
class LevelPlan:
    """Describes the blocks of a level and the resampling that leaves it, None at the last level of its side.

    `image_channels` is the width of the running image where the level ends in an input branch.
    """

    blocks: tuple[BlockPlan, ...]
    channels: int
    resample: ResampleKind | None = None
    image_channels: int | None = None

    @property
    def attentions(self) -> list[AttentionPlan]:
        """List the attention layers behind its blocks."""
        return [block.attention for block in self.blocks if block.attention is not None]


@dataclass(frozen=True)
class UNetPlan:
    """Holds the levels in the order in which an image meets them; the decoder's first is the coarsest."""

    encoder: tuple[LevelPlan, ...]
    mid: LevelPlan
    decoder: tuple[LevelPlan, ...]

    @property
    def attentions(self) -> list[AttentionPlan]:
        """List all attention layers."""
        return [attention for level in (*self.encoder, self.mid, *self.decoder) for attention in level.attentions]

    def attentions_at(self, level: int) -> list[AttentionPlan]:
        """List the attention layers of a level, counted from 0, the finest, in the encoder and the decoder."""
        return self.encoder[level].attentions + self.decoder[-1 - level].attentions


def plan_unet(config: UNetDescription) -> UNetPlan:
    """Plan the blocks that `config` describes. Raises ValueError where widths, heads and depths do not fit together."""
    return UNetPlan(_plan_encoder(config), _plan_mid(config), _plan_decoder(config))


def _plan_encoder(config: UNetDescription) -> tuple[LevelPlan, ...]:
    levels, width, image = [], config.stem_channels, config.in_channels
    for level, channels in enumerate(config.channels):
        blocks = []
        for index in range(config.depths[level]):
            attention = None
            if index in _attending(config, level):
                attention = _plan_attention(config, channels, level=level, index=index, depth=config.depths[level])
            blocks.append(BlockPlan(width, channels, False, config.resblock.residual_scale, attention))
            width = channels
        last = level == len(config.channels) - 1
        branch = image if config.encoder.residual_input and not last else None
        levels.append(LevelPlan(tuple(blocks), width, None if last else config.encoder_resample[level], branch))
        image = width
    return tuple(levels)


def _plan_mid(config: UNetDescription) -> LevelPlan:
    mid, level, channels = config.mid, len(config.channels) - 1, _encoder_width(config, len(config.channels) - 1)
    scale = config.resblock.residual_scale if mid.residual_scale is None else mid.residual_scale
    attention = None
    if mid.attention and mid.depth > 0:
        plan = _plan_attention(config, channels, level=level, index=0, depth=max(1, config.depths[level]), side="mid")
        norm = plan.norm if mid.attention_norm else None
        if norm is not None and mid.attention_num_groups is not None:
            norm = NormConfig(num_groups=mid.attention_num_groups, eps=norm.eps)
        depth = plan.depth if mid.transformer_depth is None or plan.depth is None else mid.transformer_depth
        attention = dataclasses.replace(
            plan,
            norm=norm,
            residual_scale=1.0 if plan.kind == "added" else scale,
            depth=depth,
            cross_only=mid.cross_only,
        )
    blocks = (BlockPlan(channels, channels, False, scale, attention if i == 0 else None) for i in range(mid.depth))
    return LevelPlan(tuple(blocks), channels)


def _plan_decoder(config: UNetDescription) -> tuple[LevelPlan, ...]:
    widths = config.decoder.channels or config.channels
    levels, width = [], _encoder_width(config, len(config.channels) - 1)
    for level in reversed(range(len(config.channels))):
        skips = _skip_widths(config, level)
        depth = len(skips) if config.decoder.depth is None else config.decoder.depth[level]
        if depth < len(skips):
            raise ValueError(
                f"decoder.depth={config.decoder.depth} gives level {level} {depth} blocks, but the encoder leaves it "
                f"{len(skips)} skip connections, one for a block"
            )
        chosen = _decoder_attending(config, level, depth)
        blocks = []
        for index in range(depth):
            skip = skips[-1 - index] if index < len(skips) else 0
            attention = None
            if index in chosen:
                attention = _plan_attention(
                    config, widths[level], level=level, index=index, depth=depth, side="decoder"
                )
            scale = config.resblock.residual_scale
            blocks.append(BlockPlan(width + skip, widths[level], skip > 0, scale, attention))
            width = widths[level]
        resample = config.decoder_resample[level - 1] if level else None
        levels.append(LevelPlan(tuple(blocks), width, resample))
    return tuple(levels)


def _encoder_width(config: UNetDescription, level: int) -> int:
    """Return the width in which an encoder level ends: its own, or the level before's where it has no block."""
    while level >= 0 and config.depths[level] == 0:
        level -= 1
    return config.channels[level] if level >= 0 else config.stem_channels


def _skip_widths(config: UNetDescription, level: int) -> list[int]:
    """List the widths of the skip connections that start at an encoder level, in the order in which they arise."""
    first = config.stem_channels if level == 0 else _encoder_width(config, level - 1)
    return [first] + [config.channels[level]] * config.depths[level]


def _attending(config: UNetDescription, level: int) -> tuple[int, ...]:
    if config.encoder.attention_blocks is not None:
        return config.encoder.attention_blocks[level]
    return tuple(range(config.depths[level])) if level in config.attending_levels else ()


def _decoder_attending(config: UNetDescription, level: int, depth: int) -> tuple[int, ...]:
    if config.decoder.attention_blocks is None:
        everywhere = level in config.attending_levels or _attending(config, level)
        return tuple(range(depth)) if everywhere else ()
    chosen = config.decoder.attention_blocks[level]
    if any(not 0 <= index < depth for index in chosen):
        raise ValueError(f"decoder.attention_blocks names blocks {chosen} of level {level}, which has {depth}")
    return chosen


def _plan_attention(
    config: UNetDescription,
    channels: int,
    *,
    level: int,
    index: int,
    depth: int,
    side: Literal["encoder", "mid", "decoder"] = "encoder",
) -> AttentionPlan:
    """Plan the attention behind block `index` of the `depth` blocks of a level, at one side of the network."""
    shared, transformer, kind = config.attention, config.transformer, config.attention_kind(side, level)
    count, inner = _count_heads(config, channels, level, side)
    norm = config.norm if shared.norm is None else shared.norm
    if kind == "self":
        return AttentionPlan(count, inner, norm, config.resblock.residual_scale)
    if kind == "added":
        if shared.context_dim is None:
            raise ValueError(f"an attention of the kind 'added' at level {level} needs attention.context_dim")
        return AttentionPlan(
            count,
            inner,
            norm,
            residual_scale=1.0,
            context_dim=_at(shared.context_dim, level),
            cross_only=level in shared.cross_only,
            context_norm=shared.context_norm,
        )
    if transformer is None:
        raise ValueError(f"an attention of the kind 'transformer' at level {level} needs the field transformer")
    depths = transformer.depth
    if side == "decoder" and config.decoder.transformer_depth is not None:
        depths = config.decoder.transformer_depth
    at_level = depths[level] if isinstance(depths, tuple) else depths
    if isinstance(at_level, tuple) and len(at_level) != depth:
        where = "decoder (decoder.transformer_depth)" if side == "decoder" else "encoder (transformer.depth)"
        raise ValueError(
            f"transformer depths {at_level} of level {level} must be one number for each of its blocks, which are "
            f"{depth} in the {where}"
        )
    blocks = at_level[index] if isinstance(at_level, tuple) else at_level
    return AttentionPlan(
        count,
        inner,
        norm if transformer.norm is None else transformer.norm,
        config.resblock.residual_scale,
        depth=blocks,
        context_dim=_at(transformer.context_dim, level),
        cross_only=level in transformer.cross_only and blocks > 0,
    )


def _count_heads(config: UNetDescription, channels: int, level: int, side: str) -> tuple[int, int]:
    """Count the heads of an attention layer, and their width together."""
    heads = config.attention.num_heads
    if side == "decoder" and config.decoder.num_heads is not None:
        heads = config.decoder.num_heads
    if side == "mid" and config.mid.num_heads is not None:
        heads = config.mid.num_heads
    if isinstance(heads, tuple):
        heads = heads[level]
    width = None if heads is not None else config.attention.head_dim
    unit = (width if heads is None else heads) or 1
    inner = channels - channels % unit if config.attention.narrow and unit <= channels else channels
    try:
        return count_heads(inner, num_heads=heads, head_dim=width), inner
    except ValueError as error:
        raise ValueError(f"attention at level {level}: {error} (attention.num_heads, attention.head_dim)") from None


def _at(value: int | tuple[int, ...] | None, level: int) -> int | None:
    return value[level] if isinstance(value, tuple) else value
