"""Tests values and gradients against the definition in float64, over layouts, dtypes, shapes and extras."""

import itertools

import pytest
import torch
import torch.nn.functional as F

import unetgn
from unetgn.ops import implementation

SHAPES = {
    "no spatial axis": (3, 12),
    "1-D": (3, 12, 7),
    "2-D": (2, 12, 4, 5),
    "3-D": (2, 12, 3, 2, 4),
    "one element": (3, 12, 1, 1),
    "one channel": (2, 1, 3, 5),
}
# Root-mean-square error relative to the definition: a few roundings of the output's dtype.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 4e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
NAMES = ("weight", "bias", "pre_bias", "scale", "shift")


def assert_near(actual, expected, dtype, amplified=1.0):
    """Judge errors against the size of the expected values, and absolutely where these vanish."""
    for got, want in zip(actual, expected, strict=True):
        allowed = amplified * TOLERANCE[dtype] * (want.square().mean().sqrt() + 1)
        assert (got.double() - want).square().mean().sqrt() <= allowed


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_values_and_gradients_follow_the_definition(draw, in_double, place, shape, channels_last, dtype):
    if channels_last and len(shape) < 4:
        pytest.skip("channels_last has two or three spatial axes")
    name, device = place
    given = ("weight bias", " ".join(NAMES), " ".join((*NAMES, "maps")))
    variants = itertools.product({1, shape[1]}, ("silu", None), given)
    for seed, (groups, activation, parameters) in enumerate(variants):
        inputs = draw(seed, shape, dtype=dtype, channels_last=channels_last, parameters=parameters, device=device)
        with implementation(name):
            y, gradients = inputs.call(unetgn.group_norm_silu, groups, activation=activation)
        expected, expected_gradients = in_double(inputs, groups, activation=activation)
        assert y.dtype == dtype
        assert_near([y], [expected], dtype)
        alone = y.numel() == shape[0] * groups  # a group of one element: roundings times 1/sqrt(eps)
        assert_near(gradients, expected_gradients, dtype, amplified=1e-5**-0.5 if alone else 1.0)


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
def test_every_subset_of_the_optional_arguments_follows_the_definition(draw, in_double, place, channels_last):
    name, device = place
    names = (*NAMES, "maps")
    for chosen in itertools.product([False, True], repeat=len(names)):
        parameters = " ".join(itertools.compress(names, chosen))
        inputs = draw(7, (2, 6, 3, 4), parameters=parameters, channels_last=channels_last, device=device)
        with implementation(name):
            y, gradients = inputs.call(unetgn.group_norm_silu, 3)
        expected, expected_gradients = in_double(inputs, 3)
        assert_near([y, *gradients], [expected, *expected_gradients], torch.float32)


@pytest.mark.parametrize("size", [1, 3, 10, 20, 30, 40, 60, 80])
def test_any_number_of_channels_in_a_group_works(draw, in_double, place, size):
    name, device = place
    inputs = draw(size, (2, 4 * size, 3, 3), device=device)
    with implementation(name):
        y, gradients = inputs.call(unetgn.group_norm_silu, 4)
    expected, expected_gradients = in_double(inputs, 4)
    assert_near([y, *gradients], [expected, *expected_gradients], torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("parameter_dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_parameters_may_have_another_dtype_and_their_gradients_keep_it(draw, in_double, place, dtype, parameter_dtype):
    name, device = place
    inputs = draw(3, (2, 8, 4, 4), dtype=dtype, parameter_dtype=parameter_dtype, device=device)
    with implementation(name):
        y, gradients = inputs.call(unetgn.group_norm_silu, 2)
    expected, expected_gradients = in_double(inputs, 2)
    assert y.dtype == gradients[0].dtype == dtype
    assert {gradient.dtype for gradient in gradients[1:]} == {parameter_dtype}
    assert_near([y, gradients[0]], [expected, expected_gradients[0]], dtype)
    coarser = max(dtype, parameter_dtype, key=TOLERANCE.__getitem__)
    assert_near(gradients[1:], expected_gradients[1:], coarser)


def test_without_extras_it_is_group_norm_and_silu_of_pytorch(draw, place):
    name, device = place
    inputs = draw(0, (2, 12, 5, 5), dtype=torch.float64, device=device)
    with implementation(name):
        y = unetgn.group_norm_silu(inputs.x, 4, inputs.weight, inputs.bias, 1e-3)
    torch.testing.assert_close(y, F.silu(F.group_norm(inputs.x, 4, inputs.weight, inputs.bias, 1e-3)))


def test_one_group_is_layer_normalization_over_channels_and_space(draw, place):
    name, device = place
    x = draw(1, (3, 6, 4, 5), dtype=torch.float64, device=device).x
    with implementation(name):
        y = unetgn.group_norm_silu(x, 1, activation=None)
    torch.testing.assert_close(y, F.layer_norm(x, x.shape[1:]))


def test_a_group_for_each_channel_is_instance_normalization(draw, place):
    name, device = place
    x = draw(2, (3, 6, 4, 5), dtype=torch.float64, device=device).x
    with implementation(name):
        y = unetgn.group_norm_silu(x, 6, activation=None)
    torch.testing.assert_close(y, F.instance_norm(x))


def test_float64_is_exact_to_1e_12(draw, in_double, place):
    name, device = place
    for channels_last in (False, True):
        inputs = draw(4, (2, 12, 9, 7), dtype=torch.float64, channels_last=channels_last, device=device)
        with implementation(name):
            y, gradients = inputs.call(unetgn.group_norm_silu, 3)
        expected, expected_gradients = in_double(inputs, 3)
        for got, want in zip([y, *gradients], [expected, *expected_gradients], strict=True):
            torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
