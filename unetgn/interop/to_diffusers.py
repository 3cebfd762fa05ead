"""Converts our U-Net to diffusers' UNet2DModel or UNet2DConditionModel, where these can say what it is.

The options are written down from our configuration, read back by the same translation that loads diffusers' models,
and compared: what does not come back is what diffusers cannot express.
"""

import functools
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers import ModelMixin, UNet2DConditionModel, UNet2DModel
from torch import nn

from unetgn.interop import diffusers_condition, diffusers_unet2d
from unetgn.interop.as_built import check_as_built, check_whole
from unetgn.interop.condition_options import GROUNDINGS
from unetgn.interop.diffusers_config import others_of
from unetgn.nn.checkpointing import recomputed
from unetgn.nn.transformer import TransformerConfig
from unetgn.unet import UNet
from unetgn.unet.config import UNetConfig
from unetgn.unet.facts import facts
from unetgn.unet.levels import Level
from unetgn.unet.model import empty_unet
from unetgn.unet.plan import LevelPlan, plan_unet

IMAGES = ("image", "image_hint")  # whose width is encoder_hid_dim


def to_diffusers(unet: UNet) -> ModelMixin:
    """Build diffusers' model with the architecture and (copied) weights of `unet`, in its mode, dtype and device.

    UNet2DConditionModel where `unet` has transformers, else UNet2DModel; without any attention also the former, where
    the latter cannot say it (it then takes a context that it never reads). A null class becomes an ordinary last class,
    `num_class_embeds` being one more than num_classes: pass its index where `unet` takes None. One that was not trained
    is left out.
    Sinusoids of time.frequencies="power" become diffusers' "exp", equal but for 3e-5 of a radian near t = 950.
    Gradient checkpointing comes along, as that of whole blocks.
    Raises ValueError, naming the fields, where diffusers cannot express the architecture; with what to do first, where
    `unet` is not as its configuration builds it (`unetgn.interop.as_built`); TypeError for another class.
    """
    if isinstance(unet, nn.Module):
        check_whole(unet)
    if not isinstance(unet, UNet):
        raise TypeError(f"to_diffusers takes a unetgn.UNet, got {type(unet).__name__}")
    check_as_built(unet, empty_unet(unet.unet_config))
    weights = {key: tensor.detach().clone() for key, tensor in unet.state_dict().items()}
    config = _without_untrained(unet.unet_config)
    if config is not unet.unet_config:
        weights["class_embedding.weight"] = weights["class_embedding.weight"][: config.class_rows].clone()
    model_class, options = _expressed(config)
    with torch.device("meta"):
        model = model_class(**options)
    model.load_state_dict(weights, assign=True)
    model.register_to_config(**{key: value for key, value in others_of(unet).items() if key not in model.config})
    if unet.is_gradient_checkpointing:
        model.enable_gradient_checkpointing(_own_checkpointing(unet))
    return model.train(unet.training)


def _without_untrained(config: UNetConfig) -> UNetConfig:
    """Leave out a null class that was not trained: to diffusers it would be a class like any other."""
    condition = config.condition
    if condition.null_class_trained or config.num_classes is None or not condition.null_class:
        return config
    return replace(config, condition=replace(condition, null_class=False, null_class_trained=True))


@functools.lru_cache(maxsize=16)
def options_of(config: UNetConfig) -> dict[str, Any]:
    """Write all options of the diffusers model that `config` is. Raises ValueError where there is none."""
    model_class, options = _expressed(_without_untrained(config))
    parameters = inspect.signature(model_class).parameters
    return {name: parameter.default for name, parameter in parameters.items()} | options


def _own_checkpointing(unet: UNet) -> Callable[..., Any] | None:
    """Return the function that recomputes blocks, where it is not ours."""
    functions = (level.checkpoint for level in unet.modules() if isinstance(level, Level) and level.checkpoint)
    return next((function for function in functions if getattr(function, "func", None) is not recomputed), None)


def _expressed(config: UNetConfig) -> tuple[type[ModelMixin], dict[str, Any]]:
    """Find the class of diffusers that can say what `config` is, and its options."""
    plan = plan_unet(config)
    if config.context_dims is not None or config.transformer is not None:
        peers = [CONDITIONAL]
    elif plan.mid.attentions:  # self-attention, which the middle of a UNet2DConditionModel never is
        peers = [PLAIN]
    else:
        peers = [PLAIN, CONDITIONAL]
    reasons = []
    for peer in peers:
        try:
            return peer.model_class, peer.options(config)
        except ValueError as error:
            reasons.append(f"diffusers' {peer.model_class.__name__} cannot express {error}")
    raise ValueError("; and ".join(reasons))


