"""Tests that blocks pass x through their norm where Triton computes: the same gradients as autograd's sum."""

import pytest
import torch
from torch import Tensor, nn

from tests.tensors import noise, randomized
from unetgn import UNet
from unetgn.nn import ResBlock, SelfAttention
from unetgn.nn.attention import AddedKVAttention, CrossAttention
from unetgn.nn.groups import NormConfig
from unetgn.nn.norm import GroupNormSiLU, with_shortcut
from unetgn.nn.transformer import SpatialTransformer
from unetgn.ops import autograd, dispatch

NORM = NormConfig(num_groups=2)


@pytest.fixture
def as_on_triton(monkeypatch):
    """Let modules believe that Triton computes, which this process need not be able to; PyTorch's kernels do."""
    monkeypatch.setattr(dispatch, "is_triton", lambda name, x: True)
    monkeypatch.setattr(dispatch, "resolve", lambda name, x: dispatch.aten)


def unet() -> nn.Module:
    return UNet(
        in_channels=8,
        out_channels=8,
        channels=(8, 16),
        depth=1,
        attention_levels=(1,),
        norm={"num_groups": 2},
        resample={"kind": "resblock"},
    )


def recomputing() -> nn.Module:
    block = ResBlock(8, 16, norm=NORM)
    block.recompute = True
    return block


CONTEXT = noise(1, 3, 5, seed=3)
MODULES = {  # how to make it, what it takes besides x, and how often x is passed through
    "resblock": (lambda: ResBlock(8, norm=NORM), (), 1),
    "wider resblock": (lambda: ResBlock(8, 16, norm=NORM), (), 1),
    "resblock that recomputes": (recomputing, (), 2),  # the second in the backward pass
    "resblock that resamples": (lambda: ResBlock(8, norm=NORM, resample="down"), (), 1),
    "self-attention": (lambda: SelfAttention(8, norm=NORM), (), 1),
    "attention without a norm": (lambda: SelfAttention(8, norm=None), (), 0),
    "cross-attention": (lambda: CrossAttention(8, 5, norm=NORM), (CONTEXT,), 1),
    "attention with added keys": (lambda: AddedKVAttention(8, 5, norm=NORM), (CONTEXT,), 1),
    "transformer": (lambda: SpatialTransformer(8, norm=NORM), (), 1),
    "unet": (unet, (torch.tensor([3]),), None),
}


def gradients(module: nn.Module, x: Tensor, others: tuple[Tensor, ...]) -> list[Tensor]:
    x = x.clone().requires_grad_()
    y = module(x * 1, *others)
    y = y.sample if isinstance(module, UNet) else y
    return list(torch.autograd.grad(y.square().sum(), [x, *module.parameters()]))


@pytest.mark.parametrize("name", MODULES)
def test_gradients_with_x_passed_through_are_those_without(monkeypatch, as_on_triton, name):
    make, others, times = MODULES[name]
    module, x = randomized(make(), dtype=torch.float64), noise(1, 8, 4, 4, seed=1)
    calls = []
    usual = autograd.apply_with_shortcut
    monkeypatch.setattr(autograd, "apply_with_shortcut", lambda *values: calls.append(1) or usual(*values))
    found, passed = gradients(module, x, others), len(calls)
    for norm in (part for part in module.modules() if isinstance(part, GroupNormSiLU)):
        norm.register_forward_hook(lambda *_: None)  # past which nothing is passed
    expected = gradients(module, x, others)
    blocks = [part for part in module.modules() if isinstance(part, ResBlock | SelfAttention)]
    assert passed == (len(blocks) if times is None else times)
    assert len(calls) == passed
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


class Watched(GroupNormSiLU):
    """Stands for a class of someone else's."""

    def forward(self, x):
        return super().forward(x) + 1


def is_passed(norm, x):
    y, shortcut = with_shortcut(norm, x)
    assert torch.equal(shortcut, x)
    return shortcut is not x, y


def test_modules_pass_x_through_only_their_own_norm_and_past_no_hook(as_on_triton):
    x = noise(2, 8, 3, 3, dtype=torch.float32).requires_grad_()
    norm = GroupNormSiLU(4, 8)
    passed, y = is_passed(norm, x)
    assert passed
    assert torch.equal(y, norm(x))
    assert with_shortcut(None, x) == (x, x)
    for other in (Watched(4, 8), nn.GroupNorm(4, 8), nn.Sequential(norm)):
        passed, y = is_passed(other, x)
        assert not passed
        assert torch.equal(y, other(x))
    seen = []
    hooks = {
        "register_forward_hook": lambda *_: seen.append("forward"),
        "register_forward_pre_hook": lambda *_: seen.append("before"),
        "register_full_backward_hook": lambda *_: None,
    }
    for register, hook in hooks.items():
        handle = getattr(norm, register)(hook)
        assert not is_passed(norm, x)[0]
        handle.remove()
    assert seen == ["forward", "before"]
    norm.forward = lambda x: x + 5
    passed, y = is_passed(norm, x)
    assert not passed
    assert torch.equal(y, x + 5)


def test_on_a_cpu_modules_do_not_pass_x_through():
    x = noise(2, 8, 3, 3, dtype=torch.float32).requires_grad_()
    assert with_shortcut(GroupNormSiLU(4, 8), x)[1] is x
