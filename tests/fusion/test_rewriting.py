"""Tests the rewriting of a forward: what is found, what is left, what becomes of it, and that it computes the same."""

import ast
import inspect
import re
import textwrap

import pytest
import torch
import torch.nn.functional as F
from torch import nn

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
    inputs,
)
from unetgn.fusion.norms import norm_rule
from unetgn.fusion.rewriting import additions, apart, branches, expressions, steps
from unetgn.fusion.rewriting.forward import rewrite
from unetgn.fusion.rewriting.names import Names, Parts

REWRITINGS = (additions, apart, branches, expressions, steps)

EXAMPLE = re.compile(r"Before::\n\n(?P<before>.*?)\n\nAfter::\n\n(?P<after>.*?)(?=\n\n\S|\Z)", re.DOTALL)


def fused(module: nn.Module) -> tuple[str, ...]:
    """Let `fuse` read the module's forward, fuse it, and return the norms that the report says are fused."""
    unetgn.fuse.read(type(module))
    return tuple(place.norm for place in unetgn.fuse(module).fused)


def reasons(module: nn.Module) -> dict[str, str]:
    """Return why norms of the module are left, once `fuse` may read its forward."""
    unetgn.fuse.read(type(module))
    return {place.norm: place.reason for place in unetgn.fuse(module).left}


def examples() -> list[tuple[str, str, str]]:
    """Return every example in the docstrings of the rewritings: the name, the source before, the source after."""
    named = [*vars(expressions.Expressions).items(), *(pair for module in REWRITINGS for pair in vars(module).items())]
    methods = [(name, inspect.getdoc(method)) for name, method in named if inspect.isfunction(method)]
    return [
        (name, textwrap.dedent(example["before"]), textwrap.dedent(example["after"]))
        for name, doc in methods
        for example in EXAMPLE.finditer(doc or "")
    ]


def as_definition(source: str) -> ast.FunctionDef:
    """Parse statements as the body of a forward."""
    definition = ast.parse(f"def forward(self, x, h, emb, scale):\n{textwrap.indent(source, '    ')}").body[0]
    assert isinstance(definition, ast.FunctionDef)
    return definition


@pytest.mark.parametrize(("name", "before", "after"), examples(), ids=[name for name, _, _ in examples()])
def test_the_examples_in_the_docstrings_are_what_is_rewritten(name, before, after):
    definition = as_definition(before)
    parts = Parts(frozenset({"norm"}), frozenset({"act"}), frozenset({"drop"}))
    names = Names(parts, {"F": F, "torch": torch}, frozenset())
    rewrite(names, definition)
    rewritten = ast.unparse(ast.fix_missing_locations(definition))
    for added, shown in (("unetgn_scale", "scale_"), ("unetgn_shift", "shift_"), ("unetgn_", "")):
        rewritten = rewritten.replace(added, shown)
    assert rewritten == ast.unparse(as_definition(after)) != ast.unparse(as_definition(before))


def test_every_rewriting_has_an_example():
    named = [name for name, _, _ in examples()]
    assert {name: named.count(name) for name in named} == {
        "pass_by_position": 1,
        "visit_Call": 3,
        "fuse_read_once": 1,
        "take_in_condition": 1,
        "visit_BinOp": 1,
        "push_norm": 1,
        "fuse_with_norm_before": 5,
        "take_apart": 1,
        "sink_activations": 1,
        "take_in_additions": 2,
    }
    assert len(named) == sum(inspect.getsource(module).count("Before::") for module in REWRITINGS)


@pytest.mark.parametrize("block", FOUND)
def test_the_pairs_of_a_forward_are_found(block):
    assert fused(block()) == FOUND[block]


@pytest.mark.parametrize("block", NOTHING)
def test_what_is_no_pair_is_left(block):
    assert fused(block()) == ()


