"""Checks the residual block against its definition in plain PyTorch, in float64."""

import re

import pytest
import torch
from torch.nn import functional as F

from tests.tensors import noise, randomized
from unetgn.nn import CrossAttention, NormConfig, ResBlock, ResBlockConfig, SelfAttention, SpatialTransformer

CONVOLUTIONS = (F.conv1d, F.conv2d, F.conv3d)


def group_norm(x, norm):
    """Compute the definition: biased statistics of each sample and group, then weight and bias of each channel."""
    grouped = x.unflatten(1, (norm.num_groups, -1)).flatten(2)
    centred = grouped - grouped.mean(2, keepdim=True)
    z = (centred / (centred.square().mean(2, keepdim=True) + norm.eps).sqrt()).view_as(x)
    tail = (-1, *(1,) * (x.ndim - 2))
    return z * norm.weight.view(tail) + norm.bias.view(tail)


def definition(block, x, emb, *, dims, resample=lambda x: x):
    """Compute (shortcut(x) + conv2(act(norm2(conv1(act(norm1(x))), emb)))) * residual_scale."""
    conv, tail, act = CONVOLUTIONS[dims - 1], (1,) * dims, getattr(F, block.config.activation)
    hidden = resample(act(group_norm(x, block.norm1)))
    hidden = conv(hidden, block.conv1.weight, block.conv1.bias, padding=1)
    if emb is not None:
        emb = act(emb) if block.config.activate_embedding else emb
        projected = F.linear(emb, block.time_emb_proj.weight, block.time_emb_proj.bias)
        projected = projected.view(*projected.shape, *tail)
        if block.config.embedding == "add":
            hidden = group_norm(hidden + projected, block.norm2)
        else:
            scale, shift = projected.chunk(2, dim=1)
            hidden = group_norm(hidden, block.norm2) * (1 + scale) + shift
    else:
        hidden = group_norm(hidden, block.norm2)
    hidden = conv(act(hidden), block.conv2.weight, block.conv2.bias, padding=1)
    shortcut = resample(x)
    if block.conv_shortcut is not None:
        shortcut = conv(shortcut, block.conv_shortcut.weight, block.conv_shortcut.bias)
    return (shortcut + hidden) * block.config.residual_scale


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("out_channels", [8, 12])
@pytest.mark.parametrize(
    "config",
    [
        ResBlockConfig(),
        ResBlockConfig(embedding="scale_shift"),
        ResBlockConfig(embedding="scale_shift", activate_embedding=False, residual_scale=0.5**0.5),
        ResBlockConfig(activation="gelu"),
        ResBlockConfig(activation="mish", embedding="scale_shift"),
        ResBlockConfig(activation="relu", activate_embedding=False),
    ],
)
def test_it_is_its_definition(dims, out_channels, config):
    block = randomized(
        ResBlock(8, out_channels, emb_channels=5, spatial_dims=dims, norm=NormConfig(num_groups=4), config=config),
        dtype=torch.float64,
    )
    x, emb = noise(2, 8, *[6] * dims), noise(2, 5, seed=1)
    torch.testing.assert_close(block(x, emb), definition(block, x, emb, dims=dims), rtol=1e-9, atol=1e-9)


