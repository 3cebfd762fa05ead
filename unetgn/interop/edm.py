"""Converts NVlabs/edm: DhariwalUNet (ADM) and SongUNet (DDPM++ and NCSN++).

The timestep is the network's own noise label: ln(sigma) / 4 under EDM's preconditioning (Karras et al. 2022, arXiv
2206.00364, table 1), which stays outside. Class labels may be one-hot rows; without labels the class contributes zeros,
as there. The published pickles hold a preconditioned network: convert them to safetensors where the original code runs;
`load` strips their `model.` prefix. This file has facts of names and arithmetic only: the project's code has a licence
that allows no commercial use, and none of it is here.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from unetgn.interop.qkv import as_matrix, unpack
from unetgn.interop.transfer import Names, Source, fill, refuse
from unetgn.nn.attention import AttentionConfig
from unetgn.nn.embedding import TimeConfig
from unetgn.nn.groups import NormConfig
from unetgn.nn.resample import BOX, ResampleConfig, filter_kernel
from unetgn.nn.resblock import ResBlock, ResBlockConfig
from unetgn.serialize import from_plain
from unetgn.unet import UNet
from unetgn.unet.config import ConditionConfig, DecoderConfig, EncoderConfig, MidConfig, UNetConfig
from unetgn.unet.levels import DecoderLevel, EncoderLevel, Level
from unetgn.unet.model import empty_unet

CLASSES = ("DhariwalUNet", "SongUNet")
HEAD_WIDTH = 64  # DhariwalUNet has width // 64 heads; none, and so no attention, below that
RES_BLOCK = {
    "norm1": "norm0",
    "conv1": "conv0",
    "time_emb_proj": "affine",
    "norm2": "norm1",
    "conv2": "conv1",
    "conv_shortcut": "skip",
}
ATTENTION = {"group_norm": "norm2", "to_out.0": "proj", "to_q": "qkv", "to_k": "qkv", "to_v": "qkv"}


@dataclass(frozen=True)
class DhariwalOptions:
    """Holds DhariwalUNet's options. `label_dropout` concerns training only."""

    img_resolution: int
    in_channels: int
    out_channels: int
    label_dim: int = 0
    augment_dim: int = 0
    model_channels: int = 192
    channel_mult: tuple[float, ...] = (1, 2, 3, 4)
    channel_mult_emb: float = 4
    num_blocks: int = 3
    attn_resolutions: tuple[int, ...] = (32, 16, 8)
    dropout: float = 0.10
    label_dropout: float = 0.0


@dataclass(frozen=True)
class SongOptions:
    """Holds SongUNet's options. `label_dropout` concerns training only."""

    img_resolution: int
    in_channels: int
    out_channels: int
    label_dim: int = 0
    augment_dim: int = 0
    model_channels: int = 128
    channel_mult: tuple[float, ...] = (1, 2, 2, 2)
    channel_mult_emb: float = 4
    num_blocks: int = 4
    attn_resolutions: tuple[int, ...] = (16,)
    dropout: float = 0.10
    label_dropout: float = 0.0
    embedding_type: str = "positional"
    channel_mult_noise: float = 1
    encoder_type: str = "standard"
    decoder_type: str = "standard"
    resample_filter: tuple[float, ...] = (1, 1)


def convert(config: Mapping[str, Any], state_dict: Mapping[str, Tensor], *, class_name: str, copy: bool) -> UNet:
    """Convert an EDM network of class `class_name` that was built with `config`."""
    if class_name == "DhariwalUNet":
        dhariwal = from_plain(DhariwalOptions, config)
        unet, resolution = empty_unet(translate_dhariwal(dhariwal)), dhariwal.img_resolution
    else:
        song = from_plain(SongOptions, config)
        unet, resolution = empty_unet(translate_song(song)), song.img_resolution
    return fill(unet, edm_names(unet, resolution), state_dict, copy=copy)


