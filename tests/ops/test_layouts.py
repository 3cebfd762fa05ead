"""Tests layouts and strides: contiguous and channels_last are kept, everything else is at least right."""

import itertools
from collections.abc import Callable

import pytest
import torch

import unetgn
from unetgn.ops import implementation
from unetgn.ops.layout import is_channels_last, memory_format_of

FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}
STRIDES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "a slice of the channels": lambda x: torch.cat([x, x], 1)[:, : x.shape[1]],
    "every second row": lambda x: x.repeat_interleave(2, 2)[:, :, ::2],
    "axes swapped": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "a slice of channels_last": lambda x: torch.cat([x, x], 1).contiguous(memory_format=torch.channels_last)[:, :6],
    "samples swapped with channels": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
}


@pytest.mark.parametrize("shape", [(2, 6, 4, 5), (2, 6, 3, 4, 5)], ids=["2-D", "3-D"])
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
def test_gradients_of_maps_have_the_layout_of_x(draw, place, shape, channels_last):
    name, device = place
    parameters = "weight bias pre_bias scale shift maps"
    inputs = draw(0, shape, channels_last=channels_last, parameters=parameters, device=device)
    assert inputs.scale is not None
    assert inputs.scale.is_contiguous()  # whatever x is
    inputs.requires_grad()
    for create_graph in (False, True):
        with implementation(name):
            y = unetgn.group_norm_silu(inputs.x, 3, **inputs.keywords())
            found = torch.autograd.grad(y, [inputs.scale, inputs.shift], inputs.dy, create_graph=create_graph)
        assert {gradient.stride() for gradient in found} == {inputs.x.stride()}


@pytest.mark.parametrize("shape", [(2, 6, 4, 5), (2, 6, 3, 4, 5)], ids=["2-D", "3-D"])
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
def test_output_and_gradient_keep_the_layout(draw, place, shape, channels_last):
    name, device = place
    inputs = draw(0, shape, channels_last=channels_last, device=device)
    other = torch.contiguous_format if channels_last else FORMATS[len(shape)]
    gradients = inputs.dy, inputs.dy.contiguous(memory_format=other), torch.ones_like(inputs.dy[:1]).expand(shape)
    for create_graph, dy in itertools.product((False, True), gradients):
        x = inputs.x.clone().requires_grad_()
        with implementation(name):
            y = unetgn.group_norm_silu(x, 3, **inputs.keywords())
            (dx,) = torch.autograd.grad(y, x, dy, create_graph=create_graph)
        assert x.stride() == y.stride()
        assert dx.stride() == x.stride()


@pytest.mark.parametrize("rearrange", STRIDES.values(), ids=STRIDES)
def test_any_strides_give_the_values_of_the_contiguous_tensor(draw, place, rearrange):
    name, device = place
    inputs = draw(1, (3, 6, 4, 4), dtype=torch.float64, device=device)
    with implementation(name):
        expected, expected_gradients = inputs.call(unetgn.group_norm_silu, 3)
        x = rearrange(inputs.x).detach().requires_grad_()
        assert torch.equal(x, inputs.x)
        y = unetgn.group_norm_silu(x, 3, **inputs.keywords())
        (dx,) = torch.autograd.grad(y, x, inputs.dy)
    torch.testing.assert_close(y.detach(), expected)
    torch.testing.assert_close(dx, expected_gradients[0])


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("parameters", ["weight bias", "weight bias pre_bias scale shift", "scale shift maps"])
@pytest.mark.parametrize("kind", ["every second value", "expanded"])
def test_parameters_of_any_strides_give_the_values_of_contiguous_ones(draw, place, kind, parameters, channels_last):
    name, device = place
    inputs = draw(5, (2, 16, 3, 4), channels_last=channels_last, parameters=parameters, device=device)

    def strided(value):
        return value[..., :1].expand(value.shape) if kind == "expanded" else value.repeat_interleave(2, -1)[..., ::2]

    given = inputs.map(lambda value: strided(value) if value.dim() < 3 else value)
    dense = given.map(lambda value: value.contiguous() if value.dim() < 3 else value)
    with implementation(name):
        for groups in (2, 8):
            y, gradients = by_strides(given, groups)
            expected_y, expected = by_strides(dense, groups)
            assert torch.equal(y, expected_y)
            for got, want in zip(gradients, expected, strict=True):
                assert torch.equal(got, want)


