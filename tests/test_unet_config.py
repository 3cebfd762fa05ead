"""The configuration: JSON out and in, and an error that names the field for whatever is wrong with it."""

import inspect
import json
import math
import subprocess
import sys
from dataclasses import fields

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unetgn import UNet, UNetConfig
from unetgn.nn import TransformerConfig
from unetgn.unet_config import ConditionConfig, DecoderConfig, EncoderConfig
from unetgn.unet_plan import plan_unet

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


def test_the_file_is_flat_where_pipelines_read_and_plain_dicts_below():
    config = json.loads(UNet(**{**FULL, "channels": [32, 64]}).to_json_string())
    for name in ("sample_size", "in_channels", "out_channels", "time_cond_proj_dim", "addition_time_embed_dim"):
        assert name in config
    assert config["transformer"]["depth"] == [1, [1, 2]]
    assert isinstance(config["norm"], dict)


def test_the_configuration_is_importable_without_diffusers():
    code = "import sys; from unetgn import UNetConfig, ResBlock; UNetConfig(); assert 'diffusers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"chanels": [1]}, r"'chanels' is not a field of UNetConfig; did you mean 'channels'"),
        ({"norm": {"num_group": 3}}, r"'norm\.num_group' is not a field of NormConfig; did you mean 'num_groups'"),
        ({"transformer": {"dept": 3}}, r"'transformer\.dept' is not a field of TransformerConfig"),
        ({"attention": {"num_heads": 2, "head_dim": 8}}, r"attention\.num_heads=2 and attention\.head_dim=8"),
        ({"norm": {"group_size": 2, "min_group_size": 2}}, r"norm\.group_size=2 and norm\.min_group_size=2"),
        ({"norm": {"num_groups": 0}}, r"norm\.num_groups must be at least 1"),
        ({"attention_levels": [2]}, r"attention_levels=\(2,\) names level 2.*levels 0 to 1"),
        ({"attention_levels": [0], "encoder": {"attention_blocks": [[0], []]}}, r"attention_levels and encoder\.att"),
        ({"encoder": {"attention_blocks": [[7], []]}}, r"encoder\.attention_blocks names blocks \(7,\) of level 0"),
        ({"decoder": {"attention_blocks": [[7], []]}}, r"decoder\.attention_blocks names blocks \(7,\) of level 0"),
        ({"depth": -1}, r"depth=-1 and channels=\(32, 64\) must be at least 0 and 1"),
        ({"depth": [1]}, r"depth=\(1,\) has 1 entries; 2 levels need 2"),
        ({"attention": {"num_heads": [1, 2, 3]}}, r"attention\.num_heads=\(1, 2, 3\) has 3 entries"),
        ({"decoder": {"channels": [1]}}, r"decoder\.channels=\(1,\) has 1 entries"),
        ({"encoder": {"resample": ["conv", "conv"]}}, r"encoder\.resample=.* has 2 entries; 2 levels need 1"),
        ({"decoder": {"depth": [1, 2]}}, r"decoder\.depth=\(1, 2\) gives level 1 2 blocks, but .* 3 skip"),
        ({"channels": []}, r"channels must name at least one level"),
        ({"channels": [48, 64]}, r"norm\.num_groups=32 does not divide 48 channels; numbers that do: 1, 2, 3, 4, 6, 8"),
        ({"norm": {"group_size": 24}}, r"norm\.group_size=24 does not divide 32"),
        ({"attention": {"head_dim": 24}, "attention_levels": [1]}, r"level 1: head_dim=24 does not divide 64"),
        ({"spatial_dims": 4}, r"spatial_dims must be 1, 2 or 3, got 4"),
        ({"num_classes": 0}, r"num_classes must be at least 1"),
        ({"resample": {"taps": [1, 2, 1]}}, r"resample\.taps must be an even number"),
        ({"resample": {"taps": [1, 3, 3, 1]}}, r"resample\.taps are for 'resblock' and 'plain'"),
        ({"resample": {"kind": "plain", "padding": "end"}}, r"resample\.padding='end' is for strided convolutions"),
        ({"resample": {"strides": [1, 2, 2]}}, r"resample\.strides=\(1, 2, 2\) must name one factor for each of 2"),
        ({"mid": {"cross_only": True}}, r"mid\.cross_only and mid\.transformer_depth need a transformer"),
        ({"transformer": {}, "mid": {"cross_only": True}}, r"cross_only needs transformer\.context_dim"),
        ({"transformer": {"context_dim": 8, "cross_only": [5]}}, r"transformer\.cross_only=\(5,\) names level 5"),
        ({"transformer": {"depth": [1, [1, 1]]}, "attention_levels": [1]}, r"no number for its block 2 in the decoder"),
        ({"mid": {"attention_norm": False, "attention_num_groups": 4}}, r"mid\.attention_num_groups and mid\.att"),
        ({"condition": {"class_bias": True}}, r"condition\.class_bias=True needs num_classes"),
        ({"addition_time_embed_dim": 8}, r"addition_time_embed_dim=8 needs condition\.vector_dim"),
        ({"time": {"features": "fourier", "width": 7}}, r"time\.width must be even"),
        ({"time": {"width": 2, "frequency_shift": 1}}, r"too narrow for frequency_shift=1"),
    ],
)
def test_a_contradiction_names_its_field(changes, message):
    config = {"channels": [32, 64], "attention_levels": [], **changes}
    with pytest.raises(ValueError, match=message):
        UNet.from_unet_config(UNetConfig.from_dict(config))


