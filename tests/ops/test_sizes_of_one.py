"""Tests numerical edges where an axis has one element: a batch, channel, row, column or place of one, in any layout.

The stride of such an axis is arbitrary, and kernels that read a layout from it go wrong where others do not.
"""

import math

import pytest
import torch
from torch import Tensor

import unetgn
from unetgn.ops import implementation
from unetgn.ops.layout import memory_format_of

SHAPES = [
    ((1, 8, 4, 4), 2),
    ((1, 8, 1, 5), 2),
    ((1, 8, 5, 1), 2),
    ((1, 8, 1, 1), 2),
    ((1, 1, 4, 4), 1),
    ((1, 8, 2, 3, 4), 2),
    ((1, 8, 1, 3, 1), 2),
    ((2, 8, 1, 1, 1), 8),
]
TOLERANCE = {torch.float64: 1e-11, torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 3e-2}
every_shape = pytest.mark.parametrize(("shape", "groups"), SHAPES, ids=str)
layouts = pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])


def assert_close(actual: Tensor, expected: Tensor) -> None:
    """Compare to the tolerance of the dtype; gradients are sums of terms of the size of one, or of the result."""
    tolerance = TOLERANCE[actual.dtype]
    size = expected.square().nanmean().sqrt().nan_to_num().clamp_min(1.0).item()
    torch.testing.assert_close(actual.double(), expected, rtol=tolerance, atol=tolerance * size, equal_nan=True)


@every_shape
@layouts
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("edge", ["mean 10", "mean 1000", "pre_bias 10", "constant", "nan"])
def test_values_and_gradients_at_an_edge_are_those_of_the_definition(
    draw, in_double, place, shape, groups, channels_last, dtype, edge
):
    name, device = place
    inputs = draw(
        0,
        shape,
        dtype=dtype,
        mean={"mean 10": 10.0, "mean 1000": 1000.0}.get(edge, 0.0),
        parameters="weight bias pre_bias scale shift" if edge == "pre_bias 10" else "weight bias",
        channels_last=channels_last,
        device=device,
    )
    if edge == "pre_bias 10":
        inputs.pre_bias.add_(10)
    elif edge == "constant":
        inputs.x.fill_(1000 / 3)
    elif edge == "nan":
        inputs.x[(0,) * inputs.x.dim()] = math.nan
    eps = 1e-2  # a group of one element multiplies roundings by eps**-0.5
    with implementation(name):
        y, gradients = inputs.call(unetgn.group_norm_silu, groups, eps=eps)
    expected, expected_gradients = in_double(inputs, groups, eps=eps)
    for got, want in zip([y, *gradients], [expected, *expected_gradients], strict=True):
        assert_close(got, want)
    assert y.is_contiguous(memory_format=memory_format_of(inputs.x))