def _same(ours: Any, theirs: Any) -> bool:
    if isinstance(ours, float) and isinstance(theirs, float):
        return math.isclose(ours, theirs, rel_tol=1e-12)  # 1 / (1 / x)
    if isinstance(ours, (list, tuple)) and isinstance(theirs, (list, tuple)):
        return len(ours) == len(theirs) and all(map(_same, ours, theirs))
    if isinstance(ours, dict) and isinstance(theirs, dict):
        return ours.keys() == theirs.keys() and all(_same(ours[key], theirs[key]) for key in ours)
    return ours == theirs


def _shared_options(config: UNetConfig) -> dict[str, Any]:
    time, condition, mid_scale = config.time, config.condition, config.mid.residual_scale
    if mid_scale is None:
        mid_scale = config.resblock.residual_scale
    return {
        "sample_size": config.sample_size,
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "flip_sin_to_cos": time.order == "cos_sin",
        "freq_shift": time.frequency_shift,
        "time_embedding_type": "fourier" if time.features == "fourier" else "positional",
        "time_embedding_dim": config.time_width,
        "block_out_channels": config.channels,
        "mid_block_scale_factor": 1 / mid_scale,
        "downsample_padding": 0 if config.resample.padding == "end" else 1,
        "dropout": config.dropout,
        "norm_num_groups": config.norm.groups(config.channels[0]),
        "norm_eps": config.norm.eps,
        "resnet_time_scale_shift": "default" if config.resblock.embedding == "add" else "scale_shift",
        "num_class_embeds": config.class_rows,
        "act_fn": config.resblock.activation,
        "class_embed_type": None if condition.class_embedding == "table" else condition.class_embedding,
    }


def _unet2d_options(config: UNetConfig) -> dict[str, Any]:
    plan = plan_unet(config)
    attentions = [block.attention for level in (*plan.encoder, *plan.decoder) for block in level.blocks]
    heads = {attention.num_heads for attention in attentions if attention is not None}
    mid = plan.mid.blocks[0].attention if plan.mid.blocks else None
    groups = None if mid is None or mid.norm is None else mid.norm.groups(plan.mid.channels)
    return {
        **_shared_options(config),
        "layers_per_block": config.depths[0],
        "down_block_types": _types(plan.encoder, "DownBlock2D", "ResnetDownsampleBlock2D"),
        "up_block_types": _types(plan.decoder, "UpBlock2D", "ResnetUpsampleBlock2D"),
        "downsample_type": _attention_resampling(plan.encoder),
        "upsample_type": _attention_resampling(plan.decoder),
        "mid_block_type": "UNetMidBlock2D" if plan.mid.blocks else None,
        "add_attention": mid is not None,
        "attention_head_dim": None if heads | ({mid.num_heads} if mid else set()) <= {1} else _head_width(config),
        "attn_norm_num_groups": groups,
    }


def _head_width(config: UNetConfig) -> int | None:
    """Return the width of the first attention's heads; the comparison finds out whether the others agree."""
    plan = plan_unet(config)
    for level in (*plan.encoder, plan.mid, *plan.decoder):
        for block in level.blocks:
            if block.attention is not None:
                return block.attention.inner_channels // block.attention.num_heads
    return None


def _condition_options(config: UNetConfig) -> dict[str, Any]:
    transformer = config.transformer or TransformerConfig()
    if config.transformer is not None and transformer.context_dim is None:
        raise ValueError("transformer.context_dim=None")
    plan, condition = plan_unet(config), config.condition
    middles = (None, "UNetMidBlock2D", f"UNetMidBlock2D{ATTENTION_NAMES.get(_kind(plan.mid) or 'transformer')}")
    simple = "added" in {_kind(level) for level in (*plan.encoder, plan.mid, *plan.decoder)}
    only = {*transformer.cross_only, *config.attention.cross_only}
    depths = config.decoder.transformer_depth
    added, projected = condition.added_embedding, f"{condition.context_projection}_proj"
    return {
        **_shared_options(config),
        "layers_per_block": config.depth,
        "down_block_types": _types(plan.encoder, "DownBlock2D", "ResnetDownsampleBlock2D"),
        "up_block_types": _types(plan.decoder, "UpBlock2D", "ResnetUpsampleBlock2D"),
        "mid_block_type": middles[min(len(plan.mid.blocks), 2)],
        "only_cross_attention": tuple(level in only for level in range(len(config.channels))),
        "mid_block_only_cross_attention": config.mid.cross_only if simple else None,
        "cross_attention_dim": config.context_dims or diffusers_condition.ConditionOptions.cross_attention_dim,
        "cross_attention_norm": config.attention.context_norm,
        "transformer_layers_per_block": transformer.depth,
        "reverse_transformer_layers_per_block": None if depths is None else depths[::-1],
        "attention_head_dim": _head_numbers(config),
        "use_linear_projection": transformer.linear_projection,
        "upcast_attention": config.attention.upcast,
        "attention_type": next(name for name, kind in GROUNDINGS.items() if kind == transformer.grounding),
        "class_embeddings_concat": condition.class_entry == "concat",
        "addition_embed_type": added if condition.vector_dim is None else "text_time",
        "addition_embed_type_num_heads": condition.added_heads or 64,
        "addition_time_embed_dim": config.addition_time_embed_dim,
        "projection_class_embeddings_input_dim": condition.class_dim or condition.vector_dim,
        "encoder_hid_dim": condition.added_dim
        if condition.context_dim is None and added in IMAGES
        else condition.context_dim,
        "encoder_hid_dim_type": None if condition.context_dim is None else projected,
        "timestep_post_act": config.time.post_activation,
        **_activation_options(config),
        "resnet_out_scale_factor": 1 / config.resblock.residual_scale,
        "time_cond_proj_dim": config.time_cond_proj_dim,
        "conv_in_kernel": config.encoder.stem_kernel,
        "conv_out_kernel": config.decoder.out_kernel,
    }


