"""Tests where normalization goes wrong elsewhere: means far from zero, constant groups, overflow, NaN, no elements."""

import pytest
import torch
import torch.nn.functional as F

import unetgn
from unetgn.ops import implementation

LAYOUTS = pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
CONSTANTS = [0.0, 5.0, 1000.0, 0.1, 1000 / 3, 1e6 / 3]  # sums of the last three are not exact
PARAMETERS = pytest.mark.parametrize("parameters", ["weight bias", "weight bias scale shift"])


@LAYOUTS
@PARAMETERS
@pytest.mark.parametrize("mean", [10.0, 100.0, 1000.0])
@pytest.mark.parametrize("groups", [2, 4])
def test_a_mean_far_from_zero_costs_few_digits(
    draw, in_double, relative_error, place, groups, mean, parameters, channels_last
):
    """|mean| / std = 1e3 in float32: below 2e-4 of the output's rms, both ways, where E[x^2] - E[x]^2 gives 6e-2."""
    name, device = place
    inputs = draw(0, (2, 16, 32, 32), mean=mean, parameters=parameters, channels_last=channels_last, device=device)
    with implementation(name):
        y, gradients = inputs.call(unetgn.group_norm_silu, groups)
    expected, expected_gradients = in_double(inputs, groups)
    for got, want in zip([y, *gradients], [expected, *expected_gradients], strict=True):
        assert relative_error(got, want) < 2e-4


@LAYOUTS
@pytest.mark.parametrize("shape", [(2, 1, 64, 64), (2, 512, 1, 1)], ids=["one channel", "one element"])
def test_tensors_that_fit_both_layouts_are_as_exact_as_the_others(
    draw, in_double, relative_error, place, shape, channels_last
):
    """With a mean of 20 standard deviations E[x^2] - E[x]^2 would be off by 2e-4."""
    name, device = place
    inputs = draw(11, shape, mean=20.0, parameters="weight bias", channels_last=channels_last, device=device)
    with implementation(name):
        y, gradients = inputs.call(unetgn.group_norm_silu, 1)
    expected, expected_gradients = in_double(inputs, 1)
    assert relative_error(y, expected) < 1e-5
    assert relative_error(gradients[0], expected_gradients[0]) < 1e-5


@LAYOUTS
def test_a_pre_bias_far_from_zero_costs_few_digits(draw, in_double, relative_error, place, channels_last):
    name, device = place
    inputs = draw(1, (2, 8, 16, 16), parameters="weight bias pre_bias", channels_last=channels_last, device=device)
    inputs.pre_bias = inputs.pre_bias * 0 + 1000
    with implementation(name):
        y, gradients = inputs.call(unetgn.group_norm_silu, 2)
    expected, expected_gradients = in_double(inputs, 2)
    assert relative_error(y, expected) < 2e-4
    assert relative_error(gradients[0], expected_gradients[0]) < 2e-4


@LAYOUTS
def test_one_group_far_from_zero_beside_ordinary_ones_is_noticed(draw, in_double, relative_error, place, channels_last):
    name, device = place
    inputs = draw(2, (2, 8, 16, 16), parameters="weight bias", channels_last=channels_last, device=device)
    inputs.x[1, 2:4] += 3000
    with implementation(name):
        y, gradients = inputs.call(unetgn.group_norm_silu, 4)
    expected, expected_gradients = in_double(inputs, 4)
    assert relative_error(y[1, 2:4], expected[1, 2:4]) < 6e-4
    assert relative_error(y[0], expected[0]) < 1e-5
    assert relative_error(gradients[0][1, 2:4], expected_gradients[0][1, 2:4]) < 6e-4
    assert relative_error(gradients[0][0], expected_gradients[0][0]) < 1e-5


@LAYOUTS
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("constant", CONSTANTS)
def test_a_constant_group_gives_the_bias(place, constant, dtype, channels_last):
    name, device = place
    layout = torch.channels_last if channels_last else torch.contiguous_format
    constant = min(constant, torch.finfo(dtype).max)
    x = torch.full((2, 3, 7, 11), constant, dtype=dtype, device=device).contiguous(memory_format=layout)
    weight, bias = torch.linspace(-2, 2, 3, dtype=dtype, device=device), torch.linspace(-1, 3, 3, device=device)
    with implementation(name):
        y = unetgn.group_norm_silu(x, 1, weight, bias, activation=None)
    expected = bias.to(dtype).reshape(1, 3, 1, 1).expand_as(y).contiguous(memory_format=layout)
    if place == ("aten", "cuda") and dtype == torch.float32:  # PyTorch's kernel evaluates x * a + b there
        torch.testing.assert_close(y, expected, rtol=0, atol=1e-5 + 2e-7 * constant * 1e-5**-0.5 * 2)
    else:
        torch.testing.assert_close(y, expected)


