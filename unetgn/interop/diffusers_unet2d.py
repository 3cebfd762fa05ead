"""Converts diffusers' UNet2DModel: DDPM, latent diffusion, ADM and consistency models from the hub.

`num_class_embeds` is read where class_embed_type is None, as there.
`act_fn` is that of the residual blocks alone; the time's MLP and the output have SiLU.
Not supported, each with an error that says so: the NCSN++ blocks (Skip*), Fourier and learned time embeddings.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from unetgn.interop.diffusers_config import keep, read_options
from unetgn.interop.diffusers_names import diffusers_sources
from unetgn.interop.transfer import Names, check_lengths, fill, refuse
from unetgn.messages import short
from unetgn.nn.attention import AttentionConfig
from unetgn.nn.embedding import TimeConfig
from unetgn.nn.groups import NormConfig
from unetgn.nn.norm import Activation
from unetgn.nn.resample import ResampleConfig, ResampleKind
from unetgn.nn.resblock import ResBlockConfig
from unetgn.unet import UNet
from unetgn.unet.config import ConditionConfig, DecoderConfig, EncoderConfig, MidConfig, UNetConfig
from unetgn.unet.model import empty_unet

CLASSES = ("UNet2DModel",)
ACT_FNS = ("silu", "swish", "gelu", "relu", "mish")
DOWN_BLOCKS = ("DownBlock2D", "ResnetDownsampleBlock2D", "AttnDownBlock2D")
UP_BLOCKS = ("UpBlock2D", "ResnetUpsampleBlock2D", "AttnUpBlock2D")

OTHER_BLOCKS = {  # of networks that are not built here, by a part of their names
    "Skip": "a block of NCSN++, with a picture beside its features",
    "KDown": "a block of the x2 upscaler, with norms that the timestep modulates",
    "KCross": "a block of the x2 upscaler, with norms that the timestep modulates",
    "KUp": "a block of the x2 upscaler, with norms that the timestep modulates",
    "Encoder": "a block of an autoencoder",
    "Decoder": "a block of an autoencoder",
    "3D": "a block of a video network",
    "Motion": "a block of a video network",
    "Temporal": "a block of a video network",
    "1D": "a block of a one-dimensional network",
    "Music": "a block of Mustango's own code",
}


@dataclass(frozen=True)
class UNet2DOptions:
    """Holds the constructor's options, as in config.json. `num_train_timesteps` is for embeddings that are learned."""

    sample_size: int | tuple[int, ...] | None = None
    in_channels: int = 3
    out_channels: int = 3
    center_input_sample: bool = False
    time_embedding_type: str = "positional"
    time_embedding_dim: int | None = None
    freq_shift: float = 0
    flip_sin_to_cos: bool = True
    down_block_types: tuple[str, ...] = ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D")
    mid_block_type: str | None = "UNetMidBlock2D"
    up_block_types: tuple[str, ...] = ("AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D")
    block_out_channels: tuple[int, ...] = (224, 448, 672, 896)
    layers_per_block: int = 2
    mid_block_scale_factor: float = 1
    downsample_padding: int = 1
    downsample_type: str = "conv"
    upsample_type: str = "conv"
    dropout: float = 0.0
    act_fn: str = "silu"
    attention_head_dim: int | None = 8
    norm_num_groups: int | None = 32
    attn_norm_num_groups: int | None = None
    norm_eps: float = 1e-5
    resnet_time_scale_shift: str = "default"
    add_attention: bool = True
    class_embed_type: str | None = None
    num_class_embeds: int | None = None
    num_train_timesteps: int | None = None


def convert(config: Mapping[str, Any], state_dict: Mapping[str, Tensor], *, class_name: str, copy: bool) -> UNet:
    """Convert a UNet2DModel that was built with `config`; files with the names of 2022 are recognised."""
    options, others = read_options(UNet2DOptions, config, class_name)
    unet = keep(empty_unet(translate(options, class_name=class_name)), others)
    old = any(key.endswith(".proj_attn.weight") for key in state_dict)
    return fill(unet, Names(diffusers_sources(unet, old_attention=old)), state_dict, copy=copy)


def translate(options: UNet2DOptions, *, class_name: str = "UNet2DModel") -> UNetConfig:
    """Translate the options into our configuration. Raises ValueError, naming the option, for what is not supported."""
    check_lengths(class_name, options, ("down_block_types", "up_block_types"), like="block_out_channels")
    down = block_kinds(options.down_block_types, DOWN_BLOCKS, class_name, "down_block_types")
    up = block_kinds(options.up_block_types, UP_BLOCKS, class_name, "up_block_types")[::-1]
    _refuse(options, class_name)
    encoder = tuple(level for level, kind in enumerate(down) if kind.startswith("Attn"))
    decoder = tuple(level for level, kind in enumerate(up) if kind.startswith("Attn"))
    depth = options.layers_per_block
    symmetric = encoder == decoder
    return UNetConfig(
        sample_size=options.sample_size,
        in_channels=options.in_channels,
        out_channels=options.out_channels,
        channels=options.block_out_channels,
        depth=depth,
        attention_levels=encoder,
        num_classes=options.num_class_embeds if options.class_embed_type is None else None,
        dropout=options.dropout,
        time=TimeConfig(
            order="cos_sin" if options.flip_sin_to_cos else "sin_cos",
            frequency_shift=options.freq_shift,
            embedding_width=options.time_embedding_dim,
        ),
        condition=ConditionConfig(null_class=False, class_embedding=class_embedding(options.class_embed_type)),
        norm=NormConfig(num_groups=options.norm_num_groups, eps=options.norm_eps),
        resblock=ResBlockConfig(
            embedding="add" if options.resnet_time_scale_shift == "default" else "scale_shift",
            activation=activation(options.act_fn),
            activate_embedding=False,
        ),
        attention=AttentionConfig(
            head_dim=options.attention_head_dim, narrow=_is_narrow(options, {*encoder, *decoder}, class_name)
        ),
        resample=ResampleConfig(
            padding="end"
            if options.downsample_padding == 0 and "conv" in resampling(down, options.downsample_type)
            else "both"
        ),
        encoder=EncoderConfig(resample=resampling(down, options.downsample_type)),
        mid=_translate_mid(options, class_name),
        decoder=DecoderConfig(
            attention_blocks=None
            if symmetric
            else tuple(tuple(range(depth + 1)) if level in decoder else () for level in range(len(up))),
            resample=resampling((*up[1:], ""), options.upsample_type),
        ),
    )


