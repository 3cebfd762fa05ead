"""Grounds our U-Net in boxes as diffusers' own: GLIGEN's networks, in float64."""

from types import SimpleNamespace

import pytest
import torch
from diffusers import StableDiffusionGLIGENPipeline, UNet2DConditionModel

from benchmarks.reach_small import inputs
from tests.interop.test_diffusers import KANDINSKY, SMALL_CONTEXT, assert_close
from tests.tensors import noise, randomized
from unetgn import UNet
from unetgn.interop import to_diffusers

KINDS = ["gated", "gated-text-image"]
WIDE = {**SMALL_CONTEXT, "cross_attention_dim": (12, 12), "use_linear_projection": True, "attention_head_dim": 3}


def pair(kind, options=SMALL_CONTEXT):
    theirs = randomized(UNet2DConditionModel(**options, attention_type=kind), dtype=torch.float64).eval()
    return theirs, UNet.from_diffusers(theirs), inputs(theirs, origin=True)


@pytest.mark.parametrize("options", [SMALL_CONTEXT, WIDE])
@pytest.mark.parametrize("kind", KINDS)
def test_boxes_do_what_they_do_in_diffusers_and_come_back(kind, options):
    theirs, ours, given = pair(kind, options)
    back = to_diffusers(ours)
    plain = {**given, "cross_attention_kwargs": None}
    with torch.no_grad():
        expected, without = theirs(**given).sample, theirs(**plain).sample
        assert_close(ours(**given).sample, expected, 1e-10)
        scaled = {**given, "cross_attention_kwargs": {**given["cross_attention_kwargs"], "scale": 0.5}}
        assert_close(ours(**scaled).sample, expected, 1e-10)
        assert_close(ours(**plain).sample, without, 1e-10)
        assert torch.equal(back(**given).sample, expected)
        assert not torch.equal(expected, without)
        for unet in (theirs, ours):
            StableDiffusionGLIGENPipeline.enable_fuser(SimpleNamespace(unet=unet), False)
        assert_close(ours(**given).sample, theirs(**given).sample, 1e-10)
        assert torch.equal(theirs(**given).sample, without)


@pytest.mark.parametrize("grade", ["activations", "blocks"])
def test_boxes_have_gradients_whatever_is_recomputed(grade):
    gradients = []
    for one in ("none", grade):
        _, ours, given = pair("gated")
        ours.set_checkpointing(one)
        ours(**given).sample.square().sum().backward()
        gradients.append({name: parameter.grad for name, parameter in ours.named_parameters()})
    assert all(torch.equal(value, gradients[1][name]) for name, value in gradients[0].items())
    assert all(gradients[0][name].abs().max() > 0 for name in gradients[0] if "fuser" in name or "position" in name)


def test_a_new_network_starts_as_one_without_boxes():
    blocks = {"context_dim": 12, "grounding": "text"}
    ours = UNet(channels=(32,), in_channels=4, resblock={"zero_init": False}, transformer=blocks).double()
    boxes = inputs(pair("gated")[0], origin=True)["cross_attention_kwargs"]
    sample, context = noise(2, 4, 8, 8), noise(2, 5, 12, seed=1)
    assert torch.equal(ours(sample, 0, context, cross_attention_kwargs=boxes).sample, ours(sample, 0, context).sample)


def test_boxes_that_do_not_fit_are_refused():
    _, ours, given = pair("gated")
    boxes = given["cross_attention_kwargs"]["gligen"]
    half = {name: value[:1] for name, value in boxes.items()}
    with pytest.raises(ValueError, match=r"\['gligen'\] has boxes of 1 samples, sample has 2"):
        ours(**{**given, "cross_attention_kwargs": {"gligen": half}})
    with pytest.raises(ValueError, match=r"\['gligen'\] has \['boxes'\]: .*masks"):
        ours(**{**given, "cross_attention_kwargs": {"gligen": {"boxes": boxes["boxes"]}}})
    _, ours, _ = pair("default")
    with pytest.raises(ValueError, match=r"transformer\.grounding is None: nothing reads boxes"):
        ours(**given)


@pytest.mark.filterwarnings("ignore:.*on the meta device")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {**KANDINSKY, "encoder_hid_dim_type": "text_proj", "attention_type": "gated"},
            "attention_type='gated' is not supported .only transformers read boxes, and there are none",
        ),
        ({**SMALL_CONTEXT, "cross_attention_dim": (12, 16), "attention_type": "gated"}, "must be one width"),
    ],
)
def test_a_network_that_does_not_read_its_boxes_is_refused(options, message):
    with torch.device("meta"):
        model = UNet2DConditionModel(**options)
    with pytest.raises(ValueError, match=message):
        UNet.from_diffusers(model)


def test_grounding_wants_the_width_of_what_it_reads():
    with pytest.raises(
        ValueError, match=r"transformer\.grounding='text' needs transformer.context_dim to be one number"
    ):
        UNet(channels=(32,), transformer={"grounding": "text"})
