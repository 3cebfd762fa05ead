"""Converts CompVis latent diffusion, Stable Diffusion 1 and 2: the UNetModel of `openaimodel.py`.

Without `use_spatial_transformer` (latent diffusion's unconditional models) attention is guided-diffusion's, in the
legacy order of rows. Stable Diffusion 2 adds `use_linear_in_transformer` and the options that leave attention out.

Options that the original ignores are refused. Three are accepted, since published configurations have them:
resolutions in `attention_resolutions` that no level has, entries of `disable_self_attentions` for levels without
attention, and `num_heads` beside `num_head_channels`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from unetgn.interop.openai_names import RESBLOCK_RESAMPLES, openai_sources
from unetgn.interop.transfer import Names, check_heads, check_lengths, fill, refuse
from unetgn.messages import short
from unetgn.nn.attention import AttentionConfig
from unetgn.nn.embedding import TimeConfig
from unetgn.nn.groups import NormConfig
from unetgn.nn.resample import ResampleConfig
from unetgn.nn.resblock import ResBlockConfig
from unetgn.nn.transformer import TransformerConfig
from unetgn.serialize import from_plain
from unetgn.unet import UNet
from unetgn.unet.config import ConditionConfig, DecoderConfig, EncoderConfig, MidConfig, UNetConfig
from unetgn.unet.model import empty_unet

CLASSES = ("UNetModel",)
PER_LEVEL = ("num_res_blocks", "transformer_depth", "disable_self_attentions", "num_attention_blocks")


@dataclass(frozen=True)
class CompvisOptions:
    """Holds the constructor's options. `use_checkpoint`, `use_fp16` and `use_bf16` concern how it ran only."""

    in_channels: int
    model_channels: int
    out_channels: int
    num_res_blocks: int | tuple[int, ...]
    attention_resolutions: tuple[int, ...]
    image_size: int | None = None
    dropout: float = 0.0
    channel_mult: tuple[float, ...] = (1, 2, 4, 8)
    conv_resample: bool = True
    dims: int = 2
    num_classes: int | str | None = None
    use_checkpoint: bool = False
    use_fp16: bool = False
    use_bf16: bool = False
    num_heads: int = -1
    num_head_channels: int = -1
    num_heads_upsample: int = -1
    use_scale_shift_norm: bool = False
    resblock_updown: bool = False
    use_new_attention_order: bool = False
    use_spatial_transformer: bool = False
    transformer_depth: int | tuple[int, ...] = 1
    context_dim: int | tuple[int, ...] | None = None
    n_embed: int | None = None
    legacy: bool = True
    disable_self_attentions: tuple[bool, ...] | None = None
    num_attention_blocks: tuple[int, ...] | None = None
    disable_middle_self_attn: bool = False
    use_linear_in_transformer: bool = False
    adm_in_channels: int | None = None


def convert(config: Mapping[str, Any], state_dict: Mapping[str, Tensor], *, class_name: str, copy: bool) -> UNet:
    """Convert a CompVis network that was built with `config`."""
    options = from_plain(CompvisOptions, config)
    unet = empty_unet(translate(options))
    order = "new" if options.use_new_attention_order else "legacy"
    return fill(unet, Names(openai_sources(unet, order)), state_dict, copy=copy)  # type: ignore[arg-type]


def translate(options: CompvisOptions, *, middle: bool = True, middle_depth: int | None = None) -> UNetConfig:
    """Translate the options into our configuration. Raises ValueError, naming the option, where one is not supported.

    `middle` says whether the middle attends, `middle_depth` how deep its transformer is where that is said apart.
    """
    refuse("UNetModel", options, "the predictor of codebook indices is another network", n_embed=(None,))
    spatial, levels = options.use_spatial_transformer, range(len(options.channel_mult))
    check_lengths("UNetModel", options, PER_LEVEL, like="channel_mult")
    _refuse_ignored(options)
    attending = {level for level in levels if 2**level in options.attention_resolutions}
    if options.num_attention_blocks is not None:
        attending &= {level for level, limit in enumerate(options.num_attention_blocks) if limit > 0}
    disabled = options.disable_self_attentions or (False,) * len(levels)
    cross_only = tuple(level for level in sorted(attending) if disabled[level])
    encoder_heads, decoder_heads = _heads(options, attending, middle=middle)
    kind = "resblock" if options.resblock_updown else "conv" if options.conv_resample else "plain"
    encoder_blocks, decoder_blocks = _attention_blocks(options, attending)
    sequential = options.num_classes == "sequential"
    return UNetConfig(
        sample_size=options.image_size,
        in_channels=options.in_channels,
        out_channels=options.out_channels,
        spatial_dims=options.dims,
        channels=tuple(int(mult * options.model_channels) for mult in options.channel_mult),
        depth=options.num_res_blocks,
        attention_levels=() if encoder_blocks is not None else tuple(sorted(attending)),
        num_classes=_class_count(options),
        dropout=options.dropout,
        time=TimeConfig(width=options.model_channels),
        condition=ConditionConfig(null_class=False, vector_dim=options.adm_in_channels if sequential else None),
        resblock=ResBlockConfig(
            embedding="scale_shift" if options.use_scale_shift_norm else "add", activate_embedding=False
        ),
        attention=AttentionConfig(num_heads=encoder_heads, norm=NormConfig(eps=1e-6) if spatial else None),
        transformer=TransformerConfig(
            context_dim=_context_width(options),
            depth=options.transformer_depth,
            linear_projection=options.use_linear_in_transformer,
            cross_only=cross_only,
        )
        if spatial and (attending or middle)
        else None,
        resample=ResampleConfig(kind=kind, strides=(1, 2, 2) if options.dims == 3 else None),  # type: ignore[arg-type]
        encoder=EncoderConfig(stem_channels=options.model_channels, attention_blocks=encoder_blocks),
        mid=MidConfig(attention=middle, transformer_depth=middle_depth, cross_only=options.disable_middle_self_attn),
        decoder=DecoderConfig(
            num_heads=None if decoder_heads == encoder_heads else decoder_heads, attention_blocks=decoder_blocks
        ),
    )


