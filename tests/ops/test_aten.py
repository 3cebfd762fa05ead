"""Parts of the ATen implementation that a CPU does not come through by itself: those for other devices."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import unetgn
from unetgn.ops import aten


@pytest.mark.parametrize("affine", ["none", "per channel", "per sample"])
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
def test_statistics_by_var_mean_give_the_definition_in_the_layout_of_x(draw, definition, channels_last, affine):
    inputs = draw(0, (2, 6, 4, 5), dtype=torch.float64, channels_last=channels_last)
    parameters = {"none": (), "per channel": ("weight", "bias"), "per sample": ("weight", "bias", "scale", "shift")}
    given = {name: getattr(inputs, name) for name in parameters[affine]}
    a, b = aten._affine(inputs.x, *(given.get(name) for name in ("weight", "bias", "scale", "shift")))
    z, mean, rstd = aten._channels_last(inputs.x, 3, a, b, 1e-5)
    torch.testing.assert_close(z, definition(inputs.x, 3, activation=None, **given))
    grouped = inputs.x.reshape(2, 3, -1)
    torch.testing.assert_close(mean, grouped.mean(2))
    torch.testing.assert_close(rstd, (grouped.var(2, correction=0) + 1e-5).rsqrt())
    assert z.stride() == inputs.x.stride()


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("parameters", ["", "bias", "weight bias", "weight bias pre_bias scale shift"])
def test_a_backward_pass_without_native_kernels_gives_the_same(draw, in_double, monkeypatch, parameters, channels_last):
    """As on MPS: the native backward of PyTorch is used on the CPU alone."""
    monkeypatch.setattr(aten, "_native_backward_is_right", lambda *_: False)
    for activation in ("silu", None):
        inputs = draw(1, (2, 6, 4, 5), dtype=torch.float64, channels_last=channels_last, parameters=parameters)
        _, gradients = inputs.call(unetgn.group_norm_silu, 3, activation=activation)
        _, expected = in_double(inputs, 3, activation=activation)
        for got, want in zip(gradients, expected, strict=True):
            torch.testing.assert_close(got, want)


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
