"""Tests that wrong arguments are a ValueError or TypeError that says what would be right, compiled or not."""

import numpy as np
import pytest
import torch

import unetgn

X = torch.ones(2, 6, 4, 4)

WRONG = {
    "a group count that does not divide": ({"num_groups": 4}, ValueError, r"num_groups=4 for 6 channels.* 3 or 6"),
    "more groups than channels": ({"num_groups": 32}, ValueError, r"num_groups=32 for 6 channels.*would do: 6 "),
    "no groups": ({"num_groups": 0}, ValueError, r"num_groups=0.*would do: 1 "),
    "a fractional group count": ({"num_groups": 2.0}, TypeError, r"num_groups must be an int, got 2.0 of type float"),
    "integers": ({"x": X.int()}, TypeError, r"float64, got torch.int32.*x.float\(\)"),
    "complex numbers": ({"x": X.cfloat()}, TypeError, r"got torch.complex64"),
    "no channel axis": ({"x": torch.ones(6)}, ValueError, r"none to three spatial axes, got shape \(6,\)"),
    "four spatial axes": ({"x": torch.ones(1, 6, 2, 2, 2, 2)}, ValueError, r"got shape \(1, 6, 2, 2, 2, 2\)"),
    "no channels": ({"x": torch.ones(2, 0, 4)}, ValueError, r"at least one channel, got 0"),
    "a group count that is a truth value": ({"num_groups": True}, TypeError, r"must be an int, got True of type bool"),
    "a group count of NumPy": (
        {"num_groups": np.int64(3)},
        TypeError,
        r"must be an int, got one of type .*; int\(...\) makes one",
    ),
    "a negative eps": ({"eps": -1e-5}, ValueError, r"eps must be finite and 0 or more, got -1e-05"),
    "eps that is NaN": ({"eps": float("nan")}, ValueError, r"eps must be finite and 0 or more, got nan"),
    "eps that is infinite": ({"eps": float("inf")}, ValueError, r"eps must be finite and 0 or more, got inf"),
    "eps in words": (
        {"eps": "1e-5"},
        TypeError,
        r"eps must be a float, got '1e-5' of type str; float\(...\) makes one",
    ),
    "no eps": ({"eps": None}, TypeError, r"eps must be a float, got None"),
    "eps that is a truth value": ({"eps": True}, TypeError, r"eps must be a float, got True of type bool"),
    "a tensor as eps": ({"eps": torch.tensor(1e-5)}, TypeError, r"eps must be a float, got one of type .*Tensor"),
    "an unknown activation": ({"activation": "relu"}, ValueError, r"'silu' or None, got 'relu'"),
    "a weight too long": (
        {"weight": torch.ones(7)},
        ValueError,
        r"weight must have shape \(C,\) = \(6,\).*got \(7,\)",
    ),
    "a weight of integers": ({"weight": torch.ones(6).long()}, TypeError, r"weight must be float16.*got torch.int64"),
    "a weight elsewhere": ({"weight": torch.ones(6, device="meta")}, ValueError, r"weight is on meta but x is on cpu"),
    "a bias too short": ({"bias": torch.ones(3)}, ValueError, r"bias must have shape \(C,\) = \(6,\).*got \(3,\)"),
    "a pre_bias for one sample": (
        {"pre_bias": torch.ones(6)},
        ValueError,
        r"pre_bias must have shape \(N, C\) = \(2, 6\) for x of shape \(2, 6, 4, 4\), got \(6,\)",
    ),
    "a scale with spatial axes": ({"scale": torch.ones(2, 6, 1, 1)}, ValueError, r"scale .*got \(2, 6, 1, 1\)"),
    "a shift of one sample": ({"shift": torch.ones(1, 6)}, ValueError, r"shift must have shape.*got \(1, 6\)"),
    "a map of another size": (
        {"scale": torch.ones(2, 6, 4, 3)},
        ValueError,
        r"scale must have shape \(N, C\) = \(2, 6\), or that of x, for x of shape \(2, 6, 4, 4\), got \(2, 6, 4, 3\)",
    ),
    "a map beside values of channels": (
        {"scale": torch.ones(2, 6), "shift": torch.ones(2, 6, 4, 4)},
        ValueError,
        r"scale and shift must both be \(N, C\), or both of x's shape \(2, 6, 4, 4\), got \(2, 6\) and \(2, 6, 4, 4\)",
    ),
}


def call(x=X, num_groups=3, **options):
    return unetgn.group_norm_silu(x, num_groups, **options) + 1