@LAYOUTS
@pytest.mark.parametrize("constant", CONSTANTS)
def test_a_constant_group_gives_the_bias_where_the_definition_is_transformed(place, constant, channels_last):
    """And its derivative along t is rstd * (t - mean of t), since xhat is zero; gradients likewise."""
    name, device = place
    layout = torch.channels_last if channels_last else torch.contiguous_format
    x = torch.full((2, 3, 7, 11), constant, device=device).contiguous(memory_format=layout)
    tangent = torch.randn(x.shape, generator=torch.Generator().manual_seed(12), dtype=torch.float64).to(device)
    slope = 1e-5**-0.5 * (tangent - tangent.mean((1, 2, 3), keepdim=True))
    bias = torch.linspace(-1, 3, 3, device=device)

    def operator(x):
        return unetgn.group_norm_silu(x, 1, None, bias, activation=None)

    with implementation(name):
        mapped = torch.func.vmap(operator)(torch.stack([x, x / 2]))
        y, along = torch.func.jvp(operator, (x,), (tangent.float(),))
        leaf = x.clone().requires_grad_()
        (dx,) = torch.autograd.grad(operator(leaf), leaf, tangent.float(), create_graph=True)
    for values in (y, *mapped):
        torch.testing.assert_close(values, bias.reshape(1, 3, 1, 1).expand_as(values))
    for derivative in (along, dx.detach()):
        torch.testing.assert_close(derivative.double(), slope, rtol=1e-5, atol=1e-3)


@LAYOUTS
def test_a_constant_group_has_gradients_without_nan(place, channels_last):
    name, device = place
    layout = torch.channels_last if channels_last else torch.contiguous_format
    x = torch.ones((2, 6, 4, 4), device=device).contiguous(memory_format=layout).requires_grad_()
    with implementation(name):
        unetgn.group_norm_silu(x, 3).square().sum().backward()
    assert torch.isfinite(x.grad).all()


@LAYOUTS
def test_nan_in_one_sample_stays_in_its_group(draw, place, channels_last):
    name, device = place
    inputs = draw(3, (3, 8, 4, 4), parameters="weight bias", channels_last=channels_last, device=device)
    with implementation(name):
        clean, clean_gradients = inputs.call(unetgn.group_norm_silu, 4)
        inputs.x[1, 4, 2, 2] = float("nan")
        y, gradients = inputs.call(unetgn.group_norm_silu, 4)
    inside = torch.zeros_like(y, dtype=torch.bool)
    inside[1, 4:6] = True
    for got, want in ((y, clean), (gradients[0], clean_gradients[0])):
        assert torch.isnan(got[inside]).all()
        torch.testing.assert_close(got[~inside], want[~inside], rtol=1e-5, atol=1e-5)


@LAYOUTS
def test_nan_in_one_sample_hides_no_mean_far_from_zero_in_another(
    draw, in_double, relative_error, place, channels_last
):
    name, device = place
    inputs = draw(10, (2, 8, 16, 16), mean=1000.0, channels_last=channels_last, device=device)
    inputs.x[0, 0, 0, 0] = float("nan")
    with implementation(name):
        y, gradients = inputs.call(unetgn.group_norm_silu, 2)
    expected, expected_gradients = in_double(inputs, 2)
    assert relative_error(y[1], expected[1]) < 2e-4
    assert relative_error(gradients[0][1], expected_gradients[0][1]) < 2e-4


@LAYOUTS
def test_values_whose_squares_overflow_float16_are_normalized(draw, in_double, relative_error, place, channels_last):
    name, device = place
    inputs = draw(4, (2, 8, 8, 8), dtype=torch.float16, parameters="", channels_last=channels_last, device=device)
    inputs.x = inputs.x * 15000
    with implementation(name):
        y, gradients = inputs.call(unetgn.group_norm_silu, 2)
    expected, expected_gradients = in_double(inputs, 2)
    assert relative_error(y, expected) < 1e-3
    # The gradient is of the size of 1/15000, where float16 has few digits left.
    assert relative_error(gradients[0] * 1.0, expected_gradients[0]) < 2e-2