def by_strides(inputs, groups):
    """Return y and the gradients, of tensors that keep their strides."""
    leaves = inputs.map(lambda value: value.detach()).requires_grad()
    y = unetgn.group_norm_silu(leaves.x, groups, **leaves.keywords())
    return y, torch.autograd.grad(y, leaves.leaves(), inputs.dy)


def test_a_slice_of_channels_last_stays_channels_last(draw, place):
    name, device = place
    x = STRIDES["a slice of channels_last"](draw(2, (2, 6, 4, 4), device=device).x)
    with implementation(name):
        y = unetgn.group_norm_silu(x, 3)
    assert y.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("arrives", ["expanded from one number", "in the other layout", "expanded over samples"])
@pytest.mark.parametrize("activation", ["silu", None])
@pytest.mark.parametrize("parameters", ["weight bias", "weight bias pre_bias scale shift"])
def test_the_gradient_may_arrive_in_any_strides(draw, in_double, place, parameters, activation, arrives, channels_last):
    name, device = place
    inputs = draw(
        3, (2, 6, 4, 4), dtype=torch.float64, channels_last=channels_last, parameters=parameters, device=device
    )
    if arrives == "expanded from one number":
        inputs.dy = torch.ones((), dtype=torch.float64, device=device).expand_as(inputs.x)
    elif arrives == "expanded over samples":
        inputs.dy = inputs.dy[:1].expand_as(inputs.x)
    else:
        other = torch.contiguous_format if channels_last else torch.channels_last
        inputs.dy = inputs.dy.contiguous(memory_format=other)
    with implementation(name):
        _, gradients = inputs.call(unetgn.group_norm_silu, 3, activation=activation)
    _, expected = in_double(inputs, 3, activation=activation)
    for got, want in zip(gradients, expected, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("parameters", ["", "weight bias", "weight bias pre_bias scale shift"])
def test_the_stride_of_an_axis_of_one_element_says_nothing(draw, in_double, place, parameters):
    """A picture (height, width, channels) as a batch of one: dense channels_last, whatever its first stride is."""
    name, device = place
    for shape in ((1, 6, 4, 5), (1, 6, 1, 5), (2, 6, 4, 1), (1, 6, 2, 3, 4)):
        inputs = draw(5, shape, dtype=torch.float64, parameters=parameters, device=device)
        for first in (1, 7, 10**6):
            pixels = torch.empty(shape, dtype=torch.float64, device=device, memory_format=FORMATS[len(shape)])
            strides = [first if size == 1 else stride for size, stride in zip(shape, pixels.stride(), strict=True)]
            inputs.x = pixels.copy_(inputs.x).as_strided(shape, strides)
            with implementation(name):
                y, gradients = inputs.call(unetgn.group_norm_silu, 3)
            expected, expected_gradients = in_double(inputs, 3)
            for got, want in zip([y, *gradients], [expected, *expected_gradients], strict=True):
                torch.testing.assert_close(got, want)
            assert y.is_contiguous(memory_format=FORMATS[len(shape)])


def test_where_both_layouts_fit_the_answer_is_contiguous():
    for shape in ((2, 6, 1, 1), (2, 1, 4, 4), (2, 6, 1, 1, 1)):
        x = torch.empty(shape).contiguous(memory_format=FORMATS[len(shape)])
        assert memory_format_of(x) == torch.contiguous_format
        assert not is_channels_last(x)


def test_the_layout_of_a_dense_tensor_is_its_own():
    for shape in ((2, 6, 3, 4), (2, 6, 3, 4, 5)):
        assert memory_format_of(torch.empty(shape)) == torch.contiguous_format
        channels_last = FORMATS[len(shape)]
        assert memory_format_of(torch.empty(shape).contiguous(memory_format=channels_last)) == channels_last


def test_a_tensor_used_twice_is_left_as_it_is(draw, place):
    """No implementation writes into its inputs: not into x, and not into the gradient that comes back."""
    name, device = place
    for activation in ("silu", None):
        inputs = draw(4, (2, 6, 4, 4), device=device)
        before = inputs.map(torch.clone)
        with implementation(name):
            inputs.call(unetgn.group_norm_silu, 3, activation=activation)
        assert all(map(torch.equal, [*inputs.leaves(), inputs.dy], [*before.leaves(), before.dy]))
