"""Builds the levels of the U-Net as modules, from their plans."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Literal

import torch
from torch import Tensor, cat, nn

from unetgn.nn.attention import AddedKVAttention, SelfAttention
from unetgn.nn.input_branch import InputBranch
from unetgn.nn.resample import Downsample, Resample, Upsample, remade, unkept
from unetgn.nn.resblock import ResBlock
from unetgn.nn.transformer import SpatialTransformer
from unetgn.unet.beside import NOTHING, Beside
from unetgn.unet.config import UNetConfig
from unetgn.unet.inputs import add_residual
from unetgn.unet.plan import AttentionPlan, BlockPlan, LevelPlan


class Level(nn.Module):
    """Holds residual blocks, `resnets.j`, and the attention behind them, `attentions.j` where block j attends.

    `checkpoint`, as torch.utils.checkpoint.checkpoint, is called with a block and its input, and keeps only the latter
    for the backward pass.
    """

    checkpoint: Callable[..., Tensor] | None = None

    def __init__(self, config: UNetConfig, plan: LevelPlan) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(_residual_block(config, block) for block in plan.blocks)
        attentions = {
            str(j): _attention(config, b.out_channels, b.attention) for j, b in enumerate(plan.blocks) if b.attention
        }
        self.attending = tuple(attentions)
        if attentions:  # by whether there is this attribute diffusers' code knows where adapters go
            self.attentions = nn.ModuleDict(attentions)

    def attends(self, index: int) -> bool:
        """Return True where attention stands behind residual block `index`."""
        return str(index) in self.attending

    def block(self, index: int, x: Tensor, emb: Tensor, context: Tensor | None, beside: Beside) -> Tensor:
        """Apply residual block `index` and its attention."""
        tensors = (*beside[:3], *beside.images)  # as transformers take them: those that may be None, and the images
        if self.checkpoint is not None and torch.is_grad_enabled():
            values = tensors if any(value is not None for value in tensors) else ()
            with unkept(x):
                return self.checkpoint(functools.partial(self._block, index), x, emb, context, *values)
        return self._block(index, x, emb, context, *tensors)

    def _block(self, index: int, x: Tensor, emb: Tensor, context: Tensor | None, *values: Tensor | None) -> Tensor:
        x = self.resnets[index](x, emb)
        if not self.attends(index):
            return x
        attention = self.attentions[str(index)]
        if isinstance(attention, SelfAttention):
            return attention(x)
        if isinstance(attention, AddedKVAttention):
            mask, context_mask = values[:2] or (None, None)
            return attention(x, context, context_mask if mask is None else mask)
        return attention(x, context, *values)


class EncoderLevel(Level):
    """Applies its blocks and halves the resolution; each result starts a skip connection."""

    def __init__(self, config: UNetConfig, plan: LevelPlan) -> None:
        super().__init__(config, plan)
        self.downsamplers = nn.ModuleList()
        self.input_branch = None
        self.transforms = any(attention.kind == "transformer" for attention in plan.attentions)
        if plan.resample is not None:
            self.downsamplers.append(_downsampler(config, plan))
        if plan.image_channels is not None:
            self.input_branch = InputBranch(
                plan.image_channels, plan.channels, spatial_dims=config.spatial_dims, taps=config.resample.taps
            )

    def forward(
        self,
        x: Tensor,
        image: Tensor,
        emb: Tensor,
        context: Tensor | None,
        beside: Beside = NOTHING,
        residual: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """Return x, the running image, and the skip connections (N, C, *spatial) that start here.

        `residual` is T2I-Adapter's, added as in diffusers: where transformers attend, to what the last block gives,
        elsewhere to what the level gives.
        """
        skips = []
        for index in range(len(self.resnets)):
            x = self.block(index, x, emb, context, beside)
            if residual is not None and self.transforms and index == len(self.resnets) - 1:
                x = add_residual(x, residual, "down_intrablock_additional_residuals")
            skips.append(x)
        for downsample in self.downsamplers:
            x = downsample(x, emb) if isinstance(downsample, ResBlock) else downsample(x)
            if self.input_branch is not None:
                x = image = self.input_branch(x, image)
            skips.append(x)
        if residual is not None and not self.transforms and skips:  # a level without blocks, the last, gives none
            x = add_residual(x, residual, "down_intrablock_additional_residuals")
            skips[-1] = x
        return x, image, tuple(skips)


class MidLevel(Level):
    """Applies the blocks between encoder and decoder."""

    def forward(self, x: Tensor, emb: Tensor, context: Tensor | None, beside: Beside = NOTHING) -> Tensor:
        for index in range(len(self.resnets)):
            x = self.block(index, x, emb, context, beside)
        return x


class DecoderLevel(Level):
    """Applies its blocks, the first ones each to x and a skip connection, and doubles the resolution."""

    def __init__(self, config: UNetConfig, plan: LevelPlan) -> None:
        super().__init__(config, plan)
        self.upsamplers = nn.ModuleList()
        if plan.resample is not None:
            self.upsamplers.append(_upsampler(config, plan))

    def forward(
        self,
        x: Tensor,
        skips: tuple[Tensor, ...],
        size: Sequence[int],
        emb: Tensor,
        context: Tensor | None,
        beside: Beside = NOTHING,
    ) -> Tensor:
        """Return x, enlarged to `size` where the level doubles; of its own `skips` the last one is taken first."""
        for index in range(len(self.resnets)):
            with remade(_joined, x, skips[-1 - index]) if index < len(skips) else nullcontext(x) as x:
                x = self.block(index, x, emb, context, beside)
        for upsample in self.upsamplers:
            x = upsample(x, emb, size=size) if isinstance(upsample, ResBlock) else upsample(x, size=size)
        return x


def _joined(x: Tensor, skip: Tensor) -> Tensor:
    return cat([x, skip], dim=1)


def _residual_block(config: UNetConfig, plan: BlockPlan) -> ResBlock:
    return ResBlock(
        plan.in_channels,
        plan.out_channels,
        emb_channels=config.embedding_width,
        spatial_dims=config.spatial_dims,
        norm=config.norm,
        config=dataclasses.replace(config.resblock, residual_scale=plan.residual_scale, project_resampled=False),
        dropout=config.dropout,
    )


def _resampling_block(config: UNetConfig, channels: int, direction: Literal["down", "up"]) -> ResBlock:
    return ResBlock(
        channels,
        emb_channels=config.embedding_width,
        spatial_dims=config.spatial_dims,
        norm=config.norm,
        config=config.resblock,
        dropout=config.dropout,
        resample=direction,
        strides=config.resample.strides,
        taps=config.resample.taps,
    )


def _attention(config: UNetConfig, channels: int, plan: AttentionPlan | None) -> nn.Module:
    assert plan is not None
    shared = config.attention
    if plan.kind == "added":
        assert plan.context_dim is not None
        return AddedKVAttention(
            channels,
            plan.context_dim,
            num_heads=plan.num_heads,
            context_norm=shared.context_norm,
            cross_only=plan.cross_only,
            norm=plan.norm,
            qk_norm=shared.qk_norm,
            upcast=shared.upcast,
            zero_init=shared.zero_init,
        )
    if plan.depth is None:
        return SelfAttention(
            channels,
            num_heads=plan.num_heads,
            inner_channels=plan.inner_channels,
            norm=plan.norm,
            qk_norm=shared.qk_norm,
            upcast=shared.upcast,
            residual_scale=plan.residual_scale,
            zero_init=shared.zero_init,
        )
    assert config.transformer is not None
    linear = config.transformer.linear_projection
    return SpatialTransformer(
        channels,
        num_heads=plan.num_heads,
        inner_channels=plan.inner_channels,
        context_dim=plan.context_dim,
        depth=plan.depth,
        spatial_dims=None if linear else config.spatial_dims,
        linear_projection=linear,
        cross_only=plan.cross_only,
        grounded=config.transformer.grounding is not None and plan.depth > 0,
        norm=plan.norm,
        qk_norm=shared.qk_norm,
        upcast=shared.upcast,
        zero_init=shared.zero_init,
    )


def _downsampler(config: UNetConfig, plan: LevelPlan) -> nn.Module:
    resample, dims = config.resample, config.spatial_dims
    if plan.resample == "conv":
        return Downsample(plan.channels, spatial_dims=dims, strides=resample.strides, padding=resample.padding)
    if plan.resample == "plain":
        return Resample("down", spatial_dims=dims, strides=resample.strides, taps=resample.taps)
    return _resampling_block(config, plan.channels, "down")


def _upsampler(config: UNetConfig, plan: LevelPlan) -> nn.Module:
    resample, dims = config.resample, config.spatial_dims
    if plan.resample == "conv":
        return Upsample(plan.channels, spatial_dims=dims, strides=resample.strides)
    if plan.resample == "plain":
        return Resample("up", spatial_dims=dims, strides=resample.strides, taps=resample.taps)
    return _resampling_block(config, plan.channels, "up")