def test_a_large_negative_z_gives_zero_in_float16_not_nan(place):
    """z = -1e5 does not fit float16, but silu(z) = -0 does."""
    name, device = place
    x = torch.tensor([[[-1.0, 1.0]]], dtype=torch.float16, device=device)
    weight = torch.tensor([1e5], device=device)
    with implementation(name):
        y = unetgn.group_norm_silu(x, 1, weight)
    assert y[0, 0, 0] == 0
    assert y[0, 0, 1] == float("inf")  # 1e5 is beyond float16


def test_a_small_eps_is_not_flushed_in_float16(draw, relative_error, place):
    """1e-12 is zero in float16; here it is what keeps tiny values tiny."""
    name, device = place
    x = draw(5, (1, 4, 8, 8), dtype=torch.float16, device=device).x * 1e-6
    with implementation(name):
        y = unetgn.group_norm_silu(x, 2, eps=1e-12, activation=None)
    assert relative_error(y, F.group_norm(x.double(), 2, eps=1e-12)) < 1e-3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_statistics_are_kept_in_float32_for_16_bit_inputs(draw, place, dtype):
    name, device = place
    inputs = draw(6, (2, 8, 16), dtype=dtype, mean=3.0, parameters="", device=device)
    x = inputs.x
    _, mean, rstd = torch.ops.unetgn.group_norm_silu(*inputs.arguments(2, name))
    grouped = x.double().reshape(2, 2, -1)
    torch.testing.assert_close(mean.double(), grouped.mean(2), rtol=1e-6, atol=0)
    torch.testing.assert_close(rstd.double(), (grouped.var(2, correction=0) + 1e-5).rsqrt(), rtol=1e-6, atol=0)


@LAYOUTS
def test_two_runs_give_the_same_bits(draw, place, channels_last):
    name, device = place
    inputs = draw(7, (4, 32, 16, 16), channels_last=channels_last, device=device)
    with implementation(name):
        first, first_gradients = inputs.call(unetgn.group_norm_silu, 8)
        second, second_gradients = inputs.call(unetgn.group_norm_silu, 8)
    assert all(map(torch.equal, [first, *first_gradients], [second, *second_gradients]))


@pytest.mark.parametrize("shape", [(0, 6, 4, 4), (2, 6, 0, 4), (0, 6)], ids=str)
def test_an_empty_tensor_gives_an_empty_tensor_and_zero_gradients(draw, place, shape):
    name, device = place
    inputs = draw(8, shape, device=device)
    with implementation(name):
        y, gradients = inputs.call(unetgn.group_norm_silu, 3)
    assert y.shape == gradients[0].shape == shape
    assert all(not gradient.any() for gradient in gradients)


@LAYOUTS
def test_one_spatial_element_and_one_channel_a_group_gives_the_bias(draw, place, channels_last):
    name, device = place
    inputs = draw(9, (3, 6, 1, 1), parameters="weight bias", channels_last=channels_last, device=device)
    inputs.x = inputs.x * 0.01
    with implementation(name):
        y, gradients = inputs.call(unetgn.group_norm_silu, 6)
    torch.testing.assert_close(y, F.silu(inputs.bias).reshape(1, 6, 1, 1).expand(3, 6, 1, 1))
    # rstd times the difference of two equal numbers, which a kernel may round apart
    torch.testing.assert_close(gradients[0], torch.zeros_like(y), rtol=0, atol=1e-5**-0.5 * 1e-6)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or ROCm device")
@LAYOUTS
def test_more_than_2_to_the_31_elements_are_addressed(channels_last):
    layout = torch.channels_last if channels_last else torch.contiguous_format
    shape = (3, 64, 4096, 4096)  # 3.2e9 elements, 6.4 GB in bfloat16
    x = torch.empty(shape, dtype=torch.bfloat16, device="cuda", memory_format=layout).normal_()
    y = unetgn.group_norm_silu(x, 32)
    for sample in (0, 2):
        alone = x[sample : sample + 1].contiguous(memory_format=layout)
        torch.testing.assert_close(y[sample : sample + 1], unetgn.group_norm_silu(alone, 32), rtol=0.02, atol=0.02)
