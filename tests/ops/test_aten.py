"""Tests which way a call takes through the ATen implementation, and that each gives the definition."""

from contextlib import contextmanager

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import unetgn
from unetgn.ops import aten, dispatch
from unetgn.ops.arguments import Needs
from unetgn.ops.layout import memory_format_of


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize(
    "parameters",
    ["", "bias", "weight bias", "weight bias pre_bias scale shift", "weight bias pre_bias scale shift maps"],
)
def test_a_backward_pass_without_native_kernels_gives_the_same(draw, in_double, monkeypatch, parameters, channels_last):
    """As on MPS: the native backward of PyTorch is used on the CPU alone."""
    monkeypatch.setattr(aten, "_native_backward_is_good", lambda *_: False)
    for activation in ("silu", None):
        inputs = draw(1, (2, 6, 4, 5), dtype=torch.float64, channels_last=channels_last, parameters=parameters)
        _, gradients = inputs.call(unetgn.group_norm_silu, 3, activation=activation)
        _, expected = in_double(inputs, 3, activation=activation)
        for got, want in zip(gradients, expected, strict=True):
            torch.testing.assert_close(got, want)


# (shape, groups, mean of x, channels_last): the ways forward and backward. A native way is tried first where its kernel
# is exact for most means; where its statistics show that this mean is too far from zero, the centred one follows.
WAYS = {
    ((2, 6, 4, 5), 3, 0.0, False): ("native", "native"),
    ((2, 6, 4, 5), 3, 40.0, False): ("native centred", "native"),
    ((520, 4, 2, 3), 2, 0.2, False): ("native", "native"),
    ((520, 4, 2, 3), 2, 3.0, False): ("native", "native"),
    ((2, 16, 24, 25), 2, 0.0, True): ("native", "native"),
    ((2, 16, 24, 25), 2, 6.0, True): ("native centred", "native"),
    ((2, 16, 8, 9, 8), 2, 0.0, True): ("native", "native"),
    ((2, 16, 4, 5), 2, 6.0, True): ("native centred", "copied"),
    ((2, 16, 2, 3, 4), 2, 0.0, True): ("native", "copied"),
    ((2, 6, 4, 5), 3, 0.0, True): ("native", "copied"),
    ((8, 6, 32, 32), 3, 2.0, True): ("native", "centred"),
    ((10, 6, 16, 18), 3, 0.0, True): ("native", "native"),
    ((10, 6, 16, 18), 6, 0.0, True): ("centred", "centred"),
    ((1, 2, 256, 256), 1, 0.3, True): ("native", "centred"),
    ((1, 2, 256, 256), 1, 3.0, True): ("native centred", "centred"),
    ((1, 16, 256, 257), 2, 0.3, True): ("centred", "native"),
}


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize(
    "parameters",
    ["", "bias", "weight bias", "weight pre_bias", "weight bias pre_bias scale shift", "weight bias scale shift maps"],
)
def test_each_way_gives_the_definition_in_the_layout_of_x(draw, in_double, parameters, way):
    shape, groups, mean, channels_last = way
    forward, backward = WAYS[way]
    contiguous = not channels_last
    if backward == "copied":  # to contiguous tensors, but for maps
        contiguous = "maps" not in parameters
        backward = "native" if contiguous or shape[1] > groups else "centred"
    if "scale" in parameters and "maps" not in parameters and not contiguous:
        backward = "centred"
    inputs = draw(3, shape, dtype=torch.float64, channels_last=channels_last, parameters=parameters, mean=mean)
    arguments = inputs.arguments(groups)
    with operators_of_pytorch() as called:
        y, *statistics = dispatch.forward(arguments)
    native, centred = "aten::native_group_norm" in called, "aten::rsqrt" in called
    assert " ".join(["native"] * native + ["centred"] * centred) == forward
    needs = Needs(*(value is not None for value in (inputs.x, *inputs.keywords().values())))
    with operators_of_pytorch() as called:
        gradients = dispatch.backward(inputs.dy, arguments, *statistics, needs)
    assert ("native" if "aten::native_group_norm_backward" in called else "centred") == backward
    few_groups = shape[0] * groups <= 1024
    assert ("aten::native_group_norm" in called) == (few_groups and contiguous)  # that computes z once more

    expected_y, expected = in_double(inputs, groups)
    torch.testing.assert_close(y, expected_y)
    assert memory_format_of(y) == memory_format_of(gradients.dx) == memory_format_of(inputs.x)
    for got, want in zip([gradient for gradient in gradients if gradient is not None], expected, strict=True):
        torch.testing.assert_close(got, want)
    h = inputs.x if inputs.pre_bias is None else inputs.x + inputs.pre_bias.reshape(*shape[:2], *[1] * len(shape[2:]))
    grouped = h.reshape(shape[0], groups, -1)
    torch.testing.assert_close(statistics[0], grouped.mean(2))
    torch.testing.assert_close(statistics[1], (grouped.var(2, correction=0) + 1e-5).rsqrt())


