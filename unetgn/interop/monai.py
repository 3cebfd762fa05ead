"""Converts MONAI's DiffusionModelUNet in two and three dimensions, with classes and cross-attention.

Files of MONAI's GenerativeModels, where the network stood before, have older names and are recognised; so is packed
attention (`use_combined_linear`). `num_channels`, which `channels` was called there, is taken for it.
Without attention `num_head_channels` is not read, as there; `use_flash_attention` says how it ran only.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from unetgn.interop.qkv import unpack
from unetgn.interop.transfer import Names, Source, check_heads, check_lengths, fill, refuse
from unetgn.nn.attention import AttentionConfig
from unetgn.nn.groups import NormConfig
from unetgn.nn.resample import ResampleConfig
from unetgn.nn.resblock import ResBlockConfig
from unetgn.nn.transformer import TransformerConfig
from unetgn.serialize import from_plain
from unetgn.unet import UNet
from unetgn.unet.config import ConditionConfig, UNetConfig
from unetgn.unet.model import empty_unet

CLASSES = ("DiffusionModelUNet",)
PER_LEVEL = ("num_res_blocks", "attention_levels", "num_head_channels")
RENAMES = (  # applied in order to our names
    (r"^time_embedding\.linear_1\.", "time_embed.0."),
    (r"^time_embedding\.linear_2\.", "time_embed.2."),
    (r"^conv_in\.", "conv_in.conv."),
    (r"^conv_norm_out\.", "out.0."),
    (r"^conv_out\.", "out.2.conv."),
    (r"^mid_block\.resnets\.0\.", "middle_block.resnet_1."),
    (r"^mid_block\.resnets\.1\.", "middle_block.resnet_2."),
    (r"^mid_block\.attentions\.0\.", "middle_block.attention."),
    (r"\.downsamplers\.0\.conv\.", ".downsampler.op.conv."),
    (r"\.upsamplers\.0\.conv\.", ".upsampler.postconv.conv."),
    (r"\.(down|up)samplers\.0\.", r".\1sampler."),
    (r"\.conv([12])\.", r".conv\1.conv."),
    (r"\.conv_shortcut\.", ".skip_connection.conv."),
    (r"\.group_norm\.", ".norm."),
    (r"\.proj_(in|out)\.", r".proj_\1.conv."),
    (r"\.ff\.net\.0\.proj\.", ".ff.linear1."),
    (r"\.ff\.net\.2\.", ".ff.linear2."),
    (r"\.to_out\.0\.", ".out_proj."),
    (r"(\.attentions\.\d+|\.attention)\.(to_[qkv]|out_proj)\.", r"\1.attn.\2."),
)
OLD_NAMES = (  # of GenerativeModels, applied to MONAI's
    (r"\.attn\.out_proj\.", ".proj_attn."),
    (r"\.attn\.(to_[qkv])\.", r".\1."),
    (r"\.out_proj\.", ".to_out.0."),
    (r"\.postconv\.", ".conv."),
)
OLD_KEYS = (".proj_attn.", ".to_out.0.", ".upsampler.conv.")  # the first parts of which are nowhere in new names


@dataclass(frozen=True)
class MonaiOptions:
    """Holds the constructor's options."""

    spatial_dims: int
    in_channels: int
    out_channels: int
    num_res_blocks: int | tuple[int, ...] = (2, 2, 2, 2)
    channels: tuple[int, ...] = (32, 64, 64, 64)
    attention_levels: tuple[bool, ...] = (False, False, True, True)
    norm_num_groups: int = 32
    norm_eps: float = 1e-6
    resblock_updown: bool = False
    num_head_channels: int | tuple[int, ...] = 8
    with_conditioning: bool = False
    transformer_num_layers: int = 1
    cross_attention_dim: int | None = None
    num_class_embeds: int | None = None
    upcast_attention: bool = False
    dropout_cattn: float = 0.0
    include_fc: bool = True
    use_combined_linear: bool = False
    use_flash_attention: bool = False


def convert(config: Mapping[str, Any], state_dict: Mapping[str, Tensor], *, class_name: str, copy: bool) -> UNet:
    """Convert a DiffusionModelUNet that was built with `config`."""
    given = dict(config)
    if "num_channels" in given and "channels" not in given:
        given["channels"] = given.pop("num_channels")
    options = from_plain(MonaiOptions, given)
    unet = empty_unet(translate(options, class_name=class_name))
    old = any(part in key for key in state_dict for part in OLD_KEYS)
    return fill(unet, Names(monai_sources(unet, combined=options.use_combined_linear, old=old)), state_dict, copy=copy)


def translate(options: MonaiOptions, *, class_name: str = "DiffusionModelUNet") -> UNetConfig:
    """Translate the options into our configuration. Raises ValueError, naming the option, for what is not supported."""
    check_lengths(class_name, options, PER_LEVEL, like="channels")
    refuse(class_name, options, "attention without its last layer is another network", include_fc=(True,))
    refuse(class_name, options, "attention has no dropout here; loaded with 0 it infers alike", dropout_cattn=(0.0,))
    refuse(class_name, options, "its networks have these", spatial_dims=(2, 3))
    if options.with_conditioning != (options.cross_attention_dim is not None):
        raise ValueError(
            f"{class_name}: with_conditioning={options.with_conditioning} and cross_attention_dim="
            f"{options.cross_attention_dim} belong together, as there: give both or none"
        )
    if not options.with_conditioning:
        reason = "it needs with_conditioning=True"
        refuse(class_name, options, reason, transformer_num_layers=(1,), upcast_attention=(False,))
    levels = range(len(options.channels))
    attending = tuple(level for level in levels if options.attention_levels[level])
    widths = options.num_head_channels
    widths = widths if isinstance(widths, tuple) else (widths,) * len(levels)
    for level in {*attending, levels[-1]}:  # the middle attends always
        check_heads(class_name, "num_head_channels", widths[level], [options.channels[level]])
    return UNetConfig(
        in_channels=options.in_channels,
        out_channels=options.out_channels,
        spatial_dims=options.spatial_dims,
        channels=options.channels,
        depth=options.num_res_blocks,
        attention_levels=attending,
        num_classes=options.num_class_embeds,
        condition=ConditionConfig(null_class=False),
        norm=NormConfig(num_groups=options.norm_num_groups, eps=options.norm_eps),
        resblock=ResBlockConfig(activate_embedding=False),
        attention=AttentionConfig(
            num_heads=tuple(max(1, c // max(1, w)) for c, w in zip(options.channels, widths, strict=True)),
            upcast=options.upcast_attention,
        ),
        transformer=TransformerConfig(context_dim=options.cross_attention_dim, depth=options.transformer_num_layers)
        if options.with_conditioning
        else None,
        resample=ResampleConfig(kind="resblock" if options.resblock_updown else "conv"),
    )


def monai_sources(unet: UNet, *, combined: bool, old: bool) -> dict[str, Source]:
    """Map our keys to MONAI's; `combined` for packed self-attention, `old` for the names of GenerativeModels."""
    sources = {}
    for ours in unet.state_dict():
        theirs = ours
        for pattern, name in (*RENAMES, *(OLD_NAMES if old else ())):
            theirs = re.sub(pattern, name, theirs)
        packed = re.search(r"\.attn1?\.to_([qkv])\.", theirs) if combined else None
        if packed is None:
            sources[ours] = Source(theirs)
        else:
            part = "qkv".index(packed[1])
            key = theirs.replace(f".to_{packed[1]}.", ".qkv.")
            sources[ours] = Source(key, unpack("new", 1, part))  # type: ignore[arg-type]
    return sources
