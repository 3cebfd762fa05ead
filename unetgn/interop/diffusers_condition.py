"""Converts diffusers' UNet2DConditionModel: Stable Diffusion 1 to XL, inpainting, upscaling, latent consistency.

`attention_head_dim` is the NUMBER of heads here, a slip of names that diffusers keeps for the sake of old files.
Options that diffusers writes and does not read are accepted, as there: `mid_block_only_cross_attention`, which only the
middle of Kandinsky reads, and, without `addition_embed_type`, `addition_time_embed_dim`,
`projection_class_embeddings_input_dim` and `addition_embed_type_num_heads`. A model without any attention layer never
reads its context; ours then takes none.
Not supported, each with an error that says so: Kandinsky's and DeepFloyd's blocks and embeddings, projections of the
context, GLIGEN, class embeddings other than a table.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from unetgn.interop.diffusers_config import keep, read_options
from unetgn.interop.diffusers_names import diffusers_sources
from unetgn.interop.diffusers_unet2d import block_kinds, middle_scale, resampling
from unetgn.interop.transfer import Names, check_heads, check_lengths, fill, refuse
from unetgn.nn.attention import AttentionConfig
from unetgn.nn.embedding import TimeConfig
from unetgn.nn.groups import NormConfig
from unetgn.nn.resample import ResampleConfig
from unetgn.nn.resblock import ResBlockConfig
from unetgn.nn.transformer import TransformerConfig
from unetgn.unet import UNet
from unetgn.unet.config import ConditionConfig, DecoderConfig, EncoderConfig, MidConfig, UNetConfig
from unetgn.unet.model import empty_unet

CLASSES = ("UNet2DConditionModel",)
DOWN_BLOCKS = ("DownBlock2D", "ResnetDownsampleBlock2D", "CrossAttnDownBlock2D")
UP_BLOCKS = ("UpBlock2D", "ResnetUpsampleBlock2D", "CrossAttnUpBlock2D")
PER_LEVEL = (
    "down_block_types",
    "up_block_types",
    "layers_per_block",
    "attention_head_dim",
    "only_cross_attention",
    "cross_attention_dim",
    "transformer_layers_per_block",
    "reverse_transformer_layers_per_block",
)


@dataclass(frozen=True)
class ConditionOptions:
    """Holds the constructor's options, as in config.json."""

    sample_size: int | tuple[int, ...] | None = None
    in_channels: int = 4
    out_channels: int = 4
    center_input_sample: bool = False
    flip_sin_to_cos: bool = True
    freq_shift: float = 0
    down_block_types: tuple[str, ...] = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
    mid_block_type: str | None = "UNetMidBlock2DCrossAttn"
    up_block_types: tuple[str, ...] = ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3
    only_cross_attention: bool | tuple[bool, ...] = False
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers_per_block: int | tuple[int, ...] = 2
    downsample_padding: int = 1
    mid_block_scale_factor: float = 1
    dropout: float = 0.0
    act_fn: str = "silu"
    norm_num_groups: int | None = 32
    norm_eps: float = 1e-5
    cross_attention_dim: int | tuple[int, ...] = 1280
    transformer_layers_per_block: int | tuple[int | tuple[int, ...], ...] = 1
    reverse_transformer_layers_per_block: tuple[int | tuple[int, ...], ...] | None = None
    encoder_hid_dim: int | None = None
    encoder_hid_dim_type: str | None = None
    attention_head_dim: int | tuple[int, ...] = 8
    num_attention_heads: int | tuple[int, ...] | None = None
    dual_cross_attention: bool = False
    use_linear_projection: bool = False
    class_embed_type: str | None = None
    addition_embed_type: str | None = None
    addition_time_embed_dim: int | None = None
    num_class_embeds: int | None = None
    upcast_attention: bool | None = False
    resnet_time_scale_shift: str = "default"
    resnet_skip_time_act: bool = False
    resnet_out_scale_factor: float = 1.0
    time_embedding_type: str = "positional"
    time_embedding_dim: int | None = None
    time_embedding_act_fn: str | None = None
    timestep_post_act: str | None = None
    time_cond_proj_dim: int | None = None
    conv_in_kernel: int = 3
    conv_out_kernel: int = 3
    projection_class_embeddings_input_dim: int | None = None
    attention_type: str = "default"
    class_embeddings_concat: bool = False
    mid_block_only_cross_attention: bool | None = None
    cross_attention_norm: str | None = None
    addition_embed_type_num_heads: int = 64


