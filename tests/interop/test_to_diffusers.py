"""Checks which class of diffusers our network becomes, and the fields that are named where none can be it."""

import pytest
import torch
from diffusers import UNet2DConditionModel, UNet2DModel

from tests.interop.test_diffusers import SIZED, WITHOUT_ATTENTION, assert_round_trip
from tests.tensors import randomized
from unetgn import UNet
from unetgn.interop import to_diffusers


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        ({}, UNet2DModel),
        ({"time_embedding_type": "fourier"}, UNet2DConditionModel),
        ({"time_cond_proj_dim": 6}, UNet2DConditionModel),
        ({"conv_out_kernel": 1}, UNet2DConditionModel),
        ({"layers_per_block": (1, 2)}, UNet2DConditionModel),
        (SIZED, UNet2DConditionModel),
    ],
)
def test_a_network_without_attention_becomes_whichever_class_of_diffusers_can_say_it(options, kind):
    model = randomized(
        UNet2DConditionModel(**{**WITHOUT_ATTENTION, "mid_block_type": None, **options}), dtype=torch.float64
    )
    assert type(to_diffusers(UNet.from_diffusers(model))) is kind
    assert_round_trip(model)


def test_what_neither_class_of_diffusers_can_express_is_named_for_both():
    both = r"UNet2DModel cannot express condition .*; and diffusers' UNet2DConditionModel cannot express condition"
    options = {"time_cond_proj_dim": 6, "condition": {"augment_dim": 9}}
    with pytest.raises(ValueError, match=both):
        to_diffusers(UNet(channels=(32,), attention_levels=(), mid={"depth": 0}, **options))


def test_another_network_is_no_unet_to_write_down():
    with pytest.raises(TypeError, match=r"to_diffusers takes a unetgn\.UNet, got Linear"):
        to_diffusers(torch.nn.Linear(1, 1))


def test_the_null_class_becomes_the_last_class_of_diffusers():
    ours = randomized(UNet(channels=(32, 64), depth=1, num_classes=10), dtype=torch.float64)
    theirs = to_diffusers(ours)
    x, t = (
        torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64),
        torch.tensor([0, 0]),
    )
    with torch.no_grad():
        expected = theirs(x, t, class_labels=torch.tensor([10, 10])).sample
        torch.testing.assert_close(ours(x, t).sample, expected)


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"spatial_dims": 1}, "spatial_dims"),
        ({"encoder": {"residual_input": True}}, "encoder.residual_input"),
        ({"attention": {"num_heads": 4}, "attention_levels": (0, 1)}, "attention's num_heads"),
        ({"encoder": {"attention_blocks": ((), (0,))}, "attention_levels": ()}, "attention's num_heads"),
        ({"time": {"width": 16}}, "time"),
        ({"norm": {"group_size": 4}}, "norm"),
        ({"resblock": {"residual_scale": 0.5}}, "resblock.residual_scale"),
        ({"resample": {"kind": "plain"}}, "resample"),
        ({"attention": {"qk_norm": True}}, "attention.qk_norm"),
        ({"decoder": {"channels": (32, 32)}}, "decoder.channels"),
        ({"condition": {"augment_dim": 9}}, "condition"),
        ({"encoder": {"stem_channels": 16}, "norm": {"num_groups": 8}}, "encoder.stem_channels"),
        ({"mid": {"depth": 3}}, "mid.depth"),
        ({"transformer": {}}, "transformer.context_dim=None"),
    ],
)
def test_what_diffusers_cannot_express_is_named(options, field):
    unet = UNet(**{"channels": (32, 64), "attention_levels": (1,), **options})
    with pytest.raises(ValueError, match=f"cannot express.*{field}"):
        to_diffusers(unet)
