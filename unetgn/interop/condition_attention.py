"""Reads of the options of diffusers' UNet2DConditionModel how its blocks attend: kinds, heads and depths."""

from dataclasses import dataclass

from unetgn.interop.condition_options import GROUNDINGS, ConditionOptions, Depth
from unetgn.interop.diffusers_unet2d import check_fit
from unetgn.interop.transfer import check_heads, refuse
from unetgn.nn.attention import AttentionConfig
from unetgn.nn.groups import NormConfig
from unetgn.nn.transformer import TransformerConfig
from unetgn.unet.description import AttentionKind


@dataclass(frozen=True)
class Depths:
    """Counts the transformer blocks; `decoder`, finest level first, and `mid` are None where they are as usual."""

    encoder: Depth | tuple[Depth, ...]
    mid: int | None = None
    decoder: tuple[Depth, ...] | None = None


@dataclass(frozen=True)
class Places:
    """Says of which kind the attention of each level is, finest first, and of the middle; None is none."""

    encoder: tuple[AttentionKind | None, ...]
    mid: AttentionKind | None
    decoder: tuple[AttentionKind | None, ...]

    @property
    def kinds(self) -> set[AttentionKind]:
        """Name the kinds that there are."""
        return {kind for kind in (*self.encoder, self.mid, *self.decoder) if kind is not None}

    @property
    def reads_context(self) -> bool:
        """Say whether anything reads a context."""
        return bool(self.kinds - {"self"})

    def levels(self, kind: AttentionKind) -> set[int]:
        """Name the levels at which attention of a kind stands, on either side."""
        return {level for side in (self.encoder, self.decoder) for level, one in enumerate(side) if one == kind}


def read_places(options: ConditionOptions, down: tuple[str, ...], up: tuple[str, ...]) -> Places:
    """Read the kinds of attention from the types of blocks, `up` in the order of levels."""
    middle = options.mid_block_type or ""
    return Places(tuple(map(_kind, down)), _kind(middle) if "CrossAttn" in middle else None, tuple(map(_kind, up)))


def _kind(block: str) -> AttentionKind | None:
    if "CrossAttn" in block:
        return "added" if "Simple" in block else "transformer"
    return "self" if block.startswith("Attn") else None


@dataclass(frozen=True)
class Heads:
    """Counts the heads of each level; `mid` and `decoder` are None where they are the encoder's."""

    encoder: int | tuple[int, ...]
    mid: int | None = None
    decoder: tuple[int, ...] | None = None
    narrow: bool = False


def count_heads(options: ConditionOptions, places: Places, name: str) -> Heads:
    """Count the heads that attention_head_dim stands for.

    In transformers it is their number, which need not divide the channels. Elsewhere it is their width, which must, and
    the decoder's blocks read the list as it is, not reversed: its first block, the coarsest, has the finest level's.
    Raises ValueError for a width that does not, and a number above the channels.
    """
    given, channels = options.attention_head_dim, options.block_out_channels
    entries = (given,) * len(channels) if isinstance(given, int) else given
    last, some = len(channels) - 1, next(iter(sorted(places.kinds)), "transformer")

    def count(kind: AttentionKind | None, level: int, side: str) -> int:
        own = kind or places.encoder[level] or places.decoder[level] or places.mid or some
        entry = entries[last - level] if side == "decoder" and own != "transformer" else entries[level]
        if kind == "transformer":
            check_fit(name, entry, [channels[level]])
        elif kind is not None:
            check_heads(name, "attention_head_dim", entry, [channels[level]])
        return entry if own == "transformer" else max(1, channels[level] // max(1, entry))

    encoder = tuple(count(kind, level, "encoder") for level, kind in enumerate(places.encoder))
    decoder = tuple(count(kind, level, "decoder") for level, kind in enumerate(places.decoder))
    mid = None if places.mid is None else count(places.mid, last, "mid")
    return Heads(
        given if places.kinds <= {"transformer"} else encoder,
        None if mid == encoder[last] else mid,
        None if decoder == encoder or not any(places.decoder) else decoder,
        narrow=any(
            channels[level] % heads
            for level in range(len(channels))
            for kind, heads in (
                (places.encoder[level], encoder[level]),
                (places.decoder[level], decoder[level]),
                (places.mid if level == last else None, mid or 1),
            )
            if kind == "transformer"
        ),
    )


def translate_attention(options: ConditionOptions, places: Places, heads: Heads, name: str) -> AttentionConfig:
    """Translate what all layers of attention share."""
    kinds, only = places.kinds, options.only_cross_attention
    if {"self", "added"} <= kinds and options.norm_eps != 1e-5:
        raise ValueError(
            f"{name}: norm_eps={options.norm_eps} is not supported where blocks named Attn and Simple stand together "
            "(the latter's attention has 1e-5)"
        )
    eps = 1e-5 if "added" in kinds else options.norm_eps if "self" in kinds else 1e-6
    added = "added" in kinds
    return AttentionConfig(
        num_heads=heads.encoder,
        norm=NormConfig(num_groups=options.norm_num_groups, eps=eps),
        narrow=heads.narrow,
        upcast=bool(options.upcast_attention) and (not kinds or "transformer" in kinds),
        context_dim=options.cross_attention_dim if added else None,
        context_norm=options.cross_attention_norm if added else None,  # type: ignore[arg-type]
        cross_only=tuple(
            level for level in sorted(places.levels("added")) if (only if isinstance(only, bool) else only[level])
        ),
    )


def translate_transformer(
    options: ConditionOptions, depths: Depths, places: Places, name: str
) -> TransformerConfig | None:
    """Translate the transformers, where there are any."""
    if "transformer" not in places.kinds:
        refuse(name, options, "only transformers read boxes, and there are none", attention_type=("default",))
        return None
    width = options.cross_attention_dim
    if isinstance(width, tuple) and options.attention_type != "default":
        if len(set(width)) > 1:
            raise ValueError(
                f"{name}: cross_attention_dim={list(width)} must be one width where GLIGEN's layers read it"
            )
        width = width[0]
    only = options.only_cross_attention
    levels = sorted(places.levels("transformer"))
    return TransformerConfig(
        context_dim=width,
        depth=depths.encoder,
        linear_projection=bool(options.use_linear_projection),
        cross_only=tuple(level for level in levels if (only if isinstance(only, bool) else only[level])),
        norm=NormConfig(num_groups=options.norm_num_groups, eps=1e-6) if len(places.kinds) > 1 else None,
        grounding=GROUNDINGS[options.attention_type],  # type: ignore[arg-type]
    )


def filled(kinds: tuple[AttentionKind | None, ...], places: Places) -> tuple[AttentionKind, ...] | None:
    """Name the kind of each level of a side, where a network has several; levels without attention have any."""
    if len(places.kinds) < 2 or not any(kinds):
        return None
    return tuple(kind or "self" for kind in kinds)


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
