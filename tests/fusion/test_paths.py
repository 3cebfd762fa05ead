"""fuse follows a norm and a SiLU through containers, loops and local names of a forward."""

import copy

import pytest
import torch
from torch import nn

import unetgn
from tests.fusion.forwards import inputs
from tests.fusion.sources import maker

EXACT, ANY = "", "only where SiLU comes right after it: the forward takes it from a container by a name or number"
BODIES = {  # forwards, the norms of which SiLU is taken, and what the report says of these
    "return F.silu(self.norms['a'](x))": (["norms.a"], EXACT),
    "n = self.norms['a']\nreturn F.silu(n(x))": (["norms.a"], EXACT),
    "n = self.norm\nh = n(x)\nh = F.silu(h)\nreturn h": (["norm"], EXACT),
    "n, act = self.norm, self.act\nreturn act(n(x))": (["norm"], EXACT),
    "norms = self.norms\nn = norms['b']\nreturn self.act(n(x))": (["norms.b"], EXACT),
    "return self.act(self.part.norm(x))": (["part.norm"], EXACT),
    "h = self.listed[1](x)\nh = self.act(h)\nreturn h": (["listed.1"], EXACT),
    "return self.act(self.nested[0]['n'](x))": (["nested.0.n"], EXACT),
    "for n in self.listed:\n  x = F.silu(n(x))\nreturn x": (["listed.0", "listed.1"], ANY),
    "for i, n in enumerate(self.listed):\n  x = n(x)\n  x = self.act(x)\nreturn x": (["listed.0", "listed.1"], ANY),
    "for n, c in zip(self.listed, self.convs):\n  x = c(self.act(n(x)))\nreturn x": (["listed.0", "listed.1"], ANY),
    "for n in self.norms.values():\n  x = F.silu(n(x))\nreturn x": (["norms.a", "norms.b"], ANY),
    "for k, n in self.norms.items():\n  x = F.silu(n(x))\nreturn x": (["norms.a", "norms.b"], ANY),
    "for i in range(2):\n  x = self.convs[i](F.silu(self.listed[i](x)))\nreturn x": (["listed.0", "listed.1"], ANY),
    "i = 0\nmodules = self.mixed\nx = modules[i](x)\ni += 1\nreturn F.silu(modules[i](x))": (["mixed.1"], ANY),
    # look-alikes
    "n = self.norm\nn = self.other\nreturn F.silu(n(x))": ([], EXACT),
    "for n in self.convs:\n  x = F.silu(n(x))\nreturn x": ([], EXACT),
    "for n in self.listed[1:]:\n  x = F.relu(n(x))\nreturn x": ([], EXACT),
    "n = self.norms['a']\nh = n(x)\nreturn F.silu(h) + h": ([], EXACT),
    "act = self.relu\nreturn act(self.norm(x))": ([], EXACT),
    "h = self.norm(x)\nact = self.act\nz = act(h)\nreturn z": ([], EXACT),
    "h = self.norm(x)\nif x.sum() < 1e9:\n  act, other = self.act, self.other\nh = act(h)\nreturn h": ([], EXACT),
    "for act in [self.act]:\n  h = self.norm(x)\n  x = self.other(x)\n  h = act(h)\nreturn h": ([], EXACT),
}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.other, self.act, self.relu = nn.GroupNorm(2, 4), nn.Conv2d(4, 4, 1), nn.SiLU(), nn.ReLU()
        self.norms = nn.ModuleDict({"a": nn.GroupNorm(2, 4), "b": nn.GroupNorm(1, 4)})
        self.listed = nn.ModuleList([nn.GroupNorm(2, 4), nn.GroupNorm(4, 4)])
        self.convs = nn.ModuleList([nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)])
        self.mixed = nn.ModuleList([nn.Conv2d(4, 4, 1), nn.GroupNorm(2, 4)])
        self.nested = nn.ModuleList([nn.ModuleDict({"n": nn.GroupNorm(2, 4)})])
        self.part = nn.Module()
        self.part.norm = nn.GroupNorm(2, 4)
        for parameter in self.parameters():
            nn.init.normal_(parameter)


@pytest.mark.parametrize("body", BODIES)
def test_a_norm_is_fused_however_the_forward_comes_by_it(body, tmp_path, calls):
    torch.manual_seed(0)
    block = maker(tmp_path)(Block, body)().double()
    twin, (x, _) = copy.deepcopy(block), inputs()
    report = unetgn.fuse(block)
    norms, only = BODIES[body]
    assert {(place.path, place.only) for place in report.fused} == {(norm, only) for norm in norms}
    everywhere = {name for name, module in block.named_modules() if isinstance(module, nn.GroupNorm)}
    assert sorted(place.path for place in (*report.fused, *report.left)) == sorted(everywhere)
    torch.testing.assert_close(block(x), twin(x), rtol=1e-12, atol=1e-12)
    assert len(calls) == len(norms)
    unetgn.unfuse(block)
    assert torch.equal(block(x), twin(x))
