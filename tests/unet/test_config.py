"""Checks the configuration: JSON out and in, its defaults, and what a saved file may hold."""

import inspect
import json
import math
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unetgn import UNet, UNetConfig
from unetgn.nn import TransformerConfig
from unetgn.unet.config import DecoderConfig, EncoderConfig
from unetgn.unet.facts import facts
from unetgn.unet.plan import plan_unet

FULL = {
    "sample_size": [32, 16],
    "channels": [32, 64],
    "depth": [1, 2],
    "time": {"features": "fourier", "width": 64},
    "transformer": {"context_dim": 24, "depth": [1, [1, 2]]},
    "attention": {"num_heads": [2, 4], "norm": {"eps": 1e-6}},
    "resample": {"kind": "resblock", "taps": [1, 3, 3, 1]},
    "encoder": {"residual_input": True},
    "decoder": {"transformer_depth": [1, [1, 2, 1]]},
}


def test_a_configuration_survives_json():
    config = UNetConfig.from_dict(FULL)
    assert UNetConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert config.transformer.depth == (1, (1, 2))


@settings(max_examples=50, deadline=None, derandomize=True)
@given(
    channels=st.lists(st.sampled_from([32, 64, 96]), min_size=1, max_size=4),
    depth=st.integers(1, 3),
    dropout=st.floats(0, 0.9),
    heads=st.sampled_from([None, 1, 2]),
    kind=st.sampled_from(["conv", "resblock", "plain"]),
)
def test_random_configurations_survive_json_and_have_as_many_skips_as_blocks(channels, depth, dropout, heads, kind):
    config = UNetConfig.from_dict(
        {
            "channels": channels,
            "depth": depth,
            "dropout": dropout,
            "attention_levels": [],
            "attention": {"num_heads": heads},
            "resample": {"kind": kind},
        }
    )
    assert UNetConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    plan = plan_unet(config)
    skips = 1 + sum(len(level.blocks) + (level.resample is not None) for level in plan.encoder)
    assert skips == sum(block.skip for level in plan.decoder for block in level.blocks)


def test_the_constructor_has_the_fields_and_defaults_of_the_configuration():
    parameters = dict(inspect.signature(UNet.__init__).parameters)
    parameters.pop("self")
    parameters.pop("kwargs")  # which are refused
    assert list(parameters) == [field.name for field in fields(UNetConfig)]
    assert UNet().unet_config == UNetConfig()


@pytest.mark.parametrize("channels", [(32,), (32, 64), (32, 32, 64)])
def test_attention_goes_to_the_coarsest_level_unless_levels_are_named(channels):
    unet = UNet(channels=channels, depth=1)
    coarsest = len(channels) - 1
    assert attending(unet) == {f"down_blocks.{coarsest}", "mid_block", "up_blocks.0"}  # whose first is the coarsest
    named = UNetConfig(channels=channels, depth=1, attention_levels=(coarsest,))
    assert facts(unet.unet_config) == facts(named)
    x = torch.zeros(1, 3, 8, 8)
    assert unet(x, 0).sample.shape == x.shape


def test_levels_that_are_left_open_are_so_in_the_file_and_after_a_change_of_the_channels(tmp_path):
    unet = UNet(channels=(32, 32), depth=1)
    unet.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["attention_levels"] is None
    assert UNet.from_pretrained(tmp_path).unet_config == unet.unet_config
    assert replace(unet.unet_config, channels=(32,)).attending_levels == (0,)


def test_blocks_named_for_the_encoder_alone_are_all_that_attend_there():
    unet = UNet(channels=(32, 64), depth=1, encoder={"attention_blocks": [[0], []]}, mid={"attention": False})
    assert attending(unet) == {"down_blocks.0", "up_blocks.1"}


def test_a_file_that_names_its_levels_is_the_network_that_it_was():
    """The file is `UNet().save_pretrained`'s of when attention went to level 1 by default."""
    saved = json.loads((Path(__file__).parent / "saved_config.json").read_text())
    unet = UNet.from_config(saved)
    assert attending(unet) == {"down_blocks.1", "mid_block", "up_blocks.1"}
    assert unet.unet_config == UNetConfig(attention_levels=(1,))
    written = json.loads(unet.to_json_string())
    assert with_new_fields(saved, UNetConfig().to_dict()) != saved  # a file of that time does not say all that ours do
    saved = with_new_fields(saved, UNetConfig().to_dict())
    assert {key: written[key] for key in written if key != "_diffusers_version"} == saved


def with_new_fields(saved, defaults):
    """Add to a configuration what it does not say, with its default."""
    added = {key: value for key, value in defaults.items() if key not in saved}
    nested = {key: with_new_fields(value, defaults[key]) for key, value in saved.items() if isinstance(value, dict)}
    return saved | nested | added


def attending(unet):
    """List the levels of a network that hold an attention layer."""
    return {name.split(".attentions.")[0] for name, _ in unet.named_modules() if ".attentions." in name}


def test_the_file_is_flat_where_pipelines_read_and_plain_dicts_below():
    config = json.loads(UNet(**{**FULL, "channels": [32, 64]}).to_json_string())
    for name in ("sample_size", "in_channels", "out_channels", "time_cond_proj_dim", "addition_time_embed_dim"):
        assert name in config
    assert config["transformer"]["depth"] == [1, [1, 2]]
    assert isinstance(config["norm"], dict)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"norm": 8}, "norm must be a mapping of the fields of NormConfig, got 8"),
        ({"channels": 32}, r"channels=32 is not tuple\[int, \.\.\.\]"),
        ({"channels": ["32"]}, r"channels\[0\]='32' is not int"),
        ({"attention_levels": 0}, r"attention_levels=0 is not tuple\[int, \.\.\.\] \| None"),
        ({"norm": {"eps": 1e-6}}, r"norm=\{'eps': 1e-06\} is not NormConfig; from_dict takes nested dicts"),
    ],
)
def test_a_value_of_a_wrong_type_names_its_field(options, message):
    with pytest.raises(TypeError, match=message):
        UNetConfig(**options)


def test_lists_are_taken_as_tuples():
    config = UNetConfig(
        channels=[32, 64],
        depth=[1, 1],
        attention_levels=[],
        encoder=EncoderConfig(attention_blocks=[[], [0]]),
        transformer=TransformerConfig(depth=[1, [1]]),
        decoder=DecoderConfig(transformer_depth=[1, [1, 1]]),
    )
    assert config == UNetConfig.from_dict(config.to_dict())
    assert hash(config) == hash(UNetConfig.from_dict(config.to_dict()))
    assert config.encoder.attention_blocks == ((), (0,))


def test_frequencies_of_size_numbers_may_be_shifted_beside_fourier_features():
    """Sinusoids at timestep 1 of width 4: the last frequency is 1/100, or 1/10000 with a shift of 1."""
    options = {"time": {"features": "fourier", "frequency_shift": 1}, "condition": {"vector_dim": 4}}
    unet = UNet(channels=(32,), attention_levels=(), **options, addition_time_embed_dim=4)
    assert unet.add_time_proj(torch.ones(1))[0, 3].item() == pytest.approx(math.sin(1e-4), rel=1e-5)


def test_a_misspelt_argument_of_the_network_names_the_nearest_field():
    with pytest.raises(ValueError, match=r"'chanels' is not a field of UNetConfig; did you mean 'channels'"):
        UNet(chanels=(32, 64))
