"""Checks convolutions, weight standardization and the choice of normalization."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.tensors import noise
from unetgn.nn import ConvNormAct, WeightStandardizedConv, convolution, make_norm, standardize_weight


@pytest.mark.parametrize(("dims", "kind"), [(1, nn.Conv1d), (2, nn.Conv2d), (3, nn.Conv3d)])
def test_a_convolution_keeps_the_size_over_any_number_of_axes(dims, kind):
    layer = convolution(dims, 2, 3)
    assert type(layer) is kind
    assert layer(torch.zeros(1, 2, *[5] * dims)).shape == (1, 3, *[5] * dims)


@pytest.mark.parametrize("shape", [(4, 3, 3), (4, 3, 3, 3), (4, 3, 3, 3, 3)])
def test_a_standardized_weight_has_mean_zero_and_variance_one_in_each_output_channel(shape):
    weight = standardize_weight(3 + 5 * noise(*shape), eps=0.0).flatten(1)
    torch.testing.assert_close(weight.mean(1), torch.zeros(4, dtype=torch.float64))
    torch.testing.assert_close(weight.var(1, correction=0), torch.ones(4, dtype=torch.float64))


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_standardization_forgets_shift_and_scale_of_the_weights(dims):
    layer = WeightStandardizedConv(3, 4, spatial_dims=dims, stride=2, eps=0.0).double()
    x = noise(2, 3, *[6] * dims)
    expected = layer(x)
    assert expected.shape == (2, 4, *[3] * dims)
    with torch.no_grad():
        layer.weight.mul_(7).add_(2)
    torch.testing.assert_close(layer(x), expected)


def test_a_standardized_convolution_is_a_plain_one_with_that_weight():
    layer = WeightStandardizedConv(3, 4).double()
    x = noise(2, 3, 6, 6)
    expected = F.conv2d(x, standardize_weight(layer.weight), layer.bias, padding=1)
    torch.testing.assert_close(layer(x), expected)
    plain = nn.Conv2d(3, 4, 3)
    plain.load_state_dict(layer.state_dict())  # parameters are named the same


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("size", [(6,), (4, 3), (2, 3, 4)])
def test_each_normalization_is_its_definition(size, activation):
    x, act = 2 + noise(3, 8, *size), F.silu if activation else lambda z: z
    dims = len(size)
    expected = {
        "group": F.group_norm(x, 4),
        "instance": F.group_norm(x, 8) if dims == 1 else F.instance_norm(x),
        "layer": F.layer_norm(x, x.shape[1:]),
        "batch": F.batch_norm(x, None, None, training=True),
    }
    options = {"group": {"num_groups": 4}, "batch": {"spatial_dims": dims}}
    for kind, value in expected.items():
        norm = make_norm(kind, 8, activation=activation, **options.get(kind, {})).double()
        torch.testing.assert_close(norm(x), act(value))


@pytest.mark.parametrize("kind", ["group", "instance", "layer"])
def test_all_but_batch_normalization_are_the_same_in_training_and_evaluation(kind):
    layer = ConvNormAct(3, 8, norm=kind, num_groups=4 if kind == "group" else None)
    x = noise(3, 3, 6, 6).float()
    assert torch.equal(layer.train()(x), layer.eval()(x))
    torch.testing.assert_close(layer(x)[:1], layer(x[:1]), rtol=1e-5, atol=1e-5)
    assert not list(layer.buffers())


def test_batch_normalization_depends_on_the_batch_and_keeps_statistics():
    layer = ConvNormAct(3, 8, norm="batch")
    x = noise(3, 3, 6, 6).float()
    assert not torch.allclose(layer.train()(x)[:1], layer(x[:1]), atol=1e-2)
    assert {name for name, _ in layer.named_buffers()} >= {"norm.0.running_mean", "norm.0.running_var"}


@pytest.mark.parametrize("standardize", [False, True])
def test_the_block_is_convolution_then_normalization_then_silu(standardize):
    layer = ConvNormAct(3, 8, stride=2, num_groups=4, standardize_weight=standardize).double()
    x = noise(2, 3, 6, 6)
    weight = standardize_weight(layer.conv.weight) if standardize else layer.conv.weight
    expected = F.silu(F.group_norm(F.conv2d(x, weight, stride=2, padding=1), 4))
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: make_norm("rms", 8), r"must be one of \('group', 'instance', 'layer', 'batch'\), got 'rms'"),
        (lambda: make_norm("batch", 8, activation="relu"), "activation must be 'silu' or None, got 'relu'"),
        (lambda: make_norm("group", 8, num_groups=3), "3"),
        (lambda: make_norm("layer", 8, num_groups=3), "num_groups=3 is for normalization 'group'; 'layer' has no such"),
        (lambda: make_norm("batch", 8, num_groups=32), "num_groups=32 is for normalization 'group'"),
        (lambda: make_norm("group", 32, spatial_dims=2), "spatial_dims=2 is for normalization 'batch'; 'group' takes"),
        (lambda: make_norm("batch", 8, spatial_dims=0), "spatial_dims must be 1, 2 or 3, got 0"),
        (lambda: ConvNormAct(1, 8, norm="instance", num_groups=4), "num_groups=4 is for normalization 'group'"),
        (lambda: convolution(4, 1, 1), "spatial_dims must be 1, 2 or 3, got 4"),
        (lambda: convolution(2, 1, 1, 4), "kernel_size must be odd, .*, got 4"),
        (lambda: WeightStandardizedConv(1, 1, 2), "kernel_size must be odd, .*, got 2"),
        (lambda: ConvNormAct(1, 32, 2), "kernel_size must be odd, .*, got 2"),
        (lambda: ConvNormAct(1, 32, 2, standardize_weight=True), "kernel_size must be odd, .*, got 2"),
    ],
)
def test_what_cannot_be_is_an_error(make, message):
    with pytest.raises(ValueError, match=message):
        make()
