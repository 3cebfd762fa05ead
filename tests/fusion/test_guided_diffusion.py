"""guided-diffusion's block is known by what it computes, not by the names that it uses."""

import functools

import pytest
import torch
from torch import Tensor, nn

import unetgn
from tests import tensors
from tests.fusion.guided import GuidedUNet, ResBlock

noise = functools.partial(tensors.noise, dtype=torch.float32)


class ShiftFirst(ResBlock):
    """Uses the same names, but shift is the first half of the embedding."""

    def _forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.in_layers(x)
        emb_out = self.emb_layers(emb).type(h.dtype)
        while len(emb_out.shape) < len(h.shape):
            emb_out = emb_out[..., None]
        norm, rest = self.out_layers[0], self.out_layers[1:]
        shift, scale = torch.chunk(emb_out, 2, dim=1)
        return self.skip_connection(x) + rest(norm(h) * (1 + scale) + shift)


class ScaledSum(ResBlock):
    def _forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.in_layers(x)
        emb_out = self.emb_layers(emb).type(h.dtype)
        while len(emb_out.shape) < len(h.shape):
            emb_out = emb_out[..., None]
        return (self.skip_connection(x) + self.out_layers(h + emb_out)) * 0.7071


class OtherNames(ResBlock):
    def _forward(self, h: Tensor, temb: Tensor) -> Tensor:
        added = self.emb_layers(temb).type(h.dtype)[..., None, None]
        return self.skip_connection(h) + self.out_layers(self.in_layers(h) + added)


def inputs() -> tuple[Tensor, Tensor]:
    """Return an image and an embedding for one block."""
    return noise(2, 16, 4, 4), noise(2, 16)


def block(kind: type[nn.Module] = ResBlock, scale_shift: bool = False) -> nn.Module:
    torch.manual_seed(0)
    return kind(16, 16, scale_shift, None, checkpointed=False).eval()


@pytest.mark.parametrize(("kind", "scale_shift"), [(ShiftFirst, True), (ScaledSum, False), (OtherNames, False)])
def test_a_copy_that_computes_something_else_keeps_its_numbers_and_the_report_says_so(kind, scale_shift):
    model = block(kind, scale_shift)
    expected = model(*inputs())
    report = unetgn.fuse(model)
    assert torch.equal(model(*inputs()), expected)
    assert not report.fused
    assert all("does not compute what guided-diffusion's block does" in place.reason for place in report.left)


def test_trying_a_block_out_leaves_the_random_numbers_alone():
    model = block(type("Fresh", (ResBlock,), {"_forward": ResBlock._forward}))
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    unetgn.fuse(model)
    assert torch.equal(torch.rand(1), expected)


def test_a_block_is_known_whatever_implementation_is_in_force():
    model = block(type("Fresh", (ResBlock,), {"_forward": ResBlock._forward}))
    with unetgn.ops.implementation("triton"):  # which has nothing for this machine's tensors
        assert len(unetgn.fuse(model).fused) == 2


def test_hooks_on_the_chains_of_layers_run_and_the_block_is_fused_again_without_them(calls):
    model, ran = block(), []
    unetgn.fuse(model)
    handles = [
        layers.register_forward_hook(lambda _m, _args, y, name=name: ran.append(name) or 2 * y)
        for name, layers in (("in", model.in_layers), ("out", model.out_layers))
    ]
    hooked = model(*inputs())
    assert ran == ["in", "out"]
    unetgn.unfuse(model)
    assert torch.equal(model(*inputs()), hooked)
    for handle in handles:
        handle.remove()
    unetgn.fuse(model)
    calls.clear()
    model(*inputs())
    assert len(calls) == 2


def test_a_block_with_other_layers_is_left():
    model = block(scale_shift=True)
    model.in_layers = nn.Sequential(nn.Identity())
    expected = model(*inputs())
    report = unetgn.fuse(model)
    assert [place.path for place in report.left] == ["out_layers.0"]
    assert "others than those of guided-diffusion" in report.left[0].reason
    assert torch.equal(model(*inputs()), expected)


def test_a_decorator_around_the_blocks_forward_goes_on_running(calls, monkeypatch):
    ran, original = [], ResBlock._forward

    @functools.wraps(original)
    def counting(self, x, emb):
        ran.append(1)
        return 2 * original(self, x, emb)

    monkeypatch.setattr(ResBlock, "_forward", counting)
    model = block()
    expected = model(*inputs())
    assert not unetgn.fuse(model).fused  # twice the block's sum is not what the rule computes
    assert torch.equal(model(*inputs()), expected)
    assert ran.count(1) >= 2


def test_a_part_that_was_fused_first_is_one_place_of_the_whole(calls):
    model = GuidedUNet(scale_shift=True).eval()
    x, emb = noise(2, 3, 8, 8), noise(2, 16)
    expected = model(x, emb)
    assert len(unetgn.fuse(model.down.in_layers).fused) == 1
    report = unetgn.fuse(model)
    assert len(report.fused) == len({place.path for place in report.fused}) == 7
    calls.clear()
    torch.testing.assert_close(model(x, emb), expected)
    assert len(calls) == 7


class WithOptions(ResBlock):
    """Takes options, as Forge's block, of which one word puts something else in the place of the norm."""

    def forward(self, x: Tensor, emb: Tensor, transformer_options: dict = {}) -> Tensor:  # noqa: B006
        return self._forward(x, emb, transformer_options)

    def _forward(self, x: Tensor, emb: Tensor, transformer_options: dict = {}) -> Tensor:  # noqa: B006
        h = self.in_layers(x)
        emb_out = self.emb_layers(emb).type(h.dtype)
        while len(emb_out.shape) < len(h.shape):
            emb_out = emb_out[..., None]
        norm, rest = self.out_layers[0], self.out_layers[1:]
        if "group_norm_wrapper" in transformer_options:
            h = transformer_options["group_norm_wrapper"](norm, h, transformer_options)
        else:
            h = norm(h)
        if self.use_scale_shift_norm:
            scale, shift = torch.chunk(emb_out, 2, dim=1)
            h *= 1 + scale
            h += shift
        else:
            h = h + emb_out
        return self.skip_connection(x) + rest(h)


class OtherOptions(WithOptions):
    def _forward(self, x: Tensor, emb: Tensor, transformer_options: dict = {}) -> Tensor:  # noqa: B006
        y = super()._forward(x, emb, transformer_options)
        return 2 * y if "twice" in transformer_options else y


@pytest.mark.parametrize("kind", [WithOptions, OtherOptions])
@pytest.mark.parametrize("options", [{}, {"sigmas": 1}, {"twice": 1}, {"group_norm_wrapper": lambda norm, h, _: h + 1}])
def test_options_of_a_block_are_asked_for_what_it_asks_them_for(kind, options, calls):
    model = block(kind, scale_shift=True)
    x, emb = inputs()
    expected = model(x, emb, options)
    unetgn.fuse(model)
    torch.testing.assert_close(model(x, emb, options), expected)
    torch.testing.assert_close(model(x, emb, transformer_options=options), expected)
    torch.testing.assert_close(model(x, emb), block(kind, scale_shift=True)(x, emb))
    if kind is WithOptions:
        assert len(calls) == (2 if "group_norm_wrapper" in options else 6)