def _refuse(options: UNet2DOptions, class_name: str) -> None:
    refuse(class_name, options, "the input must be centred by the caller", center_input_sample=(False,))
    refuse(class_name, options, "another time embedding", time_embedding_type=("positional",))
    refuse(class_name, options, "another class embedding", class_embed_type=(None, "timestep", "identity"))
    refuse(class_name, options, "another middle", mid_block_type=("UNetMidBlock2D", None))
    refuse(class_name, options, "another activation", act_fn=ACT_FNS)
    refuse(class_name, options, "another padding", downsample_padding=(0, 1))
    refuse(class_name, options, "another modulation", resnet_time_scale_shift=("default", "scale_shift"))
    refuse(
        class_name, options, "another resampling", downsample_type=("conv", "resnet"), upsample_type=("conv", "resnet")
    )
    refuse_empty_levels(options.layers_per_block, class_name)
    if options.norm_num_groups is None:
        raise ValueError(f"{class_name}: norm_num_groups=None is not supported (only the NCSN++ blocks have it)")


def _translate_mid(options: UNet2DOptions, class_name: str) -> MidConfig:
    if options.mid_block_type is None:
        return MidConfig(depth=0)
    scale = middle_scale(options.mid_block_scale_factor, class_name)
    if not options.add_attention:
        return MidConfig(attention=False, residual_scale=scale)
    default = options.resnet_time_scale_shift == "default"
    groups = options.attn_norm_num_groups
    return MidConfig(
        attention_norm=default or groups is not None,  # scale-shift models have none there unless told
        attention_num_groups=groups if groups != options.norm_num_groups else None,
        residual_scale=scale,
    )


def _is_narrow(options: UNet2DOptions, attending: set[int], class_name: str) -> bool:
    """Say whether heads leave a part of a width out: diffusers takes as many of them as fit."""
    if options.mid_block_type is not None and options.add_attention:
        attending = attending | {len(options.block_out_channels) - 1}
    if options.attention_head_dim is None:
        return False
    widths = [options.block_out_channels[level] for level in sorted(attending)]
    check_fit(class_name, options.attention_head_dim, widths)
    return any(width % options.attention_head_dim for width in widths)


def refuse_empty_levels(layers: int | tuple[int, ...], class_name: str) -> None:
    """Raise ValueError for levels without residual blocks, which diffusers leaves in other widths than ours."""
    if min((layers,) if isinstance(layers, int) else layers, default=1) < 1:
        given = layers if isinstance(layers, int) else list(layers)
        raise ValueError(f"{class_name}: layers_per_block={given} is not supported (each level needs a residual block)")


def check_fit(class_name: str, heads: int, widths: Iterable[int]) -> None:
    """Raise ValueError where attention_head_dim is larger than a width at which there is attention, or not above 0."""
    for width in widths:
        if not 1 <= heads <= width:
            raise ValueError(
                f"{class_name}: attention_head_dim={heads} must be at least 1, and at most {width} channels"
            )


def class_embedding(kind: str | None) -> Any:
    """Turn diffusers' class_embed_type, None being a table, into our condition.class_embedding."""
    return "table" if kind is None else kind


def activation(name: str) -> Activation:
    """Give our name of an activation of diffusers, one of ACT_FNS."""
    return "silu" if name == "swish" else name  # type: ignore[return-value]


def middle_scale(factor: float, class_name: str, option: str = "mid_block_scale_factor") -> float | None:
    """Turn a factor by which diffusers divides, of its option, into our residual_scale; None for 1."""
    if not 0 < factor < math.inf:
        raise ValueError(f"{class_name}: {option}={factor} must be a finite number above 0")
    return None if factor == 1 else 1 / factor


def block_kinds(types: tuple[str, ...], known: tuple[str, ...], class_name: str, option: str) -> tuple[str, ...]:
    """Strip the old prefix off block types. Raises ValueError for one that is not known."""
    kinds = tuple(name.removeprefix("UNetRes") for name in types)
    for kind in kinds:
        if kind not in known:
            whose = next((f" ({whose})" for part, whose in OTHER_BLOCKS.items() if part in kind), "")
            raise ValueError(
                f"{class_name}: {option} with {short(kind)} is not supported{whose}; {', '.join(known)} are"
            )
    return kinds


def resampling(kinds: tuple[str, ...], attention_kind: str) -> tuple[ResampleKind, ...]:
    """Name how each level but the last is left: by a residual block where its type or `attention_kind` says so."""
    return tuple(
        "resblock"
        if kind.startswith(("Resnet", "Simple")) or (kind.startswith("Attn") and attention_kind == "resnet")
        else "conv"
        for kind in kinds[:-1]
    )