@contextmanager
def operators_of_pytorch():
    """Fill the set with the names of the operators of PyTorch that run within the block."""
    called = set()
    with torch.autograd.profiler.profile(use_kineto=False) as profile:
        yield called
    called.update(event.name for event in profile.function_events)


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
        y, _, _ = dispatch.forward(inputs.arguments(4))
    assert large == {y.data_ptr()}


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize(("mean", "most"), [(0.0, 2), (40.0, 3)], ids=["near zero", "far"])
@pytest.mark.parametrize("parameters", ["weight bias", "bias", "weight bias scale shift"])
def test_the_backward_pass_makes_no_copy_of_h_where_means_are_near_zero(draw, parameters, mean, most, channels_last):
    """Two tensors of x's size are made, for z and dh; a third, for h - mean, where the mean is far from zero."""
    inputs = draw(6, (2, 32, 32, 32), parameters=parameters, mean=mean, channels_last=channels_last)
    arguments = inputs.arguments(4)
    _, *statistics = dispatch.forward(arguments)
    given, made = {inputs.x.data_ptr(), inputs.dy.data_ptr()}, {}

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            for output in result if isinstance(result, (tuple, list)) else (result,):
                if isinstance(output, torch.Tensor) and output.numel() == inputs.x.numel():
                    made[output.untyped_storage().data_ptr()] = output  # kept, so that no address comes twice
            return result

    needs = Needs(*(value is not None for value in (inputs.x, *inputs.keywords().values())))
    with Record():
        dispatch.backward(inputs.dy, arguments, *statistics, needs)
    assert len(set(made) - given) == most


@pytest.mark.parametrize("side", [16, 32, 128, 256])
@pytest.mark.parametrize("mean", [0.0, 0.8, 1.4, 3.9, 10.0])
def test_repeated_values_in_channels_last_are_off_by_no_more_than_is_promised(
    draw, in_double, relative_error, mean, side
):
    """Roundings of equal values add up: `aten` says by how much, and where it takes another way."""
    inputs = draw(8, (1, 16, side, side), parameters="", channels_last=True)
    inputs.x = (inputs.x.sign() + mean) * 1.7
    y, gradients = inputs.call(unetgn.group_norm_silu, 2)
    expected_y, expected = in_double(inputs, 2)
    bound = min(2e-3, side**2 * 2**-27 * (1 + 1.4 * mean**2)) + 1e-6
    assert relative_error(y, expected_y) < bound
    assert relative_error(gradients[0], expected[0]) < 4 * bound


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", [(2, 2, 2, 17), (4, 6, 3, 3), (3, 16, 32, 33)], ids=str)
@pytest.mark.parametrize(
    "parameters", ["bias scale", "shift", "pre_bias", "weight bias shift", "weight bias pre_bias scale shift"]
)
def test_strides_of_small_arguments_make_no_difference(shape, parameters, channels_last):
    """Of a sum in PyTorch the first operand decides on the layout, and kernels of norms read what they get as dense."""
    n, channels, *_ = shape
    x = torch.randn(shape, dtype=torch.float64)
    x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
    given = {}
    for name in parameters.split():
        if name in ("weight", "bias"):
            given[name] = torch.randn(channels, 2, dtype=torch.float64)[:, 0]
        else:
            given[name] = torch.randn(channels, n, dtype=torch.float64).t()
    leaves = [x, *given.values()]
    for leaf in leaves:
        leaf.requires_grad_()
    dy, found = torch.randn(shape, dtype=torch.float64), []
    for which in ("aten", "reference"):
        with dispatch.implementation(which):
            y = unetgn.group_norm_silu(x, 2, **given)
            found.append((y, *torch.autograd.grad(y, leaves, dy)))
    torch.testing.assert_close(*found)
