"""Registers diffusers: its forwards are rewritten, except that norms of other names and two blocks have rules.

Paths and names as of diffusers 0.36 to 0.42. Where another version uses other names in one of these forwards, the rule
does not apply and the report says so.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unetgn.fusion.activations import is_silu_module
from unetgn.fusion.classes import owner_of, path_of
from unetgn.fusion.norm_silu import fused_group_norm, norm_by_maps_silu, norm_silu
from unetgn.fusion.norms import fused_forward, norm_rule
from unetgn.fusion.projections import register_norm_before_projections
from unetgn.fusion.recognition import is_bare, unknown_names
from unetgn.fusion.rules import register_library, rule

register_library("diffusers")

MODELS = "diffusers.models"
AUTOENCODERS = f"{MODELS}.autoencoders"
COGVIDEOX = f"{AUTOENCODERS}.autoencoder_kl_cogvideox"
COGVIDEOX_NORM = f"{COGVIDEOX}.CogVideoXSpatialNorm3D"
COGVIDEOX_NORM_USES = frozenset(("F", "cat", "conv_b", "conv_y", "get", "interpolate", "norm_layer", "shape", "torch"))

register_norm_before_projections(f"{MODELS}.attention_processor.Attention", "group_norm")


@norm_rule(
    f"{MODELS}.normalization.AdaGroupNorm", uses=("act", "linear", "chunk", "F", "group_norm", "num_groups", "eps")
)
def ada_group_norm(norm: Any, x: Tensor, emb: Tensor) -> Tensor:
    """Compute a group norm without parameters; scale and shift are a linear function of the embedding."""
    emb = norm.linear(norm.act(emb) if norm.act else emb)[:, :, None, None]
    scale, shift = emb.chunk(2, dim=1)
    return fused_group_norm(x, norm.num_groups, None, None, norm.eps, scale=scale, shift=shift)


@norm_rule(
    f"{MODELS}.unets.unet_kandinsky3.Kandinsky3ConditionalGroupNorm",
    uses=("context_mlp", "range", "len", "shape", "unsqueeze", "chunk", "norm"),
)
def kandinsky3_conditional_group_norm(norm: Any, x: Tensor, context: Tensor) -> Tensor:
    """Make scale and shift of the embedding, each (N, C)."""
    context = norm.context_mlp(context)
    context = context.reshape(*context.shape, *(1 for _ in x.shape[2:]))
    scale, shift = context.chunk(2, dim=1)
    return norm_silu(norm.norm, F.silu, x, scale=scale, shift=shift)


@norm_rule(
    f"{AUTOENCODERS}.autoencoder_kl_mochi.MochiChunkedGroupNorm3D",
    uses=("size", "permute", "flatten", "torch", "cat", "norm_layer", "split", "chunk_size", "unflatten"),
)
def mochi_chunked_group_norm(norm: Any, x: Tensor) -> Tensor:
    """Normalize each frame by itself, a few frames at a time."""
    frames = _frames_as_samples(x)
    chunks = [norm_silu(norm.norm_layer, F.silu, chunk) for chunk in frames.split(norm.chunk_size, dim=0)]
    return _samples_as_frames(torch.cat(chunks, dim=0), x)


@norm_rule(
    f"{AUTOENCODERS}.autoencoder_kl_cosmos.CosmosCausalGroupNorm",
    uses=("num_groups", "size", "permute", "flatten", "norm", "unflatten"),
)
def cosmos_causal_group_norm(norm: Any, x: Tensor) -> Tensor:
    """Normalize each frame by itself where there is one group; else over all frames."""
    if norm.num_groups == 1:
        return _samples_as_frames(norm_silu(norm.norm, F.silu, _frames_as_samples(x)), x)
    return norm_silu(norm.norm, F.silu, x)


@norm_rule(
    f"{AUTOENCODERS}.autoencoder_kl_minimax_h3.MiniMaxH3VideoGroupNorm",
    uses=("shape", "permute", "contiguous", "view", "super", "forward"),
)
def minimax_h3_video_group_norm(norm: nn.GroupNorm, x: Tensor) -> Tensor:
    """Normalize each frame by itself."""
    frames = _frames_as_samples(x).contiguous()
    normed = fused_group_norm(frames, norm.num_groups, norm.weight, norm.bias, norm.eps)
    return _samples_as_frames(normed, x).contiguous()


@norm_rule(f"{AUTOENCODERS}.autoencoder_kl_kvae_video.KVAECachedGroupNorm", uses=("norm_layer", "get"))
def kvae_cached_group_norm(norm: Any, x: Tensor, cache: dict[str, Any] | None = None) -> Tensor:
    """Normalize, and note in the cache that this has run, as the norm itself does."""
    if cache is not None and cache.get("mean") is None and cache.get("var") is None:
        cache["mean"] = cache["var"] = 1
    return norm_silu(norm.norm_layer, F.silu, x)


@norm_rule(
    f"{MODELS}.attention_processor.SpatialNorm",
    uses=("F", "conv_b", "conv_y", "interpolate", "norm_layer", "shape"),
)
def spatial_norm(norm: Any, x: Tensor, zq: Tensor) -> Tensor:
    """Make factor and shift, maps of x's shape, of what is decoded."""
    zq = F.interpolate(zq, size=x.shape[-2:], mode="nearest")
    return norm_by_maps_silu(norm.norm_layer, F.silu, x, norm.conv_y(zq), norm.conv_b(zq))


