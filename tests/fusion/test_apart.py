"""A norm and its SiLU may be apart: in two branches, in two iterations of a loop, or in the class above.

Forwards are drawn at random, from steps that bind a name and steps that read it, in branches and loops.
"""

import copy
import random

import pytest
import torch
from torch import nn

import unetgn
from tests.fusion.forwards import inputs
from tests.fusion.sources import maker

NORM, SILU = "t = self.norm(x)", "t = self.conv(self.act(t))\nx = x + t"  # every forward has these, and a few others
STEPS = [
    *("t = self.conv(x)", "t = self.act(t)", "x = x + t", "x = self.conv(x)", "t = x", "t = self.norm(t)", "t = 1 + t"),
    *("t = self.norm2(self.act(t))", "y = self.act(t)\ny.mul_(2)\nx = x + y", "if t is None:\n    x = -x", "t = -x"),
    *("t = F.silu(t)", "t = self.act(t)\nx = x + t", "x = self.act(t)"),
]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.norm2, self.act, self.conv = (
            nn.GroupNorm(2, 4),
            nn.GroupNorm(4, 4),
            nn.SiLU(),
            nn.Conv2d(4, 4, 1),
        )
        self.held = nn.ModuleDict({"norm": nn.GroupNorm(2, 4), "conv": nn.Conv2d(4, 4, 1)})
        self.also = nn.ModuleDict({"conv": nn.Conv2d(4, 4, 1)})
        for parameter in self.parameters():
            nn.init.normal_(parameter)


def drawn(rng: random.Random, steps: list[str], depth: int = 0) -> list[str]:
    """Draw some lines of a forward; conditions come from `coin`, which is drawn for each call."""
    lines: list[str] = []
    for _ in range(rng.randint(1, 4)):
        kind = rng.random()
        if depth < 3 and kind < 0.45:
            lines.append("for _ in range(3):" if kind < 0.2 else "if next(coin):")
            lines += [f"    {line}" for line in drawn(rng, steps, depth + 1)]
            if kind >= 0.3:
                lines += ["else:", *(f"    {line}" for line in drawn(rng, steps, depth + 1))]
        else:
            lines += rng.choice(steps).splitlines()
    return lines


def ran(block: nn.Module, x: torch.Tensor, seed: int) -> list[torch.Tensor]:
    """Run a forward with coins of a seed; return what it gives, and the gradient of its input."""
    coins = random.Random(seed)
    x = x.clone().requires_grad_()
    y = block(x, iter(lambda: coins.random() < 0.5, None))
    (gradient,) = torch.autograd.grad(y.square().sum(), x)
    return [y, gradient]


@pytest.mark.parametrize(
    ("first", "count"), [(0, 120), *(pytest.param(at, 400, marks=pytest.mark.slow) for at in (1000, 2000))]
)
def test_forwards_drawn_at_random_compute_the_same(first, count, tmp_path, calls):
    rng, make, taken = random.Random(first), maker(tmp_path), 0
    x, _ = inputs()
    for number in range(count):
        steps = [NORM, SILU, *rng.sample(STEPS, rng.randint(0, 2))]
        body = "\n".join(["t = x", *drawn(rng, steps), *rng.sample(["return x", "return x + t"], 1)])
        torch.manual_seed(number)
        block = make(Block, body, "x, coin")().double()
        twin = copy.deepcopy(block)
        if not unetgn.fuse(block).fused:
            continue
        calls.clear()
        for seed in range(2):
            for actual, expected in zip(ran(block, x, seed), ran(twin, x, seed), strict=True):
                assert (actual - expected).abs().max() <= 1e-9 * (1 + expected.abs().max()), body
        taken += bool(calls)
    assert taken > count / 5


