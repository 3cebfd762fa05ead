"""Checks attention blocks against their definitions, in float64."""

import math

import pytest
import torch
from torch.nn import functional as F

from tests.tensors import noise, randomized
from unetgn.nn import (
    GEGLU,
    AddedKVAttention,
    CrossAttention,
    FeedForward,
    MultiHeadAttention,
    NormConfig,
    SelfAttention,
    SpatialTransformer,
    TransformerBlock,
)

GROUPS = NormConfig(num_groups=4)


def attention(layer, tokens, context):
    """Compute softmax(q k^T / sqrt(d)) v, one head at a time."""
    query, key, value = layer.to_q(tokens), layer.to_k(context), layer.to_v(context)
    width = query.shape[2] // layer.heads
    heads = []
    for head in range(layer.heads):
        q, k, v = (part[..., head * width : (head + 1) * width] for part in (query, key, value))
        if layer.norm_q is not None:
            q = q / (q.square().mean(-1, keepdim=True) + 1e-6).sqrt() * layer.norm_q.weight
            k = k / (k.square().mean(-1, keepdim=True) + 1e-6).sqrt() * layer.norm_k.weight
        scores = torch.einsum("nld,nmd->nlm", q, k) / math.sqrt(width)
        heads.append(torch.einsum("nlm,nmd->nld", scores.softmax(-1), v))
    return layer.to_out[0](torch.cat(heads, dim=-1))


def tokens_of(x):
    return x.flatten(2).transpose(1, 2)


