"""Checks blocks that are known ones but for a switch: fused while it is off, their own forward where it is on."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import unetgn
from tests.fusion.guided import ResBlock
from tests.fusion.test_guided_diffusion import block, inputs


class Switched(ResBlock):
    """Has further switches, each used in another way; all are off."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.silent = self.swapped = self.doubled = self.shifted = self.rolled = self.offset = False


class ByStatement(Switched):
    def _forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.in_layers(x)
        if self.silent:  # noqa: SIM108 - a statement on purpose
            emb_out = torch.zeros_like(h)
        else:
            emb_out = self.emb_layers(emb).type(h.dtype)
        while len(emb_out.shape) < len(h.shape):
            emb_out = emb_out[..., None]
        if self.rolled and not self.swapped:
            emb_out = emb_out.roll(1, dims=1)
        return self.skip_connection(x) + self.out_layers(h + emb_out)


class ByExpression(Switched):
    def _forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.in_layers(x)
        emb_out = torch.zeros(1).type(h.dtype) if self.silent else self.emb_layers(emb).type(h.dtype)
        while len(emb_out.shape) < len(h.shape):
            emb_out = emb_out[..., None]
        out = self.skip_connection(x) + self.out_layers(h + emb_out)
        return out if not (self.doubled or self.shifted) else out.mul(2).add(self.offset)


SWITCHES = {ByStatement: ("silent", "rolled"), ByExpression: ("silent", "doubled", "shifted")}
MEMBERS = [(kind, name) for kind, names in SWITCHES.items() for name in names]


@pytest.mark.parametrize("kind", SWITCHES)
def test_a_block_whose_further_switches_are_off_is_fused(kind):
    model = block(kind)
    expected = model(*inputs())
    report = unetgn.fuse(model)
    assert (len(report.fused), len(report.left)) == (2, 0)
    torch.testing.assert_close(model(*inputs()), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("kind", "name"), MEMBERS)
def test_a_switch_that_is_on_keeps_the_numbers_and_is_named(kind, name):
    model = block(kind)
    setattr(model, name, True)
    expected = model(*inputs())
    report = unetgn.fuse(model)
    assert torch.equal(model(*inputs()), expected)
    assert len(report.left) == 2
    assert all(name in place.reason for place in report.left)


@pytest.mark.parametrize(("kind", "name"), MEMBERS)
def test_a_switch_that_is_turned_on_after_fusing_is_obeyed_and_turned_off_again(kind, name):
    model = block(kind)
    off = model(*inputs())
    setattr(model, name, True)
    on = model(*inputs())
    setattr(model, name, False)
    assert unetgn.fuse(model).fused
    setattr(model, name, True)
    assert torch.equal(model(*inputs()), on)
    setattr(model, name, False)
    torch.testing.assert_close(model(*inputs()), off, rtol=1e-5, atol=1e-5)


def test_a_compiled_block_sees_its_switches():
    model = block(ByStatement)
    unetgn.fuse(model)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for value in (False, True, False):
        model.silent = value
        torch.testing.assert_close(compiled(*inputs()), model(*inputs()), rtol=1e-5, atol=1e-5)


class Own(nn.Module):
    """Is a group norm of its own, as EDM's."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        return F.group_norm(x, 4, self.weight, self.bias)


class OwnByTorch(Own):
    def forward(self, x: Tensor) -> Tensor:
        return torch.nn.functional.group_norm(x, num_groups=4, weight=self.weight.to(x.dtype), bias=self.bias, eps=1e-6)


class OwnWithoutWeights(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        return torch.group_norm(x, 4)


class Block(nn.Module):
    def __init__(self, norm: type[nn.Module]) -> None:
        super().__init__()
        self.norm, self.conv = norm(8), nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.silu(self.norm(x)))


@pytest.mark.parametrize("kind", [Own, OwnByTorch, OwnWithoutWeights])
@pytest.mark.parametrize("wrap", [Block, lambda kind: nn.Sequential(kind(8), nn.SiLU())], ids=["block", "sequential"])
def test_a_group_norm_that_is_no_subclass_of_torchs_is_reported_with_the_reason(wrap, kind):
    report = unetgn.fuse(nn.Sequential(wrap(kind), nn.Identity()))
    assert [(place.norm, not place.reason) for place in report.left] == [("norm" if wrap is Block else "0", False)]
    assert f"{kind.__name__} calls group_norm itself" in report.left[0].reason