BODIES = {  # forwards, and how often they call the operator
    "for k, m in self.held.items():\n  if k == 'norm':\n    t = m(x)\n  else:\n"
    "    t = m(self.act(t))\n    x = x + t\nreturn x": 1,
    "for m in self.also.values():\n  x = m(x)\nfor k, m in self.held.items():\n"
    "  if k == 'norm':\n    t = m(x)\n  else:\n    t = m(self.act(t))\n    x = x + t\nreturn x": 1,
    "if x.sum() < 1e9:\n  t = self.norm(x)\nelse:\n  t = x\nx = self.conv(x)\nt = self.act(t)\nreturn x + t": 1,
    "t = x\nfor i in range(4):\n  if i % 2 == 0:\n    t = self.norm(x)\n  else:\n    t = self.act(t)\n"
    "    x = x + t\nreturn x": 2,
    # what may not be taken early
    "if x.sum() < 1e9:\n  t = self.norm(x)\nelse:\n  t = x\nreturn t + self.act(t)": 0,
    "if x.sum() < 1e9:\n  t = self.norm(x)\nelse:\n  t = x\nx = self.act(t)\nreturn x + t": 0,
    "for i in range(2):\n  if i:\n    x = self.conv(self.act(t))\n  t = self.norm(x)\nreturn x + t": 0,
    "for i in range(2):\n  if i == 0:\n    t = self.norm(x)\n  else:\n    y = self.act(t)\n"
    "    x = x + t.mul_(2) + y\nreturn x": 0,
    "for i in range(2):\n  if i == 0:\n    t = self.norm(x)\n  else:\n    t = self.conv(self.act(t)) + t\nreturn t": 0,
    "for i in range(2):\n  if i == 0:\n    t = self.norm(x)\n  else:\n    t = self.act(t)\nreturn t": 0,
    "t = x\nfor i in range(4):\n  if i == 1:\n    x = self.conv(x)\n    x = x + t\n  elif i % 2:\n    t = self.act(t)\n"
    "    x = x + t\n  else:\n    t = self.norm(x)\nreturn x": 0,
    "f = lambda: t\nfor i in range(2):\n  if i == 0:\n    t = self.norm(x)\n    x = x + f()\n  else:\n"
    "    t = self.act(t)\n    x = x + t\nreturn x": 0,
    "for i in range(3):\n  if i == 0:\n    t = self.norm(x)\n  elif i == 1:\n    x = self.act(t)\n  else:\n"
    "    t = t.relu()\n    x = x + t\nreturn x": 0,
    "for i in range(3):\n  if i == 0:\n    t = self.norm(x)\n  elif i == 1:\n    t = self.act(t)\n  else:\n"
    "    t = F.silu(t)\n    x = x + t\nreturn x": 0,
    "t = self.norm(x)\ntry:\n  if x.sum() < 1e9:\n    t = self.act(t)\nexcept ValueError:\n  pass\nreturn t": 0,
}


@pytest.mark.parametrize("body", BODIES)
def test_silu_is_taken_early_where_nothing_else_reads_the_norm(body, tmp_path, calls):
    torch.manual_seed(0)
    block = maker(tmp_path)(Block, body)().double()
    twin, (x, _) = copy.deepcopy(block), inputs()
    unetgn.fuse(block)
    torch.testing.assert_close(block(x), twin(x), rtol=1e-12, atol=1e-12)
    assert len(calls) == BODIES[body]
    unetgn.unfuse(block)
    assert torch.equal(block(x), twin(x))


ABOVE = {  # a forward, and that of its subclass
    "plain": ("return self.act(self.norm(x))", "return 2 * super().forward(x)"),
    "by name": ("return self.act(self.norm(x))", "return 2 * super(Theirs, self).forward(x=x)"),
    "twice": ("return self.act(self.norm(x))", "return super().forward(super().forward(x))"),
    "its own, too": ("return self.act(self.norm(x))", "x = super().forward(x)\nreturn self.act(self.norm2(x))"),
    "under a condition": ("return self.act(self.norm(x))", "if x.sum() < 1e9:\n  x = super().forward(x)\nreturn x"),
}


@pytest.mark.parametrize("kind", ABOVE)
@pytest.mark.parametrize("levels", [1, 2])
def test_a_forward_is_followed_into_that_of_the_class_above(kind, levels, tmp_path, calls):
    torch.manual_seed(0)
    make, (body, below) = maker(tmp_path), ABOVE[kind]
    cls = make(Block, body)
    for _ in range(levels):
        cls = make(cls, below)
    block, (x, _) = cls().double(), inputs()
    twin = copy.deepcopy(block)
    report = unetgn.fuse(block)
    expected = twin(x)
    assert {place.norm for place in report.fused} == ({"norm", "norm2"} if kind == "its own, too" else {"norm"})
    for one in (block, copy.deepcopy(block)):
        torch.testing.assert_close(one(x), expected, rtol=1e-12, atol=1e-12)
    assert len(calls) == 2 * {"twice": 2**levels, "its own, too": 1 + levels}.get(kind, 1)
    assert unetgn.fuse(block) == report
    unetgn.unfuse(block)
    assert torch.equal(block(x), expected)


def test_the_class_above_is_that_of_the_modules_class(tmp_path):
    make, (x, _) = maker(tmp_path), inputs()
    first = make(Block, "return self.act(self.norm(x))")
    left = make(first, "return 2 * super().forward(x)")
    right = make(first, "return self.conv(self.act(self.norm2(x)))")
    both = type("Both", (left, right), {})
    for cls, norms in ((left, ["norm"]), (both, ["norm2"])):
        torch.manual_seed(0)
        block = cls().double()
        expected = block(x)
        assert [place.norm for place in unetgn.fuse(block).fused] == norms
        torch.testing.assert_close(block(x), expected, rtol=1e-12, atol=1e-12)


