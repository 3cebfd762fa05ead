"""Reads of the options of diffusers' UNet2DConditionModel how its blocks attend: kinds, heads and depths."""

from dataclasses import dataclass

from unetgn.interop.condition_options import ConditionOptions, Depth
from unetgn.interop.transfer import check_heads
from unetgn.nn.attention import AttentionConfig
from unetgn.nn.groups import NormConfig
from unetgn.nn.transformer import TransformerConfig


@dataclass(frozen=True)
class Depths:
    """Counts the transformer blocks; `decoder`, finest level first, and `mid` are None where they are as usual."""

    encoder: Depth | tuple[Depth, ...]
    mid: int | None = None
    decoder: tuple[Depth, ...] | None = None


def translate_attention(options: ConditionOptions) -> AttentionConfig:
    """Translate the attention of transformers."""
    return AttentionConfig(
        num_heads=options.attention_head_dim,
        norm=NormConfig(num_groups=options.norm_num_groups, eps=1e-6),
        upcast=bool(options.upcast_attention),
    )


def _head_widths(options: ConditionOptions) -> tuple[int, ...]:
    """List the widths of the heads in the blocks named Simple, for each encoder level.

    The decoder's blocks read the same list, not reversed: its first block, the coarsest, has the finest level's.
    """
    widths = options.attention_head_dim
    return (widths,) * len(options.block_out_channels) if isinstance(widths, int) else widths


def decoder_heads(options: ConditionOptions) -> tuple[int, ...] | None:
    """Count the decoder's heads of each level, finest first, where they are not the encoder's."""
    widths = _head_widths(options)
    if widths == widths[::-1]:
        return None
    return _heads(options, widths[::-1])


def _heads(options: ConditionOptions, widths: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(max(1, channels // width) for channels, width in zip(options.block_out_channels, widths, strict=True))


def check_head_widths(options: ConditionOptions, encoder: set[int], decoder: set[int], name: str) -> None:
    """Raise ValueError where the width of heads does not divide the channels of a level that attends."""
    widths = _head_widths(options)
    for levels, own in ((encoder, widths), (decoder, widths[::-1])):
        for level in sorted(levels):
            check_heads(name, "attention_head_dim", own[level], [options.block_out_channels[level]])


def translate_added_attention(options: ConditionOptions, attending: set[int]) -> AttentionConfig:
    """Translate the attention of blocks named Simple."""
    levels, only = range(len(options.block_out_channels)), options.only_cross_attention
    return AttentionConfig(
        num_heads=_heads(options, _head_widths(options)),
        norm=NormConfig(num_groups=options.norm_num_groups, eps=1e-5),
        context_dim=options.cross_attention_dim,
        context_norm=options.cross_attention_norm,  # type: ignore[arg-type]
        cross_only=tuple(
            level for level in levels if level in attending and (only if isinstance(only, bool) else only[level])
        ),
    )


def check_head_counts(options: ConditionOptions, attending: set[int], name: str) -> None:
    """Raise ValueError where the number of heads does not divide the channels of a level that attends."""
    heads = options.attention_head_dim
    for level in sorted(attending):
        count = heads if isinstance(heads, int) else heads[level]
        check_heads(name, "attention_head_dim", count, [options.block_out_channels[level]])


def translate_transformer(options: ConditionOptions, depths: Depths, attending: set[int]) -> TransformerConfig:
    """Translate the transformers."""
    only = options.only_cross_attention
    cross_only = tuple(level for level in sorted(attending) if (only if isinstance(only, bool) else only[level]))
    return TransformerConfig(
        context_dim=options.cross_attention_dim,
        depth=depths.encoder,
        linear_projection=bool(options.use_linear_projection),
        cross_only=cross_only,
    )


def layers_of(options: ConditionOptions) -> tuple[int, ...]:
    """Count the residual blocks of each encoder level."""
    layers = options.layers_per_block
    return (layers,) * len(options.block_out_channels) if isinstance(layers, int) else layers


def read_depths(options: ConditionOptions, name: str) -> Depths:
    """Read the depths of the transformers as diffusers does, level by level.

    It reads no entry beyond those that it needs: published lists may be longer. Only the middle reads the last one.
    """
    given, layers, levels = options.transformer_layers_per_block, layers_of(options), len(options.block_out_channels)
    backwards, own = options.reverse_transformer_layers_per_block, "reverse_transformer_layers_per_block"
    if isinstance(given, int):
        encoder: Depth | tuple[Depth, ...] = given
    else:
        _check_long_enough(name, "transformer_layers_per_block", given, levels)
        encoder = tuple(_cut(depth, count) for depth, count in zip(given, layers, strict=False))
        if backwards is None and len(given) > levels:
            backwards = given[::-1]
    if backwards is None:
        return Depths(encoder)
    _check_long_enough(name, own, backwards, levels)
    decoder = tuple(_cut(depth, count + 1) for depth, count in zip(backwards, layers[::-1], strict=False))[::-1]
    longer = isinstance(given, tuple) and len(given) > levels
    last = given[-1] if longer and isinstance(given, tuple) else None
    return Depths(encoder, last[0] if isinstance(last, tuple) else last, decoder)


def _cut(depth: Depth, count: int) -> Depth:
    return depth[:count] if isinstance(depth, tuple) else depth


def _check_long_enough(name: str, option: str, given: tuple[Depth, ...], levels: int) -> None:
    if len(given) < levels:
        entries = f"{option}={list(given)} has {len(given)} entries"
        raise ValueError(f"{name}: {entries}, but block_out_channels names {levels} levels")