def translate_dhariwal(options: DhariwalOptions) -> UNetConfig:
    """Translate a DhariwalUNet's options. Raises ValueError where its levels have no block, and so no width."""
    if options.num_blocks < 1:
        raise ValueError(f"DhariwalUNet: num_blocks={options.num_blocks} is not supported; numbers from 1 on are")
    channels = tuple(int(mult * options.model_channels) for mult in options.channel_mult)
    heads = tuple(width // HEAD_WIDTH for width in channels)
    resolutions = [options.img_resolution >> level for level in range(len(channels))]
    return UNetConfig(
        sample_size=options.img_resolution,
        in_channels=options.in_channels,
        out_channels=options.out_channels,
        channels=channels,
        depth=options.num_blocks,
        attention_levels=tuple(
            level for level, size in enumerate(resolutions) if size in options.attn_resolutions and heads[level]
        ),
        num_classes=options.label_dim or None,
        dropout=options.dropout,
        time=TimeConfig(
            frequencies="power",
            width=options.model_channels,
            embedding_width=int(options.model_channels * options.channel_mult_emb),
        ),
        condition=ConditionConfig(
            null_class=False,
            missing_class="zeros" if options.label_dim else "error",
            augment_dim=options.augment_dim or None,
        ),
        norm=NormConfig(min_group_size=4, eps=1e-5),
        resblock=ResBlockConfig(embedding="scale_shift", activate_embedding=False),
        attention=AttentionConfig(num_heads=tuple(max(1, count) for count in heads)),
        resample=ResampleConfig(kind="resblock"),
        mid=MidConfig(attention=heads[-1] > 0),
    )


def translate_song(options: SongOptions) -> UNetConfig:
    """Translate a SongUNet's options. Raises ValueError for its "skip" encoder and decoder."""
    refuse("SongUNet", options, "no published network has it", decoder_type=("standard",))
    refuse("SongUNet", options, "no published network has it", encoder_type=("standard", "residual"))
    refuse("SongUNet", options, "unknown there too", embedding_type=("positional", "fourier"))
    channels = tuple(int(mult * options.model_channels) for mult in options.channel_mult)
    attending = [options.img_resolution >> level in options.attn_resolutions for level in range(len(channels))]
    resampled = len(channels) > 1
    return UNetConfig(
        sample_size=options.img_resolution,
        in_channels=options.in_channels,
        out_channels=options.out_channels,
        channels=channels,
        depth=options.num_blocks,
        attention_levels=tuple(level for level, attends in enumerate(attending) if attends and options.num_blocks),
        num_classes=options.label_dim or None,
        dropout=options.dropout,
        time=_song_time(options),
        condition=_song_condition(options),
        norm=NormConfig(min_group_size=4, eps=1e-6),
        resblock=ResBlockConfig(activate_embedding=False, residual_scale=0.5**0.5, project_resampled=resampled),
        resample=ResampleConfig(kind="resblock", taps=options.resample_filter if resampled else BOX),
        encoder=EncoderConfig(
            stem_channels=options.model_channels, residual_input=resampled and options.encoder_type == "residual"
        ),
        decoder=DecoderConfig(
            attention_blocks=tuple((options.num_blocks,) if attends else () for attends in attending)
        ),
    )


def _song_time(options: SongOptions) -> TimeConfig:
    width = int(options.model_channels * options.channel_mult_noise)
    embedding_width = int(options.model_channels * options.channel_mult_emb)
    if options.embedding_type == "fourier":
        return TimeConfig(features="fourier", order="sin_cos", width=width, embedding_width=embedding_width)
    return TimeConfig(
        order="sin_cos", frequency_shift=1.0, frequencies="power", width=width, embedding_width=embedding_width
    )


def _song_condition(options: SongOptions) -> ConditionConfig:
    augment_dim = options.augment_dim or None
    if not options.label_dim:
        return ConditionConfig(augment_dim=augment_dim)
    return ConditionConfig(
        null_class=False,
        missing_class="zeros",
        class_entry="before_mlp",
        class_bias=True,
        class_scale=options.label_dim**0.5,
        augment_dim=augment_dim,
    )


def edm_names(unet: UNet, resolution: int) -> Names:
    """Map our keys to EDM's, whose blocks are named by their resolution; filter taps are constants there."""
    kernel = filter_kernel(unet.unet_config.resample.taps, 2)
    places = dict(_places(unet, resolution))
    modules = dict(unet.named_modules())
    song = unet.unet_config.resblock.embedding == "add"
    sources, own = {}, {}
    for ours in unet.state_dict():
        if ours.endswith(".kernel"):
            own[ours] = kernel
            continue
        prefix = max((place for place in places if ours.startswith(place + ".")), key=len)
        part, _, leaf = ours[len(prefix) + 1 :].rpartition(".")
        sources[ours] = _source(places[prefix], part, leaf, modules[prefix], song)
    constants = {}
    for prefix, theirs in places.items():
        module = modules.get(prefix)
        if isinstance(module, ResBlock) and module.resample is not None:
            constants[f"{theirs}.conv0.resample_filter"] = constants[f"{theirs}.skip.resample_filter"] = kernel
        elif prefix.endswith("input_branch.conv"):
            constants[f"{theirs}.resample_filter"] = kernel
    return Names(sources, constants, own)


def _source(theirs: str, part: str, leaf: str, module: torch.nn.Module, song: bool) -> Source:
    if isinstance(module, ResBlock):
        return Source(f"{theirs}.{RES_BLOCK[part]}.{leaf}")
    if part in ATTENTION:
        key = f"{theirs}.{ATTENTION[part]}.{leaf}"
        if part == "group_norm":
            return Source(key)
        if part == "to_out.0":
            return Source(key, as_matrix)
        return Source(key, unpack("edm", module.heads, {"to_q": 0, "to_k": 1, "to_v": 2}[part]))  # type: ignore[arg-type]
    if theirs == "map_label" and leaf == "weight":
        return Source("map_label.weight", lambda weight: weight.t())
    if theirs == "map_noise":
        return Source("map_noise.freqs")
    return Source(f"{theirs}.{leaf}")


def _places(unet: UNet, resolution: int) -> Iterator[tuple[str, str]]:
    """Name our modules as they are called there."""
    song = unet.unet_config.resblock.embedding == "add"
    yield from {
        "time_proj": "map_noise",
        "time_embedding.linear_1": "map_layer0",
        "time_embedding.linear_2": "map_layer1",
        "class_embedding": "map_label",
        "augment_embedding": "map_augment",
        "conv_in": f"enc.{resolution}x{resolution}_conv",
        "conv_norm_out": f"dec.{resolution}x{resolution}_aux_norm" if song else "out_norm",
        "conv_out": f"dec.{resolution}x{resolution}_aux_conv" if song else "out_conv",
    }.items()
    for i, level in enumerate(cast("list[EncoderLevel]", list(unet.down_blocks))):
        size, half = resolution >> i, resolution >> (i + 1)
        yield from _blocks(level, f"down_blocks.{i}", f"enc.{size}x{size}_block")
        if len(level.downsamplers):
            yield f"down_blocks.{i}.downsamplers.0", f"enc.{half}x{half}_down"
        if level.input_branch is not None:
            yield f"down_blocks.{i}.input_branch.conv", f"enc.{half}x{half}_aux_residual"
    coarsest = len(unet.down_blocks) - 1
    yield from _blocks(unet.mid_block, "mid_block", f"dec.{resolution >> coarsest}x{resolution >> coarsest}_in")
    for i, up_level in enumerate(cast("list[DecoderLevel]", list(unet.up_blocks))):
        size, double = resolution >> (coarsest - i), resolution >> max(coarsest - i - 1, 0)
        yield from _blocks(up_level, f"up_blocks.{i}", f"dec.{size}x{size}_block")
        if len(up_level.upsamplers):
            yield f"up_blocks.{i}.upsamplers.0", f"dec.{double}x{double}_up"


def _blocks(level: Level, ours: str, theirs: str) -> Iterator[tuple[str, str]]:
    for index in range(len(level.resnets)):
        yield f"{ours}.resnets.{index}", f"{theirs}{index}"
        if level.attends(index):
            yield f"{ours}.attentions.{index}", f"{theirs}{index}"
