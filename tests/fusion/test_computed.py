"""Tests that `fuse` knows modules by what they compute: each test generates members, and look-alikes that stay.

The classes are made from source text, one file each, so that every member is a class of its own.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import unetgn
from tests.fusion.forwards import inputs
from tests.fusion.sources import maker

CALL = "F.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)"
CAST = "F.group_norm(x.float(), self.num_groups, self.weight.float(), self.bias.float(), self.eps).type(x.dtype)"
NAMED = "torch.nn.functional.group_norm(x, num_groups=self.num_groups, weight=self.weight.to(x.dtype), "
NAMED += "bias=self.bias.to(x.dtype), eps=self.eps)"
NORMS = {  # what a class that is no nn.GroupNorm returns, and whether that is a group norm
    CALL: True,
    CAST: True,
    NAMED: True,
    f"{CALL} * 2": False,
    CALL.replace("self.weight", "1 + self.weight"): False,
    CALL.replace("self.eps", "2 * self.eps"): False,
    CALL.replace("self.num_groups", "1"): False,
    CALL.replace("self.bias", "None"): False,
    CAST.removesuffix(".type(x.dtype)"): False,
    f"{CALL} if x.dtype == torch.float32 or x.dtype == torch.bfloat16 else x": False,
}
FORWARDS = {  # forwards of a block, and whether a norm is fused
    "return self.act(self.norm(x))": True,
    "return F.silu(self.norm(x), inplace=True)": True,
    "y = self.norm(x)\nreturn y * torch.sigmoid(y)": True,
    "y = self.norm(x)\nreturn torch.sigmoid(y) * y": True,
    "y = self.norm(x)\ny = y.mul(y.sigmoid())\nreturn y": True,
    "return nonlinearity(self.norm(x))": True,
    "return written_with_exp(self.norm(x))": True,
    "return self.function(self.norm(x))": True,
    "y = self.norm(x)\nskip = self.conv(x)\nreturn skip + self.act(y)": True,
    "x = self.norm(x)\nreturn self.conv(self.act(x))": True,
    "return F.silu(torch.addcmul(shift, self.norm(x), scale + 1))": True,
    "return F.silu(shift + (1 + scale) * self.norm(x))": True,
    "y = self.norm(x)\na, b = scale, shift\ny = y * (a + 1) + b\nreturn self.act(y)": False,
    "y = self.norm(x)\na, b = scale, shift\ny = y * (a + 1) + b\ny = self.act(y)\nreturn y": True,
    "y = self.norm(x)\nif scale is not None:\n  a = scale\n  y = y * (a + 1) + shift\ny = self.act(y)\nreturn y": True,
    "y = self.norm(x)\nif self.training:\n    y = self.act(y)\nreturn y": True,
    # look-alikes
    "y = self.norm(x)\nreturn y * torch.sigmoid(1.702 * y)": False,
    "y = self.norm(x)\nreturn y * torch.sigmoid(x)": False,
    "y = self.norm(x)\nreturn self.act(y) + y": False,
    "y = self.norm(x)\nz = y\ny = self.act(y)\nreturn y + z": False,
    "y = self.norm(x)\nz = self.act(y)\ny = y + z\nreturn y": False,
    "y = self.norm(x)\nreturn [self.act(y) for _ in range(2)][1]": False,
    "return F.silu(self.norm(x) * (1 + self.gate(x)) + shift)": False,
    "y = self.norm(x)\ny = y * (1 + self.gate(x)) + shift\ny = self.act(y)\nreturn y": False,
    "y = self.norm(x)\na = self.gate(x)\ny = y * (1 + a) + shift\ny = self.act(y)\nreturn y": False,
    "return F.silu(torch.addcmul(shift, self.norm(x), scale + 2))": False,
    "return twice(self.norm(x))": False,
    "return clipped(self.norm(x))": False,
}
ACT = "if self.act is not None:\n  x = self.act(x)\nreturn x"
OWN = {  # forwards of a norm that takes SiLU itself, and whether that is fused
    f"return F.silu({CALL})": True,
    f"x = {CALL}\n{ACT}": True,
    f"if self.training:\n  x = {CALL}\nelse:\n  x = {CALL}\n{ACT}": True,
    f"y = {CAST}\nif self.eps > 0:\n    y = F.silu(y)\nreturn y": True,
    f"return F.relu({CALL})": False,
    f"return F.silu({CALL} + x)": False,
}


def nonlinearity(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


def written_with_exp(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def twice(x: Tensor) -> Tensor:
    return 2 * x * torch.sigmoid(x)


def clipped(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x) * (x < 40)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.act, self.conv, self.function = nn.GroupNorm(2, 4), nn.SiLU(), nn.Conv2d(4, 4, 1), F.silu
        self.gate = nn.ReLU(inplace=True)
        nn.init.normal_(self.norm.weight)
        nn.init.normal_(self.norm.bias)


class Norm(nn.Module):
    """Has a group norm's parts, without being one."""

    def __init__(self, num_groups: int = 2, eps: float = 0.1) -> None:
        super().__init__()
        self.num_groups, self.eps, self.act = num_groups, eps, F.silu
        self.weight, self.bias = nn.Parameter(torch.randn(4)), nn.Parameter(torch.randn(4))


@pytest.fixture
def with_forward(tmp_path):
    """Return the function that makes a class with a forward from a file of its own."""
    functions = (nonlinearity, written_with_exp, twice, clipped)
    return maker(tmp_path, **{function.__name__: function for function in functions})


