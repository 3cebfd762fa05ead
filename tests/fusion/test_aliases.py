"""A fused forward computes the same where one tensor has several names and something changes it in place.

The forwards are generated: which tensor has a second name, how it got it, what changes it, and where that happens.
"""

import copy
import itertools

import pytest
import torch
from torch import Tensor, nn

import unetgn
from tests import tensors
from tests.fusion.sources import maker

OTHER_NAMES = ["z = {}", "z = {}.view(2, 4, 9)", "z, _ = {}, 0", "z = [{}][0]", "z = self.same({})", "z = {}[:]"]
CHANGES = ["self.relu(z)", "z.mul_(2)", "z *= 2", "F.silu(z, inplace=True)", "w = z\nself.relu(w)", "self.silu(z)"]
# Where `OTHER` stands a second name is given to what comes in braces, and `CHANGE` is where it is changed.
STEPS = {
    "before the norm": "h = self.conv(x)\nOTHER{h}\nCHANGE\nh = self.norm(h)\nh = self.act(h)\nreturn h",
    "between norm and SiLU": "h = self.norm(x)\nOTHER{h}\nCHANGE\nh = self.act(h)\nreturn h",
    "the input, between": "h = self.conv(x)\nOTHER{h}\nh = self.norm(h)\nCHANGE\nh = self.act(h)\nreturn h",
    "the input, later": "h = self.conv(x)\nOTHER{h}\nh = self.norm(h)\nh = self.act(h)\nCHANGE\nreturn h",
    "the result": "h = self.norm(x)\nOTHER{h}\nh = self.act(h)\nCHANGE\nreturn h",
    "after SiLU": "h = self.norm(x)\nh = self.act(h)\nOTHER{h}\nCHANGE\nreturn h",
    "what is added to": "h = self.conv(x)\nOTHER{h}\nh = h + emb\nh = self.norm(h)\nh = self.act(h)\nCHANGE\nreturn h",
    "the sum": "h = self.conv(x)\nh = h + emb\nOTHER{h}\nCHANGE\nh = self.norm(h)\nh = self.act(h)\nreturn h",
    "the argument": "OTHER{x}\nx = x + emb\nx = self.norm(x)\nx = self.act(x)\nCHANGE\nreturn x",
    "read once": "h = self.norm(x)\nOTHER{x}\nCHANGE\nreturn z.sum() + self.act(h)",
    "read once, of two": "h = self.norm(x)\nOTHER{h}\ny = x + emb\nCHANGE\nreturn y + self.act(h)",
}
# Here what changes it is an operand: CHANGED is a value that is made of it in place.
OPERANDS = {
    "scale": "h = self.conv(x)\nOTHER{h}\nh = self.norm(h)\nh = h * (1 + CHANGED) + emb\nh = self.act(h)\nreturn h",
    "shift": "h = self.conv(x)\nOTHER{h}\nh = self.norm(h)\nh = h * (1 + emb) + CHANGED\nh = self.act(h)\nreturn h",
    "expression": "h = self.conv(x)\nOTHER{h}\nreturn F.silu(self.norm(h) * (1 + CHANGED) + emb)",
    "addcmul": "h = self.conv(x)\nOTHER{h}\nreturn F.silu(torch.addcmul(emb, self.norm(h), 1 + CHANGED))",
    "addend": "h = self.conv(x)\nOTHER{h}\nh = h + CHANGED\nh = self.norm(h)\nh = self.act(h)\nreturn h",
    "addend and scale": "h = self.conv(x)\nOTHER{h}\nh = h + emb\nh = self.norm(h)\n"
    "h = h * (1 + CHANGED) + emb\nh = self.act(h)\nreturn h",
    "test": "h = self.conv(x)\nOTHER{h}\nh = self.norm(h)\nif CHANGED.sum() > -1e9:\n  h = self.act(h)\nreturn h",
    "scale in a branch": "h = self.conv(x)\nOTHER{h}\nh = self.norm(h)\nif emb is not None:\n"
    "  h = h * (1 + CHANGED) + emb\nh = self.act(h)\nreturn h",
    "test of a scale": "h = self.conv(x)\nOTHER{h}\nh = self.norm(h)\nif CHANGED.sum() > -1e9:\n"
    "  h = h * (1 + emb) + emb\nh = self.act(h)\nreturn h",
    "kept by the module": "h = self.conv(x)\nself.kept = h\nh = self.norm(h)\n"
    "h = h * (1 + self.mean(self.relu(self.kept))) + emb\nh = self.act(h)\nreturn h",
    "kept by a function": "h = self.conv(x)\ny = h\nget = lambda: self.relu(y)\nh = self.norm(h)\n"
    "h = h * (1 + self.mean(get())) + emb\nh = self.act(h)\nreturn h",
}
MADE = ["self.mean(self.relu(z))", "self.mean(z.mul_(2))", "self.mean(F.relu(z, inplace=True))"]


