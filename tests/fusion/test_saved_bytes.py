"""Measures that a training step keeps less for its backward pass: with saved-tensor hooks, each storage once."""

from typing import Any

import pytest
import torch

import unetgn
from tests.fusion.models import CIFAR10


def saved_bytes(model: torch.nn.Module, inputs: dict[str, Any]) -> int:
    """Count the bytes of the storages that autograd keeps in one forward pass, the parameters' own left out."""
    own = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage  # held, so that no later storage gets its address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(**inputs)
    return sum(storage.nbytes() for storage in kept.values())


def ratio(model: torch.nn.Module, inputs: dict[str, Any]) -> float:
    original = saved_bytes(model, inputs)
    unetgn.fuse(model)
    return saved_bytes(model, inputs) / original


def test_of_ddpm_cifar10_at_most_three_quarters_are_left():
    from diffusers import UNet2DModel

    model = UNet2DModel(**CIFAR10, block_out_channels=(128, 256, 256, 256))
    assert sum(parameter.numel() for parameter in model.parameters()) == 35_746_307  # the published network
    inputs = {"sample": torch.randn(2, 3, 32, 32), "timestep": torch.tensor([3, 7])}
    assert ratio(model, inputs) <= 0.75


@pytest.mark.slow
def test_of_stable_diffusion_1_5_at_most_94_percent_are_left():
    from diffusers import UNet2DConditionModel

    model = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
    assert sum(parameter.numel() for parameter in model.parameters()) == 859_520_964  # the published network
    inputs = {"sample": torch.randn(1, 4, 64, 64), "timestep": 7, "encoder_hidden_states": torch.randn(1, 77, 768)}
    assert ratio(model, inputs) <= 0.94


def test_of_stable_diffusion_1_5_at_a_tenth_of_its_width_less_is_left():
    from diffusers import UNet2DConditionModel

    model = UNet2DConditionModel(
        sample_size=64, block_out_channels=(32, 64, 128, 128), cross_attention_dim=768, attention_head_dim=8
    )
    inputs = {"sample": torch.randn(1, 4, 32, 32), "timestep": 7, "encoder_hidden_states": torch.randn(1, 77, 768)}
    assert ratio(model, inputs) <= 0.94
