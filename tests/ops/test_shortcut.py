"""Tests `group_norm_silu_with_shortcut`: x is returned, and its gradient is added where dx is computed."""

import pytest
import torch
from torch.autograd import gradgradcheck
from torch.utils.flop_counter import FlopCounterMode

import unetgn
from unetgn.ops import group_norm_silu_with_shortcut, implementation

LAYOUTS = pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
# Of a gradient's root mean square: rounding of the result, once.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 4e-6, torch.bfloat16: 6e-3}


def both(inputs, num_groups, dshortcut, function=group_norm_silu_with_shortcut):
    """Return the gradients of all leaves, dy coming back to y and dshortcut to x."""
    leaves = inputs.map(lambda value: value.detach()).requires_grad()
    y, x = function(leaves.x, num_groups, **leaves.keywords())
    return torch.autograd.grad((y, x), leaves.leaves(), (inputs.dy, dshortcut))


def summed(inputs, num_groups, dshortcut, function=unetgn.group_norm_silu):
    """Return the same gradients of x and the operator, as autograd adds them."""
    leaves = inputs.map(lambda value: value.detach()).requires_grad()
    y = function(leaves.x, num_groups, **leaves.keywords())
    return torch.autograd.grad((y, leaves.x.view_as(leaves.x)), leaves.leaves(), (inputs.dy, dshortcut))


@LAYOUTS
@pytest.mark.parametrize("parameters", ["weight bias", "weight bias pre_bias scale shift", "bias scale shift maps", ""])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_are_those_of_the_sum_rounded_once(
    draw, definition, relative_error, place, dtype, parameters, channels_last
):
    name, device = place
    inputs = draw(0, (2, 8, 4, 4), dtype=dtype, parameters=parameters, channels_last=channels_last, device=device)
    dshortcut = 3 * inputs.dy.flip(0)
    in_double = inputs.map(lambda value: value.double())
    expected = summed(in_double, 4, dshortcut.double(), definition)
    with implementation(name):
        found = both(inputs, 4, dshortcut)
    assert found[0].stride() == inputs.x.stride()
    for got, want in zip(found, expected, strict=True):
        assert got.dtype == dtype
        assert relative_error(got, want) < TOLERANCE[dtype]
    rounded = expected[0].to(dtype)
    if dtype == torch.bfloat16:  # nearly everywhere the nearest value
        assert (found[0] == rounded).double().mean() > 0.9


def test_a_gradient_of_other_strides_and_an_expanded_one_are_added_too(draw, place):
    name, device = place
    inputs = draw(1, (2, 8, 4, 4), dtype=torch.float64, device=device)
    wide = torch.cat([inputs.dy, inputs.dy], dim=3)
    others = inputs.dy.transpose(2, 3), wide[..., ::2], inputs.dy[:, :1, :1, :1].expand_as(inputs.dy)
    with implementation(name):
        for dshortcut in others:
            torch.testing.assert_close(both(inputs, 4, dshortcut), summed(inputs, 4, dshortcut), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("used", ["y", "x", "neither x nor its gradient"])
def test_where_one_of_both_is_not_used_the_gradient_is_that_of_the_other(draw, place, used):
    name, device = place
    leaves = draw(2, (2, 8, 3, 3), dtype=torch.float64, device=device).requires_grad()
    with implementation(name):
        y, x = group_norm_silu_with_shortcut(leaves.x, 4, **leaves.keywords())
        alone = unetgn.group_norm_silu(leaves.x, 4, **leaves.keywords())
    if used == "x":
        (dx, *others) = torch.autograd.grad(x, leaves.leaves(), leaves.dy, allow_unused=True)
        assert torch.equal(dx, leaves.dy)
        assert others == [None] * 5
    elif used == "y":
        found, expected = (torch.autograd.grad(one, leaves.leaves(), leaves.dy) for one in (y, alone))
        assert all(map(torch.equal, found, expected))
    else:
        found = torch.autograd.grad((y, x), leaves.leaves()[1:], (leaves.dy, leaves.dy))
        expected = torch.autograd.grad(alone, leaves.leaves()[1:], leaves.dy)
        assert all(map(torch.equal, found, expected))


def test_gradients_of_gradients_agree_with_differences(draw):
    inputs = draw(3, (2, 4, 2, 2), dtype=torch.float64).requires_grad()
    names = list(inputs.keywords())

    def function(x, *parameters):
        y, x = group_norm_silu_with_shortcut(x, 2, **dict(zip(names, parameters, strict=True)))
        return y, x * x  # whose gradient of a gradient is not zero

    assert gradgradcheck(function, inputs.leaves(), check_batched_grad=True)


def losses(function, x):
    y, x = function(x, 4)
    return (y.square() + x.sin()).sum()


def plain(x, num_groups):
    return unetgn.group_norm_silu(x, num_groups), x


@pytest.mark.parametrize("onlooker", ["torch.func", "dispatch mode", "dispatch mode in backward"])
def test_whoever_looks_on_gets_the_same_gradients(draw, onlooker):
    x = draw(4, (2, 8, 3, 3), dtype=torch.float64).x.requires_grad_()
    (expected,) = torch.autograd.grad(losses(plain, x), x)

    def loss(x):
        return losses(group_norm_silu_with_shortcut, x)

    if onlooker == "torch.func":
        found = torch.func.vmap(torch.func.grad(loss))(x.detach().unsqueeze(0))[0]
    elif onlooker == "dispatch mode":
        with FlopCounterMode(display=False):
            (found,) = torch.autograd.grad(loss(x), x)
    else:
        value = loss(x)
        with FlopCounterMode(display=False):
            (found,) = torch.autograd.grad(value, x)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_an_x_without_a_gradient_is_returned_itself(draw):
    inputs = draw(5, (2, 8, 3, 3))
    weight = inputs.weight.requires_grad_()
    y, x = group_norm_silu_with_shortcut(inputs.x, 4, weight)
    assert x is inputs.x
    assert y.requires_grad
    with torch.no_grad():
        assert group_norm_silu_with_shortcut(inputs.x.clone().requires_grad_(), 4, weight)[0].requires_grad is False


def test_what_is_saved_is_what_the_operator_saves(draw):
    inputs = draw(6, (2, 8, 16, 16)).requires_grad()
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda nothing: nothing):
        group_norm_silu_with_shortcut(inputs.x, 4, **inputs.keywords())
    assert [t.data_ptr() for t in saved if t.numel() >= inputs.x.numel()] == [inputs.x.data_ptr()]


def test_changing_the_shortcut_in_place_is_an_error(draw):
    x = draw(7, (2, 8, 3, 3)).x.requires_grad_() * 1
    _, shortcut = group_norm_silu_with_shortcut(x, 4)
    with pytest.raises(RuntimeError, match="modified inplace"):
        shortcut.add_(1)


def test_wrong_arguments_are_refused_as_by_the_operator(draw):
    x = draw(8, (2, 8, 3, 3)).x.requires_grad_()
    with pytest.raises(ValueError, match="num_groups must divide"):
        group_norm_silu_with_shortcut(x, 3)
    with pytest.raises(ValueError, match="activation must be"):
        group_norm_silu_with_shortcut(x, 4, activation="relu")
    with pytest.raises(TypeError, match="x must be a tensor"):
        group_norm_silu_with_shortcut([1.0], 1)
