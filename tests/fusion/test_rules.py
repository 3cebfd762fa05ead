"""Tests what `fuse` takes and leaves by rule: blocks of one's own, subclasses, Sequentials, norms of other names."""

import functools
import importlib
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import unetgn
from tests import tensors
from tests.fusion.forwards import inputs
from unetgn.fusion import norm_silu

noise = functools.partial(tensors.noise, dtype=torch.float32)


class Taught(nn.Module):
    """Is unknown to fuse until a test teaches it: what the norm makes is called in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.act, self.conv, self.proj = nn.GroupNorm(2, 4), nn.SiLU(), nn.Conv2d(4, 4, 1), nn.Linear(3, 4)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        normed = [self.norm(x + self.proj(emb)[:, :, None, None])]
        return x + self.conv(self.act(normed[0]))


class Read(nn.Module):
    """Has a forward that may be read, once a test says so."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(2, 4)

    def forward(self, x: Tensor) -> Tensor:
        assert x.dim() == 4
        return F.silu(self.norm(x))


class GroupNorm32(nn.GroupNorm):
    """Computes in float32, whatever comes in, as guided-diffusion's and CompVis's does."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.float()).type(x.dtype)


class DoubledGroupNorm(nn.GroupNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


class SiLU(nn.Module):
    """Computes SiLU as it was written before PyTorch had one."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(x)


