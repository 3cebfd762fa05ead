"""Checks that ours compute what other projects' networks compute, on fixtures of their own outputs."""

import os
import subprocess
import sys

import pytest
import torch

from tests.interop.fixtures import NAMES, fixture, max_relative_error
from unetgn.interop import convert


@pytest.mark.parametrize("name", NAMES)
def test_the_converted_network_gives_the_authors_float32_output(name):
    it = fixture(name)
    limit = 3 * it.meta["fp32_error"]["max_rel"] + it.meta["float64_sinusoid_change"]["max_rel"]
    assert max_relative_error(it.output(it.converted(), torch.float32), it.tensors["output"]) <= limit


@pytest.mark.parametrize("name", NAMES)
def test_the_converted_network_in_float64_gives_the_authors_float64_output(name):
    it = fixture(name)
    error = max_relative_error(it.output(it.converted(), torch.float64), it.tensors["output_float64_sinusoid"])
    assert error <= 2e-7  # a wrong eps in the attention norms alone moves it by 9e-7 and more


@pytest.mark.slow
@pytest.mark.parametrize("name", ["edm_song_ncsnpp_augment", "adm_updown_scale_shift_class_new_order"])
def test_the_triton_kernels_give_the_authors_output_too(name):
    pytest.importorskip("triton")
    # in a process of its own: Triton decides at import whether it interprets
    code = f"""
import torch, unetgn.ops
from tests.interop.fixtures import fixture, max_relative_error
it = fixture({name!r})
with unetgn.ops.implementation("triton"):
    error = max_relative_error(it.output(it.converted(), torch.float32), it.tensors["output"])
limit = 3 * it.meta["fp32_error"]["max_rel"] + it.meta["float64_sinusoid_change"]["max_rel"]
assert error <= limit, (error, limit)
"""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_improved_diffusion_is_another_name_for_guided_diffusion():
    it = fixture("adm_conv_additive_legacy")
    unet = convert("improved-diffusion", it.config, it.state_dict())
    assert torch.equal(it.output(unet, torch.float32), it.output(it.converted(), torch.float32))


def test_the_order_of_attention_rows_matters():
    it = fixture("adm_conv_additive_legacy")
    unet = convert("guided-diffusion", {**it.config, "use_new_attention_order": True}, it.state_dict())
    assert max_relative_error(it.output(unet, torch.float32), it.tensors["output"]) > 4e-2


def test_super_resolution_takes_the_image_and_the_enlarged_one_side_by_side():
    it = fixture("adm_conv_additive_legacy")
    state = it.state_dict()
    generator = torch.Generator().manual_seed(0)
    state["input_blocks.0.0.weight"] = torch.randn(64, 6, 3, 3, generator=generator)
    unet = convert("guided-diffusion", {**it.config, "class": "SuperResModel"}, state)
    x, low = torch.randn(2, 1, 3, 16, 16, generator=generator)
    same = convert("guided-diffusion", {**it.config, "in_channels": 6}, state)
    both = torch.cat([x, low], dim=1)
    with torch.no_grad():
        assert torch.equal(unet(both, 3).sample, same(both, 3).sample)


@pytest.mark.parametrize("name", ["edm_dhariwal_class_augment", "edm_song_ddpmpp_class_augment"])
def test_edm_without_labels_is_edm_with_rows_of_zeros(name):
    it = fixture(name)
    unet, x, noise = it.converted(), it.tensors["x"], it.tensors["noise_labels"]
    augment = torch.zeros_like(it.tensors["augment_labels"])
    with torch.no_grad():
        without = unet(x, noise).sample
        zeros = unet(x, noise, class_labels=torch.zeros(2, 10), augment_labels=augment).sample
    assert torch.equal(without, zeros)


def test_a_class_index_is_its_one_hot_row():
    it = fixture("edm_song_ddpmpp_class_augment")
    unet, x, noise = it.converted(), it.tensors["x"], it.tensors["noise_labels"]
    with torch.no_grad():
        rows = unet(x, noise, class_labels=it.tensors["class_labels"]).sample
        indices = unet(x, noise, class_labels=torch.tensor(it.meta["labels"])).sample
    torch.testing.assert_close(rows, indices, rtol=1e-5, atol=1e-6)


def test_a_converted_network_without_a_null_class_wants_labels():
    it = fixture("adm_updown_scale_shift_class_new_order")
    with pytest.raises(ValueError, match="class_labels are missing"):
        it.converted()(it.tensors["x"], 3)
