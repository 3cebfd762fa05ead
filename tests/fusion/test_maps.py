"""Tests norms that maps modulate, those of decoders: where the operator takes them in, and where it must not."""

import copy

import pytest
import torch
from diffusers.models.attention_processor import SpatialNorm
from torch import Tensor, nn
from torch.nn import functional as F

import unetgn
from benchmarks.fuse_watching import OperatorWatcher


class Block(nn.Module):
    """Normalizes with a modulation by zq, and takes SiLU, as a residual block of MoVQ's decoder."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.act = SpatialNorm(64, 3), nn.SiLU()

    def forward(self, x: Tensor, zq: Tensor) -> Tensor:
        return self.act(self.norm(x, zq))


def drawn(dtype: torch.dtype = torch.float64) -> tuple[Block, Tensor, Tensor]:
    torch.manual_seed(0)
    return Block().to(dtype), torch.randn(2, 64, 8, 8, dtype=dtype), torch.randn(2, 3, 4, 4, dtype=dtype)


def fused(block: Block) -> Block:
    twin = copy.deepcopy(block)
    assert [place.norm for place in unetgn.fuse(twin).fused] == ["norm"]
    return twin


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_operator_takes_the_maps_and_values_and_layout_stay(layout: torch.memory_format) -> None:
    block, x, zq = drawn()
    x, twin = x.contiguous(memory_format=layout).requires_grad_(), fused(block)
    with OperatorWatcher(twin) as watcher:
        y = twin(x, zq)
    assert watcher.reached
    expected = block(x, zq)
    torch.testing.assert_close(y, expected)
    assert y.stride() == expected.stride()
    dy = torch.randn_like(y)
    names = dict(block.named_parameters())
    found = torch.autograd.grad(y, [x, *(twin.get_parameter(name) for name in names)], dy)
    for got, want in zip(found, torch.autograd.grad(expected, [x, *names.values()], dy), strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("child", ["norm", "norm.norm_layer", "act"])
def test_with_a_hook_all_runs_as_written(child: str) -> None:
    block, x, zq = drawn()
    twin, seen = fused(block), []
    twin.get_submodule(child).register_forward_hook(lambda _, __, output: seen.append(output))
    with OperatorWatcher(twin) as watcher:
        y = twin(x, zq)
    assert not watcher.reached
    assert len(seen) == 1
    assert torch.equal(y, block(x, zq))


def test_maps_of_one_sample_are_spread_over_the_batch_as_before() -> None:
    block, x, zq = drawn()
    twin = fused(block)
    assert torch.equal(twin(x, zq[:1]), block(x, zq[:1]))


def test_small_factors_keep_their_digits_in_16_bits() -> None:
    block, x, zq = drawn(torch.bfloat16)
    with torch.no_grad():
        block.norm.conv_y.weight.mul_(1e-3)
        block.norm.conv_y.bias.fill_(0.01)
        block.norm.conv_b.weight.zero_()
        block.norm.conv_b.bias.zero_()
    exact = copy.deepcopy(block).double()(x.double(), zq.double())
    errors = [(net(x, zq).double() - exact).norm() / exact.norm() for net in (fused(block), block)]
    assert errors[0] < errors[1]  # of what is rounded more often


class Modulated(nn.Module):
    """Modulates by what it is given, in a forward that `fuse` rewrites."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(4, 64)

    def forward(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        return F.silu(self.norm(x) * (1 + scale) + shift)


@pytest.mark.parametrize("scale_of", ["a sample", "channels", "positions", "x", "x in float32"])
@pytest.mark.parametrize("shift_of", ["channels", "x"])
def test_whatever_a_modulation_is_spread_over_values_and_dtype_stay(scale_of: str, shift_of: str) -> None:
    torch.manual_seed(0)
    kinds = {"a sample": (2, 1, 1, 1), "channels": (2, 64, 1, 1), "positions": (2, 1, 8, 8), "x": (2, 64, 8, 8)}
    block, dtype = Modulated().double(), torch.float32 if scale_of.endswith("float32") else torch.float64
    x, shift = torch.randn(2, 64, 8, 8, dtype=torch.float64), torch.randn(kinds[shift_of], dtype=torch.float64)
    scale = torch.randn(kinds[scale_of.partition(" in")[0]], dtype=dtype)
    twin = copy.deepcopy(block)
    assert unetgn.fuse(twin).fused
    with OperatorWatcher(twin) as watcher:
        y = twin(x, scale, shift)
    inside = scale_of.partition(" in")[0] == shift_of
    assert bool(watcher.reached) == inside  # else SiLU comes after the operator
    torch.testing.assert_close(y, block(x, scale, shift))


@pytest.mark.parametrize("hooked", ["", "norm_layer", "norm_layer.norm_layer"])
def test_a_norm_with_a_cache_notes_that_it_ran_with_a_hook_or_without(hooked: str) -> None:
    from diffusers.models.autoencoders.autoencoder_kl_kvae_video import KVAECachedSpatialNorm3D

    class Cached(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = KVAECachedSpatialNorm3D(64, 3)

        def forward(self, x: Tensor, zq: Tensor, cache: dict) -> Tensor:
            return F.silu(self.norm(x, zq, cache))

    torch.manual_seed(0)
    block, caches = Cached().double(), ({"norm": {}}, {"norm": {}})
    twin = copy.deepcopy(block)
    assert unetgn.fuse(twin).fused
    seen: list[Tensor] = []
    if hooked:
        twin.norm.get_submodule(hooked).register_forward_hook(lambda _, __, output: seen.append(output))
    for frames in (3, 2):  # the first call enlarges its first frame by itself, the second has none such
        x, zq = (torch.randn(2, c, frames, 4, 4, dtype=torch.float64) for c in (64, 3))
        torch.testing.assert_close(twin(x, zq, caches[0]), block(x, zq, caches[1]))
        assert caches[0] == caches[1] == {"norm": {"mean": 1, "var": 1}}
    assert len(seen) == (2 if hooked else 0)
