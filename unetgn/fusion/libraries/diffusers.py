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
from unetgn.fusion.norm_silu import fused_group_norm, norm_silu
from unetgn.fusion.norms import norm_rule, register_unfusable
from unetgn.fusion.projections import register_norm_before_projections
from unetgn.fusion.rules import register_library, rule

register_library("diffusers")

MODELS = "diffusers.models"
AUTOENCODERS = f"{MODELS}.autoencoders"
SPATIAL = "its scale and shift vary over space, the operator takes one of each a channel"

register_norm_before_projections(f"{MODELS}.attention_processor.Attention", "group_norm")
register_unfusable(f"{MODELS}.attention_processor.SpatialNorm", SPATIAL)
register_unfusable(f"{AUTOENCODERS}.autoencoder_kl_cogvideox.CogVideoXSpatialNorm3D", SPATIAL)
register_unfusable(f"{AUTOENCODERS}.autoencoder_kl_kvae.KVAEDecoderSpatialNorm2D", SPATIAL)
register_unfusable(f"{AUTOENCODERS}.autoencoder_kl_kvae_video.KVAECachedSpatialNorm3D", SPATIAL)


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
