"""Whoever comes after the operator may change y in place, as after `torch.nn.GroupNorm`: y is a tensor of its own."""

import functools
import itertools

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad

import unetgn
from unetgn.ops import implementation

SHAPES = [(3, 12), (3, 12, 7), (2, 12, 4, 5), (2, 12, 3, 2, 4), (3, 12, 1, 1), (0, 12, 4, 4), (1, 12, 40, 40)]
PARAMETERS = ("", "weight bias", "pre_bias", "weight bias pre_bias scale shift", "shift", "bias scale shift maps")
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
MEANS = (0.0, 1000.0)  # the second is far off the centre: the operator takes another way


def cases():
    for seed, (shape, parameters, mean) in enumerate(itertools.product(SHAPES, PARAMETERS, MEANS)):
        for channels_last in (False, True) if len(shape) > 3 else (False,):
            for activation in ("silu", None):
                dtype = DTYPES[seed % 4]
                if not (mean and dtype is torch.float16):  # whose squares overflow
                    yield seed, shape, parameters, mean, channels_last, activation, dtype


compiled = functools.partial(torch.compile, backend="aot_eager")


def named(inputs):
    return {name: value for name, value in inputs.keywords().items() if value is not None}


def test_y_is_no_view_and_may_be_changed_in_place(draw, place):
    name, device = place
    for seed, shape, parameters, mean, channels_last, activation, dtype in cases():
        options = {"dtype": dtype, "channels_last": channels_last, "parameters": parameters, "device": device}
        inputs = draw(seed, shape, mean=mean, **options).requires_grad()
        expected = []
        for in_place in (False, True):
            with implementation(name):
                y = unetgn.group_norm_silu(inputs.x, 4, **named(inputs), activation=activation)
                assert not y._is_view()
                z = y.mul_(2).add_(1) if in_place else y * 2 + 1
                gradients = torch.autograd.grad(z, inputs.leaves(), inputs.dy)
            if in_place:
                for got, want in zip([z, *gradients], expected, strict=True):
                    torch.testing.assert_close(got, want, equal_nan=True)
            expected = [z.detach(), *gradients]


@pytest.mark.parametrize("way", [torch.no_grad, torch.inference_mode])
def test_y_is_no_view_without_gradients_either_and_shares_nothing_with_x(draw, place, way):
    name, device = place
    for seed, shape, parameters, mean, channels_last, activation, dtype in cases():
        options = {"dtype": dtype, "channels_last": channels_last, "parameters": parameters, "device": device}
        inputs = draw(seed, shape, mean=mean, **options)
        before = inputs.x.clone()
        with implementation(name), way():
            y = unetgn.group_norm_silu(inputs.x, 4, **named(inputs), activation=activation)
            assert not y._is_view()
            y.add_(1)
        assert torch.equal(inputs.x, before)


@pytest.mark.parametrize("activation", ["silu", None])
def test_y_may_be_changed_in_place_within_transforms(draw, place, activation):
    name, device = place
    inputs = draw(0, (2, 12, 4, 5), device=device)

    def total(x, in_place):
        y = unetgn.group_norm_silu(x, 4, **named(inputs), activation=activation)
        return (y.mul_(2) if in_place else y * 2).square().sum()

    with implementation(name):
        torch.testing.assert_close(grad(total)(inputs.x, True), grad(total)(inputs.x, False))


@pytest.mark.parametrize("mean", MEANS)
@pytest.mark.parametrize("wrap", [unetgn.fuse, compiled, lambda net: net], ids=["fused", "compiled", "plain"])
def test_what_works_in_place_may_follow_a_norm_in_a_network(mean, wrap):
    """The norm of the library and a dropout in place, on images whose groups are far off their centre."""
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(4, 8), nn.SiLU(), nn.Dropout(0.5, inplace=True))
    net[0].bias.data.add_(mean)
    ours = nn.Sequential(net[0], unetgn.GroupNormSiLU(4, 8), net[3])
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    weights = dict(net.named_parameters())
    torch.manual_seed(0)
    functional_call(net, weights, (x,)).square().sum().backward()
    expected = net[0].weight.grad.clone()
    for model in (ours, net):
        net[0].weight.grad = None
        torch.manual_seed(0)
        wrapped = wrap(model)
        (model if wrapped is None or not isinstance(wrapped, nn.Module) else wrapped)(x).square().sum().backward()
        if wrap is not compiled:  # whose dropout draws other numbers
            torch.testing.assert_close(net[0].weight.grad, expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())
