"""Checks that the text of a module says what it is: widths, heads, embedding, scale, activation, resampling."""

import pytest

from unetgn.nn import (
    GEGLU,
    AddedKVAttention,
    AttentionPooling,
    ClassEmbedding,
    ConvNormAct,
    CrossAttention,
    Downsample,
    FeedForward,
    FourierFeatures,
    GroupNormSiLU,
    InputBranch,
    MultiHeadAttention,
    NormConfig,
    Resample,
    ResBlock,
    ResBlockConfig,
    SelfAttention,
    SinusoidalFeatures,
    SpatialTransformer,
    TimestepEmbedding,
    TransformerBlock,
    WeightStandardizedConv,
    make_norm,
)

MODULATED = ResBlockConfig(embedding="scale_shift", residual_scale=0.5**0.5)


@pytest.mark.parametrize(
    ("module", "text"),
    [
        (GroupNormSiLU(4, 8), "GroupNormSiLU(4, 8, eps=1e-05, affine=True"),
        (GroupNormSiLU(4, 8, activation=None), "GroupNorm(4, 8, eps=1e-05, affine=True"),
        (make_norm("layer", 8, activation="silu"), "GroupNormSiLU(1, 8, "),
        (ConvNormAct(4, 8, num_groups=2, activation=None), "(norm): GroupNorm(2, 8, "),
        (WeightStandardizedConv(4, 8, bias=False), "(4, 8, kernel_size=3, stride=1, bias=False, eps=1e-05)"),
        (ResBlock(32), "32, 32, embedding=None, residual_scale=1\n"),
        (ResBlock(32, 64, emb_channels=8), "32, 64, embedding='add', residual_scale=1\n"),
        (ResBlock(32, emb_channels=8, config=MODULATED), "32, 32, embedding='scale_shift', residual_scale=0.7071\n"),
        (ResBlock(32, config=ResBlockConfig(activation="gelu")), "residual_scale=1, activation='gelu'\n"),
        (
            ResBlock(32, config=ResBlockConfig(activation="gelu")),
            "GroupNormAct(32, 32, eps=1e-05, affine=True",
        ),
        (
            AddedKVAttention(32, 6, num_heads=4, cross_only=True, context_norm="layer_norm"),
            "32, context_dim=6, heads=4, head_dim=8, context_norm='layer_norm', cross_only=True\n",
        ),
        (AttentionPooling(32, num_heads=4), "(\n  32, heads=4\n"),
        (
            TimestepEmbedding(4, 16, activation="gelu", post_activation="relu"),
            "activation='gelu', post_activation='relu'\n",
        ),
        (ResBlock(32, resample="down"), "(resample): Resample('down', strides=(2, 2), taps=(1.0, 1.0))"),
        (ResBlock(32, dropout=0.1), "(dropout): Dropout(p=0.1, inplace=False)"),
        (SelfAttention(32), "32, heads=1, head_dim=32, residual_scale=1\n"),
        (SelfAttention(32, num_heads=4, residual_scale=0.5), "32, heads=4, head_dim=8, residual_scale=0.5\n"),
        (SelfAttention(32, norm=NormConfig(num_groups=4)), "(group_norm): GroupNorm(4, 32, "),
        (SelfAttention(32, upcast=True, qk_norm=True), "upcast=True"),
        (SelfAttention(32, upcast=True, qk_norm=True), "(norm_q): RMSNorm((32,)"),
        (CrossAttention(32, 6, head_dim=8), "32, context_dim=6, heads=4, head_dim=8\n"),
        (MultiHeadAttention(32, num_heads=2), "MultiHeadAttention(\n  32, heads=2, head_dim=16\n"),
        (TransformerBlock(32, num_heads=2, context_dim=6, cross_only=True), "cross_only=True"),
        (SpatialTransformer(32, linear_projection=True), "linear_projection=True"),
        (SpatialTransformer(32, depth=0), "32, heads=1, head_dim=32, depth=0, linear_projection=False\n"),
        (
            SpatialTransformer(32, depth=2, head_dim=8, context_dim=6, linear_projection=True),
            "(\n  32, context_dim=6, heads=4, head_dim=8, depth=2, linear_projection=True\n",
        ),
        (GEGLU(8, 16), "GEGLU(\n  8, 16, activation='gelu'\n"),
        (FeedForward(8), "FeedForward(\n  8, hidden=32, activation='geglu'\n"),
        (TimestepEmbedding(4, 16), "4, 16, activation='silu'\n"),
        (TimestepEmbedding(4, 16, cond_channels=3), "4, 16, cond_channels=3, activation='silu'\n"),
        (SpatialTransformer(32, num_heads=2, context_dim=6), "32, context_dim=6, heads=2, head_dim=16\n"),
        (SinusoidalFeatures(8), "(8, order='cos_sin', frequency_shift=0.0, frequencies='exp')"),
        (FourierFeatures(8, order="sin_cos"), "(8, order='sin_cos', scale=16.0)"),
        (ClassEmbedding(5, 8, bias=True), "(5, 8, null_class=True, bias=True, scale=1)"),
        (ClassEmbedding(5, 8, null_class=False), "(5, 8, missing='error', bias=False, scale=1)"),
        (Resample("up", spatial_dims=1, taps=(1, 3, 3, 1)), "Resample('up', strides=(2,), taps=(1, 3, 3, 1))"),
        (Downsample(8, padding="end", strides=(1, 2)), "strides=(1, 2), padding='end'\n"),
        (InputBranch(3, 8, taps=(1, 3, 3, 1)), "taps=(1, 3, 3, 1)\n"),
    ],
)
def test_the_text_of_a_module_says_what_it_is(module, text):
    assert text in repr(module)
