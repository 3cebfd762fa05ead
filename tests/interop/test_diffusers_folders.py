"""Reads diffusers' U-Nets from the folders that `save_pretrained` writes, and checks what is refused there."""

import pytest
import torch
from diffusers import UNet2DModel

from tests.interop.test_diffusers import DDPM
from unetgn import UNet


@pytest.mark.parametrize("variant", [None, "fp16"])
@pytest.mark.parametrize("sharded", [False, True])
def test_a_folder_gives_what_the_model_gives(tmp_path, variant, sharded):
    model = UNet2DModel(**DDPM)
    size = "100KB" if sharded else "1GB"
    model.half().save_pretrained(tmp_path, variant=variant, max_shard_size=size)
    ours, theirs = UNet.from_diffusers(tmp_path, variant=variant).state_dict(), model.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_a_folder_of_pickles_is_refused(tmp_path):
    UNet2DModel(**DDPM).save_pretrained(tmp_path, safe_serialization=False)
    with pytest.raises(ValueError, match="is a pickle"):
        UNet.from_diffusers(tmp_path)


def test_a_folder_without_weights_or_configuration_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"has no config\.json"):
        UNet.from_diffusers(tmp_path)
    UNet2DModel(**DDPM).save_config(tmp_path)
    with pytest.raises(ValueError, match="has neither"):
        UNet.from_diffusers(tmp_path)


def test_another_class_is_refused():
    with pytest.raises(ValueError, match="'Linear' is not supported"):
        UNet.from_diffusers(torch.nn.Linear(1, 1))
