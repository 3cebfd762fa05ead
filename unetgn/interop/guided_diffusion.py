"""Converts openai/guided-diffusion and openai/improved-diffusion: UNetModel and SuperResModel.

Released ImageNet-64 weights have the new order of attention rows, those of 128 pixels and more the legacy order; the
option `use_new_attention_order` says which, as it does there. improved-diffusion has the legacy order.
The flags of its scripts (`num_channels`, `attention_resolutions="32,16,8"`, …) are taken for the constructor's options.
`num_head_channels` decides before `num_heads`, which the published configurations leave beside it.
SuperResModel has twice the input channels: the caller concatenates x and the bilinearly enlarged low_res.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from unetgn.interop.openai_names import RESBLOCK_RESAMPLES, openai_sources
from unetgn.interop.original_configs import has_flags, read_flags
from unetgn.interop.transfer import Names, check_heads, fill, refuse
from unetgn.nn.attention import AttentionConfig
from unetgn.nn.embedding import TimeConfig
from unetgn.nn.resample import ResampleConfig
from unetgn.nn.resblock import ResBlockConfig
from unetgn.serialize import from_plain
from unetgn.unet import UNet
from unetgn.unet.config import ConditionConfig, DecoderConfig, UNetConfig
from unetgn.unet.model import empty_unet

CLASSES = ("UNetModel", "SuperResModel")


@dataclass(frozen=True)
class GuidedOptions:
    """Holds the constructor's options. `use_checkpoint` and `use_fp16` concern how it ran, not what it computes."""

    in_channels: int
    model_channels: int
    out_channels: int
    num_res_blocks: int
    attention_resolutions: tuple[int, ...]
    image_size: int | None = None
    dropout: float = 0.0
    channel_mult: tuple[float, ...] = (1, 2, 4, 8)
    conv_resample: bool = True
    dims: int = 2
    num_classes: int | None = None
    use_checkpoint: bool = False
    use_fp16: bool = False
    num_heads: int = 1
    num_head_channels: int = -1
    num_heads_upsample: int = -1
    use_scale_shift_norm: bool = False
    resblock_updown: bool = False
    use_new_attention_order: bool = False


def convert(config: Mapping[str, Any], state_dict: Mapping[str, Tensor], *, class_name: str, copy: bool) -> UNet:
    """Convert a guided-diffusion network that was built with `config`."""
    if has_flags(config):
        config = read_flags(config)
    options = from_plain(GuidedOptions, config)
    unet = empty_unet(translate(options, class_name=class_name))
    order = "new" if options.use_new_attention_order else "legacy"
    return fill(unet, Names(openai_sources(unet, order)), state_dict, copy=copy)  # type: ignore[arg-type]


def translate(options: GuidedOptions, *, class_name: str) -> UNetConfig:
    """Translate the options into our configuration. They name attention by downsampling factors, ours by levels."""
    channels = tuple(int(mult * options.model_channels) for mult in options.channel_mult)
    attending = tuple(level for level in range(len(channels)) if 2**level in options.attention_resolutions)
    widths = options.num_head_channels != -1
    if options.resblock_updown:
        refuse(class_name, options, RESBLOCK_RESAMPLES, conv_resample=(True,))
    if widths:
        reason = "num_head_channels decides the number of heads"
        refuse(class_name, options, reason, num_heads_upsample=(-1, options.num_heads))
    upsample_heads = options.num_heads_upsample if options.num_heads_upsample != -1 else None
    around = [channels[level] for level in attending]
    name = "num_head_channels" if widths else "num_heads"
    check_heads(class_name, name, getattr(options, name), [*around, channels[-1]])
    if upsample_heads is not None and not widths:
        check_heads(class_name, "num_heads_upsample", upsample_heads, around)
    kind = "resblock" if options.resblock_updown else "conv" if options.conv_resample else "plain"
    return UNetConfig(
        sample_size=options.image_size,
        in_channels=options.in_channels * (2 if class_name == "SuperResModel" else 1),
        out_channels=options.out_channels,
        spatial_dims=options.dims,
        channels=channels,
        depth=options.num_res_blocks,
        attention_levels=attending,
        num_classes=options.num_classes,
        dropout=options.dropout,
        time=TimeConfig(width=options.model_channels),
        condition=ConditionConfig(null_class=False),
        resblock=ResBlockConfig(
            embedding="scale_shift" if options.use_scale_shift_norm else "add", activate_embedding=False
        ),
        attention=AttentionConfig(
            num_heads=None if widths else options.num_heads, head_dim=options.num_head_channels if widths else None
        ),
        # three axes: only the last two change their resolution there
        resample=ResampleConfig(kind=kind, strides=(1, 2, 2) if options.dims == 3 else None),  # type: ignore[arg-type]
        decoder=DecoderConfig(num_heads=None if widths else upsample_heads),
    )