class Swish(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


DROPOUT, SHARED_SILU = nn.Dropout(0.5), nn.SiLU()


def test_a_user_teaches_a_block_of_their_own(calls):
    block = nn.ModuleDict({"first": Taught(), "second": Taught()})
    x, emb = inputs(torch.float32)
    expected = block["first"](x, emb)
    before = unetgn.fuse(block)
    assert not before.fused
    assert {place.path for place in before.left} == {"first.norm", "second.norm"}

    @unetgn.fuse.rule(Taught)
    def taught(block, x, emb):
        added = block.proj(emb)[:, :, None, None]
        return x + block.conv(norm_silu(block.norm, block.act, x, pre_bias=added))

    report = unetgn.fuse(block)
    assert {place.path for place in report.fused} == {"first.norm", "second.norm"}
    torch.testing.assert_close(block["first"](x, emb), expected)
    assert len(calls) == 1


def test_a_user_lets_fuse_read_a_forward_that_is_not_what_its_source_says(calls):
    """pytest changes the assert of `Read`, as an edit after the import would."""
    block = Read()
    x, _ = inputs(torch.float32)
    before = unetgn.fuse(block)
    assert not before.fused
    assert "not what runs: unetgn.fuse.read(Read)" in before.left[0].reason
    assert unetgn.fuse.read(Read) is Read
    assert len(unetgn.fuse(block).fused) == 1
    torch.testing.assert_close(block(x), F.silu(block.norm(x)))
    assert len(calls) == 1


def test_a_subclass_with_a_forward_of_its_own_is_left_and_the_report_says_so(calls):
    from diffusers.models.resnet import ResnetBlock2D

    class Mine(ResnetBlock2D):
        def forward(self, input_tensor, temb):
            return 2 * ResnetBlock2D.forward(self, input_tensor, temb)

    class Inheriting(ResnetBlock2D):
        pass

    settings = {"in_channels": 8, "groups": 2, "temb_channels": 3}
    mine, inheriting = Mine(**settings), Inheriting(**settings)
    x, emb = noise(2, 8, 4, 4), noise(2, 3)
    expected = mine(x, emb)
    report = unetgn.fuse(mine)
    assert not report.fused
    assert {place.norm for place in report.left} == {"norm1", "norm2"}
    assert all(place.reason == "Mine has a forward of its own in place of ResnetBlock2D's" for place in report.left)
    assert torch.equal(mine(x, emb), expected)
    assert not calls
    assert len(unetgn.fuse(inheriting).fused) == 2


def test_a_block_without_silu_is_left():
    from diffusers.models.resnet import ResnetBlock2D

    report = unetgn.fuse(ResnetBlock2D(in_channels=8, groups=2, temb_channels=3, non_linearity="mish"))
    assert not report.fused
    assert len(report.left) == 2


def test_a_model_in_which_nothing_can_be_fused_says_so():
    model = nn.Sequential(nn.Linear(3, 3), nn.SiLU())
    report = unetgn.fuse(model)
    assert (report.fused, report.left) == ((), ())
    assert str(report) == "Sequential: nothing to fuse, there is no group norm in it"
    assert "forward" not in vars(model)


def test_what_is_no_module_is_refused():
    with pytest.raises(TypeError, match=r"pipeline\.unet, not dict"):
        unetgn.fuse({})


def test_unfusing_what_is_not_fused_changes_nothing():
    model = nn.Sequential(nn.GroupNorm(2, 4), nn.SiLU())
    attributes = dict(vars(model))
    unetgn.unfuse(model)
    assert vars(model) == attributes


@pytest.mark.parametrize(
    ("layers", "places"),
    [
        ([nn.GroupNorm(2, 4), nn.SiLU()], 1),
        ([nn.Conv2d(4, 4, 1), nn.GroupNorm(2, 4), nn.SiLU(inplace=True), nn.Conv2d(4, 4, 1)], 1),
        ([nn.GroupNorm(4, 4, affine=False), nn.SiLU(), nn.GroupNorm(1, 4), nn.SiLU()], 2),
        ([GroupNorm32(2, 4), SiLU()], 1),
        ([nn.GroupNorm(2, 4), nn.ReLU()], 0),
        ([nn.GroupNorm(2, 4), nn.Dropout(0.5), nn.SiLU()], 0),
        ([nn.SiLU(), nn.GroupNorm(2, 4)], 0),
        ([nn.BatchNorm2d(4), nn.SiLU()], 0),
        ([DoubledGroupNorm(2, 4), nn.SiLU()], 0),
        ([nn.GroupNorm(2, 4), Swish()], 0),
        ([DROPOUT, nn.GroupNorm(2, 4), DROPOUT, nn.SiLU()], 0),
        ([nn.GroupNorm(2, 4), SHARED_SILU, nn.Conv2d(4, 4, 1), nn.GroupNorm(2, 4), SHARED_SILU], 2),
    ],
    ids=lambda value: "-".join(type(layer).__name__ for layer in value) if isinstance(value, list) else str(value),
)
def test_a_sequential_is_fused_where_silu_is_the_norms_neighbour(layers, places, calls):
    model = nn.Sequential(*layers).eval()
    x, _ = inputs(torch.float32)
    expected = model(x)
    assert len(unetgn.fuse(model).fused) == places
    torch.testing.assert_close(model(x), expected)
    assert len(calls) == places


def test_a_sequential_that_its_owner_takes_apart_gives_its_parts():
    class Owner(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.Sequential(nn.GroupNorm(2, 4), nn.SiLU())

        def forward(self, x):
            norm, act = self.layers
            return act(norm(x) * 2)

    model = Owner()
    x, _ = inputs(torch.float32)
    expected = model(x)
    unetgn.fuse(model)
    assert torch.equal(model(x), expected)


def test_a_float32_group_norm_is_fused_in_sixteen_bits_with_no_more_error():
    torch.manual_seed(0)
    model = nn.Sequential(GroupNorm32(2, 4), nn.SiLU())
    x = noise(2, 4, 9, 9, dtype=torch.bfloat16)
    exact = F.silu(F.group_norm(x.double(), 2))
    original = model(x)
    unetgn.fuse(model)
    assert model(x).dtype == original.dtype == torch.bfloat16
    assert (model(x) - exact).norm() <= (original - exact).norm()


def test_a_version_that_a_rule_does_not_know_is_left():
    class Changed(Taught):
        def forward(self, x, emb):
            return self.conv(self.act(self.norm(x))) * self.new_gate

    @unetgn.fuse.rule(Changed, uses=("norm", "act", "conv"))
    def changed(block, x, emb):
        return block.conv(norm_silu(block.norm, block.act, x))

    report = unetgn.fuse(Changed())
    assert not report.fused
    assert report.left[0].reason.endswith("Changed.forward uses new_gate, which its rule does not know")


def test_a_block_shared_by_two_parents_is_one_place():
    shared = nn.Sequential(nn.GroupNorm(2, 4), nn.SiLU())
    model = nn.ModuleDict({"a": nn.ModuleList([shared]), "b": nn.ModuleList([shared])})
    assert [place.path for place in unetgn.fuse(model).fused] == ["a.0.0"]


def test_a_norm_shared_by_two_blocks_is_two_places(calls):
    norm = nn.GroupNorm(2, 4)
    model = nn.Sequential(nn.Sequential(norm, nn.SiLU()), nn.Sequential(norm, nn.SiLU()))
    assert [place.path for place in unetgn.fuse(model).fused] == ["0.0", "1.0"]
    model(inputs(torch.float32)[0])
    assert len(calls) == 2


def test_the_norm_before_attention_projections_keeps_its_values_bit_for_bit():
    from diffusers.models.attention_processor import Attention

    torch.manual_seed(0)
    attention = Attention(8, heads=2, dim_head=4, norm_num_groups=2, residual_connection=True, bias=True)
    x = noise(2, 8, 3, 5)
    normed = attention.group_norm(x.flatten(2))
    expected = attention(x)
    report = unetgn.fuse(attention)
    assert [(place.norm, "laid out once" in place.reason) for place in report.left] == [("group_norm", True)]
    assert torch.equal(attention.group_norm(x.flatten(2)), normed)
    assert attention.group_norm(x.flatten(2)).transpose(1, 2).is_contiguous()
    torch.testing.assert_close(attention(x), expected)
    assert not unetgn.fuse(attention.group_norm).fused
    unetgn.unfuse(attention)
    assert torch.equal(attention(x), expected)


def test_our_own_model_has_nothing_left_to_fuse():
    report = unetgn.fuse(unetgn.GroupNormSiLU(2, 4))
    assert (report.fused, report.left) == ((), ())


def test_the_report_prints_as_a_table_of_what_where_and_why():
    class Head(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.GroupNorm(2, 4)

        def forward(self, x):
            return self.norm(x)

    model = nn.ModuleDict({"body": nn.ModuleList([nn.Sequential(nn.GroupNorm(2, 4), nn.SiLU())] * 1), "head": Head()})
    lines = str(unetgn.fuse(model)).splitlines()
    assert lines[0] == "ModuleDict: 1 places fused, 1 group norms left as they are"
    assert lines[2].split() == ["fused", "Sequential", "0", "1", "body.0.0"]
    assert lines[3].split(maxsplit=5) == [
        *("left", "Head", "norm", "1", "head.norm"),
        "no SiLU comes right after it in the forward of Head",
    ]


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (
            nn.Sequential(nn.Sequential(nn.Conv2d(4, 4, 1), nn.GroupNorm(2, 4)), nn.SiLU()),
            "it is the last layer of its Sequential, and what comes after that is not looked at",
        ),
        (
            nn.Sequential(nn.GroupNorm(2, 4), nn.Dropout(), nn.SiLU()),
            "no SiLU that fuse knows comes right after it in Sequential, but Dropout",
        ),
        (
            nn.ModuleList([nn.GroupNorm(2, 4), nn.SiLU()]),
            "ModuleList has no forward, and SiLU is looked for in that of the module that holds the norm",
        ),
    ],
)
def test_the_report_says_what_comes_after_a_norm_in_the_place_of_silu(model, reason):
    assert [place.reason for place in unetgn.fuse(model).left] == [reason]


def test_importing_fuse_imports_no_library_that_it_has_rules_for(monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] in ("diffusers", "monai")]:
        monkeypatch.setitem(sys.modules, name, None)  # to import it is an error
    for name in [name for name in sys.modules if name.startswith("unetgn.fusion")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(unetgn, "fusion", None)
    again = importlib.import_module("unetgn.fusion")
    assert again.fuse is not unetgn.fuse


def test_a_model_is_fused_around_a_part_that_is_scripted():
    scripted = [torch.jit.script(layer) for layer in (nn.Conv2d(4, 4, 1), nn.SiLU())]
    model = nn.Sequential(scripted[0], nn.GroupNorm(2, 4), nn.SiLU(), nn.GroupNorm(2, 4), scripted[1])
    x, _ = inputs(torch.float32)
    expected = model(x)
    assert [place.path for place in unetgn.fuse(model).fused] == ["1"]
    torch.testing.assert_close(model(x), expected)
