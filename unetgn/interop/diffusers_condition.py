"""Converts diffusers' UNet2DConditionModel: Stable Diffusion 1 to XL, inpainting, upscaling, latent consistency.

`attention_head_dim` is the NUMBER of heads here, a slip of names that diffusers keeps for the sake of old files.
Options that diffusers writes and does not read are accepted, as there: `mid_block_only_cross_attention`, which only the
middle of Kandinsky reads, and, without `addition_embed_type`, `addition_time_embed_dim`,
`projection_class_embeddings_input_dim` and `addition_embed_type_num_heads`; `num_class_embeds` beside a
class_embed_type. A model without any attention layer never reads its context; ours then takes none.
In the blocks named Simple (Kandinsky, Karlo, DeepFloyd IF) `attention_head_dim` is what its name says, a level is left
through a residual block, and `upcast_attention` and `use_linear_projection` are not read.
The blocks named Attn are UNet2DModel's, with `attention_head_dim` as in those named Simple. Kinds may stand together.
Not supported, each with an error that says so: the x2 upscaler's blocks.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from unetgn.interop import diffusers_unet2d
from unetgn.interop.condition_attention import (
    Depths,
    count_heads,
    filled,
    layers_of,
    read_depths,
    read_places,
    translate_attention,
    translate_transformer,
)
from unetgn.interop.condition_embedding import translate_condition, translate_time
from unetgn.interop.condition_options import SIMPLE_MIDDLE, ConditionOptions, refuse_options
from unetgn.interop.diffusers_config import keep, read_options
from unetgn.interop.diffusers_names import diffusers_sources
from unetgn.interop.diffusers_unet2d import activation, block_kinds, middle_scale, refuse_empty_levels, resampling
from unetgn.interop.transfer import Names, check_lengths, fill
from unetgn.nn.groups import NormConfig
from unetgn.nn.resample import ResampleConfig
from unetgn.nn.resblock import ResBlockConfig
from unetgn.unet import UNet
from unetgn.unet.config import DecoderConfig, EncoderConfig, MidConfig, UNetConfig
from unetgn.unet.model import empty_unet

CLASSES = ("UNet2DConditionModel",)
DOWN_BLOCKS = (*diffusers_unet2d.DOWN_BLOCKS, "CrossAttnDownBlock2D", "SimpleCrossAttnDownBlock2D")
UP_BLOCKS = (*diffusers_unet2d.UP_BLOCKS, "CrossAttnUpBlock2D", "SimpleCrossAttnUpBlock2D")
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
    refuse_empty_levels(options.layers_per_block, class_name)
    places = read_places(options, down, up)
    encoder = tuple(level for level, kind in enumerate(places.encoder) if kind)
    decoder = tuple(level for level, kind in enumerate(places.decoder) if kind)
    layers = layers_of(options)
    down_resample = resampling(down, "conv")
    heads = count_heads(options, places, class_name)
    transformer = translate_transformer(options, depths, places, class_name)
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
        condition=translate_condition(options, attends=places.reads_context),
        norm=NormConfig(num_groups=options.norm_num_groups, eps=options.norm_eps),
        resblock=ResBlockConfig(
            embedding="add" if options.resnet_time_scale_shift == "default" else "scale_shift",
            activation=activation(options.act_fn),
            activate_embedding=False,
            residual_scale=_residual_scale(options, class_name),
        ),
        attention=translate_attention(options, places, heads, class_name),
        transformer=transformer,
        resample=ResampleConfig(
            padding="end" if options.downsample_padding == 0 and "conv" in down_resample else "both"
        ),
        encoder=EncoderConfig(
            stem_kernel=options.conv_in_kernel,
            attention_kinds=filled(places.encoder, places),
            resample=down_resample,
        ),
        mid=dataclasses.replace(
            _translate_mid(options, depths, class_name),
            attention_kind=places.mid if len(places.kinds) > 1 else None,
            num_heads=heads.mid,
        ),
        decoder=DecoderConfig(
            attention_blocks=None
            if encoder == decoder
            else tuple(tuple(range(depth + 1)) if level in decoder else () for level, depth in enumerate(layers)),
            attention_kinds=filled(places.decoder, places),
            num_heads=heads.decoder,
            transformer_depth=None if transformer is None else depths.decoder,
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
