"""Tests what is taken for SiLU and for a group norm: values alone do not make a class one."""

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import unetgn
from tests import tensors
from tests.fusion import guided

noise = functools.partial(tensors.noise, dtype=torch.float32)


class WithParameter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.beta = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.beta * x)


class WithClassAttribute(nn.Module):
    beta = 1.0

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.beta * x)


class WithSigmoidOfItsOwn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.sigmoid = nn.Sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        return x * self.sigmoid(x)


class InFloat32(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.silu(x.float())


class Raising(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(x, "no such argument")


class Float32GroupNorm(nn.GroupNorm):
    """Gives float32 for whatever comes in, unlike nn.GroupNorm."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.float())


@pytest.mark.parametrize("kind", [WithParameter, WithClassAttribute, WithSigmoidOfItsOwn, InFloat32, Raising])
def test_an_activation_that_may_compute_something_else_is_no_silu(kind):
    look_alike = type("Swish", (kind,), {})()
    model = nn.Sequential(nn.GroupNorm(2, 4), look_alike)
    report = unetgn.fuse(model)
    assert not report.fused
    assert "no SiLU" in report.left[0].reason


def test_a_subclass_of_a_silu_with_another_constant_keeps_its_numbers():
    torch.manual_seed(0)
    first = type("Swish", (WithClassAttribute,), {})
    second = type("Swish", (first,), {"beta": 3.0})
    model = nn.Sequential(nn.GroupNorm(2, 4), first(), nn.GroupNorm(2, 4), second())
    x = noise(2, 4, 3, 3)
    expected = model(x)
    unetgn.fuse(model)
    assert torch.equal(model(x), expected)


def test_the_gradient_of_an_activations_own_parameter_is_kept():
    torch.manual_seed(0)
    model = nn.Sequential(nn.GroupNorm(2, 4), type("SiLU", (WithParameter,), {})())
    unetgn.fuse(model)
    model(noise(2, 4, 3, 3)).sum().backward()
    assert model[1].beta.grad is not None


@pytest.mark.parametrize(
    ("act", "places"), [("swish", 7), (("swish", {"alpha": 2.0}), 0), ("memswish", 7), (("swish", {"alpha": 1}), 7)]
)
def test_monais_swish_is_a_silu_where_its_constant_is_one(act, places, calls):
    from monai.networks.nets import SegResNet

    torch.manual_seed(0)
    settings = {"spatial_dims": 2, "init_filters": 8, "blocks_down": (1, 1), "blocks_up": (1,)}
    model = SegResNet(**settings, norm=("GROUP", {"num_groups": 4}), act=act).double()
    x = noise(2, 1, 8, 8, dtype=torch.float64)
    expected = model(x)
    # Two places in each of three residual blocks, and the output's.
    assert len(unetgn.fuse(model).fused) == places
    torch.testing.assert_close(model(x), expected, rtol=1e-10, atol=1e-12)
    assert len(calls) == places


def test_monais_swish_is_none_where_its_constant_is_trained_or_becomes_another():
    from monai.networks.blocks.activation import Swish

    class Trained(Swish):
        def __init__(self) -> None:
            super().__init__()
            self.alpha = nn.Parameter(torch.ones(()))

    assert not unetgn.fuse(nn.Sequential(nn.GroupNorm(2, 4), Trained())).fused
    model = nn.Sequential(nn.GroupNorm(2, 4), Swish())
    assert unetgn.fuse(model).fused
    model[1].alpha = 2.0
    x = noise(2, 4, 3, 3)
    torch.testing.assert_close(model(x), model[1](model[0](x)))


def test_a_group_norm_that_gives_float32_for_sixteen_bits_still_does():
    model = nn.Sequential(Float32GroupNorm(2, 4), nn.SiLU())
    x = noise(2, 4, 3, 3, dtype=torch.bfloat16)
    expected = model(x)
    assert not unetgn.fuse(model).fused
    assert model(x).dtype == expected.dtype == torch.float32


def test_a_single_value_a_group_is_refused_as_before():
    model = nn.Sequential(nn.GroupNorm(4, 4), nn.SiLU())
    unetgn.fuse(model)
    with pytest.raises(ValueError, match="Expected more than 1 value"):
        model(noise(1, 4, 1, 1))


MODES = {
    "fake tensors": FakeTensorMode,
    "the meta device": lambda: torch.device("meta"),
    "a counter": lambda: FlopCounterMode(display=False),
}


@pytest.mark.parametrize("mode", MODES)
def test_copies_are_recognized_by_trial_where_tensors_have_no_numbers(mode):
    """Every class is new here: what was once recognized is known."""

    class SiLU(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * torch.sigmoid(x)

    class GroupNorm32(nn.GroupNorm):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.float()).type(x.dtype)

    class Block(guided.ResBlock):
        pass

    with MODES[mode]():
        model = nn.ModuleList([nn.Sequential(GroupNorm32(2, 4), SiLU()), Block(4, 3, True, None, False)])
        assert [place.path for place in unetgn.fuse(model).fused] == ["0.0", "1.in_layers.0", "1.out_layers.0"]