def convert(config: Mapping[str, Any], state_dict: Mapping[str, Tensor], *, class_name: str, copy: bool) -> UNet:
    """Convert a UNet2DConditionModel that was built with `config`."""
    options, others = read_options(ConditionOptions, config, class_name)
    unet = keep(empty_unet(translate(options, class_name=class_name)), others)
    return fill(unet, Names(diffusers_sources(unet)), state_dict, copy=copy)


def translate(options: ConditionOptions, *, class_name: str = "UNet2DConditionModel") -> UNetConfig:
    """Translate the options into our configuration. Raises ValueError, naming the option, for what is not supported."""
    check_lengths(class_name, options, PER_LEVEL, like="block_out_channels")
    down = block_kinds(options.down_block_types, DOWN_BLOCKS, class_name, "down_block_types")
    up = block_kinds(options.up_block_types, UP_BLOCKS, class_name, "up_block_types")[::-1]
    _refuse(options, class_name)
    encoder = tuple(level for level, kind in enumerate(down) if kind.startswith("Cross"))
    decoder = tuple(level for level, kind in enumerate(up) if kind.startswith("Cross"))
    depths = options.layers_per_block
    depths = (depths,) * len(down) if isinstance(depths, int) else depths
    down_resample = resampling(down, "conv")
    sized = options.addition_embed_type == "text_time"
    attending = {*encoder, *decoder}
    middle = options.mid_block_type == "UNetMidBlock2DCrossAttn"
    _check_heads(options, attending | ({len(down) - 1} if middle else set()), class_name)
    return UNetConfig(
        sample_size=options.sample_size,
        in_channels=options.in_channels,
        out_channels=options.out_channels,
        channels=options.block_out_channels,
        depth=options.layers_per_block,
        attention_levels=encoder,
        num_classes=options.num_class_embeds,
        dropout=options.dropout,
        time_cond_proj_dim=options.time_cond_proj_dim,
        addition_time_embed_dim=options.addition_time_embed_dim if sized else None,
        time=_translate_time(options),
        condition=ConditionConfig(
            null_class=False, vector_dim=options.projection_class_embeddings_input_dim if sized else None
        ),
        norm=NormConfig(num_groups=options.norm_num_groups, eps=options.norm_eps),
        resblock=ResBlockConfig(
            embedding="add" if options.resnet_time_scale_shift == "default" else "scale_shift", activate_embedding=False
        ),
        attention=AttentionConfig(
            num_heads=options.attention_head_dim,
            norm=NormConfig(num_groups=options.norm_num_groups, eps=1e-6),
            upcast=bool(options.upcast_attention),
        ),
        transformer=_translate_transformer(options, attending) if attending or middle else None,
        resample=ResampleConfig(
            padding="end" if options.downsample_padding == 0 and "conv" in down_resample else "both"
        ),
        encoder=EncoderConfig(stem_kernel=options.conv_in_kernel, resample=down_resample),
        mid=_translate_mid(options, class_name),
        decoder=DecoderConfig(
            attention_blocks=None
            if encoder == decoder
            else tuple(tuple(range(depth + 1)) if level in decoder else () for level, depth in enumerate(depths)),
            transformer_depth=_decoder_depths(options) if attending or middle else None,
            resample=resampling((*up[1:], ""), "conv"),
            out_kernel=options.conv_out_kernel,
        ),
    )


