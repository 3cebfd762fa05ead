"""Tests that a fused model goes on computing what its forwards say, whatever is replaced, hooked or patched later.

And that modules which look like a norm, SiLU or nothing on the day of the trial are not believed for it.
"""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import unetgn
from tests.fusion.forwards import inputs

activation = F.silu


class Block(nn.Module):
    def __init__(self, norm: nn.Module | None = None, act: nn.Module | None = None) -> None:
        super().__init__()
        self.norm, self.act, self.drop = norm or nn.GroupNorm(2, 4), act or nn.SiLU(), nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(x))


class Permuted(Block):
    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        y = y.permute(0, 2, 3, 1)
        y = self.act(y)
        return y


class Later(Block):
    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        dropped = self.drop(x)
        return dropped + self.act(y)


class ByName(Block):
    def forward(self, x: Tensor) -> Tensor:
        return activation(self.norm(x))


class ByFunction(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(F.group_norm(x, 2, self.weight))


def replace_activation(act: nn.Module) -> Callable[[Any, Any], None]:
    return lambda block, _: setattr(block, "act", act)


def hook(block: Any, _: Any) -> None:
    block.act.register_forward_pre_hook(lambda _, args: (args[0].softmax(1),))


def plain_function(block: Any, _: Any) -> None:
    del block.norm
    block.norm = torch.tanh


def patch_name(_: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ByName.forward.__globals__, "activation", torch.tanh)


def patch_group_norm(_: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    group_norm = F.group_norm
    monkeypatch.setattr(F, "group_norm", lambda *args: 2 * group_norm(*args))


def patch_silu(_: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(F, "silu", torch.tanh)


CHANGES = [
    (Permuted, replace_activation(nn.Softmax(1))),
    (Permuted, replace_activation(nn.PReLU(3, dtype=torch.float64))),
    (Permuted, hook),
    (Later, replace_activation(nn.RReLU())),
    (Later, hook),
    (Block, plain_function),
    (ByName, patch_name),
    (ByFunction, patch_group_norm),
    (ByFunction, patch_silu),
]


@pytest.mark.parametrize(("kind", "change"), CHANGES)
def test_what_is_changed_after_fusing_is_what_runs(kind, change, monkeypatch):
    block = kind().double()
    fused = copy.deepcopy(block)
    assert len(unetgn.fuse(fused).fused) == 1
    x, _ = inputs()
    results = []
    for one in (block, fused):
        change(one, monkeypatch)
    for one in (block, fused):
        torch.manual_seed(1)
        results.append(one(x))
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)


class CallingNorm(nn.GroupNorm):
    def __call__(self, x: Tensor) -> Tensor:
        return 2 * super().__call__(x)


class CallingSiLU(nn.SiLU):
    def __call__(self, x: Tensor) -> Tensor:
        return 2 * super().__call__(x)


class Counting(nn.GroupNorm):
    def forward(self, x: Tensor, seen: list[Tensor] = []) -> Tensor:  # noqa: B006
        seen += [x]
        return super().forward(x) if seen[9:] == [] else x


class OfThreeTypes(nn.GroupNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.dtype == torch.float32 else x


class WithoutWeight(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.num_groups, self.eps, self.weight, self.bias = 2, 0.1, None, nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        if self.weight is None:
            return F.group_norm(x, self.num_groups, eps=self.eps)
        return F.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)


class Swish(nn.Module):
    def forward(self, x: Tensor, seen: list[Tensor] = []) -> Tensor:  # noqa: B006
        seen += [x]
        return x * torch.sigmoid(x) if seen[9:] == [] else x


PRETENDERS = {
    "a norm's __call__": (lambda: CallingNorm(2, 4), nn.SiLU),
    "an activation's __call__": (lambda: nn.GroupNorm(2, 4), CallingSiLU),
    "a default that counts": (lambda: Counting(2, 4), nn.SiLU),
    "other types": (lambda: OfThreeTypes(2, 4), nn.SiLU),
    "no weight": (WithoutWeight, nn.SiLU),
    "an activation that counts": (lambda: nn.GroupNorm(2, 4), Swish),
}


@pytest.mark.parametrize("name", PRETENDERS)
@pytest.mark.parametrize("container", [Block, nn.Sequential])
def test_what_pretends_to_be_a_norm_or_silu_is_left(name, container):
    model = container(*(make() for make in PRETENDERS[name])).double()
    x, _ = inputs()
    report = unetgn.fuse(model)
    results = []
    for change in (lambda _: None, unetgn.unfuse):
        change(model)
        results.append(model(x))
    assert not report.fused
    assert report.left
    torch.testing.assert_close(*results)


def test_a_norm_with_a_call_of_its_own_is_named():
    assert unetgn.fuse(Block(CallingNorm(2, 4))).left[0].reason == "CallingNorm has a __call__ of its own"


class Doubling(nn.Module):
    """Hands on what it is given in one mode of two."""

    def __init__(self, mode: str | None = None, drop_prob: float | None = None) -> None:
        super().__init__()
        self.mode, self.drop_prob = mode, drop_prob

    def forward(self, x: Tensor) -> Tensor:
        return 2 * x if self.mode or self.drop_prob else x


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("settings", [{"mode": "on"}, {"drop_prob": 0.5}])
def test_one_module_that_hands_on_its_input_says_nothing_of_others_of_its_class(settings, order):
    kind = type("Doubling", (Doubling,), {"forward": lambda self, x: Doubling.forward(self, x)})
    kind.forward = type(Doubling.forward)(Doubling.forward.__code__, Doubling.forward.__globals__)
    layers = [[nn.GroupNorm(2, 4), kind(**given), nn.SiLU()] for given in ({}, settings)][::order]
    model = nn.Sequential(*layers[0], *layers[1])
    x, _ = inputs(torch.float32)
    expected = model(x)
    assert len(unetgn.fuse(model).fused) == 1
    torch.testing.assert_close(model(x), expected)


class WeightsElsewhere(nn.GroupNorm):
    """Computes by a method of its own where the class says so, as ComfyUI's layers do."""

    cast_weights = False

    def forward_elsewhere(self, x: Tensor) -> Tensor:
        return F.group_norm(x, self.num_groups, 2 * self.weight, self.bias, self.eps)

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        if self.cast_weights:
            return self.forward_elsewhere(*args, **kwargs)
        return super().forward(*args, **kwargs)


class Elsewhere(WeightsElsewhere):
    cast_weights = True


class ElsewhereInDouble(WeightsElsewhere):
    def forward(self, x: Tensor) -> Tensor:
        return self.forward_elsewhere(x) if x.type() == "torch.DoubleTensor" else super().forward(x)


@pytest.mark.parametrize(("kind", "fused"), [(WeightsElsewhere, 1), (Elsewhere, 0), (ElsewhereInDouble, 0)])
def test_a_norm_with_a_way_of_its_own_is_fused_where_it_does_not_go_it(kind, fused):
    block, (x, _) = Block(kind(2, 4)).double(), inputs()
    expected = block(x)
    assert len(unetgn.fuse(block).fused) == fused
    torch.testing.assert_close(block(x), expected)
    block.norm.cast_weights = True
    torch.testing.assert_close(block(x), Block(Elsewhere(2, 4)).double()(x))


class DropoutInShiftThenScale(Block):
    def forward(self, x: Tensor) -> Tensor:
        ones = torch.ones(2, 4, 1, 1, dtype=x.dtype)
        return self.act(self.drop(ones) + self.norm(x) * (1 + self.drop(ones)))


class DropoutInScaleThenNorm(Block):
    def forward(self, x: Tensor) -> Tensor:
        return self.act((1 + self.drop(1.0 + torch.zeros(2, 4, 1, 1))) * self.norm(self.drop(x)) + 1)


class DropoutUnderACondition(Block):
    def forward(self, x: Tensor, scale: bool = True) -> Tensor:
        y = self.norm(x)
        if scale:
            y = self.drop(torch.ones(2, 4, 1, 1)) + y * (1 + self.drop(torch.ones(2, 4, 1, 1)))
        y = self.act(y)
        return y


@pytest.mark.parametrize("kind", [DropoutInShiftThenScale, DropoutInScaleThenNorm, DropoutUnderACondition])
def test_dropout_draws_in_the_order_of_the_forward(kind):
    block, (x, _) = kind().double(), inputs()
    results = []
    for change in (lambda _: None, unetgn.fuse):
        change(block)
        torch.manual_seed(1)
        results.append(block(x))
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)


@pytest.fixture
def from_file(tmp_path):
    """Return the function that makes a class of block from a file with the lines of its forward."""

    def make(*lines: str) -> type[nn.Module]:
        path = tmp_path / "file.py"
        path.write_text("\n".join(["class Theirs(Block):", "    def forward(self, x):", *lines, ""]))
        names = {"Block": Block, "__name__": "theirs"}
        exec(compile(path.read_text(), str(path), "exec", dont_inherit=True), names)
        return names["Theirs"]

    return make


@pytest.mark.parametrize(
    "lines",
    [
        ("        return self.act(self.norm(x)) * len('''two\n            lines''')",),
        ("        y = self.norm(x)", "#        y = 2 * y", "        return self.act(y)"),
    ],
)
def test_strings_and_comments_of_a_forward_may_begin_anywhere(lines, from_file):
    block, (x, _) = from_file(*lines)().double(), inputs()
    expected = block(x)
    assert len(unetgn.fuse(block).fused) == 1
    torch.testing.assert_close(block(x), expected, rtol=1e-12, atol=1e-12)


class Unavailable:
    def __getattr__(self, name: str) -> Any:
        raise RuntimeError("a package that is not installed")


package = Unavailable()


class WithAnOption(Block):
    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.norm(x))
        return package.attention(x) if self.norm is None else x


def test_a_package_that_raises_when_it_is_asked_for_a_part_is_no_hindrance():
    assert len(unetgn.fuse(WithAnOption()).fused) == 1


class Catching(Block):
    def forward(self, x: Tensor) -> Tensor:
        try:
            y = self.norm(x)
            self.drop(x).view(1, 2)
            y = self.act(y)
        except RuntimeError:
            return y
        return x


def test_a_handler_reads_what_the_norm_has_made():
    block, (x, _) = Catching().double(), inputs()
    expected = block(x)
    unetgn.fuse(block)
    torch.testing.assert_close(block(x), expected, rtol=1e-12, atol=1e-12)


class WithAWrongRule(Block):
    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(x))


def test_an_error_leaves_no_part_of_the_model_fused():
    unetgn.fuse.rule(WithAWrongRule, norms=("missing",))(lambda block, x: x)
    model = nn.Sequential(Block(), Permuted(), nn.Sequential(nn.GroupNorm(2, 4), nn.SiLU()), WithAWrongRule())
    unetgn.fuse(model[1])
    before = [vars(module).keys() for module in map(copy.copy, model.modules())]
    with pytest.raises(ValueError, match="missing"):
        unetgn.fuse(model)
    assert [vars(module).keys() for module in model.modules()] == before


def test_a_file_that_is_edited_between_two_calls_of_fuse_is_not_read_again(from_file, tmp_path):
    kind, (x, _) = from_file("        return self.act(self.norm(x))"), inputs(torch.float32)
    assert unetgn.fuse(kind()).fused
    path = tmp_path / "file.py"
    path.write_text(path.read_text().replace("self.norm(x))", "self.norm(x)) + 1"))
    block = kind()
    block.more = F.silu  # another set of activations, for which the forward is looked at again
    expected = block(x)
    assert unetgn.fuse(block).fused
    torch.testing.assert_close(block(x), expected)