@norm_rule(
    f"{AUTOENCODERS}.autoencoder_kl_kvae.KVAEDecoderSpatialNorm2D",
    uses=("F", "add_conv", "conv", "conv_b", "conv_y", "interpolate", "norm_layer", "shape"),
)
def kvae_spatial_norm(norm: Any, x: Tensor, zq: Tensor) -> Tensor:
    """Make factor and shift of what is decoded, after a convolution where it has one."""
    zq = F.interpolate(zq, size=x.shape[2:], mode="nearest")
    zq = norm.conv(zq) if norm.add_conv else zq
    return norm_by_maps_silu(norm.norm_layer, F.silu, x, norm.conv_y(zq), norm.conv_b(zq))


@norm_rule(
    f"{AUTOENCODERS}.autoencoder_kl_kvae_video.KVAECachedSpatialNorm3D",
    uses=(
        *("F", "add_conv", "cat", "conv", "conv_b", "conv_y", "get", "interpolate", "norm_layer", "shape", "size"),
        *("split", "torch"),
    ),
)
def kvae_cached_spatial_norm(norm: Any, x: Tensor, zq: Tensor, cache: dict[str, Any]) -> Tensor:
    """Make factor and shift of what is decoded: the first frame, which later calls no longer have, by itself."""

    def resized(part: Tensor, size: torch.Size) -> Tensor:
        return torch.cat([F.interpolate(piece, size=size, mode="nearest") for piece in part.split(32, dim=1)], dim=1)

    noted = cache["norm"]
    if noted.get("mean") is None and noted.get("var") is None:
        first = F.interpolate(zq[:, :, :1], size=x[:, :, :1].shape[-3:], mode="nearest")
        rest = x[:, :, 1:].shape[-3:]
        zq = torch.cat([first, resized(zq[:, :, 1:], rest)], dim=2) if zq.size(2) > 1 else first
    else:
        zq = resized(zq, x.shape[-3:])
    zq = norm.conv(zq, cache["add_conv"]) if norm.add_conv else zq
    inner, factor, shift = norm.norm_layer, norm.conv_y(zq), norm.conv_b(zq)
    if not is_bare(inner) or fused_forward(inner) is not kvae_cached_group_norm:
        return F.silu(inner(x, noted) * factor + shift)
    y = norm_by_maps_silu(inner.norm_layer, F.silu, x, factor, shift)
    if noted.get("mean") is None and noted.get("var") is None:
        noted["mean"] = noted["var"] = 1
    return y


def _cogvideox_norms(block: Any) -> tuple[str, ...]:
    within = "" if block.spatial_norm_dim is None else ".norm_layer"
    norms = (*_if_silu(block, "nonlinearity", "norm1"), *_if_silu(block, "nonlinearity", "norm2"))
    return tuple(f"{norm}{within}" for norm in norms)


def _unknown_cogvideox_norm(block: Any) -> str | None:
    return None if block.spatial_norm_dim is None else unknown_names(type(block.norm1).forward, COGVIDEOX_NORM_USES)