def test_decorators_of_the_class_above_stay(tmp_path):
    make, (x, _) = maker(tmp_path), inputs()
    above = make(Block, "return self.act(self.norm(x))")
    above.forward = torch.no_grad()(above.forward)
    block = make(above, "return 2 * super().forward(x)")().double()
    assert [place.norm for place in unetgn.fuse(block).fused] == ["norm"]
    assert not block(x.requires_grad_()).requires_grad


def test_a_hook_on_a_part_of_the_class_above_is_called(tmp_path):
    make, (x, _) = maker(tmp_path), inputs()
    block = make(make(Block, "return self.act(self.norm(x))"), "return 2 * super().forward(x)")().double()
    unetgn.fuse(block)
    block.norm.register_forward_hook(lambda norm, args, y: 3 * y)
    torch.testing.assert_close(block(x), 2 * block.act(block.norm(x)), rtol=1e-12, atol=1e-12)


DROPPED = {
    "steps": "x = self.norm(x)\nx = self.drop(x)\nx = self.act(x)\nreturn x",
    "expression": "return self.act(self.drop(self.norm(x)))",
    "two of them": "return self.conv(self.act(self.same(self.drop(self.norm(x)))))",
    "after branches": "if x.sum() < 1e9:\n  x = self.norm(x)\nelse:\n  x = -x\n"
    "x = self.drop(x)\nx = self.act(x)\nreturn x",
    "with a layout": "x = self.norm(x)\nx = self.drop(x)\nx = x.flatten(2)\nx = self.act(x)\nreturn x",
    "with a scale-shift": "y = self.norm(x)\ny = y * (1 + self.conv.bias[:, None, None]) + 1\n"
    "y = self.drop(y)\ny = self.act(y)\nreturn y",
    "its own group norm": "x = F.group_norm(x, 2, self.norm.weight)\nx = self.drop(x)\nreturn self.act(x)",
}


class Dropping(Block):
    def __init__(self) -> None:
        super().__init__()
        self.drop, self.same = nn.Dropout(0.0), nn.Identity()


CHANGES = [
    lambda block: None,
    lambda block: setattr(block.drop, "p", 0.5),
    lambda block: setattr(block, "drop", nn.Threshold(0.5, -1.0)),
    lambda block: block.drop.register_forward_hook(lambda drop, args, y: y + 1),
    lambda block: setattr(block, "act", nn.Tanh()),
    lambda block: block.act.register_forward_pre_hook(lambda act, args: (3 * args[0],)),
]


def assert_equal_after(change, block, twin, x):
    """Change both, and compare their results; dropout draws the same in both."""
    results = []
    for one in (block, twin):
        change(one)
        torch.manual_seed(1)
        results.append(one(x))
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("body", DROPPED)
def test_what_hands_on_between_norm_and_silu_may_change_later(body, tmp_path, calls):
    torch.manual_seed(0)
    original, (x, _) = maker(tmp_path)(Dropping, DROPPED[body])().double(), inputs()
    for number, change in enumerate(CHANGES):
        block, twin = copy.deepcopy(original), copy.deepcopy(original)
        assert len(unetgn.fuse(block).fused) == (0 if body == "its own group norm" else 1)
        calls.clear()
        assert_equal_after(change, block, twin, x)
        assert number or bool(calls) == (body != "its own group norm")


class NormDropAct(nn.GroupNorm):
    """Takes drop and activation in, as timm's GroupNormAct does, and has a second way to compute."""

    def __init__(self, fast: bool = False) -> None:
        super().__init__(2, 4)
        self.fast, self.drop, self.act = fast, nn.Identity(), nn.SiLU(True)
        nn.init.normal_(self.weight)

    def forward(self, x):
        if self.fast:
            x = torch.layer_norm(x, x.shape[1:])
        else:
            x = nn.functional.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)
        x = self.drop(x)
        x = self.act(x)
        return x


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("change", CHANGES)
def test_a_norm_with_drop_and_activation_within_is_fused(fast, change, calls):
    x, _ = inputs()
    block = NormDropAct(fast).double()
    block.drop = nn.Dropout(0.0)
    twin = copy.deepcopy(block)
    assert [place.path for place in unetgn.fuse(nn.Sequential(block)).fused] == ["0"]
    assert_equal_after(change, block, twin, x)
    assert fast or change is not CHANGES[0] or len(calls) == 1
