"""Converts diffusers' UNet2DConditionModel: Stable Diffusion 1 to XL, inpainting, upscaling, latent consistency.

`attention_head_dim` is the NUMBER of heads here, a slip of names that diffusers keeps for the sake of old files.
Options that diffusers writes and does not read are accepted, as there: `mid_block_only_cross_attention`, which only the
middle of Kandinsky reads, and, without `addition_embed_type`, `addition_time_embed_dim`,
`projection_class_embeddings_input_dim` and `addition_embed_type_num_heads`; `num_class_embeds` beside a
class_embed_type. A model without any attention layer never reads its context; ours then takes none.
In the blocks named Simple (Kandinsky, Karlo, DeepFloyd IF) `attention_head_dim` is what its name says, a level is left
through a residual block, and `upcast_attention` and `use_linear_projection` are not read.
Not supported, each with an error that says so: GLIGEN, Simple blocks beside transformers, the x2 upscaler's blocks.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from unetgn.interop.condition_attention import (
    Depths,
    check_head_counts,
    check_head_widths,
    decoder_heads,
    layers_of,
    read_depths,
    translate_added_attention,
    translate_attention,
    translate_transformer,
)
from unetgn.interop.condition_embedding import translate_condition, translate_time
from unetgn.interop.condition_options import SIMPLE_MIDDLE, ConditionOptions, attending_kinds, refuse_options
from unetgn.interop.diffusers_config import keep, read_options
from unetgn.interop.diffusers_names import diffusers_sources
from unetgn.interop.diffusers_unet2d import activation, block_kinds, middle_scale, resampling
from unetgn.interop.transfer import Names, check_lengths, fill
from unetgn.nn.groups import NormConfig
from unetgn.nn.resample import ResampleConfig
from unetgn.nn.resblock import ResBlockConfig
from unetgn.unet import UNet
from unetgn.unet.config import DecoderConfig, EncoderConfig, MidConfig, UNetConfig
from unetgn.unet.model import empty_unet

CLASSES = ("UNet2DConditionModel",)
DOWN_BLOCKS = ("DownBlock2D", "ResnetDownsampleBlock2D", "CrossAttnDownBlock2D", "SimpleCrossAttnDownBlock2D")
UP_BLOCKS = ("UpBlock2D", "ResnetUpsampleBlock2D", "CrossAttnUpBlock2D", "SimpleCrossAttnUpBlock2D")
PER_LEVEL = (
    "down_block_types",
    "up_block_types",
    "layers_per_block",
    "attention_head_dim",
    "only_cross_attention",
    "cross_attention_dim",
)


def convert(config: Mapping[str, Any], state_dict: Mapping[str, Tensor], *, class_name: str, copy: bool) -> UNet:
    """Convert a UNet2DConditionModel that was built with `config`."""
    options, others = read_options(ConditionOptions, config, class_name)
    unet = keep(empty_unet(translate(options, class_name=class_name)), others)
    return fill(unet, Names(diffusers_sources(unet)), state_dict, copy=copy)


def translate(options: ConditionOptions, *, class_name: str = "UNet2DConditionModel") -> UNetConfig:
    """Translate the options into our configuration. Raises ValueError, naming the option, for what is not supported."""
    check_lengths(class_name, options, PER_LEVEL, like="block_out_channels")
    depths = read_depths(options, class_name)
    down = block_kinds(options.down_block_types, DOWN_BLOCKS, class_name, "down_block_types")
    up = block_kinds(options.up_block_types, UP_BLOCKS, class_name, "up_block_types")[::-1]
    refuse_options(options, class_name)
    encoder = tuple(level for level, kind in enumerate(down) if "CrossAttn" in kind)
    decoder = tuple(level for level, kind in enumerate(up) if "CrossAttn" in kind)
    layers = layers_of(options)
    down_resample = resampling(down, "conv")
    attending = {*encoder, *decoder}
    middle = options.mid_block_type in ("UNetMidBlock2DCrossAttn", SIMPLE_MIDDLE)
    simple = SIMPLE_MIDDLE in attending_kinds(options)
    middle_level = {len(down) - 1} if middle else set()
    if simple:
        check_head_widths(options, {*encoder, *middle_level}, set(decoder), class_name)
    else:
        check_head_counts(options, attending | middle_level, class_name)
    transformers = (attending or middle) and not simple
    return UNetConfig(
        sample_size=options.sample_size,
        in_channels=options.in_channels,
        out_channels=options.out_channels,
        channels=options.block_out_channels,
        depth=options.layers_per_block,
        attention_levels=encoder,
        num_classes=options.num_class_embeds if options.class_embed_type is None else None,
        dropout=options.dropout,
        time_cond_proj_dim=options.time_cond_proj_dim,
        addition_time_embed_dim=options.addition_time_embed_dim if options.addition_embed_type == "text_time" else None,
        time=translate_time(options),
        condition=translate_condition(options, attends=bool(attending or middle)),
        norm=NormConfig(num_groups=options.norm_num_groups, eps=options.norm_eps),
        resblock=ResBlockConfig(
            embedding="add" if options.resnet_time_scale_shift == "default" else "scale_shift",
            activation=activation(options.act_fn),
            activate_embedding=False,
            residual_scale=_residual_scale(options, class_name),
        ),
        attention=translate_added_attention(options, attending) if simple else translate_attention(options),
        transformer=translate_transformer(options, depths, attending) if transformers else None,
        resample=ResampleConfig(
            padding="end" if options.downsample_padding == 0 and "conv" in down_resample else "both"
        ),
        encoder=EncoderConfig(stem_kernel=options.conv_in_kernel, resample=down_resample),
        mid=_translate_mid(options, depths, class_name),
        decoder=DecoderConfig(
            attention_blocks=None
            if encoder == decoder
            else tuple(tuple(range(depth + 1)) if level in decoder else () for level, depth in enumerate(layers)),
            num_heads=decoder_heads(options) if simple else None,
            transformer_depth=depths.decoder if transformers else None,
            resample=resampling((*up[1:], ""), "conv"),
            out_kernel=options.conv_out_kernel,
            out_activation=activation(options.act_fn),
        ),
    )


def _residual_scale(options: ConditionOptions, name: str) -> float:
    """Give the scale of residual blocks, whose sum diffusers divides by resnet_out_scale_factor."""
    scale = middle_scale(options.resnet_out_scale_factor, name, "resnet_out_scale_factor")
    return 1.0 if scale is None else scale


def _translate_mid(options: ConditionOptions, depths: Depths, class_name: str) -> MidConfig:
    if options.mid_block_type is None:
        return MidConfig(depth=0)
    scale = middle_scale(options.mid_block_scale_factor, class_name)
    if scale is None and options.resnet_out_scale_factor != 1:
        scale = 1.0
    if options.mid_block_type == "UNetMidBlock2D":  # one residual block, as it is called there
        return MidConfig(depth=1, attention=False, residual_scale=scale)
    if options.mid_block_type == SIMPLE_MIDDLE:
        own, general = options.mid_block_only_cross_attention, options.only_cross_attention
        return MidConfig(residual_scale=scale, cross_only=bool(general is True if own is None else own))
    return MidConfig(residual_scale=scale, transformer_depth=depths.mid)
