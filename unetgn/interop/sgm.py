"""Converts Stability-AI/generative-models: the UNetModel of Stable Diffusion XL, base and refiner.

Attention is always a spatial transformer, of a depth for each level; the conditioning vector (`num_classes:
"sequential"`) is given as `added_cond_kwargs={"vector": ...}`, joined by the caller.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from unetgn.interop import compvis
from unetgn.interop.openai_names import openai_sources
from unetgn.interop.transfer import Names, fill, refuse
from unetgn.serialize import from_plain
from unetgn.unet import UNet
from unetgn.unet.config import UNetConfig
from unetgn.unet.model import empty_unet

CLASSES = ("UNetModel",)
ATTENTION_KINDS = ("softmax", "softmax-xformers")  # two implementations of one formula


@dataclass(frozen=True)
class SgmOptions:
    """Holds the constructor's options. `use_checkpoint` and `use_fp16` concern how it ran only.

    Earlier versions had `use_spatial_transformer` and `legacy`, which published configuration files still name; with
    transformers the latter changes nothing.
    """

    in_channels: int
    model_channels: int
    out_channels: int
    num_res_blocks: int | tuple[int, ...]
    attention_resolutions: tuple[int, ...]
    dropout: float = 0.0
    channel_mult: tuple[float, ...] = (1, 2, 4, 8)
    conv_resample: bool = True
    dims: int = 2
    num_classes: int | str | None = None
    use_checkpoint: bool = False
    use_fp16: bool = False
    num_heads: int = -1
    num_head_channels: int = -1
    num_heads_upsample: int = -1
    use_scale_shift_norm: bool = False
    resblock_updown: bool = False
    transformer_depth: int | tuple[int, ...] = 1
    transformer_depth_middle: int | None = None
    context_dim: int | tuple[int, ...] | None = None
    disable_self_attentions: tuple[bool, ...] | None = None
    num_attention_blocks: tuple[int, ...] | None = None
    disable_middle_self_attn: bool = False
    disable_middle_transformer: bool = False
    use_linear_in_transformer: bool = False
    spatial_transformer_attn_type: str = "softmax"
    adm_in_channels: int | None = None
    use_spatial_transformer: bool = True
    legacy: bool = False


def convert(config: Mapping[str, Any], state_dict: Mapping[str, Tensor], *, class_name: str, copy: bool) -> UNet:
    """Convert a generative-models network that was built with `config`."""
    unet = empty_unet(translate(from_plain(SgmOptions, config), class_name=class_name))
    return fill(unet, Names(openai_sources(unet, "legacy")), state_dict, copy=copy)


def translate(options: SgmOptions, *, class_name: str = "UNetModel") -> UNetConfig:
    """Translate the options into our configuration; the network is CompVis' with a middle of its own."""
    refuse(class_name, options, "another attention", spatial_transformer_attn_type=ATTENTION_KINDS)
    refuse(class_name, options, "attention is always a transformer", use_spatial_transformer=(True,))
    if options.disable_middle_transformer:
        reason = "disable_middle_transformer=True leaves the middle without it"
        refuse(class_name, options, reason, transformer_depth_middle=(None,), disable_middle_self_attn=(False,))
    shared = {field.name for field in dataclasses.fields(compvis.CompvisOptions)}
    values = {field.name: getattr(options, field.name) for field in dataclasses.fields(options) if field.name in shared}
    return compvis.translate(
        compvis.CompvisOptions(**values),
        middle=not options.disable_middle_transformer,
        middle_depth=options.transformer_depth_middle,
    )
