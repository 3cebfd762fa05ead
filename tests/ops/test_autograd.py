"""Tests the operator's derivatives: by differences, of any order, transformed by torch.func; and what is saved."""

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

import unetgn
from unetgn.ops import implementation, reference
from unetgn.ops.arguments import DIFFERENTIABLE, Needs

NAMES = DIFFERENTIABLE[1:]
LAYOUTS = pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])


def by_position(num_groups=3, **options):
    """Return the operator as a function of its tensors alone."""

    def function(x, *parameters):
        return unetgn.group_norm_silu(x, num_groups, **dict(zip(NAMES, parameters, strict=False)), **options)

    return function


@LAYOUTS
@pytest.mark.parametrize("activation", ["silu", None])
def test_gradients_agree_with_differences(draw, place, channels_last, activation):
    name, device = place
    leaves = draw(0, (2, 6, 2, 3), dtype=torch.float64, channels_last=channels_last, device=device).requires_grad()
    function = by_position(activation=activation)
    with implementation(name):
        assert gradcheck(function, leaves.leaves(), check_forward_ad=True, check_batched_grad=True)


@LAYOUTS
def test_gradients_of_gradients_agree_with_differences(draw, place, channels_last):
    name, device = place
    inputs = draw(1, (2, 4, 2, 2), dtype=torch.float64, channels_last=channels_last, device=device).requires_grad()
    with implementation(name):
        assert gradgradcheck(by_position(2), inputs.leaves(), check_fwd_over_rev=True, check_batched_grad=True)