class Mean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(2).mean(2)[:, :, None, None].detach()


class Block(nn.Module):
    def __init__(self, inplace: bool) -> None:
        super().__init__()
        self.norm, self.act, self.conv = nn.GroupNorm(2, 4), nn.SiLU(inplace), nn.Conv2d(4, 4, 1)
        self.relu, self.silu, self.same, self.mean = nn.ReLU(True), nn.SiLU(True), nn.Identity(), Mean()
        nn.init.normal_(self.norm.weight)


def forwards() -> list[str]:
    """Return the bodies of all forwards."""
    steps = itertools.product(STEPS.values(), OTHER_NAMES, CHANGES)
    operands = itertools.product(OPERANDS.values(), OTHER_NAMES, MADE)
    return list(dict.fromkeys(_filled(*parts) for parts in (*steps, *operands)))


def _filled(body: str, other: str, change: str) -> str:
    lines = []
    for line in body.splitlines():
        indent = " " * (len(line) - len(line.lstrip()))
        if line.strip().startswith("OTHER{"):
            line = other.format(line.strip()[6:-1])
        elif line.strip() == "CHANGE":
            line = change.replace("\n", f"\n{indent}")
        lines.append(line.replace("CHANGED", change))
    return "\n".join(lines)


def given() -> tuple[Tensor, Tensor]:
    """Return an image and what is added to it."""
    return tensors.noise(2, 4, 3, 3, dtype=torch.float64), tensors.noise(2, 4, 1, 1, dtype=torch.float64)


def outcome(block: nn.Module) -> list[Tensor] | None:
    """Return result and gradients; None where the backward pass is refused."""
    x, emb = given()
    x, emb = x.requires_grad_(), emb.requires_grad_()
    try:
        y = block(x * 1, emb)
        y.sin().sum().backward()
    except RuntimeError:  # a tensor that is saved for the backward pass was changed
        return None
    return [y.detach(), *(leaf.grad for leaf in (x, emb, *block.parameters()) if leaf.grad is not None)]


PARTS = 8


@pytest.mark.parametrize("part", [0, *(pytest.param(part, marks=pytest.mark.slow) for part in range(1, PARTS))])
@pytest.mark.parametrize("inplace", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_what_is_changed_by_another_name_is_what_the_original_sees(inplace, part, tmp_path):
    make, fused = maker(tmp_path), 0
    for body in forwards()[part::PARTS]:
        torch.manual_seed(0)
        block = make(Block, body, "x, emb")(inplace).double()
        twin = copy.deepcopy(block)
        fused += len(unetgn.fuse(twin).fused)
        with torch.no_grad():
            torch.testing.assert_close(twin(*given()), block(*given()), rtol=1e-10, atol=1e-10, msg=body)
        expected, got = outcome(block), outcome(twin)
        if expected is None:  # the original saves a tensor for its backward pass that the operator does without
            continue
        assert got is not None, body
        for one, other in zip(got, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10, msg=body)
    assert fused > 20


def test_forwards_are_generated():
    assert len(forwards()) > 500
