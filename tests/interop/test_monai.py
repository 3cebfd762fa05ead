"""Converts MONAI's DiffusionModelUNet: weights and outputs, on random architectures in two and three dimensions."""

import re

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tests.tensors import noise, randomized
from unetgn import UNet
from unetgn.interop import convert, to_diffusers
from unetgn.interop.monai import OLD_NAMES

nets = pytest.importorskip("monai.networks.nets")
SMALL = {
    "spatial_dims": 2,
    "in_channels": 1,
    "out_channels": 2,
    "num_res_blocks": 1,
    "channels": [8, 16],
    "attention_levels": [False, True],
    "norm_num_groups": 4,
    "num_head_channels": 4,
}
TEXT = {"with_conditioning": True, "cross_attention_dim": 6, "transformer_num_layers": 2}
SLOW_START = [HealthCheck.too_slow, HealthCheck.data_too_large]


@st.composite
def monai_options(draw):
    """Draw options of a small DiffusionModelUNet that MONAI itself accepts."""
    levels = draw(st.integers(1, 3))
    heads = draw(st.sampled_from([2, 4, [draw(st.sampled_from([2, 4, 8])) for _ in range(levels)]]))
    return {
        **SMALL,
        "spatial_dims": draw(st.sampled_from([2, 3])),
        "num_res_blocks": [draw(st.integers(1, 2)) for _ in range(levels)],
        "channels": [draw(st.sampled_from([8, 16])) for _ in range(levels)],
        "attention_levels": [draw(st.booleans()) for _ in range(levels)],
        "num_head_channels": heads,
        "norm_eps": draw(st.sampled_from([1e-6, 1e-5])),
        "resblock_updown": draw(st.booleans()),
        "num_class_embeds": draw(st.sampled_from([None, 3])),
        "use_combined_linear": draw(st.booleans()),
        **draw(st.sampled_from([{}, TEXT, {**TEXT, "upcast_attention": True}])),
    }


def build(options):
    return randomized(nets.DiffusionModelUNet(**options), dtype=torch.float64).eval()


def inputs(options):
    """Draw an input, and the conditions by MONAI's names and by ours; timestep 0, where sinusoids are exact."""
    x = noise(2, options["in_channels"], *(8,) * options["spatial_dims"])
    context = noise(2, 3, 6, seed=1) if options.get("with_conditioning") else None
    labels = torch.tensor([0, 2]) if options.get("num_class_embeds") else None
    theirs = {"context": context, "class_labels": labels}
    return x, theirs, {"encoder_hidden_states": context, "class_labels": labels}


def assert_same(options, unet):
    """Compare a network of ours with MONAI's in float64."""
    theirs = build(options)
    x, given_theirs, given_ours = inputs(options)
    with torch.no_grad():
        expected = theirs(x, torch.zeros(2), **given_theirs)
        actual = unet(x, torch.zeros(2), **given_ours).sample
    # upcast: MONAI rounds queries and keys to float32 in float64 networks too
    limit = 1e-5 if options.get("upcast_attention") else 1e-11
    torch.testing.assert_close(actual, expected, rtol=0, atol=limit * float(expected.abs().max()))


@settings(max_examples=14, deadline=None, derandomize=True, suppress_health_check=SLOW_START)
@given(options=monai_options().filter(lambda options: not options.get("upcast_attention")))
@example(options={**SMALL, **TEXT, "spatial_dims": 3, "num_class_embeds": 3})
@example(options={**SMALL, **TEXT, "use_combined_linear": True})
def test_a_network_of_monai_computes_the_same(options):
    assert_same(options, convert("monai", {**options, "class": "DiffusionModelUNet"}, build(options).state_dict()))


@pytest.mark.parametrize("more", [{}, TEXT])
def test_timesteps_are_embedded_in_the_same_order(more):
    options = {**SMALL, **more}
    theirs, unet = build(options), convert("monai", options, build(options).state_dict())
    x, given_theirs, given_ours = inputs(options)
    steps = torch.tensor([3, 700])
    with torch.no_grad():
        expected = theirs(x, steps, **given_theirs)
        torch.testing.assert_close(unet(x, steps, **given_ours).sample, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("more", [{}, TEXT])
def test_files_of_generative_models_have_older_names(more):
    options = {**SMALL, **more}
    state = build(options).state_dict()
    old = {}
    for key, value in state.items():
        for pattern, name in OLD_NAMES:
            key = re.sub(pattern, name, key)
        old[key] = value
    fresh = nets.DiffusionModelUNet(**options)
    fresh.load_old_state_dict(dict(old))  # MONAI's own reading of those names
    assert all(torch.equal(value, state[key].float()) for key, value in fresh.state_dict().items())
    config = {key: value for key, value in options.items() if key != "channels"} | {"num_channels": [8, 16]}
    assert_same(options, convert("monai", config, old))


@pytest.mark.parametrize("more", [TEXT, {"num_class_embeds": 3}])
def test_a_network_in_two_dimensions_goes_on_to_diffusers(more):
    options = {**SMALL, "channels": [8, 16], "num_head_channels": 4, **more}
    unet = convert("monai", options, build(options).state_dict())
    back = UNet.from_diffusers(to_diffusers(unet))
    x, _, given_ours = inputs(options)
    with torch.no_grad():
        assert torch.equal(back(x, 5, **given_ours).sample, unet(x, 5, **given_ours).sample)


def test_the_published_sizes_convert_without_memory():
    options = {"spatial_dims": 3, "in_channels": 7, "out_channels": 3, "channels": [256, 512, 768]}
    options |= {"num_res_blocks": 2, "attention_levels": [False, True, True], "num_head_channels": [0, 512, 768]}
    options |= {"with_conditioning": True, "cross_attention_dim": 4}  # of MONAI's brain_image_synthesis bundle
    with torch.device("meta"):
        state = nets.DiffusionModelUNet(**options).state_dict()
    unet = convert("monai", options, state)
    assert sum(p.numel() for p in unet.parameters()) == sum(value.numel() for value in state.values())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"include_fc": False}, "include_fc=False is not supported"),
        ({"dropout_cattn": 0.1}, "dropout_cattn=0.1 is not supported"),
        ({"spatial_dims": 1}, "spatial_dims=1 is not supported"),
        ({"with_conditioning": True}, "with_conditioning=True and cross_attention_dim=None belong together"),
        ({"transformer_num_layers": 2}, "transformer_num_layers=2 is not supported .it needs with_conditioning"),
        ({"num_head_channels": 5}, "num_head_channels=5 does not divide 16"),
        ({"attention_levels": [True]}, "attention_levels=.* has 1 entries"),
        ({"chanels": [8]}, "chanels"),
    ],
)
def test_an_option_that_is_not_supported_is_named(changes, message):
    with pytest.raises(ValueError, match=message):
        convert("monai", {**SMALL, **changes}, {})