def test_a_block_without_an_embedding_is_its_definition():
    block = randomized(ResBlock(8, norm=NormConfig(num_groups=4)), dtype=torch.float64)
    x = noise(2, 8, 6, 6)
    torch.testing.assert_close(block(x), definition(block, x, None, dims=2), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("project", [False, True])
def test_resampling_happens_after_the_activation_and_on_the_shortcut(project):
    for direction, resample in (
        ("down", lambda x: F.avg_pool2d(x, 2)),
        ("up", lambda x: x.repeat_interleave(2, 2).repeat_interleave(2, 3)),
    ):
        block = randomized(
            ResBlock(
                8,
                emb_channels=5,
                norm=NormConfig(num_groups=4),
                config=ResBlockConfig(project_resampled=project),
                resample=direction,
            ),
            dtype=torch.float64,
        )
        assert (block.conv_shortcut is not None) == project
        x, emb = noise(2, 8, 6, 6), noise(2, 5, seed=1)
        expected = definition(block, x, emb, dims=2, resample=resample)
        torch.testing.assert_close(block(x, emb), expected, rtol=1e-9, atol=1e-9)


def test_one_group_is_layer_normalization_and_one_a_channel_instance_normalization():
    x = noise(2, 8, 6, 6)
    layer = randomized(ResBlock(8, norm=NormConfig(num_groups=1)), dtype=torch.float64)
    instance = randomized(ResBlock(8, norm=NormConfig(group_size=1)), dtype=torch.float64)
    plain = layer.norm1
    expected = F.silu(
        F.layer_norm(x, x.shape[1:], eps=plain.eps) * plain.weight[:, None, None] + plain.bias[:, None, None]
    )
    torch.testing.assert_close(layer.norm1(x), expected)
    plain = instance.norm1
    expected = F.silu(F.instance_norm(x, weight=plain.weight, bias=plain.bias, eps=plain.eps))
    torch.testing.assert_close(instance.norm1(x), expected)


def test_a_sample_does_not_depend_on_its_batch():
    block = randomized(ResBlock(8, emb_channels=5, norm=NormConfig(num_groups=4)), dtype=torch.float64).train()
    x, emb = noise(3, 8, 6, 6), noise(3, 5, seed=1)
    alone = torch.cat([block(x[i : i + 1], emb[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(block(x, emb), alone, rtol=1e-9, atol=1e-9)


def test_a_new_block_is_its_shortcut():
    x, emb = noise(2, 8, 6, 6).float(), noise(2, 5).float()
    assert torch.equal(ResBlock(8, emb_channels=5, norm=NormConfig(num_groups=4))(x, emb), x)


def test_dropout_is_between_the_second_activation_and_convolution():
    block = randomized(ResBlock(8, norm=NormConfig(num_groups=4), dropout=1.0), dtype=torch.float64).train()
    x = noise(2, 8, 6, 6)
    torch.testing.assert_close(block(x), x + block.conv2.bias[:, None, None])


def test_the_embedding_and_the_size_are_checked():
    block, plain = ResBlock(32, emb_channels=5), ResBlock(32)
    x = torch.zeros(1, 32, 4, 4)
    with pytest.raises(ValueError, match=r"needs an embedding \(N, 5\)"):
        block(x)
    with pytest.raises(ValueError, match="built without emb_channels"):
        plain(x, torch.zeros(1, 5))
    for size in ((8, 8), 8):
        with pytest.raises(ValueError, match=rf"size={re.escape(str(size))} is for a ResBlock that upsamples"):
            plain(x, size=size)
    with pytest.raises(TypeError, match="size must name one length for each of 2 axes, got 8"):
        ResBlock(32, resample="up")(x, size=8)
    with pytest.raises(ValueError, match="are for a ResBlock with resample='down' or 'up'"):
        ResBlock(32, taps=(1, 3, 3, 1))
    with pytest.raises(ValueError, match="are for a ResBlock with resample='down' or 'up'"):
        ResBlock(32, strides=(1, 2))
    with pytest.raises(ValueError, match="direction must be 'down' or 'up', got 'sideways'"):
        ResBlock(32, resample="sideways")
    with pytest.raises(ValueError, match=r"resblock\.embedding must be 'add' or 'scale_shift', got 'mul'"):
        ResBlockConfig(embedding="mul")


def test_a_group_count_that_does_not_divide_is_an_error_and_a_fallback_is_chosen_explicitly():
    from unetgn import largest_group_count

    with pytest.raises(
        ValueError, match=r"norm\.num_groups=32 does not divide 40 channels; numbers that do: 1, 2, 4, 5"
    ):
        ResBlock(40)
    block = ResBlock(40, norm=NormConfig(num_groups=largest_group_count(40)))
    assert block.norm1.num_groups == 20


@pytest.mark.parametrize(
    ("config", "channels", "groups"),
    [
        (NormConfig(), 64, 32),
        (NormConfig(group_size=16), 64, 4),
        (NormConfig(min_group_size=4), 64, 16),
        (NormConfig(min_group_size=4), 256, 32),
        (NormConfig(min_group_size=4), 2, 1),
    ],
)
def test_each_rule_gives_its_number_of_groups(config, channels, groups):
    assert config.groups(channels) == groups


def test_filter_taps_act_on_branch_and_shortcut():
    taps = torch.tensor([1.0, 3.0, 3.0, 1.0], dtype=torch.float64)
    kernel = (taps[:, None] * taps / taps.sum() ** 2).expand(8, 1, 4, 4)
    block = randomized(
        ResBlock(8, norm=NormConfig(num_groups=4), resample="down", taps=(1, 3, 3, 1)), dtype=torch.float64
    )
    x = noise(2, 8, 6, 6)
    expected = definition(block, x, None, dims=2, resample=lambda x: F.conv2d(x, kernel, stride=2, padding=1, groups=8))
    torch.testing.assert_close(block(x), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ResBlock(8, norm=8), "norm must be a NormConfig, got 8"),
        (lambda: ResBlock(32, config="add"), "config must be a ResBlockConfig, got 'add'"),
        (lambda: SelfAttention(8, norm=8), "norm must be a NormConfig, got 8"),
        (lambda: CrossAttention(8, 6, norm=8), "norm must be a NormConfig, got 8"),
        (lambda: SpatialTransformer(8, norm=8), "norm must be a NormConfig, got 8"),
    ],
)
def test_a_configuration_of_another_type_is_an_error_that_names_it(make, message):
    with pytest.raises(TypeError, match=message):
        make()