@rule(
    f"{COGVIDEOX}.CogVideoXResnetBlock3D",
    norms=_cogvideox_norms,
    uses=(
        *("conv1", "conv2", "conv_shortcut", "dropout", "get", "in_channels", "nonlinearity", "norm1", "norm2"),
        *("out_channels", "temb_proj", "use_conv_shortcut"),
    ),
    refuses=_unknown_cogvideox_norm,
)
def cogvideox_resnet_block(
    block: Any,
    inputs: Tensor,
    temb: Tensor | None = None,
    zq: Tensor | None = None,
    conv_cache: dict[str, Any] | None = None,
) -> tuple[Tensor, dict[str, Any]]:
    """Compute a residual block, whose norms return a cache beside their result where they are modulated by zq."""
    caches: dict[str, Any] = {}
    conv_cache = conv_cache or {}

    def normed(x: Tensor, name: str) -> Tensor:
        norm = getattr(block, name)
        if zq is None:
            return norm_silu(norm, block.nonlinearity, x)
        y, caches[name] = _cogvideox_norm_silu(norm, block.nonlinearity, x, zq, conv_cache.get(name))
        return y

    x, caches["conv1"] = block.conv1(normed(inputs, "norm1"), conv_cache=conv_cache.get("conv1"))
    if temb is not None:
        x = x + block.temb_proj(block.nonlinearity(temb))[:, :, None, None, None]
    x, caches["conv2"] = block.conv2(block.dropout(normed(x, "norm2")), conv_cache=conv_cache.get("conv2"))
    if block.in_channels != block.out_channels:
        if block.use_conv_shortcut:
            inputs, caches["conv_shortcut"] = block.conv_shortcut(inputs, conv_cache=conv_cache.get("conv_shortcut"))
        else:
            inputs = block.conv_shortcut(inputs)
    return x + inputs, caches


def _cogvideox_norm_silu(
    norm: Any, act: Any, x: Tensor, zq: Tensor, cache: dict[str, Any] | None
) -> tuple[Tensor, dict[str, Any]]:
    """Compute a norm, the modulation by zq and SiLU. The first of an odd number of frames is enlarged by itself."""
    if not is_bare(norm) or path_of(owner_of(type(norm), "forward")) != COGVIDEOX_NORM:
        y, caches = norm(x, zq, conv_cache=cache)
        return act(y), caches
    cache, caches = cache or {}, {}
    if x.shape[2] > 1 and x.shape[2] % 2 == 1:
        parts = ((zq[:, :, :1], x[:, :, :1]), (zq[:, :, 1:], x[:, :, 1:]))
        zq = torch.cat([F.interpolate(z, size=frames.shape[-3:]) for z, frames in parts], dim=2)
    else:
        zq = F.interpolate(zq, size=x.shape[-3:])
    factor, caches["conv_y"] = norm.conv_y(zq, conv_cache=cache.get("conv_y"))
    shift, caches["conv_b"] = norm.conv_b(zq, conv_cache=cache.get("conv_b"))
    return norm_by_maps_silu(norm.norm_layer, act, x, factor, shift), caches


@rule(
    f"{MODELS}.resnet.Conv1dBlock",
    norms=lambda block: _if_silu(block, "mish", "group_norm"),
    uses=("conv1d", "rearrange_dims", "group_norm", "mish"),
)
def conv_1d_block(block: Any, inputs: Tensor) -> Tensor:
    """Compute convolution, norm and activation, which is called `mish`, but may be any."""
    return norm_silu(block.group_norm, block.mish, block.conv1d(inputs)[:, :, None, :])[:, :, 0, :]


@rule(
    f"{MODELS}.unets.unet_1d_blocks.OutConv1DBlock",
    norms=lambda block: _if_silu(block, "final_conv1d_act", "final_conv1d_gn"),
    uses=("final_conv1d_1", "rearrange_dims", "final_conv1d_gn", "final_conv1d_act", "final_conv1d_2"),
)
def out_conv_1d_block(block: Any, hidden_states: Tensor, temb: Tensor | None = None) -> Tensor:
    """Compute the tail of the 1-D U-Net for reinforcement learning."""
    hidden_states = block.final_conv1d_1(hidden_states)[:, :, None, :]
    hidden_states = norm_silu(block.final_conv1d_gn, block.final_conv1d_act, hidden_states)[:, :, 0, :]
    return block.final_conv1d_2(hidden_states)


def _if_silu(block: nn.Module, activation: str, norm: str) -> tuple[str, ...]:
    return (norm,) if is_silu_module(block.get_submodule(activation)) else ()


def _frames_as_samples(x: Tensor) -> Tensor:
    """Return x (N, C, T, H, W) as (N·T, C, H, W)."""
    return x.permute(0, 2, 1, 3, 4).flatten(0, 1)


def _samples_as_frames(y: Tensor, x: Tensor) -> Tensor:
    """Return y (N·T, C, H, W) as (N, C, T, H, W), with N from x."""
    return y.unflatten(0, (x.shape[0], -1)).permute(0, 2, 1, 3, 4)
