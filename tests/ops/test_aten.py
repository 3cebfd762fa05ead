"""The ways through the ATen implementation: which one a call takes, and that each gives the definition."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import unetgn
from unetgn.ops import aten


@pytest.mark.parametrize("affine", ["none", "per channel", "per sample"])
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
def test_the_centred_way_gives_the_definition_in_the_layout_of_x(draw, definition, channels_last, affine):
    inputs = draw(0, (2, 6, 4, 5), dtype=torch.float64, channels_last=channels_last)
    parameters = {"none": (), "per channel": ("weight", "bias"), "per sample": ("weight", "bias", "scale", "shift")}
    given = {name: getattr(inputs, name) for name in parameters[affine]}
    a, b = aten._affine(inputs.x, *(given.get(name) for name in ("weight", "bias", "scale", "shift")))
    z, mean, rstd = aten._centred(inputs.x, 3, a, b, 1e-5)
    torch.testing.assert_close(z, definition(inputs.x, 3, activation=None, **given))
    grouped = inputs.x.reshape(2, 3, -1)
    torch.testing.assert_close(mean, grouped.mean(2))
    torch.testing.assert_close(rstd, (grouped.var(2, correction=0) + 1e-5).rsqrt())
    assert z.stride() == inputs.x.stride()


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("parameters", ["", "bias", "weight bias", "weight bias pre_bias scale shift"])
def test_a_backward_pass_without_native_kernels_gives_the_same(draw, in_double, monkeypatch, parameters, channels_last):
    """As on MPS: the native backward of PyTorch is used on the CPU alone."""
    monkeypatch.setattr(aten, "_native_backward_is_good", lambda *_: False)
    for activation in ("silu", None):
        inputs = draw(1, (2, 6, 4, 5), dtype=torch.float64, channels_last=channels_last, parameters=parameters)
        _, gradients = inputs.call(unetgn.group_norm_silu, 3, activation=activation)
        _, expected = in_double(inputs, 3, activation=activation)
        for got, want in zip(gradients, expected, strict=True):
            torch.testing.assert_close(got, want)


WAYS = {  # (shape, groups, mean of x, channels_last): the ways forward and backward
    ((2, 6, 4, 5), 3, 0.0, False): ("_native", "_native_backward"),
    ((2, 6, 4, 5), 3, 40.0, False): ("_native _centred", "_native_backward"),
    ((2, 16, 4, 5), 2, 0.0, True): ("_native_channels_last", "_native_backward"),
    ((2, 16, 4, 5), 2, 6.0, True): ("_native_channels_last _centred", "_native_backward"),
    ((2, 16, 2, 3, 4), 2, 0.0, True): ("_native_channels_last", "_native_backward"),
    ((2, 6, 4, 5), 3, 0.0, True): ("_native_channels_last", "_centred_backward"),
    ((8, 6, 32, 32), 3, 2.0, True): ("_native_channels_last", "_centred_backward"),
    ((10, 6, 16, 18), 3, 0.0, True): ("_centred", "_centred_backward"),
    ((1, 2, 256, 256), 1, 0.3, True): ("_native_channels_last", "_centred_backward"),
    ((1, 2, 256, 256), 1, 3.0, True): ("_native_channels_last _centred", "_centred_backward"),
    ((1, 16, 256, 257), 2, 0.3, True): ("_centred", "_native_backward"),
}


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize(
    "parameters", ["", "bias", "weight bias", "weight pre_bias", "weight bias pre_bias scale shift"]
)
def test_each_way_gives_the_definition(draw, in_double, monkeypatch, parameters, way):
    shape, groups, mean, channels_last = way
    forward, backward = WAYS[way]
    if "scale" in parameters and channels_last:
        backward = "_centred_backward"
    inputs = draw(3, shape, dtype=torch.float64, channels_last=channels_last, parameters=parameters, mean=mean)
    taken = []

    def noted(name):
        way_taken = getattr(aten, name)
        return lambda *arguments: taken.append(name) or way_taken(*arguments)

    for name in ("_native", "_native_channels_last", "_centred", "_native_backward", "_centred_backward"):
        monkeypatch.setattr(aten, name, noted(name))
    y, gradients = inputs.call(unetgn.group_norm_silu, groups)
    assert taken == [*forward.split(), backward]
    expected_y, expected = in_double(inputs, groups)
    torch.testing.assert_close(y, expected_y)
    for got, want in zip(gradients, expected, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
def test_gradients_of_parameters_alone_need_none_of_x(draw, in_double, channels_last):
    """PyTorch's backward crashes where it is not asked for it in channels_last."""
    inputs = draw(4, (2, 16, 4, 5), dtype=torch.float64, channels_last=channels_last, parameters="weight bias")
    leaves = [inputs.weight.requires_grad_(), inputs.bias.requires_grad_()]
    y = unetgn.group_norm_silu(inputs.x, 2, *leaves)
    gradients = torch.autograd.grad(y, leaves, inputs.dy)
    _, (_, *expected) = in_double(inputs, 2)
    for got, want in zip(gradients, expected, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("parameters", ["weight bias", "weight bias scale shift"])
@pytest.mark.parametrize(("shape", "groups"), [((2, 32, 64, 64), 4), ((1, 4, 512, 512), 4)], ids=str)
@pytest.mark.parametrize("mean", [0.0, 0.9, 3.9, 30.0])
def test_means_below_the_limits_cost_few_digits_in_any_gradient(
    draw, in_double, relative_error, mean, shape, groups, parameters, channels_last
):
    """Also of the weight, where dy has a mean too: S1 is small beside the sums that it is made of."""
    inputs = draw(5, shape, mean=mean, channels_last=channels_last, parameters=parameters)
    inputs.dy.add_(1.0)
    y, gradients = inputs.call(unetgn.group_norm_silu, groups)
    expected_y, expected = in_double(inputs, groups)
    for got, want in zip([y, *gradients], [expected_y, *expected], strict=True):
        assert relative_error(got, want) < 1e-5


def test_silu_is_computed_in_place(draw):
    """Besides y, no tensor of its size is made."""
    inputs = draw(2, (2, 8, 16, 16), parameters="weight bias")
    large = set()

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            for output in result if isinstance(result, (tuple, list)) else (result,):
                if isinstance(output, torch.Tensor) and output.numel() == inputs.x.numel():
                    large.add(output.untyped_storage().data_ptr())
            return result

    with Record():
        y, _, _ = aten.forward(inputs.x, 4, inputs.weight, inputs.bias, 1e-5, True, None, None, None)
    assert large == {y.data_ptr()}