@pytest.mark.parametrize("returned", NORMS)
@pytest.mark.parametrize("num_groups", [1, 2])
def test_a_norm_of_another_class_is_fused_where_it_computes_group_norm(returned, num_groups, with_forward, calls):
    torch.manual_seed(0)
    model = nn.Sequential(with_forward(Norm, f"return {returned}")(num_groups), nn.SiLU())
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 3e-2)):
        x, _ = inputs(dtype)
        calls.clear()
        model = model.to(dtype)
        unetgn.unfuse(model)
        expected = model(10 * x)
        assert [place.path for place in unetgn.fuse(model).fused] == ["0"] * NORMS[returned]
        result = model(10 * x)
        assert result.dtype == expected.dtype
        torch.testing.assert_close(result, expected, rtol=tolerance, atol=tolerance)
        assert len(calls) == NORMS[returned]


@pytest.mark.parametrize("body", FORWARDS)
def test_a_block_that_nobody_named_is_fused_where_silu_follows_the_norm(body, with_forward, calls):
    torch.manual_seed(0)
    block = with_forward(Block, body, "x, scale, shift")().double()
    x, _ = inputs()
    scale, shift = torch.randn(2, 2, 4, 1, 1, dtype=torch.float64)
    expected = block(x.clone(), scale, shift)
    assert [place.norm for place in unetgn.fuse(block).fused] == ["norm"] * FORWARDS[body]
    torch.testing.assert_close(block(x.clone(), scale, shift), expected, rtol=1e-12, atol=1e-12)
    assert len(calls) == FORWARDS[body]


@pytest.mark.parametrize("body", OWN)
@pytest.mark.parametrize("training", [True, False])
def test_a_norm_that_takes_silu_itself_is_fused_on_its_own(body, training, with_forward, calls):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 4, 1), with_forward(Norm, body)(), nn.Conv2d(4, 4, 1)).train(training)
    x, _ = inputs(torch.float32)
    expected = model(x)
    assert [place.path for place in unetgn.fuse(model).fused] == ["1"] * OWN[body]
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
    assert len(calls) == OWN[body]
    unetgn.unfuse(model)
    assert torch.equal(model(x), expected)


def test_a_file_that_was_edited_after_its_import_is_not_taken_for_what_runs(with_forward, tmp_path):
    block = with_forward(Block, "return self.act(self.norm(x))")()
    (tmp_path / "file0.py").write_text((tmp_path / "file0.py").read_text().replace("self.norm(x)", "self.norm(-x)"))
    x, _ = inputs(torch.float32)
    expected = block(x)
    report = unetgn.fuse(block)
    assert "not what runs" in report.left[0].reason
    assert torch.equal(block(x), expected)


class Switched(nn.GroupNorm):
    """Has an activation that an attribute leaves out."""

    def __init__(self, swish: float) -> None:
        super().__init__(2, 4)
        self.swish = swish
        nn.init.normal_(self.weight)


GATE = "if self.swish == 1.0:\n  y = F.silu(y)\nelif self.swish:\n  y = y * F.sigmoid(y * float(self.swish))\nreturn y"
SWITCHED = {  # forwards, and for which values of the attribute a SiLU after the norm is fused with it
    f"y = super().forward(x.float()).to(x.dtype)\n{GATE}": (0.0,),
    f"y = super().forward(x.float()).type(x.dtype)\n{GATE}": (0.0,),
    "y = super().forward(x)\nreturn y * torch.sigmoid(y) if self.swish else y": (0.0,),
    "return super().forward(x) * (1 + self.swish)": (0.0,),
    "return super().forward(x) + (self.swish if x.dtype == torch.float64 else 0.0)": (),
    "self.swish = self.swish + 1.0\nreturn super().forward(x) if self.swish < 9 else x": (),
    "return super().forward(x + self.swish)": (0.0, 1.0, 1.7),  # a number that is added to all goes into the mean
    "return super().forward(x) if self.swish or x.dtype == torch.float32 else x": (1.0, 1.7),
}


@pytest.mark.parametrize("body", SWITCHED)
@pytest.mark.parametrize("order", [1, -1])
def test_a_norm_that_leaves_its_activation_out_is_fused_with_the_one_after_it(body, order, with_forward, calls):
    torch.manual_seed(0)
    cls = with_forward(Switched, body)
    chains = [nn.Sequential(cls(swish), nn.SiLU()) for swish in (0.0, 1.0, 1.7)]
    model = nn.ModuleList(chains[::order])
    twin = copy.deepcopy(model)
    x, _ = inputs(torch.float32)
    report = unetgn.fuse(model)
    for one, other in list(zip(model, twin, strict=True)) * 2:
        torch.testing.assert_close(one(x), other(x), rtol=1e-5, atol=1e-5)
    fused = {model.get_submodule(place.path).swish for place in report.fused if place.block == "Sequential"}
    assert fused == set(SWITCHED[body])


def test_an_attribute_that_is_changed_after_fusing_is_what_runs(with_forward, calls):
    model = nn.Sequential(with_forward(Switched, f"y = super().forward(x)\n{GATE}")(0.0), nn.SiLU()).double()
    x, _ = inputs()
    unetgn.fuse(model)
    model[0].swish = 1.7
    expected = F.silu(type(model[0]).forward(model[0], x))
    torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)
    assert not calls
