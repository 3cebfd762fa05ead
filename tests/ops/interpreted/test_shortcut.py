"""Tests that a block passes x through its norm on Triton's kernels. More blocks: tests/nn/test_shortcut.py."""

import torch

from tests.tensors import noise, randomized
from unetgn.nn import ResBlock
from unetgn.nn.groups import NormConfig
from unetgn.nn.norm import with_shortcut
from unetgn.ops import group_norm_silu_with_shortcut, implementation


def test_the_public_function_adds_in_the_kernel():
    x, dy, dshortcut = noise(1, 8, 4, 4), noise(1, 8, 4, 4, seed=1), noise(8, 1, 4, 4, seed=2).transpose(0, 1)
    found = []
    for name in ("triton", "reference"):
        leaf = x.clone().requires_grad_()
        with implementation(name):
            found += torch.autograd.grad(group_norm_silu_with_shortcut(leaf, 2), leaf, (dy, dshortcut))
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)


def test_a_block_passes_x_through_on_triton():
    block = randomized(ResBlock(8, norm=NormConfig(num_groups=2)), dtype=torch.float64)
    x = noise(1, 8, 4, 4).contiguous(memory_format=torch.channels_last).requires_grad_()
    leaves = [x, *block.parameters()]
    with implementation("triton"):
        assert with_shortcut(block.norm1, x)[1] is not x
        found = torch.autograd.grad(block(x).square().sum(), leaves)
    with implementation("reference"):
        assert with_shortcut(block.norm1, x)[1] is x
        expected = torch.autograd.grad(block(x).square().sum(), leaves)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