def _refuse_ignored(options: CompvisOptions) -> None:
    """Raise ValueError for an option that changes nothing in the original beside the other ones."""
    nowhere = (None, (False,) * len(options.channel_mult))
    if not options.use_spatial_transformer:
        reason = "it needs use_spatial_transformer=True, without which the original ignores it"
        refuse("UNetModel", options, reason, context_dim=(None,), use_linear_in_transformer=(False,))
        refuse("UNetModel", options, reason, transformer_depth=(1,))
        refuse("UNetModel", options, reason, disable_self_attentions=nowhere, disable_middle_self_attn=(False,))
    if options.context_dim is None:
        reason = "it needs context_dim: without a context all attention is self-attention"
        refuse("UNetModel", options, reason, disable_self_attentions=nowhere, disable_middle_self_attn=(False,))
    if options.num_classes != "sequential":
        refuse("UNetModel", options, "it needs num_classes='sequential'", adm_in_channels=(None,))
    if options.resblock_updown:
        refuse("UNetModel", options, RESBLOCK_RESAMPLES, conv_resample=(True,))
    if options.use_spatial_transformer:
        refuse("UNetModel", options, "a transformer's rows are not packed", use_new_attention_order=(False,))
    if options.use_spatial_transformer or not options.legacy or options.num_head_channels != -1:
        reason = "it counts for plain attention with legacy=True only, and without num_head_channels"
        refuse("UNetModel", options, reason, num_heads_upsample=(-1, options.num_heads))


def _context_width(options: CompvisOptions) -> int | None:
    """Return the context's width; a list has one for each block of a transformer, which all read one context here."""
    widths = options.context_dim
    if not isinstance(widths, tuple):
        return widths
    if len(set(widths)) != 1:
        raise ValueError(f"UNetModel: context_dim={list(widths)} is not supported; only lists of one width are")
    return widths[0]


def _class_count(options: CompvisOptions) -> int | None:
    if isinstance(options.num_classes, int) or options.num_classes is None:
        return options.num_classes
    if options.num_classes != "sequential":
        raise ValueError(
            f"UNetModel: num_classes={short(options.num_classes)} is not supported; a number, None and 'sequential' are"
        )
    if options.adm_in_channels is None:
        raise ValueError("UNetModel: num_classes='sequential' needs adm_in_channels")
    return None


def _heads(options: CompvisOptions, attending: set[int], *, middle: bool) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Count the heads of each encoder and decoder level."""
    if options.num_heads == -1 and options.num_head_channels == -1:
        raise ValueError("UNetModel: either num_heads or num_head_channels has to be set")
    widths = [int(mult * options.model_channels) for mult in options.channel_mult]
    around = [widths[level] for level in sorted(attending)]
    attended = around + widths[-1:] * middle  # the middle has the last one's width
    if options.num_head_channels != -1:
        check_heads("UNetModel", "num_head_channels", options.num_head_channels, attended)
        heads = tuple(max(1, width // options.num_head_channels) for width in widths)
        return heads, heads
    check_heads("UNetModel", "num_heads", options.num_heads, attended)
    heads = (options.num_heads,) * len(widths)
    if options.num_heads_upsample == -1:
        return heads, heads
    check_heads("UNetModel", "num_heads_upsample", options.num_heads_upsample, around)
    return heads, (options.num_heads_upsample,) * len(widths)


def _attention_blocks(
    options: CompvisOptions, attending: set[int]
) -> tuple[tuple[tuple[int, ...], ...] | None, tuple[tuple[int, ...], ...] | None]:
    """Name the blocks of each level that attend, in encoder and decoder, where `num_attention_blocks` limits them."""
    limits = options.num_attention_blocks
    if limits is None:
        return None, None
    depths = options.num_res_blocks
    depths = (depths,) * len(limits) if isinstance(depths, int) else depths
    encoder, decoder = (
        tuple(
            tuple(range(min(limit, depth + more))) if level in attending else ()
            for level, (limit, depth) in enumerate(zip(limits, depths, strict=True))
        )
        for more in (0, 1)
    )
    return encoder, decoder