def _head_numbers(config: UNetConfig) -> Any:
    """Write attention_head_dim: the number of heads in transformers, elsewhere their width.

    One entry is read at several places, not always of one level; the comparison finds out whether they agree.
    """
    plan, levels = plan_unet(config), len(config.channels)
    entries: dict[int, int] = {}
    read: list[tuple[int, LevelPlan]] = [*enumerate(plan.encoder), (levels - 1, plan.mid)]
    for index, level in enumerate(plan.decoder):
        read.append((levels - 1 - index if _kind(level) == "transformer" else index, level))
    for entry, level in read:
        if level.attentions:
            heads = level.attentions[0].num_heads
            own = heads if level.attentions[0].kind == "transformer" else level.channels // heads
            entries.setdefault(entry, own)
    if not entries:
        return 1
    return tuple(entries.get(level, next(iter(entries.values()))) for level in range(levels))


def _activation_options(config: UNetConfig) -> dict[str, Any]:
    """Write what is applied to the embedding: time_embedding_act_fn, then act_fn unless blocks skip it."""
    own = config.resblock.activation
    applied = (own,) if config.resblock.activate_embedding else config.embedding_activations
    skipped = not applied or applied[-1] != own
    first = applied if skipped else applied[:-1]
    if len(first) > 1:
        raise ValueError(f"condition.activations={applied}")
    return {"act_fn": own, "time_embedding_act_fn": first[0] if first else None, "resnet_skip_time_act": skipped}


ATTENTION_NAMES = {"self": "Attn", "added": "SimpleCrossAttn", "transformer": "CrossAttn"}


def _kind(level: LevelPlan) -> str | None:
    """Name the kind of a level's attention; the comparison finds out whether its blocks agree."""
    return level.attentions[0].kind if level.attentions else None


def _types(levels: tuple[LevelPlan, ...], plain: str, resampling: str) -> tuple[str, ...]:
    """Name the types of levels; one that nothing leaves is as those around it."""
    names, inside = [], all(level.resample == "resblock" for level in levels if level.resample)
    for level in levels:
        if level.attentions:
            names.append(f"{ATTENTION_NAMES[level.attentions[0].kind]}{plain}")
        else:
            names.append(resampling if level.resample == "resblock" or (inside and not level.resample) else plain)
    return tuple(names)


def _attention_resampling(levels: tuple[LevelPlan, ...]) -> str:
    """Name how the first level with attention is left; the comparison finds out whether the others agree."""
    kinds = [level.resample for level in levels if level.resample and any(block.attention for block in level.blocks)]
    return "resnet" if kinds and kinds[0] == "resblock" else "conv"


@dataclass(frozen=True)
class _Peer:
    """Describes a class of diffusers: how its options are written from our configuration, and read back."""

    model_class: type[ModelMixin]
    write: Callable[[UNetConfig], dict[str, Any]]
    read: Callable[[dict[str, Any]], UNetConfig]

    def options(self, config: UNetConfig) -> dict[str, Any]:
        """Write the options that make it `config`. Raises ValueError with the fields that they cannot express."""
        options = self.write(config)
        try:
            back = self.read(options)
        except ValueError as error:
            raise ValueError(f"this U-Net: {error}") from error
        ours, theirs = facts(config), facts(back)
        lost = [name for name, value in ours.items() if not _same(value, theirs[name])]
        if lost:
            raise ValueError("; ".join(f"{name} ({ours[name]!r}; it would be {theirs[name]!r})" for name in lost))
        return options


PLAIN = _Peer(
    UNet2DModel,
    _unet2d_options,
    lambda options: diffusers_unet2d.translate(diffusers_unet2d.UNet2DOptions(**options)),
)
CONDITIONAL = _Peer(
    UNet2DConditionModel,
    _condition_options,
    lambda options: diffusers_condition.translate(diffusers_condition.ConditionOptions(**options)),
)