NOWHERE = {"depth": 1, "mid": {"attention": False}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"decoder": {"transformer_depth": [1, 5]}}, r"decoder\.transformer_depth=\(1, 5\) needs a transformer"),
        ({"time": {"fourier_scale": 3.0}}, r"time\.fourier_scale=3\.0 needs time\.features='fourier'"),
        ({"time": {"features": "fourier", "frequency_shift": 1}}, r"time\.frequency_shift=1\.0 is for sinusoids"),
        ({"time": {"features": "fourier", "frequencies": "power"}}, r"time\.frequencies='power' is for sinusoids"),
        ({"condition": {"null_class": False, "missing_class": "zeros"}}, r"missing_class='zeros' needs num_classes"),
        ({"num_classes": 3, "condition": {"missing_class": "zeros"}}, r"missing_class='zeros' and .*null_class=True"),
        ({"norm": {"group_size": 8, "num_groups": 4}}, r"norm\.group_size=8 and norm\.num_groups=4 contradict"),
        ({"resblock": {"project_resampled": True}}, r"resblock\.project_resampled is for 'resblock' resampling"),
        (
            {"mid": {"attention": False, "attention_norm": False}},
            r"mid\.attention_norm=False .* mid\.attention is False",
        ),
        ({"mid": {"attention": False, "attention_num_groups": 8}}, r"mid\.attention_num_groups=8 needs attention"),
        ({"mid": {"depth": 0, "attention_norm": False}}, r"mid\.attention_norm=False .* mid\.depth is 0"),
        ({"mid": {"depth": 0, "residual_scale": 0.5}}, r"mid\.residual_scale=0\.5 needs blocks in the middle"),
        (
            {"transformer": {}, "attention_levels": [1], "mid": {"attention": False, "transformer_depth": 3}},
            r"mid\.transformer_depth=3 needs attention in the middle, but mid\.attention is False",
        ),
        (
            {
                "transformer": {"context_dim": 8},
                "attention_levels": [1],
                "mid": {"attention": False, "cross_only": True},
            },
            r"mid\.cross_only=True needs attention in the middle",
        ),
        ({**NOWHERE, "transformer": {"context_dim": 8}}, r"transformer has no place: nothing attends"),
        (
            {**NOWHERE, "transformer": {"context_dim": 8}, "encoder": {"attention_blocks": [[], []]}},
            r"transformer has no place: nothing attends",
        ),
        (
            {"transformer": {"context_dim": 8, "cross_only": [0]}, "attention_levels": [1]},
            r"transformer\.cross_only=\(0,\) names level 0, at which nothing attends",
        ),
        (
            {"channels": [32], "resample": {"kind": "resblock", "taps": [1, 3, 3, 1]}},
            r"resample\.taps are for 'resblock' and 'plain' resampling, but there is \[\]",
        ),
        ({"channels": [32], "encoder": {"residual_input": True}}, r"encoder\.residual_input adds .* names one level"),
        (
            {"resample": {"kind": "plain"}, "encoder": {"resample": ["conv"]}, "decoder": {"resample": ["conv"]}},
            r"resample\.kind='plain', but encoder\.resample and decoder\.resample say it for all",
        ),
        (
            {"encoder": {"residual_input": True}, "resample": {"kind": "resblock", "strides": [1, 2]}},
            r"encoder\.residual_input halves all axes.*resample\.strides=\(1, 2\) does not",
        ),
        (
            {"encoder": {"residual_input": True}, "resample": {"padding": "end"}},
            r"encoder\.residual_input halves all axes.*resample\.padding='end'",
        ),
    ],
)
def test_an_option_that_would_change_nothing_or_fail_later_names_its_field(changes, message):
    with pytest.raises(ValueError, match=message):
        UNetConfig.from_dict({"channels": [32, 64], "attention_levels": [], **changes})


