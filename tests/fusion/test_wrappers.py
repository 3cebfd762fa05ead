"""Decorators around a forward go on running, or the block is left."""

import functools

import torch
import torch.nn.functional as F

import unetgn
from tests.fusion.forwards import Base, TwoSteps, inputs
from tests.fusion.models import CASES


def counted(forward):
    @functools.wraps(forward)
    def wrapper(self, *args, **kwargs):
        self.runs = getattr(self, "runs", 0) + 1
        return 2 * forward(self, *args, **kwargs)

    return wrapper


class Decorated(Base):
    @torch.no_grad()
    @counted
    def forward(self, x, emb):
        return F.silu(self.norm1(x))


def test_decorators_of_a_forward_go_on_running(calls):
    unetgn.fuse.read(Decorated)
    module = Decorated()
    x, emb = inputs(torch.float32)
    expected = module(x, emb)
    assert len(unetgn.fuse(module).fused) == 1
    got = module(x, emb)
    torch.testing.assert_close(got, expected)
    assert (module.runs, len(calls), got.requires_grad) == (2, 1, False)


def test_a_wrapper_put_around_a_class_later_goes_on_running(calls, monkeypatch):
    from diffusers.models.resnet import ResnetBlock2D

    monkeypatch.setattr(ResnetBlock2D, "forward", counted(ResnetBlock2D.forward))
    block = ResnetBlock2D(in_channels=8, groups=2, temb_channels=None)
    x = torch.randn(1, 8, 4, 4)
    expected = block(x, None)
    assert len(unetgn.fuse(block).fused) == 2
    torch.testing.assert_close(block(x, None), expected)
    assert (block.runs, len(calls)) == (2, 2)


class Hiding:
    """Wraps a method without holding it in a closure."""

    def __call__(self, module, *args):
        return 2 * self.__wrapped__(module, *args)

    def __get__(self, module, owner=None):
        return self if module is None else functools.partial(self, module)


def test_a_wrapper_that_hides_what_it_wraps_is_left_and_the_report_says_so():
    class Hidden(Base):
        forward = functools.wraps(TwoSteps.forward)(Hiding())

    unetgn.fuse.read(Hidden)
    module = Hidden()
    x, emb = inputs(torch.float32)
    expected = module(x, emb)
    report = unetgn.fuse(module)
    assert not report.fused
    assert any("wrapped in a way that hides it" in place.reason for place in report.left)
    assert torch.equal(module(x, emb), expected)


def test_the_scale_of_lora_layers_that_a_decorator_of_diffusers_applies_is_kept():
    from peft import LoraConfig, inject_adapter_in_model

    case = CASES["SD 1.5"]
    model = case.model().eval()
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["to_q", "conv1"], init_lora_weights=False), model)
    torch.manual_seed(1)
    given = case.inputs() | {"cross_attention_kwargs": {"scale": 0.3}}
    with torch.no_grad():
        expected = model(**given).sample
        assert len(unetgn.fuse(model).fused) == case.places
        torch.testing.assert_close(model(**given).sample, expected, rtol=1e-4, atol=1e-5)
