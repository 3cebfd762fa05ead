"""Converts diffusers' UNet2DConditionModel: Stable Diffusion 1 to XL, inpainting, upscaling, latent consistency.

`attention_head_dim` is the NUMBER of heads here, a slip of names that diffusers keeps for the sake of old files.
Options that diffusers writes and does not read are accepted, as there: `mid_block_only_cross_attention`, which only the
middle of Kandinsky reads, and, without `addition_embed_type`, `addition_time_embed_dim`,
`projection_class_embeddings_input_dim` and `addition_embed_type_num_heads`; `num_class_embeds` beside a
class_embed_type. A model without any attention layer never reads its context; ours then takes none.
Not supported, each with an error that says so: Kandinsky's and DeepFloyd's blocks and embeddings, GLIGEN.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from unetgn.interop.diffusers_config import keep, read_options
from unetgn.interop.diffusers_names import diffusers_sources
from unetgn.interop.diffusers_unet2d import block_kinds, class_embedding, middle_scale, resampling
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
CLASS_EMBED_TYPES = (None, "timestep", "identity", "projection", "simple_projection")
PROJECTED = ("text_time", "projection", "simple_projection")  # by projection_class_embeddings_input_dim
PER_LEVEL = (
    "down_block_types",
    "up_block_types",
    "layers_per_block",
    "attention_head_dim",
    "only_cross_attention",
    "cross_attention_dim",
)


Depth = int | tuple[int, ...]


@dataclass(frozen=True)
class Depths:
    """Counts the transformer blocks; `decoder`, finest level first, and `mid` are None where they are as usual."""

    encoder: Depth | tuple[Depth, ...]
    mid: int | None = None
    decoder: tuple[Depth, ...] | None = None


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
    depths = _read_depths(options, class_name)
    down = block_kinds(options.down_block_types, DOWN_BLOCKS, class_name, "down_block_types")
    up = block_kinds(options.up_block_types, UP_BLOCKS, class_name, "up_block_types")[::-1]
    _refuse(options, class_name)
    encoder = tuple(level for level, kind in enumerate(down) if kind.startswith("Cross"))
    decoder = tuple(level for level, kind in enumerate(up) if kind.startswith("Cross"))
    layers = _layers(options)
    down_resample = resampling(down, "conv")
    sized = options.addition_embed_type == "text_time"
    projected = options.class_embed_type in ("projection", "simple_projection")
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
        num_classes=options.num_class_embeds if options.class_embed_type is None else None,
        dropout=options.dropout,
        time_cond_proj_dim=options.time_cond_proj_dim,
        addition_time_embed_dim=options.addition_time_embed_dim if sized else None,
        time=_translate_time(options),
        condition=ConditionConfig(
            class_embedding=class_embedding(options.class_embed_type),
            class_dim=options.projection_class_embeddings_input_dim if projected else None,
            null_class=False,
            class_entry="concat" if options.class_embeddings_concat else "after_mlp",
            vector_dim=options.projection_class_embeddings_input_dim if sized else None,
            context_dim=options.encoder_hid_dim if attending or middle else None,
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
        transformer=_translate_transformer(options, depths, attending) if attending or middle else None,
        resample=ResampleConfig(
            padding="end" if options.downsample_padding == 0 and "conv" in down_resample else "both"
        ),
        encoder=EncoderConfig(stem_kernel=options.conv_in_kernel, resample=down_resample),
        mid=_translate_mid(options, depths, class_name),
        decoder=DecoderConfig(
            attention_blocks=None
            if encoder == decoder
            else tuple(tuple(range(depth + 1)) if level in decoder else () for level, depth in enumerate(layers)),
            transformer_depth=depths.decoder if attending or middle else None,
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
    refuse(name, options, "another class embedding", class_embed_type=CLASS_EMBED_TYPES)
    refuse(name, options, "another added embedding", addition_embed_type=(None, "text_time"))
    refuse(name, options, "another projection of the context", encoder_hid_dim_type=(None, "text_proj"))
    refuse(name, options, "another attention", dual_cross_attention=(False,), attention_type=("default",))
    refuse(name, options, "another attention", cross_attention_norm=(None,))
    refuse(name, options, "diffusers refuses it too", num_attention_heads=(None,))
    refuse(name, options, "another embedding", time_embedding_act_fn=(None,), timestep_post_act=(None,))
    refuse(name, options, "another embedding", time_embedding_type=("positional", "fourier"))
    refuse(name, options, "another residual block", resnet_skip_time_act=(False,), resnet_out_scale_factor=(1.0,))
    if options.norm_num_groups is None:
        raise ValueError(f"{name}: norm_num_groups=None is not supported")
    for kind in (options.addition_embed_type, options.class_embed_type):
        if kind in PROJECTED and options.projection_class_embeddings_input_dim is None:
            raise ValueError(f"{name}: {kind!r} needs projection_class_embeddings_input_dim")
    if options.encoder_hid_dim_type is not None and options.encoder_hid_dim is None:
        raise ValueError(f"{name}: encoder_hid_dim_type={options.encoder_hid_dim_type!r} needs encoder_hid_dim")


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


def _translate_transformer(options: ConditionOptions, depths: Depths, attending: set[int]) -> TransformerConfig:
    only = options.only_cross_attention
    cross_only = tuple(level for level in sorted(attending) if (only if isinstance(only, bool) else only[level]))
    return TransformerConfig(
        context_dim=options.cross_attention_dim,
        depth=depths.encoder,
        linear_projection=options.use_linear_projection,
        cross_only=cross_only,
    )


def _translate_mid(options: ConditionOptions, depths: Depths, class_name: str) -> MidConfig:
    if options.mid_block_type is None:
        return MidConfig(depth=0)
    scale = middle_scale(options.mid_block_scale_factor, class_name)
    if options.mid_block_type == "UNetMidBlock2D":  # one residual block, as it is called there
        return MidConfig(depth=1, attention=False, residual_scale=scale)
    return MidConfig(residual_scale=scale, transformer_depth=depths.mid)


def _layers(options: ConditionOptions) -> tuple[int, ...]:
    layers = options.layers_per_block
    return (layers,) * len(options.block_out_channels) if isinstance(layers, int) else layers


def _read_depths(options: ConditionOptions, name: str) -> Depths:
    """Read the depths of the transformers as diffusers does, level by level.

    It reads no entry beyond those that it needs: published lists may be longer. Only the middle reads the last one.
    """
    given, layers, levels = options.transformer_layers_per_block, _layers(options), len(options.block_out_channels)
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