@pytest.mark.parametrize(
    "name",
    [
        "sample_size",
        "in_channels",
        "out_channels",
        "time_cond_proj_dim",
        "addition_time_embed_dim",
        "time.width",
        "time.embedding_width",
        "condition.augment_dim",
        "condition.vector_dim",
        "norm.num_groups",
        "norm.group_size",
        "norm.min_group_size",
        "attention.num_heads",
        "attention.head_dim",
        "transformer.context_dim",
        "encoder.stem_channels",
        "mid.attention_num_groups",
        "decoder.channels",
        "decoder.num_heads",
    ],
)
def test_a_number_that_must_be_positive_names_its_field(name):
    part, _, field = name.rpartition(".")
    value = [0, 32] if field == "channels" else 0
    with pytest.raises(ValueError, match=rf"^{name} must be at least 1, got"):
        UNetConfig.from_dict({"channels": [32, 64], **({part: {field: value}} if part else {field: value})})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mid": {"depth": -1}}, r"mid\.depth must be at least 0, got -1"),
        ({"mid": {"transformer_depth": -1}}, r"mid\.transformer_depth must be at least 0"),
        ({"transformer": {"depth": [1, [1, -1]]}}, r"transformer\.depth must be at least 0, got \(1, \(1, -1\)\)"),
        ({"decoder": {"depth": [2, -1]}}, r"decoder\.depth must be at least 0"),
        ({"norm": {"eps": -1.0}}, r"norm\.eps must be at least 0, got -1\.0"),
        ({"dropout": 2.0}, r"dropout is a probability, from 0 to 1, got 2\.0"),
        ({"sample_size": [8, 8, 8]}, r"sample_size=\(8, 8, 8\) has 3 entries; spatial_dims=2 needs one number, or 2"),
        ({"encoder": {"stem_kernel": 4}}, r"encoder\.stem_kernel must be odd, .* got 4"),
        ({"decoder": {"out_kernel": 2}}, r"decoder\.out_kernel must be odd, .* got 2"),
    ],
)
def test_a_number_out_of_its_range_names_its_field(changes, message):
    with pytest.raises(ValueError, match=message):
        UNetConfig.from_dict({"channels": [32, 64], **changes})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: ConditionConfig(missing_class="null"),
            r"condition\.missing_class must be 'error' or 'zeros', got 'null'",
        ),
        (lambda: ConditionConfig(class_entry="last"), r"condition\.class_entry must be 'before_mlp' or 'after_mlp'"),
        (lambda: UNetConfig(encoder=EncoderConfig(resample=("fir", "conv"))), r"encoder\.resample must be one of"),
        (lambda: UNetConfig(decoder=DecoderConfig(resample=("fir", "conv"))), r"decoder\.resample must be one of"),
    ],
)
def test_a_word_that_is_none_of_the_choices_names_its_field(make, message):
    with pytest.raises(ValueError, match=message):
        make()


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


def test_turning_attention_off_needs_no_second_change():
    UNetConfig.from_dict({"attention_levels": [], "attention": {"num_heads": 4}, "decoder": {"num_heads": 2}})
    UNetConfig.from_dict({**NOWHERE, "attention_levels": [], "attention": {"head_dim": 8, "qk_norm": True}})


def test_a_misspelt_argument_of_the_network_names_the_nearest_field():
    with pytest.raises(ValueError, match=r"'chanels' is not a field of UNetConfig; did you mean 'channels'"):
        UNet(chanels=(32, 64))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"in_channels": "3"}, r"in_channels='3' is not int"),
        ({"in_channels": True}, r"in_channels=True is not int"),
        ({"channels": 3}, r"channels=3 is not tuple"),
        ({"channels": [32, 1.5]}, r"channels\[1\]=1\.5 is not int"),
        ({"resample": {"kind": "fir"}}, r"resample\.kind='fir' is not Literal"),
        ({"norm": 3}, r"norm must be a mapping of the fields of NormConfig"),
        ({"transformer": {"context_dim": "x"}}, r"transformer\.context_dim='x' is not"),
    ],
)
def test_a_wrong_type_names_its_field(changes, message):
    with pytest.raises(TypeError, match=message):
        UNetConfig.from_dict(changes)


def test_an_unknown_key_of_a_saved_network_is_an_error(tmp_path):
    UNet(channels=(32,), attention_levels=()).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "norm_groups": 8}))
    with pytest.raises(ValueError, match="'norm_groups' is not a field of UNetConfig"):
        UNet.from_pretrained(tmp_path)
