"""Tests that fused blocks leave out the division by a factor that is 1, and no other."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import unetgn

ONES = (1, 1.0)
OTHERS = (2.0, 2**0.5, True, torch.tensor(1.0), torch.ones(8, 1, 1))


class Divides(nn.Module):
    def __init__(self, factor: Any) -> None:
        super().__init__()
        self.norm, self.act, self.conv = nn.GroupNorm(2, 8), nn.SiLU(), nn.Conv2d(8, 8, 3, padding=1)
        self.factor = factor


class Sum(Divides):
    def forward(self, x: Tensor) -> Tensor:
        return (x + self.conv(self.act(self.norm(x)))) / self.factor


class Product(Divides):
    def forward(self, x: Tensor) -> Tensor:
        h = self.conv(self.act(self.norm(x))) * x / self.factor
        return h + 1


class Twice(Divides):
    def forward(self, x: Tensor) -> Tensor:
        h = self.act(self.norm((x + x.flip(0)) / self.factor))
        h += (h - x) / self.factor
        return h


class OfAnInput(Divides):
    def forward(self, x: Tensor) -> Tensor:
        h = x / self.factor  # a new tensor, which is changed in place
        h += 1
        return self.act(self.norm(h))


class Divisions(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += function.overloadpacket is torch.ops.aten.div
        return function(*args, **(kwargs or {}))


def results(module: nn.Module, x: Tensor) -> tuple[Tensor, Tensor, int]:
    """Return the output, the gradient of x, and the divisions of the forward pass."""
    given = x.clone().requires_grad_()
    with Divisions() as divisions:
        y = module(given)
    y.square().sum().backward()
    assert given.grad is not None
    return y.detach(), given.grad, divisions.count


def both(cls: type[Divides], factor: Any, dtype: torch.dtype) -> tuple[tuple[Tensor, Tensor, int], ...]:
    """Return the results of fused modules of equal weights, by that factor and by 1 as a tensor, which divides."""
    unetgn.fuse.read(cls)
    x = torch.randn(2, 8, 4, 4, generator=torch.Generator().manual_seed(1)).to(dtype)
    found = []
    for each in (factor, torch.tensor(1.0, dtype=dtype)):
        torch.manual_seed(0)
        module = cls(each).to(dtype)
        assert unetgn.fuse(module).fused
        found.append(results(module, x))
    return tuple(found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("factor", ONES, ids=repr)
@pytest.mark.parametrize("cls", [Sum, Product, Twice])
def test_a_division_of_a_fresh_result_by_1_is_left_out_and_every_bit_is_the_same(
    cls: type[Divides], factor: float, dtype: torch.dtype
) -> None:
    without, divided = both(cls, factor, dtype)
    assert without[2] == 0
    assert divided[2] > 0
    assert all(torch.equal(a, b) for a, b in zip(without[:2], divided[:2], strict=True))


@pytest.mark.parametrize("factor", OTHERS, ids=repr)
@pytest.mark.parametrize("cls", [Sum, Product, Twice])
def test_every_other_factor_divides(cls: type[Divides], factor: Any) -> None:
    by_factor, by_one = both(cls, factor, torch.float32)
    assert by_factor[2] == by_one[2] > 0


def test_what_the_caller_holds_is_divided_into_a_tensor_of_its_own() -> None:
    unetgn.fuse.read(OfAnInput)
    module = OfAnInput(1.0)
    unetgn.fuse(module)
    x = torch.ones(2, 8, 4, 4)
    module(x)
    assert torch.equal(x, torch.ones_like(x))


def test_integers_become_floating_point_numbers_as_division_makes_them() -> None:
    from unetgn.fusion.division import divide

    assert divide(torch.tensor([3]), 1).dtype == torch.float32
    assert isinstance(divide(3, 1), float)


@pytest.mark.parametrize("factor", [1, 1.0, 2.0])
def test_blocks_of_diffusers_leave_it_out(factor: float) -> None:
    resnet = pytest.importorskip("diffusers.models.resnet")
    block = resnet.ResnetBlock2D(in_channels=8, groups=2, temb_channels=None, output_scale_factor=factor)
    assert len(unetgn.fuse(block).fused) == 2
    with Divisions() as divisions:
        block(torch.randn(1, 8, 4, 4), None)
    assert divisions.count == (factor != 1)