@pytest.mark.parametrize("block", [*FOUND, *NOTHING])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_rewritten_forward_computes_the_same(block, sign):
    torch.manual_seed(1)
    module = block().double()
    x, emb = inputs()
    expected = module(x.clone(), sign * emb)
    fused(module)
    torch.testing.assert_close(module(x, sign * emb), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("block", FOUND)
def test_each_pair_that_runs_is_one_call_of_the_operator(block, calls):
    module = block().double()
    fused(module)
    module(*inputs())
    ran = 1 if block is InABranchOfALoop else len(FOUND[block])
    if block is not ActivationAfterTheBranches:  # which branch runs depends on the numbers
        assert len(calls) == ran


@pytest.mark.parametrize(
    ("block", "inside"),
    [(AdditionBefore, {"pre_bias"}), (AdditionUnderACondition, {"pre_bias"}), (ScaleShift, {"scale", "shift"})],
)
def test_what_is_constant_over_space_goes_into_the_operator(block, inside, calls):
    module = block().double()
    fused(module)
    module(*inputs())
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
    """Takes something beside its input."""

    def forward(self, x, gate):
        return super().forward(x) * gate


@norm_rule(lambda cls: cls is Gated, uses=("super", "forward"))
def gated(norm, x, gate):
    return F.silu(norm(x, gate))


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
    for change in (lambda _: (), fused):
        norms = change(module)
        torch.manual_seed(2)
        results.append(module(*inputs()))
    assert norms == ("norm1",)
    assert torch.equal(*results)


def test_a_norm_of_which_some_calls_are_not_fused_is_reported_so():
    class Twice(Base):
        def forward(self, x, emb):
            x = self.act(self.norm1(x))
            return self.norm1(x)

    unetgn.fuse.read(Twice)
    report = unetgn.fuse(Twice())
    assert [place.only for place in report.fused] == ["only where SiLU comes right after it: 1 of its 2 calls"]
    assert "1 of its 2 calls" in str(report)


def test_a_norm_whose_sum_with_something_is_activated_is_reported_so():
    assert reasons(ResidualBetween())["norm1"] == "SiLU is taken of `h + x`, not of its result alone"


def test_what_would_widen_the_dtype_stays_outside_of_the_operator(calls):
    module = AdditionBefore()
    x, emb = inputs(torch.float32)
    half = module.conv.half()(x.half())
    expected = F.silu(module.norm1(half + module.proj(emb)[:, :4, None, None])) + x.half()
    fused(module)
    torch.testing.assert_close(module(x.half(), emb), expected)
    assert calls[0]["pre_bias"] is None


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool], ids=str)
@pytest.mark.parametrize(("block", "names"), [(AddedTensor, {"pre_bias"}), (ScaledTensor, {"scale", "shift"})])
def test_whole_numbers_and_truth_values_stay_outside_of_the_operator(block, names, dtype, calls):
    x, _ = inputs()
    numbers = torch.arange(8).view(2, 4, 1, 1).to(dtype)
    module = block().double()
    expected = module(x, numbers)
    fused(module)
    torch.testing.assert_close(module(x, numbers), expected, rtol=1e-12, atol=1e-12)
    assert not names & {name for name, value in calls[0].items() if value is not None}


def test_a_forward_that_closes_over_its_class_and_functions_is_rewritten_with_them(calls):
    factor, act = 2.0, F.silu

    class Inner(Base):
        def forward(self, x):
            return factor * self.conv(x)

    class Outer(Inner):
        def forward(self, x):
            return super().forward(act(self.norm1(x)))

    module, (x, _) = Outer().double(), inputs()
    expected = module(x)
    assert fused(module) == ("norm1",)
    torch.testing.assert_close(module(x), expected, rtol=1e-12, atol=1e-12)
    factor = 3.0
    torch.testing.assert_close(module(x), 1.5 * expected, rtol=1e-12, atol=1e-12)
    assert len(calls) == 2


def test_a_forward_without_source_is_left_and_the_report_says_so():
    made: dict = {}
    exec("def forward(self, x):\n    x = self.norm1(x)\n    x = self.act(x)\n    return x", made)
    assert "source" in reasons(type("Made", (Base,), made)())["norm1"]


def test_errors_in_a_rewritten_forward_point_at_the_line_of_its_author():
    module = TwoSteps()
    fused(module)
    lines, first = inspect.getsourcelines(TwoSteps.forward)
    with pytest.raises(RuntimeError) as caught:
        module(torch.randn(1, 4, 2), None)  # an image without its width: the convolution refuses it
    frames = [entry for entry in caught.traceback if str(entry.path) == inspect.getfile(TwoSteps)]
    assert first < frames[-1].lineno + 1 < first + len(lines)
