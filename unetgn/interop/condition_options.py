"""Holds the options of diffusers' UNet2DConditionModel, and what is refused of them."""

from dataclasses import dataclass

from unetgn.interop.diffusers_unet2d import ACT_FNS
from unetgn.interop.transfer import refuse
from unetgn.messages import short

SIMPLE_MIDDLE = "UNetMidBlock2DSimpleCrossAttn"
OF_RESNETS = ("Resnet", "Simple")  # blocks that read resnet_skip_time_act and resnet_out_scale_factor
ADDED = ("text", "text_image", "image", "image_hint")
PROJECTIONS = {"text_proj": "text", "text_image_proj": "text_image", "image_proj": "image"}
GROUNDINGS = {"default": None, "gated": "text", "gated-text-image": "text_image"}  # of transformers
CLASS_EMBED_TYPES = (None, "timestep", "identity", "projection", "simple_projection")
PROJECTED = ("text_time", "projection", "simple_projection")  # by projection_class_embeddings_input_dim
Depth = int | tuple[int, ...]


@dataclass(frozen=True)
class ConditionOptions:
    """Holds the constructor's options, as in config.json."""

    sample_size: int | tuple[int, ...] | None = None
    in_channels: int = 4
    out_channels: int = 4
    center_input_sample: bool | None = False
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
    dual_cross_attention: bool | None = False
    use_linear_projection: bool | None = False
    class_embed_type: str | None = None
    addition_embed_type: str | None = None
    addition_time_embed_dim: int | None = None
    num_class_embeds: int | None = None
    upcast_attention: bool | None = False
    resnet_time_scale_shift: str = "default"
    resnet_skip_time_act: bool | None = False
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
    class_embeddings_concat: bool | None = False
    mid_block_only_cross_attention: bool | None = None
    cross_attention_norm: str | None = None
    addition_embed_type_num_heads: int = 64


def refuse_options(options: ConditionOptions, name: str) -> None:
    """Raise ValueError, naming the option, for what is not supported."""
    refuse(name, options, "the input must be centred by the caller", center_input_sample=(False, None))
    middle = options.mid_block_type
    middles = ("UNetMidBlock2DCrossAttn", SIMPLE_MIDDLE, "UNetMidBlock2D", None)
    refuse(name, options, "another middle", mid_block_type=middles)
    refuse(name, options, "another activation", act_fn=ACT_FNS)
    refuse(name, options, "another padding", downsample_padding=(0, 1))
    refuse(name, options, "another modulation", resnet_time_scale_shift=("default", "scale_shift"))
    refuse(name, options, "another class embedding", class_embed_type=CLASS_EMBED_TYPES)
    refuse(name, options, "another added embedding", addition_embed_type=(None, "text_time", *ADDED))
    refuse(name, options, "another projection of the context", encoder_hid_dim_type=(None, *PROJECTIONS))
    refuse(name, options, "two contexts in one layer", dual_cross_attention=(False, None))
    refuse(name, options, "another layer that reads boxes", attention_type=tuple(GROUNDINGS))
    refuse(name, options, "another attention", cross_attention_norm=(None, "layer_norm", "group_norm"))
    blocks = (*options.down_block_types, *options.up_block_types)
    if options.cross_attention_norm == "layer_norm" and "SimpleCrossAttn" in " ".join((*blocks, str(middle))):
        raise ValueError(
            f"{name}: cross_attention_norm='layer_norm' is not supported: diffusers gives it another width"
        )
    refuse(name, options, "diffusers refuses it too", num_attention_heads=(None,))
    refuse(name, options, "another activation", time_embedding_act_fn=(None, *ACT_FNS))
    refuse(name, options, "another activation", timestep_post_act=(None, *ACT_FNS))
    refuse(name, options, "another embedding", time_embedding_type=("positional", "fourier"))
    if not all(kind.startswith(OF_RESNETS) for kind in blocks) or middle not in (None, SIMPLE_MIDDLE):
        reason = "only blocks named Resnet and Simple read it, and this model has others"
        refuse(name, options, reason, resnet_skip_time_act=(False, None), resnet_out_scale_factor=(1.0,))
    if options.norm_num_groups is None:
        raise ValueError(f"{name}: norm_num_groups=None is not supported")
    for kind in (options.addition_embed_type, options.class_embed_type):
        if kind in PROJECTED and options.projection_class_embeddings_input_dim is None:
            raise ValueError(f"{name}: {short(kind)} needs projection_class_embeddings_input_dim")
    for kind in (options.encoder_hid_dim_type, options.addition_embed_type):
        if kind in (*PROJECTIONS, "image", "image_hint") and options.encoder_hid_dim is None:
            raise ValueError(f"{name}: {short(kind)} needs encoder_hid_dim")
