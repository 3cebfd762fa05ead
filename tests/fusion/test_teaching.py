"""Tests `fuse.rule` and `fuse.read`: what they hold for, when they take effect, and what they refuse."""

import functools

import pytest
import torch
from torch import Tensor, nn

import unetgn
from tests import tensors
from unetgn.fusion import norm_silu

noise = functools.partial(tensors.noise, dtype=torch.float32)


class Half(nn.Module):
    """Has two places: rewriting finds one, a rule knows both."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2, self.act = nn.GroupNorm(2, 4), nn.GroupNorm(2, 4), nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.norm1(x))
        y = [self.norm2(x)]
        return self.act(y[0])


X = noise(2, 4, 3, 3)


def test_a_rule_that_is_taught_after_a_first_fuse_takes_effect_at_the_next(calls):
    unetgn.fuse.read(Half)
    model = nn.ModuleList([Half()])
    expected = model[0](X)
    first = unetgn.fuse(model)
    assert ([place.norm for place in first.fused], [place.norm for place in first.left]) == (["norm1"], ["norm2"])
    assert unetgn.fuse(model) == first

    @unetgn.fuse.rule(Half)
    def half(block, x):
        return norm_silu(block.norm2, block.act, norm_silu(block.norm1, block.act, x))

    second = unetgn.fuse(model)
    assert ([place.norm for place in second.fused], second.left) == (["norm1", "norm2"], ())
    torch.testing.assert_close(model[0](X), expected)
    assert len(calls) == 2
    unetgn.unfuse(model)
    assert torch.equal(model[0](X), expected)


def test_a_rule_for_a_class_without_a_forward_of_its_own_does_not_hold_for_its_parent():
    class Chain(nn.Sequential):
        pass

    @unetgn.fuse.rule(Chain)
    def chain(block, x):
        return 7 * norm_silu(block[0], block[1], x)

    plain, taught = nn.Sequential(nn.GroupNorm(2, 4), nn.SiLU()), Chain(nn.GroupNorm(2, 4), nn.SiLU())
    expected = plain(X)
    unetgn.fuse(plain)
    unetgn.fuse(taught)
    torch.testing.assert_close(plain(X), expected)
    torch.testing.assert_close(taught(X), 7 * expected)


def test_a_class_that_inherits_its_forward_may_be_read():
    class Parent(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.act = nn.GroupNorm(2, 4), nn.SiLU()

        def forward(self, x):
            assert x.dim() == 4  # which pytest changes: the source is not what runs
            return self.act(self.norm(x))

    class Child(Parent):
        pass

    unetgn.fuse.read(Child)
    assert len(unetgn.fuse(Child()).fused) == 1
    assert not unetgn.fuse(Parent()).fused


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: unetgn.fuse.rule(nn.Sequential()), TypeError, "Sequential, not an instance of it"),
        (lambda: unetgn.fuse.rule(int), TypeError, "int is not"),
        (lambda: unetgn.fuse.rule(3), TypeError, "not 3"),
        (lambda: unetgn.fuse.rule(Half, norms="norm1"), TypeError, r'norms=\("norm1",\)'),
        (lambda: unetgn.fuse.rule(Half, method="_forward"), ValueError, "no method '_forward'"),
        (lambda: unetgn.fuse.read(Half()), TypeError, "Half, not an instance of it"),
        (lambda: unetgn.fuse.read("difusers"), ValueError, "not 'difusers'"),
        (lambda: unetgn.fuse.read("diffusers.models"), ValueError, "not 'diffusers.models'"),
        (lambda: unetgn.fuse.read(len), TypeError, "class or the name"),
        (lambda: unetgn.unfuse({}), TypeError, r"unfuse takes a torch\.nn\.Module .* not dict"),
    ],
)
def test_what_cannot_be_taught_is_refused_with_what_would_be_right(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_a_rule_that_lists_a_norm_that_is_not_there_is_refused_when_it_is_used():
    class Block(Half):
        def forward(self, x):
            return x

    unetgn.fuse.rule(Block, norms=("norm3",))(lambda block, x: x)
    with pytest.raises(ValueError, match="lists the norm 'norm3', which this Block does not have"):
        unetgn.fuse(Block())