@pytest.mark.parametrize(("arguments", "error", "message"), WRONG.values(), ids=WRONG)
def test_a_wrong_argument_is_explained(arguments, error, message):
    with pytest.raises(error, match=message):
        call(**arguments)


@pytest.mark.parametrize(("arguments", "error", "message"), WRONG.values(), ids=WRONG)
def test_a_compiled_call_with_graph_breaks_allowed_raises_the_same(arguments, error, message):
    torch._dynamo.reset()
    with pytest.raises(error, match=message):
        torch.compile(call, backend="eager")(**arguments)


@pytest.mark.parametrize(("arguments", "error", "message"), WRONG.values(), ids=WRONG)
def test_under_fullgraph_the_error_of_the_compiler_carries_the_message(arguments, error, message):
    torch._dynamo.reset()
    with pytest.raises(Exception, match=message):
        torch.compile(call, backend="eager", fullgraph=True)(**arguments)


@pytest.mark.parametrize("value", [None, [1.0, 2.0], 3.0], ids=str)
def test_x_that_is_no_tensor_is_a_type_error(value):
    with pytest.raises(TypeError, match=r"x must be a tensor \(N, C, \*spatial\), got"):
        unetgn.group_norm_silu(value, 1)


def test_a_parameter_that_is_no_tensor_is_a_type_error():
    with pytest.raises(TypeError, match=r"scale must be a tensor \(N, C\) or None, got float"):
        unetgn.group_norm_silu(X, 3, scale=0.5)


@pytest.mark.parametrize("compiled", [False, True])
def test_sparse_tensors_are_a_type_error(compiled):
    torch._dynamo.reset()
    function = torch.compile(call, backend="eager") if compiled else call
    with pytest.raises(TypeError, match=r"x must be a dense tensor .*got one of layout torch.sparse_coo"):
        function(X.to_sparse())
    with pytest.raises(TypeError, match=r"weight must be a dense tensor \(C,\) or None, got one of layout"):
        function(weight=torch.ones(6).to_sparse())


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged], ids=str)
def test_nested_x_is_a_type_error(layout):
    nested = torch.nested.nested_tensor([torch.ones(6, 4), torch.ones(6, 4)], layout=layout)
    with pytest.raises(TypeError, match=r"x must be a dense tensor .*got a nested tensor"):
        unetgn.group_norm_silu(nested, 3)


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace:DeprecationWarning")
def test_the_tracer_of_torchscript_is_refused_by_name():
    """Sizes are tensors there."""
    with pytest.raises(TypeError, match=r"torch\.jit\.trace.* is not supported; use torch\.export"):
        torch.jit.trace(unetgn.GroupNormSiLU(3, 6), torch.ones(2, 6, 4))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((4.0, 8), TypeError, r"num_groups must be an int, got 4.0 of type float"),
        ((True, 8), TypeError, r"num_groups must be an int, got True of type bool"),
        ((4, "8"), TypeError, r"num_channels must be an int, got '8' of type str"),
        ((4, 8.0), TypeError, r"num_channels must be an int, got 8.0 of type float"),
        ((4, 8, -1.0), ValueError, r"eps must be finite and 0 or more, got -1.0"),
        ((4, 8, "1e-5"), TypeError, r"eps must be a float, got '1e-5'"),
        ((4, 8, float("inf")), ValueError, r"eps must be finite and 0 or more, got inf"),
    ],
    ids=str,
)
def test_the_modules_constructor_explains_a_wrong_argument(arguments, error, message):
    with pytest.raises(error, match=message):
        unetgn.GroupNormSiLU(*arguments)


@pytest.mark.parametrize("arguments", [("12",), (12.0,), (12, "4"), (True,)], ids=str)
def test_a_group_count_is_found_for_ints_only(arguments):
    with pytest.raises(TypeError, match=r"(num_channels|at_most) must be an int, got"):
        unetgn.largest_group_count(*arguments)


def test_eps_may_be_an_int():
    assert torch.equal(unetgn.group_norm_silu(X, 3, eps=1), unetgn.group_norm_silu(X, 3, eps=1.0))


def test_options_go_by_name():
    with pytest.raises(TypeError, match="positional"):
        unetgn.group_norm_silu(X, 3, None, None, 1e-5, "silu")


def test_eps_may_be_zero():
    x = torch.randn(2, 6, 4, 4, generator=torch.Generator().manual_seed(0))
    y = unetgn.group_norm_silu(x, 3, eps=0.0, activation=None)
    torch.testing.assert_close(y.reshape(2, 3, -1).var(2, correction=0), torch.ones(2, 3))