def _refuse(options: ConditionOptions, name: str) -> None:
    refuse(name, options, "the input must be centred by the caller", center_input_sample=(False,))
    refuse(name, options, "another middle", mid_block_type=("UNetMidBlock2DCrossAttn", "UNetMidBlock2D", None))
    refuse(name, options, "another activation", act_fn=("silu", "swish"))
    refuse(name, options, "another padding", downsample_padding=(0, 1))
    refuse(name, options, "another modulation", resnet_time_scale_shift=("default", "scale_shift"))
    refuse(name, options, "another class embedding", class_embed_type=(None,), class_embeddings_concat=(False,))
    refuse(name, options, "another added embedding", addition_embed_type=(None, "text_time"))
    refuse(name, options, "a projection of the context", encoder_hid_dim=(None,), encoder_hid_dim_type=(None,))
    refuse(name, options, "another attention", dual_cross_attention=(False,), attention_type=("default",))
    refuse(name, options, "another attention", cross_attention_norm=(None,))
    refuse(name, options, "diffusers refuses it too", num_attention_heads=(None,))
    refuse(name, options, "another embedding", time_embedding_act_fn=(None,), timestep_post_act=(None,))
    refuse(name, options, "another embedding", time_embedding_type=("positional", "fourier"))
    refuse(name, options, "another residual block", resnet_skip_time_act=(False,), resnet_out_scale_factor=(1.0,))
    if options.norm_num_groups is None:
        raise ValueError(f"{name}: norm_num_groups=None is not supported")
    if options.addition_embed_type == "text_time" and options.projection_class_embeddings_input_dim is None:
        raise ValueError(f"{name}: addition_embed_type='text_time' needs projection_class_embeddings_input_dim")


def _translate_time(options: ConditionOptions) -> TimeConfig:
    order = "cos_sin" if options.flip_sin_to_cos else "sin_cos"
    first = options.block_out_channels[0]
    if options.time_embedding_type == "fourier":
        width = options.time_embedding_dim or 2 * first
        return TimeConfig(
            features="fourier",
            order=order,  # type: ignore[arg-type]
            # the shift is that of the size numbers' features, where there are any
            frequency_shift=options.freq_shift if options.addition_embed_type == "text_time" else 0.0,
            width=width,
            embedding_width=width,
            fourier_scale=1.0,
        )
    return TimeConfig(order=order, frequency_shift=options.freq_shift, embedding_width=options.time_embedding_dim)  # type: ignore[arg-type]


def _check_heads(options: ConditionOptions, attending: set[int], name: str) -> None:
    heads = options.attention_head_dim
    for level in sorted(attending):
        count = heads if isinstance(heads, int) else heads[level]
        check_heads(name, "attention_head_dim", count, [options.block_out_channels[level]])


def _translate_transformer(options: ConditionOptions, attending: set[int]) -> TransformerConfig:
    only = options.only_cross_attention
    cross_only = tuple(level for level in sorted(attending) if (only if isinstance(only, bool) else only[level]))
    return TransformerConfig(
        context_dim=options.cross_attention_dim,
        depth=options.transformer_layers_per_block,
        linear_projection=options.use_linear_projection,
        cross_only=cross_only,
    )


def _translate_mid(options: ConditionOptions, class_name: str) -> MidConfig:
    if options.mid_block_type is None:
        return MidConfig(depth=0)
    scale = middle_scale(options.mid_block_scale_factor, class_name)
    if options.mid_block_type == "UNetMidBlock2D":  # one residual block, as it is called there
        return MidConfig(depth=1, attention=False, residual_scale=scale)
    return MidConfig(residual_scale=scale)


def _decoder_depths(options: ConditionOptions) -> tuple[int | tuple[int, ...], ...] | None:
    """List the depths of the decoder's transformers, finest level first, where they are not the encoder's."""
    reverse = options.reverse_transformer_layers_per_block
    return None if reverse is None else reverse[::-1]
