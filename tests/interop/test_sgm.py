"""Checks Stability's options one by one: the shape of the middle, which blocks attend, and to what."""

import json

import pytest
import torch

from tests.interop.fixtures import GOLDEN, fixture, made_up, max_relative_error
from unetgn.interop import convert, sgm, to_diffusers
from unetgn.serialize import from_plain
from unetgn.unet.model import empty_unet

REFINER = {  # of stabilityai/stable-diffusion-xl-refiner-1.0, by generative-models' own configuration file
    "adm_in_channels": 2560,
    "num_classes": "sequential",
    "use_checkpoint": True,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 384,
    "attention_resolutions": [4, 2],
    "num_res_blocks": 2,
    "channel_mult": [1, 2, 4, 4],
    "num_head_channels": 64,
    "use_linear_in_transformer": True,
    "transformer_depth": 4,
    "context_dim": [1280, 1280, 1280, 1280],
    "spatial_transformer_attn_type": "softmax-xformers",
}


def silenced(state, prefix):
    """Return the weights with the transformer at `prefix` adding nothing to its input."""
    zeros = {key: torch.zeros_like(value) for key, value in state.items() if key.startswith(f"{prefix}.proj_out.")}
    assert len(zeros) == 2
    return {**state, **zeros}


def without(state, *prefixes):
    return {key: value for key, value in state.items() if not key.startswith(prefixes)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("name", "widths"), [("sgm_sdxl_base", [64] * 3), ("sgm_sdxl_base", [64]), ("compvis_sd1", [48])]
)
def test_a_list_of_context_widths_counts_the_blocks_of_a_transformer(name, widths, dtype):
    it = fixture(name)
    unet = convert(it.meta["family"], {**it.config, "context_dim": widths}, it.state_dict())
    expected, limit = it.tensors["output_float64_sinusoid"], 2e-7
    if dtype == torch.float32:
        expected = it.tensors["output"]
        limit = 3 * it.meta["fp32_error"]["max_rel"] + it.meta["float64_sinusoid_change"]["max_rel"]
    assert max_relative_error(it.output(unet, dtype), expected) <= limit


@pytest.mark.parametrize("name", ["sgm_sdxl_base", "compvis_sd1"])
def test_contexts_of_several_widths_are_refused_by_name(name):
    it = fixture(name)
    with pytest.raises(ValueError, match=r"context_dim=\[64, 32, 64\] is not supported"):
        convert(it.meta["family"], {**it.config, "context_dim": [64, 32, 64]}, it.state_dict())


def test_the_published_refiner_is_the_network_that_diffusers_publishes():
    ours = empty_unet(sgm.translate(from_plain(sgm.SgmOptions, REFINER)))
    name = "diffusers__stable-diffusion-xl-refiner-1.0_unet.json"
    published = json.loads((GOLDEN / "keys" / name).read_text())  # our names are diffusers'
    assert {key: list(value.shape) for key, value in ours.state_dict().items()} == published
    assert sum(parameter.numel() for parameter in ours.parameters()) == 2_259_526_660


def test_disable_middle_transformer_leaves_its_place_empty():
    it = fixture("sgm_sdxl_base")
    state = it.state_dict()
    shorter = without(state, "middle_block.1.")
    unet = convert("sgm", {**it.config, "disable_middle_transformer": True}, shorter)
    silent = convert("sgm", it.config, silenced(state, "middle_block.1"))
    assert torch.equal(it.output(unet, torch.float64), it.output(silent, torch.float64))
    with pytest.raises(ValueError, match=r"missing: middle_block\.1\."):
        convert("sgm", it.config, shorter)


def test_num_attention_blocks_limits_the_blocks_of_a_level_that_attend():
    it = fixture("sgm_sdxl_base")
    state = it.state_dict()
    # level 1: one of two blocks, level 2: none; one more block on the way up, coarsest level first
    left_out = [f"input_blocks.{k}.1" for k in (5, 7, 8)] + [f"output_blocks.{k}.1" for k in (0, 1, 2, 4, 5)]
    shorter = without(state, *(f"{prefix}." for prefix in left_out))
    for level_end, slot in ((2, 2), (5, 2)):  # the upsampling moves into the transformer's place
        key = f"output_blocks.{level_end}.{slot}.conv."
        shorter |= {k.replace(f".{slot}.conv.", ".1.conv."): v for k, v in state.items() if k.startswith(key)}
        shorter = without(shorter, key)
    unet = convert("sgm", {**it.config, "num_attention_blocks": [2, 1, 0]}, shorter)
    for prefix in left_out:
        state = silenced(state, prefix)
    assert torch.equal(it.output(unet, torch.float64), it.output(convert("sgm", it.config, state), torch.float64))


def test_disable_self_attentions_makes_the_first_attention_of_a_level_read_the_context():
    it = fixture("sgm_sdxl_base")
    config = {**it.config, "num_classes": None, "adm_in_channels": None, "context_dim": 48}
    shapes = {key: list(shape) for key, shape in it.meta["shapes"].items() if not key.startswith("label_emb.")}
    attending = ("input_blocks.7.", "input_blocks.8.", *(f"output_blocks.{k}.1." for k in range(3)))  # level 2
    for key, shape in shapes.items():
        if key.endswith(("attn2.to_k.weight", "attn2.to_v.weight")) or (
            key.endswith(("attn1.to_k.weight", "attn1.to_v.weight")) and key.startswith(attending)
        ):
            shape[1] = 48
    state = {key: made_up(key, shape).double() for key, shape in shapes.items()}
    unet = convert("sgm", {**config, "disable_self_attentions": [False, False, True]}, state)
    theirs = to_diffusers(unet)
    assert theirs.config.only_cross_attention == (False, False, True)
    x, context = it.tensors["x"].double(), it.tensors["context"][..., :48].double()
    with torch.no_grad():
        expected = theirs(x, 0, context).sample
        torch.testing.assert_close(unet(x, 0, context).sample, expected, rtol=1e-9, atol=1e-9)