def test_the_closed_form_is_the_gradient_of_the_definition(draw):
    inputs = draw(2, (2, 6, 3, 3), dtype=torch.float64).requires_grad()
    arguments = inputs.arguments(3)
    y, mean, rstd = reference.forward(arguments)
    expected = torch.autograd.grad(y, inputs.leaves(), inputs.dy)
    with torch.no_grad():
        closed = reference.backward(inputs.dy, arguments, mean, rstd, Needs(*[True] * 6))
    for got, want in zip(closed, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@LAYOUTS
def test_only_x_two_statistics_and_small_tensors_are_saved(draw, channels_last):
    with implementation("aten"):
        for dtype in (torch.float32, torch.bfloat16):
            inputs = draw(3, (2, 8, 16, 16), dtype=dtype, channels_last=channels_last).requires_grad()
            saved: list[torch.Tensor] = []
            keep = saved.append
            with saved_tensors_hooks(keep, lambda nothing: nothing):
                unetgn.group_norm_silu(inputs.x, 4, **inputs.keywords())
            large = [tensor for tensor in saved if tensor.numel() >= inputs.x.numel()]
            assert [tensor.data_ptr() for tensor in large] == [inputs.x.data_ptr()]
            small = sorted(tuple(tensor.shape) for tensor in saved if tensor.numel() < inputs.x.numel())
            assert small == [(2, 4), (2, 4), (2, 8), (2, 8), (2, 8), (8,), (8,)]


@pytest.mark.parametrize("maps", ["", " maps"])
def test_each_gradient_is_computed_alone_as_among_the_others(draw, place, maps):
    name, device = place
    parameters = f"weight bias pre_bias scale shift{maps}"
    inputs = draw(4, (2, 6, 3, 3), dtype=torch.float64, parameters=parameters, device=device)
    with implementation(name):
        _, expected = inputs.call(unetgn.group_norm_silu, 3)
        for position, want in enumerate(expected):
            leaves = [leaf.detach().requires_grad_(i == position) for i, leaf in enumerate(inputs.leaves())]
            (got,) = torch.autograd.grad(by_position()(*leaves), leaves[position], inputs.dy)
            torch.testing.assert_close(got, want)


@pytest.mark.parametrize(
    "parameters", ["bias shift", "weight scale", "weight bias pre_bias scale shift", "shift maps", "scale shift maps"]
)
def test_no_two_gradients_share_memory(draw, place, parameters):
    """Of one sample a sum over samples is the value itself, but not the same tensor: optimizers write in place."""
    name, device = place
    inputs = draw(6, (1, 8, 3, 3), parameters=parameters, device=device)
    with implementation(name):
        _, gradients = inputs.call(unetgn.group_norm_silu, 4)
    assert len({gradient.untyped_storage().data_ptr() for gradient in gradients}) == len(gradients)


def test_without_gradients_nothing_is_recorded(draw, place):
    name, device = place
    inputs = draw(5, (2, 6, 3, 3), device=device)
    with implementation(name):
        assert not unetgn.group_norm_silu(inputs.x, 3, **inputs.keywords()).requires_grad
        inputs.requires_grad()
        with torch.no_grad():
            assert not unetgn.group_norm_silu(inputs.x, 3, **inputs.keywords()).requires_grad


def test_an_undefined_gradient_is_no_gradient(draw):
    """A function further on may say that its input has no gradient: None then reaches the operator."""

    class WithoutGradient(torch.autograd.Function):
        @staticmethod
        def forward(ctx, y):
            return y.clone()

        @staticmethod
        def backward(ctx, dy):
            return None

    inputs = draw(6, (2, 6, 3, 3)).requires_grad()
    with implementation("aten"):
        y = WithoutGradient.apply(unetgn.group_norm_silu(inputs.x, 3, **inputs.keywords()))
    gradients = torch.autograd.grad(y.sum(), inputs.leaves(), allow_unused=True)
    assert gradients == (None,) * 6


@pytest.mark.parametrize("transform", ["grad", "vmap", "jvp", "jacrev", "jacfwd", "hessian", "vmap of grad"])
def test_torch_func_transforms_agree_with_those_of_the_definition(draw, definition, place, transform):
    name, device = place
    inputs = draw(7, (2, 4, 2, 2), dtype=torch.float64, device=device)
    x, *parameters = inputs.leaves()

    def transformed(operator):
        def loss(x, *parameters):
            return operator(x, 2, **dict(zip(NAMES, parameters, strict=True))).square().sum()

        def call(x, *parameters):
            return operator(x, 2, **dict(zip(NAMES, parameters, strict=True)))

        batch = [torch.stack([t, 2 * t, t - 1]) for t in (x, *parameters)]
        return {
            "grad": lambda: torch.func.grad(loss, argnums=(0, 1, 2, 3, 4, 5))(x, *parameters),
            "vmap": lambda: torch.func.vmap(call, in_dims=(0, None, 0, None, 0, 0))(
                batch[0], parameters[0], batch[2], parameters[2], batch[4], batch[5]
            ),
            "jvp": lambda: torch.func.jvp(call, (x, *parameters), tuple(t[2] for t in batch)),
            "jacrev": lambda: torch.func.jacrev(call, argnums=(0, 3))(x, *parameters),
            "jacfwd": lambda: torch.func.jacfwd(call, argnums=(0, 3))(x, *parameters),
            "hessian": lambda: torch.func.hessian(loss, argnums=(0, 1))(x, *parameters),
            "vmap of grad": lambda: torch.func.vmap(torch.func.grad(loss, argnums=(0, 1)))(*batch),
        }[transform]()

    with implementation(name):
        torch.testing.assert_close(transformed(unetgn.group_norm_silu), transformed(definition))


def test_forward_mode_passes_through_the_module(draw, place):
    name, device = place
    x = draw(8, (2, 6, 3, 3), dtype=torch.float64, device=device).x
    norm = unetgn.GroupNormSiLU(3, 6, device=device, dtype=torch.float64)
    tangent = torch.ones_like(x) + x.square()
    with implementation(name), torch.autograd.forward_ad.dual_level():
        y = norm(torch.autograd.forward_ad.make_dual(x, tangent))
        found = torch.autograd.forward_ad.unpack_dual(y).tangent
    step = 1e-6
    difference = (norm(x + step * tangent) - norm(x - step * tangent)) / (2 * step)
    torch.testing.assert_close(found, difference.detach(), rtol=1e-6, atol=1e-8)


def test_forward_mode_through_the_registered_operator_is_an_error_and_not_zero(draw):
    x, *arguments = draw(9, (2, 6, 3, 3), parameters="").arguments(3)
    with pytest.raises(NotImplementedError, match="forward-mode"):
        torch.func.jvp(lambda x: torch.ops.unetgn.group_norm_silu(x, *arguments)[0], (x,), (x,))


def test_the_registered_backward_operator_has_no_derivative_and_says_so(draw):
    inputs = draw(13, (2, 6, 3, 3), parameters="")
    arguments = inputs.arguments(3)
    _, mean, rstd = torch.ops.unetgn.group_norm_silu(*arguments)
    named = {"mean": mean, "rstd": rstd, "needs": (True, *[False] * 5), **arguments._asdict()}
    dx, *_ = torch.ops.unetgn.group_norm_silu_backward(dy=inputs.dy.requires_grad_(), **named)
    with pytest.raises(NotImplementedError, match=r"backward has no derivative.*create_graph=True"):
        dx.sum().backward()


@pytest.mark.parametrize("reentrant", [False, True], ids=["new", "reentrant"])
def test_activation_checkpointing_gives_the_same_gradients(draw, place, reentrant):
    name, device = place
    inputs = draw(10, (2, 6, 4, 4), device=device)
    with implementation(name):
        y, expected = inputs.call(unetgn.group_norm_silu, 3)
        leaves = inputs.requires_grad().leaves()
        again = checkpoint(by_position(), *leaves, use_reentrant=reentrant)
        again.backward(inputs.dy)
    assert torch.equal(y, again)
    assert all(map(torch.equal, expected, [leaf.grad for leaf in leaves]))


def test_a_second_backward_pass_over_a_kept_graph_gives_the_same(draw, place):
    name, device = place
    inputs = draw(11, (2, 6, 4, 4), device=device).requires_grad()
    with implementation(name):
        y = unetgn.group_norm_silu(inputs.x, 3, **inputs.keywords())
        first = torch.autograd.grad(y, inputs.leaves(), inputs.dy, retain_graph=True)
        second = torch.autograd.grad(y, inputs.leaves(), inputs.dy)
    assert all(map(torch.equal, first, second))


def test_changing_x_in_place_before_backward_is_an_error(draw):
    inputs = draw(12, (2, 6, 4, 4)).requires_grad()
    x = inputs.x * 1
    y = unetgn.group_norm_silu(x, 3)
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
