"""Checks resampling against its definition, for any size and one to three axes."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from tests.tensors import noise
from unetgn.nn import Downsample, InputBranch, Resample, ResampleConfig, Upsample

TAPS = {"taps": (1, 3, 3, 1)}


def along_axes(matrices, x):
    """Apply a matrix along each of the spatial axes of `x`."""
    for axis, matrix in enumerate(matrices, start=2):
        x = torch.movedim(torch.movedim(x, axis, -1) @ matrix.T, -1, axis)
    return x


def filter_down(length):
    """Make the matrix of y[i] = sum_k taps[k] x[2 i + k - 1] / 8, zeros outside, for ceil(length / 2) rows."""
    matrix = torch.zeros(-(-length // 2), length, dtype=torch.float64)
    for i in range(matrix.shape[0]):
        for k, tap in enumerate((1, 3, 3, 1)):
            if 0 <= 2 * i + k - 1 < length:
                matrix[i, 2 * i + k - 1] = tap / 8
    return matrix


def filter_up(length):
    """Make the matrix of y[2 i + k - 1] += taps[k] x[i] / 4: the transpose of filter_down, times two."""
    return 2 * filter_down(2 * length).T


@pytest.mark.parametrize("size", [(8,), (7,), (6, 5), (1, 9), (4, 3, 6)])
def test_the_filter_is_its_definition_in_both_directions(size):
    x = noise(2, 3, *size)
    down = Resample("down", spatial_dims=len(size), **TAPS).double()
    torch.testing.assert_close(down(x), along_axes([filter_down(n) for n in size], x))
    up = Resample("up", spatial_dims=len(size), **TAPS).double()
    torch.testing.assert_close(up(x), along_axes([filter_up(n) for n in size], x))


@pytest.mark.parametrize("size", [(8,), (7,), (6, 5), (1, 9), (4, 3, 6)])
def test_without_taps_it_is_the_mean_of_what_is_there_and_the_nearest_neighbour(size):
    x = noise(2, 3, *size)
    down = Resample("down", spatial_dims=len(size))(x)
    for index in np.ndindex(*down.shape[2:]):
        window = tuple(slice(2 * i, 2 * i + 2) for i in index)
        torch.testing.assert_close(down[(..., *index)], x[(..., *window)].flatten(2).mean(2))
    up = Resample("up", spatial_dims=len(size))(x)
    for index in np.ndindex(*up.shape[2:]):
        assert torch.equal(up[(..., *index)], x[(..., *(i // 2 for i in index))])


@pytest.mark.parametrize("taps", [{}, TAPS])
def test_a_given_size_is_the_size(taps):
    assert Resample("up", **taps)(torch.zeros(1, 2, 4, 4)[..., :3], size=(7, 5)).shape == (1, 2, 7, 5)


def test_a_size_that_was_rounded_down_comes_back():
    x = noise(1, 2, 7, 9)
    halved = Downsample(2, padding="end").double()(x)
    assert halved.shape == (1, 2, 3, 4)
    back = Resample("up")(halved, size=(7, 9))
    rows, columns = ([i * n // (2 * n + 1) for i in range(2 * n + 1)] for n in (3, 4))  # the nearest neighbours
    assert torch.equal(back, halved[:, :, rows][..., columns])


def test_strides_leave_an_axis_alone():
    x = noise(1, 2, 6, 6)
    torch.testing.assert_close(Resample("down", strides=(1, 2))(x), F.avg_pool2d(x, (1, 2)))
    assert Resample("up", strides=(1, 2))(x).shape == (1, 2, 6, 12)
    assert Downsample(2, strides=(1, 2)).double()(x).shape == (1, 2, 6, 3)
    assert Upsample(2, strides=(1, 2)).double()(x).shape == (1, 2, 6, 12)


LAYOUTS = {
    "contiguous": lambda x: x.clone(),
    "channels_last": lambda x: x.movedim(1, -1).clone(memory_format=torch.contiguous_format).movedim(-1, 1),
    "strided": lambda x: torch.stack([x, x], -1)[..., 0],
}
SHAPES = [((5,), (2,)), ((3, 4), (2, 2)), ((3, 4), (1, 2)), ((3, 4), (2, 1)), ((1, 1), (2, 2)), ((2, 3, 4), (1, 2, 2))]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("size", "strides"), SHAPES)
def test_the_nearest_neighbour_and_its_gradient_are_pytorchs_however_x_lies(size, strides, dtype, layout):
    x = noise(2, 4, *size).to(dtype)
    ours, theirs = (LAYOUTS[layout](x).requires_grad_() for _ in range(2))
    up = Resample("up", spatial_dims=len(size), strides=strides)
    usual = [length * stride for length, stride in zip(size, strides, strict=True)]
    got, expected = up(ours), F.interpolate(theirs, size=usual, mode="nearest")
    assert torch.equal(got, expected)
    assert torch.equal(up(ours, size=torch.Size(usual)), expected)
    grad = torch.arange(expected.numel()).reshape(expected.shape).remainder(7).to(dtype)  # sums of four are exact
    got.backward(grad)
    expected.backward(grad)
    assert torch.equal(ours.grad, theirs.grad)


def test_what_is_exported_enlarges_by_one_operation():
    exported = torch.export.export(Resample("up"), (noise(1, 2, 3, 3).float(),))
    called = [node.target for node in exported.graph.nodes if node.op == "call_function"]
    assert called == [torch.ops.aten.upsample_nearest2d.vec]


@pytest.mark.parametrize(("padding", "zeros"), [("both", (1, 1, 1, 1)), ("end", (0, 1, 0, 1))])
def test_the_strided_convolution_pads_where_it_is_told(padding, zeros):
    x, layer = noise(2, 4, 8, 8), Downsample(4, 6, padding=padding).double()
    torch.testing.assert_close(layer(x), F.conv2d(F.pad(x, zeros), layer.conv.weight, layer.conv.bias, stride=2))


def test_the_upsampling_convolution_sees_the_nearest_neighbours():
    x, layer = noise(2, 4, 3, 5), Upsample(4, 6).double()
    enlarged = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
    torch.testing.assert_close(layer(x), F.conv2d(enlarged, layer.conv.weight, layer.conv.bias, padding=1))
    assert layer(x, size=(5, 9)).shape == (2, 6, 5, 9)


@pytest.mark.parametrize("size", [(8, 8), (6, 10)])
def test_the_input_branch_convolves_then_filters_without_a_border_of_its_own(size):
    branch = InputBranch(3, 5, **TAPS).double()
    image, x = noise(2, 3, *size), noise(2, 5, *(n // 2 for n in size), seed=1)
    wide = F.conv2d(image, branch.conv.weight, branch.conv.bias, padding=2)
    taps = torch.tensor([1, 3, 3, 1], dtype=torch.float64)
    kernel = (taps[:, None] * taps / 64).expand(5, 1, 4, 4)
    expected = (x + F.conv2d(wide, kernel, stride=2, groups=5)) / 2**0.5
    torch.testing.assert_close(branch(x, image), expected)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Resample("sideways"), "direction must be 'down' or 'up'"),
        (lambda: Resample("down", spatial_dims=4), "spatial_dims must be 1, 2 or 3"),
        (lambda: ResampleConfig(taps=(1, 2, 1)), "even number of taps"),
        (lambda: ResampleConfig(taps=(1, -1)), "positive sum"),
        (lambda: ResampleConfig(strides=(3,)), "must be 1 or 2"),
        (lambda: ResampleConfig(taps=(1, 3, 3, 1), strides=(1, 2)), "work with stride 2 along all axes"),
        (lambda: Resample("up", **TAPS)(torch.zeros(1, 1, 2, 2), size=(5, 4)), r"cannot upsample \(2, 2\) to \(5, 4\)"),
        (lambda: Resample("up")(torch.zeros(1, 1, 2, 2), size=(4, 6)), r"to \(4, 6\): \(5, 5\) is the largest"),
        (lambda: Resample("up", strides=(1, 2))(torch.zeros(1, 1, 2, 2), size=(3, 4)), r"\(2, 5\) is the largest"),
        (
            lambda: ResampleConfig(kind="fir"),
            r"resample\.kind must be one of \('conv', 'resblock', 'plain'\), got 'fir'",
        ),
        (lambda: ResampleConfig(padding="start"), r"resample\.padding must be 'both' or 'end', got 'start'"),
        (lambda: Downsample(2, padding="start"), r"resample\.padding must be 'both' or 'end', got 'start'"),
        (lambda: Downsample(2, strides=(2, 3)), "must be 1 or 2"),
        (lambda: Upsample(2, strides=(2,)), "one factor for each of 2 axes"),
        (lambda: InputBranch(1, 2, taps=(1, 2, 1)), "even number of taps"),
        (lambda: Resample("down")(torch.zeros(1, 1, 2, 2), size=(1, 1)), "is for upsampling"),
        (lambda: Resample("down")(torch.zeros(1, 1, 2, 2), size=1), "is for upsampling"),
        (lambda: Resample("up")(torch.zeros(1, 1, 2, 2), size=(4,)), r"size=\(4,\) must name one length for each of 2"),
        (lambda: Downsample(8, padding="end", strides=(1, 1)), r"strides=\(1, 1\) halve none"),
    ],
)
def test_what_cannot_be_is_an_error(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Resample("up", spatial_dims=1)(torch.zeros(1, 1, 50), size=101), "for each of 1 axes, got 101"),
        (lambda: Upsample(1)(torch.zeros(1, 1, 2, 2), size=4), "size must name one length for each of 2 axes, got 4"),
        (lambda: Resample("down", strides=2), r"resample\.strides must name one number for each axis, got 2"),
        (lambda: Downsample(8, strides=2), r"resample\.strides must name one number for each axis, got 2"),
        (lambda: ResampleConfig(taps=3), r"resample\.taps must name one number for each tap, got 3"),
    ],
)
def test_one_number_where_each_axis_wants_its_own_is_a_type_error(make, message):
    with pytest.raises(TypeError, match=message):
        make()
