"""Converts full-size published architectures, on the meta device: every key has its place, sizes are as published."""

import json

import pytest
import torch

from tests.interop.fixtures import GOLDEN
from unetgn.interop import convert

INDEX = json.loads((GOLDEN / "keys" / "index.json").read_text())
REFUSED = {
    "edm2__img512_xs.json": "edm2",
    "diffusers__google__ncsnpp-celebahq-256.json": "SkipDownBlock2D",
}
# Parameters, buffers not counted. The papers and model cards, as far as they say; else the authors' own classes.
PARAMETERS = {
    "diffusers__google__ddpm-cifar10-32.json": 35_746_307,
    "diffusers__google__ddpm-cat-256.json": 113_673_219,
    "diffusers__google__ddpm-celebahq-256.json": 113_673_219,
    "diffusers__google__ddpm-church-256.json": 113_673_219,
    "diffusers__google__ddpm-bedroom-256.json": 113_673_219,
    "diffusers__anton-l__ddpm-butterflies-128.json": 113_673_219,
    "compvis__ldm_celeba256.json": 274_056_163,
    "diffusers__CompVis__ldm-celebahq-256_unet.json": 274_056_163,
    "guided_diffusion__64x64.json": 295_904_454,
    "guided_diffusion__128x128.json": 421_529_606,
    "guided_diffusion__256x256.json": 553_838_086,
    "guided_diffusion__512x512.json": 558_997_638,
    "edm__cifar10_ddpmpp_cond.json": 55_735_299,
    "edm__cifar10_ncsnpp_uncond.json": 56_397_827,
    "compvis__sd1.json": 859_520_964,
    "diffusers__stable-diffusion-v1-5_unet.json": 859_520_964,
    "diffusers__stable-diffusion-2-1_unet.json": 865_910_724,
    "diffusers__stable-diffusion-xl-base-1.0_unet.json": 2_567_463_684,
    "diffusers__stable-diffusion-xl-refiner-1.0_unet.json": 2_259_526_660,
}


def table(name):
    """Read the entry of the index, and the state dict on the meta device."""
    shapes = json.loads((GOLDEN / "keys" / name).read_text())
    return INDEX[name], {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}


@pytest.mark.parametrize("name", sorted(set(INDEX) - set(REFUSED)))
def test_a_published_network_converts_with_no_key_missing_or_left_over(name):
    entry, state = table(name)
    unet = convert(entry["family"], {**entry["constructor_kwargs"], "class": entry["class"]}, state)
    count = sum(parameter.numel() for parameter in unet.parameters())
    buffers = sum(tensor.numel() for key, tensor in state.items() if key.endswith((".resample_filter", ".freqs")))
    assert count == entry["numbers"] - buffers
    if name in PARAMETERS:
        assert count == PARAMETERS[name]


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_an_architecture_of_another_kind_is_refused_by_name(name):
    entry, state = table(name)
    with pytest.raises(ValueError, match=f"{REFUSED[name]}.* is not supported"):
        convert(entry["family"], {**entry["constructor_kwargs"], "class": entry["class"]}, state)


def test_every_published_count_belongs_to_a_table():
    assert set(PARAMETERS) <= set(INDEX)
