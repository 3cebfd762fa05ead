"""Tests the gradients of autoencoders, most of them for video: each has a norm or a block that no U-Net has."""

import pytest
import torch
from torch import Tensor, nn

import unetgn
from benchmarks.fuse_coverage import RECIPES
from benchmarks.fuse_instances import Recipe, build
from tests.fusion.models import cast, tensors


def run(recipe: Recipe, model: nn.Module) -> tuple[Tensor, Tensor]:
    """Return output and concatenated gradient, of the parameters and the video, under a fixed random cotangent."""
    torch.manual_seed(1)
    inputs = cast(recipe.inputs(), torch.float64)
    inputs["sample"].requires_grad_()
    model.zero_grad()
    torch.manual_seed(2)
    output = torch.cat([tensor.flatten() for tensor in tensors(recipe.run(model, inputs))])
    torch.manual_seed(3)
    output.backward(torch.randn_like(output))
    grads = [p.grad.flatten() for p in [*model.parameters(), inputs["sample"]] if p.grad is not None]
    return output.detach(), torch.cat(grads)


@pytest.mark.parametrize(
    "name",
    [
        "AutoencoderKLMagvit",  # a norm of frames by themselves, laid out otherwise before SiLU
        "AutoencoderKLMochi",  # a norm of a few frames at a time
        "AutoencoderKLCosmos",  # one group, frames by themselves
        "AutoencoderKLCogVideoX",  # modulated by maps, with a cache beside the result
        "AutoencoderKLKVAE",  # modulated by maps
        "AutoencoderKLKVAEVideo",
        "VQModel MoVQ",
    ],
)
def test_in_float64_outputs_and_gradients_agree_to_1e_10(name):
    import diffusers

    name, _, variant = name.partition(" ")
    recipe = next(recipe for recipe in RECIPES if recipe.name == name and recipe.variant.startswith(variant))
    torch.manual_seed(0)
    model = build(recipe, getattr(diffusers, name)).double()
    before = run(recipe, model)
    assert unetgn.fuse(model).fused
    for got, expected in zip(run(recipe, model), before, strict=True):
        assert (got - expected).norm() <= 1e-10 * expected.norm()
