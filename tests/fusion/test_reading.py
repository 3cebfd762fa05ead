"""What reading a forward finds and what it leaves, and that the rewritten forward computes the same."""

import inspect

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import unetgn
from unetgn.fusion.reading import CannotReadError, find_pairs, read


def swish(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


def silu(x: Tensor) -> Tensor:
    return 2 * F.silu(x)  # of that name, but not that function


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2, self.act = nn.GroupNorm(2, 4), nn.GroupNorm(4, 4), nn.SiLU()
        self.conv, self.proj = nn.Conv2d(4, 4, 1), nn.Linear(3, 8)
        for norm in (self.norm1, self.norm2):
            nn.init.normal_(norm.weight)
            nn.init.normal_(norm.bias)


class TwoSteps(Base):
    def forward(self, x, emb):
        x = self.norm1(x)
        x = self.act(x)
        return self.conv(x)


class OneExpression(Base):
    def forward(self, x, emb):
        return self.conv(F.silu(self.norm1(x))) + torch.nn.functional.silu(self.norm2(x))


class FunctionOfTheFile(Base):
    def forward(self, x, emb):
        h = self.norm1(x)
        h = swish(h)
        return h


class InABranchOfALoop(Base):
    def forward(self, x, emb):
        for index in range(3):
            if index % 2:
                x = self.norm1(x)
                x = self.act(x)
            else:
                x = self.conv(x)
        return x


class ActivationAfterTheBranches(Base):
    def forward(self, x, emb):
        if emb.sum() > 0:
            x = self.conv(x)
        elif emb is not None:
            x = self.norm1(x)
        else:
            x = self.norm2(x)
        x = self.act(x)
        return x


class AdditionBefore(Base):
    def forward(self, x, emb):
        h = self.conv(x)
        h = h + self.proj(emb)[:, :4, None, None]
        h = self.norm1(h)
        h = self.act(h)
        return h + x


class AdditionUnderACondition(Base):
    def forward(self, x, emb):
        h = x
        if emb is not None:
            shift = self.act(self.proj(emb))[:, :4, None, None]
            h = h + shift
        h = self.norm1(h)
        h = self.act(h)
        return h


class AdditionThatVariesOverSpace(Base):
    def forward(self, x, emb):
        x = x + self.conv(x)
        x = self.norm1(x)
        x = self.act(x)
        return x


class ScaleShift(Base):
    def forward(self, x, emb):
        scale, shift = self.proj(emb)[:, :, None, None].chunk(2, dim=1)
        x = self.norm1(x)
        x = x * (1 + scale) + shift
        x = self.act(x)
        return x


class ScaleShiftOverSpace(Base):
    def forward(self, x, emb):
        scale, shift = self.conv(x), x.mean(dim=(2, 3), keepdim=True)
        x = self.norm2(x)
        x = x * (scale + 1.0) + shift
        x = self.act(x)
        return x


FOUND = {
    TwoSteps: ("norm1",),
    OneExpression: ("norm1", "norm2"),
    FunctionOfTheFile: ("norm1",),
    InABranchOfALoop: ("norm1",),
    ActivationAfterTheBranches: ("norm1", "norm2"),
    AdditionBefore: ("norm1",),
    AdditionUnderACondition: ("norm1",),
    AdditionThatVariesOverSpace: ("norm1",),
    ScaleShift: ("norm1",),
    ScaleShiftOverSpace: ("norm2",),
}


class ResidualBetween(Base):
    def forward(self, x, emb):
        h = self.norm1(x)
        h = self.act(h + x)
        return h


class NormKept(Base):
    def forward(self, x, emb):
        normed = self.norm1(x)
        h = self.act(normed)
        return h + normed


class AnotherActivation(Base):
    def forward(self, x, emb):
        x = self.norm1(x)
        x = F.relu(x)
        return x


class AnotherFunctionOfThatName(Base):
    def forward(self, x, emb):
        x = self.norm1(x)
        x = silu(x)
        return x


class AnotherTensor(Base):
    def forward(self, x, emb):
        h = self.norm1(x)
        x = self.act(x)
        return h + x


NOTHING = (ResidualBetween, NormKept, AnotherActivation, AnotherFunctionOfThatName, AnotherTensor)
NORMS, ACTIVATIONS = frozenset({"norm1", "norm2"}), frozenset({"act"})


def inputs() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(2, 4, 3, 3, dtype=torch.float64), torch.randn(2, 3, dtype=torch.float64)


@pytest.mark.parametrize("block", FOUND)
def test_the_pairs_of_a_forward_are_found(block):
    assert find_pairs(block.forward, NORMS, ACTIVATIONS) == FOUND[block]


@pytest.mark.parametrize("block", NOTHING)
def test_what_is_no_pair_is_left(block):
    assert find_pairs(block.forward, NORMS, ACTIVATIONS) == ()


@pytest.mark.parametrize("block", [*FOUND, *NOTHING])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_rewritten_forward_computes_the_same(block, sign):
    torch.manual_seed(1)
    module = block().double()
    x, emb = inputs()
    rewritten = read(block.forward, NORMS, ACTIVATIONS)
    torch.testing.assert_close(rewritten(module, x, sign * emb), module(x, sign * emb), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("block", FOUND)
def test_each_pair_that_runs_is_one_call_of_the_operator(block, calls):
    module = block().double()
    read(block.forward, NORMS, ACTIVATIONS)(module, *inputs())
    ran = {InABranchOfALoop: 1, OneExpression: 2}.get(block, 1)
    if block is not ActivationAfterTheBranches:  # which branch runs depends on the numbers
        assert len(calls) == ran


@pytest.mark.parametrize(
    ("block", "inside"),
    [(AdditionBefore, {"pre_bias"}), (AdditionUnderACondition, {"pre_bias"}), (ScaleShift, {"scale", "shift"})],
)
def test_what_is_constant_over_space_goes_into_the_operator(block, inside, calls):
    read(block.forward, NORMS, ACTIVATIONS)(block().double(), *inputs())
    assert {name for name, value in calls[0].items() if value is not None} == inside


def test_what_would_widen_the_dtype_stays_outside_of_the_operator(calls):
    module = AdditionBefore()
    x, emb = (tensor.float() for tensor in inputs())
    half = module.conv.half()(x.half())
    expected = F.silu(module.norm1(half + module.proj(emb)[:, :4, None, None])) + x.half()
    got = read(AdditionBefore.forward, NORMS, ACTIVATIONS)(module, x.half(), emb)
    torch.testing.assert_close(got, expected)
    assert calls[0]["pre_bias"] is None


def test_a_forward_bound_to_its_class_cannot_be_read():
    class Outer(Base):
        def forward(self, x, emb):
            return super().forward(x)

    with pytest.raises(CannotReadError, match="closes over"):
        read(Outer.forward, NORMS, ACTIVATIONS)


def test_a_forward_without_source_cannot_be_read():
    made: dict = {}
    exec("def forward(self, x):\n    x = self.norm1(x)\n    x = self.act(x)\n    return x", made)
    with pytest.raises(CannotReadError, match="source"):
        read(made["forward"], NORMS, ACTIVATIONS)


def test_errors_in_a_rewritten_forward_point_at_the_line_of_its_author():
    module = TwoSteps()
    unetgn.fuse.read(TwoSteps)
    unetgn.fuse(module)
    lines, first = inspect.getsourcelines(TwoSteps.forward)
    with pytest.raises(RuntimeError) as caught:
        module(torch.randn(1, 4, 2), None)  # an image without its width: the convolution refuses it
    frames = [entry for entry in caught.traceback if str(entry.path) == __file__]
    assert first < frames[-1].lineno + 1 < first + len(lines)
