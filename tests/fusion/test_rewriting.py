"""What reading a forward finds and what it leaves, and that the rewritten forward computes the same."""

import inspect

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import unetgn
from tests.fusion.forwards import (
    FOUND,
    NOTHING,
    ActivationAfterTheBranches,
    AdditionBefore,
    AdditionUnderACondition,
    Base,
    InABranchOfALoop,
    ResidualBetween,
    ScaleShift,
    TwoSteps,
)
from unetgn.fusion.rewriting import find_pairs, rewrite_forward
from unetgn.fusion.source import CannotRewriteError

NORMS, ACTIVATIONS = frozenset({"norm1", "norm2"}), frozenset({"act"})


def inputs() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(2, 4, 3, 3, dtype=torch.float64), torch.randn(2, 3, dtype=torch.float64)


@pytest.mark.parametrize("block", FOUND)
def test_the_pairs_of_a_forward_are_found(block):
    assert find_pairs(block.forward, NORMS, ACTIVATIONS).norms == FOUND[block]


@pytest.mark.parametrize("block", NOTHING)
def test_what_is_no_pair_is_left(block):
    assert find_pairs(block.forward, NORMS, ACTIVATIONS).norms == ()


@pytest.mark.parametrize("block", [*FOUND, *NOTHING])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_rewritten_forward_computes_the_same(block, sign):
    torch.manual_seed(1)
    module = block().double()
    x, emb = inputs()
    rewritten = rewrite_forward(block.forward, NORMS, ACTIVATIONS)
    torch.testing.assert_close(rewritten(module, x, sign * emb), module(x, sign * emb), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("block", FOUND)
def test_each_pair_that_runs_is_one_call_of_the_operator(block, calls):
    module = block().double()
    rewrite_forward(block.forward, NORMS, ACTIVATIONS)(module, *inputs())
    ran = 1 if block is InABranchOfALoop else len(FOUND[block])
    if block is not ActivationAfterTheBranches:  # which branch runs depends on the numbers
        assert len(calls) == ran


@pytest.mark.parametrize(
    ("block", "inside"),
    [(AdditionBefore, {"pre_bias"}), (AdditionUnderACondition, {"pre_bias"}), (ScaleShift, {"scale", "shift"})],
)
def test_what_is_constant_over_space_goes_into_the_operator(block, inside, calls):
    rewrite_forward(block.forward, NORMS, ACTIVATIONS)(block().double(), *inputs())
    assert {name for name, value in calls[0].items() if value is not None} == inside


class AddedTensor(Base):
    def forward(self, x, emb):
        x = x + emb
        x = self.norm1(x)
        x = self.act(x)
        return x


class ScaledTensor(Base):
    def forward(self, x, emb):
        x = self.norm1(x)
        x = x * (1 + emb) + emb
        x = self.act(x)
        return x


class Gated(nn.GroupNorm):
    """A norm that takes something beside its input."""

    def forward(self, x, gate):
        return super().forward(x) * gate


class AdditionThatTheNormsArgumentSees(Base):
    def __init__(self):
        super().__init__()
        self.norm1 = Gated(2, 4)

    def forward(self, x, emb):
        x = x + self.conv(x)
        x = self.norm1(x, x.mean())
        x = self.act(x)
        return x


class AdditionThenDropoutInTheNormsArgument(AdditionThatTheNormsArgumentSees):
    def forward(self, x, emb):
        x = x + F.dropout(self.conv(x))
        x = self.norm1(x, 1 + F.dropout(emb.mean()))
        x = self.act(x)
        return x


@pytest.mark.parametrize("block", [AdditionThatTheNormsArgumentSees, AdditionThenDropoutInTheNormsArgument])
def test_an_addition_is_taken_in_only_where_nothing_else_sees_its_sum(block):
    torch.manual_seed(1)
    module = block().double()
    results = []
    for forward in (block.forward, rewrite_forward(block.forward, NORMS, ACTIVATIONS)):
        torch.manual_seed(2)
        results.append(forward(module, *inputs()))
    assert find_pairs(block.forward, NORMS, ACTIVATIONS).norms == ("norm1",)
    assert torch.equal(*results)


def test_a_norm_of_which_some_calls_are_not_joined_is_reported_so():
    class Twice(Base):
        def forward(self, x, emb):
            x = self.act(self.norm1(x))
            return self.norm1(x)

    unetgn.fuse.read(Twice)
    report = unetgn.fuse(Twice())
    assert [place.only for place in report.fused] == ["only where SiLU comes right after it: 1 of its 2 calls"]
    assert "1 of its 2 calls" in str(report)


def test_a_norm_whose_sum_with_something_is_activated_is_reported_so():
    unetgn.fuse.read(ResidualBetween)
    reasons = {place.norm: place.reason for place in unetgn.fuse(ResidualBetween()).left}
    assert reasons["norm1"] == "SiLU is taken of `h + x`, not of its result alone"


def test_what_would_widen_the_dtype_stays_outside_of_the_operator(calls):
    module = AdditionBefore()
    x, emb = (tensor.float() for tensor in inputs())
    half = module.conv.half()(x.half())
    expected = F.silu(module.norm1(half + module.proj(emb)[:, :4, None, None])) + x.half()
    got = rewrite_forward(AdditionBefore.forward, NORMS, ACTIVATIONS)(module, x.half(), emb)
    torch.testing.assert_close(got, expected)
    assert calls[0]["pre_bias"] is None


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool], ids=str)
@pytest.mark.parametrize(("block", "names"), [(AddedTensor, {"pre_bias"}), (ScaledTensor, {"scale", "shift"})])
def test_whole_numbers_and_truth_values_stay_outside_of_the_operator(block, names, dtype, calls):
    x = inputs()[0]
    numbers = torch.arange(8).view(2, 4, 1, 1).to(dtype)
    module = block().double()
    got = rewrite_forward(block.forward, NORMS, ACTIVATIONS)(module, x, numbers)
    torch.testing.assert_close(got, module(x, numbers), rtol=1e-12, atol=1e-12)
    assert not names & {name for name, value in calls[0].items() if value is not None}


def test_a_forward_bound_to_its_class_cannot_be_read():
    class Outer(Base):
        def forward(self, x, emb):
            return super().forward(x)

    with pytest.raises(CannotRewriteError, match="closes over"):
        rewrite_forward(Outer.forward, NORMS, ACTIVATIONS)


def test_a_forward_without_source_cannot_be_read():
    made: dict = {}
    exec("def forward(self, x):\n    x = self.norm1(x)\n    x = self.act(x)\n    return x", made)
    with pytest.raises(CannotRewriteError, match="source"):
        rewrite_forward(made["forward"], NORMS, ACTIVATIONS)


def test_errors_in_a_rewritten_forward_point_at_the_line_of_its_author():
    module = TwoSteps()
    unetgn.fuse.read(TwoSteps)
    unetgn.fuse(module)
    lines, first = inspect.getsourcelines(TwoSteps.forward)
    with pytest.raises(RuntimeError) as caught:
        module(torch.randn(1, 4, 2), None)  # an image without its width: the convolution refuses it
    frames = [entry for entry in caught.traceback if str(entry.path) == inspect.getfile(TwoSteps)]
    assert first < frames[-1].lineno + 1 < first + len(lines)