@pytest.mark.parametrize("heads", [{"num_heads": 2}, {"head_dim": 2}, {}])
@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("context_dim", [None, 6])
def test_multi_head_attention_is_its_definition(heads, qk_norm, context_dim):
    layer = randomized(MultiHeadAttention(8, **heads, qk_norm=qk_norm, context_dim=context_dim), dtype=torch.float64)
    assert layer.heads == {"num_heads": 2, "head_dim": 4}.get(next(iter(heads), ""), 1)
    tokens = noise(2, 5, 8)
    context = tokens if context_dim is None else noise(2, 7, 6, seed=1)
    output = layer(tokens) if context_dim is None else layer(tokens, context)
    torch.testing.assert_close(output, attention(layer, tokens, context), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("size", [(6,), (3, 4), (2, 3, 2)])
@pytest.mark.parametrize("norm", [GROUPS, None])
def test_self_attention_is_its_definition_for_any_number_of_axes(size, norm):
    layer = randomized(SelfAttention(8, num_heads=2, norm=norm, residual_scale=0.5), dtype=torch.float64)
    x = noise(2, 8, *size)
    normed = x if norm is None else F.group_norm(x, 4, layer.group_norm.weight, layer.group_norm.bias)
    mixed = attention(layer, tokens_of(normed), tokens_of(normed))
    expected = (x + mixed.transpose(1, 2).view_as(x)) * 0.5
    torch.testing.assert_close(layer(x), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("qk_norm", [False, True])
def test_cross_attention_is_its_definition(qk_norm):
    layer = randomized(CrossAttention(8, 6, num_heads=2, norm=GROUPS, qk_norm=qk_norm), dtype=torch.float64)
    assert (layer.norm_q is not None) == qk_norm
    x, context = noise(2, 8, 3, 4), noise(2, 5, 6, seed=1)
    normed = F.group_norm(x, 4, layer.group_norm.weight, layer.group_norm.bias)
    expected = x + attention(layer, tokens_of(normed), context).transpose(1, 2).reshape(x.shape)
    torch.testing.assert_close(layer(x, context), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("cross_only", [False, True])
@pytest.mark.parametrize("context_norm", [None, "layer_norm", "group_norm"])
def test_attention_with_added_keys_and_values_is_its_definition(cross_only, context_norm):
    layer = AddedKVAttention(8, 32, num_heads=2, norm=GROUPS, cross_only=cross_only, context_norm=context_norm)
    randomized(layer, dtype=torch.float64)
    x, context = noise(2, 8, 3, 4), noise(2, 5, 32, seed=1)
    tokens = tokens_of(F.group_norm(x, 4, layer.group_norm.weight, layer.group_norm.bias))
    normed = context
    if context_norm == "layer_norm":
        normed = F.layer_norm(context, (32,), layer.norm_cross.weight, layer.norm_cross.bias)
    elif context_norm == "group_norm":
        weight, bias = layer.norm_cross.weight, layer.norm_cross.bias
        normed = F.group_norm(context.transpose(1, 2), 32, weight, bias).transpose(1, 2)
    keys, values = layer.add_k_proj(normed), layer.add_v_proj(normed)
    if not cross_only:
        keys, values = torch.cat([layer.to_k(tokens), keys], 1), torch.cat([layer.to_v(tokens), values], 1)
    query, heads = layer.to_q(tokens), []
    for head in (slice(0, 4), slice(4, 8)):
        scores = torch.einsum("nld,nmd->nlm", query[..., head], keys[..., head]) / 2
        heads.append(torch.einsum("nlm,nmd->nld", scores.softmax(-1), values[..., head]))
    expected = x + layer.to_out[0](torch.cat(heads, dim=-1)).transpose(1, 2).reshape(x.shape)
    torch.testing.assert_close(layer(x, context), expected, rtol=1e-9, atol=1e-9)


def test_pixels_may_change_places():
    layer = randomized(SelfAttention(8, num_heads=2, norm=GROUPS), dtype=torch.float64)
    x = noise(2, 8, 12)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(layer(x[..., order]), layer(x)[..., order])


@pytest.mark.parametrize(("upcast", "dtype"), [(True, torch.float32), (False, torch.float16)])
def test_upcasting_attends_in_float32(monkeypatch, upcast, dtype):
    seen, attend = [], F.scaled_dot_product_attention

    def spy(*parts):
        seen.extend(part.dtype for part in parts if part is not None)
        return attend(*parts)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    layer = MultiHeadAttention(8, num_heads=2, upcast=upcast).half()
    assert layer(noise(1, 5, 8).half()).dtype == torch.float16
    layer = CrossAttention(8, 6, num_heads=2, norm=GROUPS, upcast=upcast).half()
    assert layer(noise(1, 8, 2, 2).half(), noise(1, 3, 6).half()).dtype == torch.float16
    assert seen == [dtype] * 6


def transformer_block(block, tokens, context):
    first = context if block.cross_only else tokens
    normed = block.norm1(tokens)
    tokens = tokens + attention(block.attn1, normed, first if block.cross_only else normed)
    normed = block.norm2(tokens)
    tokens = tokens + attention(block.attn2, normed, normed if context is None else context)
    value, gate = block.ff.net[0].proj(block.norm3(tokens)).chunk(2, dim=-1)
    return tokens + block.ff.net[2](value * 0.5 * gate * (1 + torch.erf(gate / math.sqrt(2))))


@pytest.mark.parametrize(("context_dim", "cross_only"), [(None, False), (6, False), (6, True)])
@pytest.mark.parametrize("linear_projection", [False, True])
@pytest.mark.parametrize("size", [(6,), (3, 4), (2, 3, 2)])
def test_the_spatial_transformer_is_its_definition(context_dim, cross_only, linear_projection, size):
    layer = randomized(
        SpatialTransformer(
            8,
            num_heads=2,
            context_dim=context_dim,
            depth=2,
            spatial_dims=None if linear_projection else len(size),
            linear_projection=linear_projection,
            cross_only=cross_only,
            norm=NormConfig(num_groups=4, eps=1e-6),
        ),
        dtype=torch.float64,
    )
    x = noise(2, 8, *size)
    context = None if context_dim is None else noise(2, 5, 6, seed=1)
    tokens = tokens_of(F.group_norm(x, 4, layer.norm.weight, layer.norm.bias, 1e-6))
    tokens = F.linear(tokens, layer.proj_in.weight.flatten(1), layer.proj_in.bias)
    for block in layer.transformer_blocks:
        tokens = transformer_block(block, tokens, context)
    tokens = F.linear(tokens, layer.proj_out.weight.flatten(1), layer.proj_out.bias)
    expected = x + tokens.transpose(1, 2).reshape(x.shape)
    torch.testing.assert_close(layer(x, context), expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(("heads", "count"), [({"num_heads": 2}, 2), ({"head_dim": 2}, 4), ({}, 1)])
def test_the_spatial_transformer_takes_a_number_of_heads_or_their_width(heads, count):
    block = SpatialTransformer(8, norm=GROUPS, **heads).transformer_blocks[0]
    assert block.attn1.heads == block.attn2.heads == count


@pytest.mark.parametrize("layer", [SelfAttention(8, norm=GROUPS), SpatialTransformer(8, norm=GROUPS)])
def test_a_new_layer_is_the_identity(layer):
    x = noise(2, 8, 3, 4).float()
    assert torch.equal(layer(x), x)


def test_the_feed_forward_layer_is_four_times_as_wide():
    assert FeedForward(8).net[0].proj.out_features == 64
    assert GEGLU(8, 5)(torch.zeros(1, 2, 8)).shape == (1, 2, 5)
    assert TransformerBlock(8, num_heads=2, context_dim=3)(torch.zeros(1, 2, 8), torch.zeros(1, 4, 3)).shape == (
        1,
        2,
        8,
    )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SelfAttention(8, num_heads=2, head_dim=4), "num_heads=2 and head_dim=4 contradict"),
        (lambda: SelfAttention(8, num_heads=3), "num_heads=3 does not divide 8"),
        (lambda: SelfAttention(8, head_dim=3), "head_dim=3 does not divide 8"),
        (lambda: SelfAttention(8, num_heads=0), "num_heads=0 does not divide 8"),
        (lambda: SelfAttention(8), "norm.num_groups=32 does not divide 8"),
        (lambda: SpatialTransformer(32, cross_only=True), "cross_only needs transformer.context_dim"),
        (
            lambda: SpatialTransformer(32, context_dim=4)(torch.zeros(1, 32, 2, 2)),
            "must be .N, length, 4. with N = 1, got None",
        ),
        (lambda: SpatialTransformer(32)(torch.zeros(1, 32, 2, 2), torch.zeros(1, 1, 1)), "context_dim is None"),
        (lambda: SpatialTransformer(32, num_heads=2, head_dim=4), "num_heads=2 and head_dim=4 contradict"),
        (
            lambda: AddedKVAttention(32, 4)(torch.zeros(2, 32, 2, 2), torch.zeros(2, 3, 5)),
            r"4\) with N = 2, got \(2, 3, 5\)",
        ),
        (lambda: AddedKVAttention(32, 4, context_norm="batch_norm"), "context_norm must be one of"),
        (
            lambda: CrossAttention(32, 4)(torch.zeros(2, 32, 2, 2), torch.zeros(2, 3, 5)),
            r"4\) with N = 2, got \(2, 3, 5\)",
        ),
        (
            lambda: CrossAttention(32, 4)(torch.zeros(2, 32, 2, 2), torch.zeros(1, 3, 4)),
            r"4\) with N = 2, got \(1, 3, 4\)",
        ),
        (lambda: CrossAttention(32, 4)(torch.zeros(2, 32, 2, 2), torch.zeros(2, 4)), r"4\) with N = 2, got \(2, 4\)"),
    ],
)
def test_what_cannot_be_is_an_error(make, message):
    with pytest.raises(ValueError, match=message):
        make()
