"""Checks that whatever is wrong with a configuration, or would change nothing, is an error that names the field."""

import math

import pytest

from unetgn import UNet, UNetConfig
from unetgn.unet.config import ConditionConfig, DecoderConfig, EncoderConfig


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
        ({"channels": [32] * 10**5}, r"the number of channels is 100000; at most 1000 are built"),
        ({"depth": 10**6}, r"depth is 1000000; at most 1000 are built"),
        ({"depth": [1, 10**6]}, r"depth is 1000000; at most 1000 are built"),
        ({"decoder": {"depth": [1, 10**6]}}, r"decoder\.depth is 1000000; at most 1000 are built"),
        ({"transformer": {"depth": [[1], [1, 10**6]]}}, r"transformer\.depth is 1000000; at most 1000 are built"),
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
        ({"mid": {"cross_only": True}}, r"mid\.cross_only one or attention\.context_dim"),
        ({"transformer": {}, "mid": {"cross_only": True}}, r"cross_only needs transformer\.context_dim"),
        ({"transformer": {"context_dim": 8, "cross_only": [5]}}, r"transformer\.cross_only=\(5,\) names level 5"),
        (
            {"transformer": {"depth": [1, [1, 1]]}, "attention_levels": [1]},
            r"blocks, which are 3 in the decoder",
        ),
        ({"mid": {"attention_norm": False, "attention_num_groups": 4}}, r"mid\.attention_num_groups and mid\.att"),
        ({"condition": {"class_bias": True}}, r"condition\.class_bias=True needs num_classes"),
        ({"condition": {"class_dim": 8}}, r"condition\.class_dim=8 and condition\.class_embedding='table': a width"),
        ({"condition": {"class_embedding": "projection"}}, r"condition\.class_dim=None and .*'projection': a width"),
        ({"condition": {"class_dim": 0}}, r"condition\.class_dim must be at least 1"),
        ({"num_classes": 3, "condition": {"class_embedding": "timestep"}}, r"num_classes=3 counts the rows of a table"),
        (
            {"condition": {"class_embedding": "identity", "class_bias": True}},
            r"condition\.class_bias=True needs num_cl",
        ),
        ({"condition": {"class_entry": "concat"}}, r"condition\.class_entry='concat' needs num_classes"),
        (
            {"condition": {"added_dim": 8}},
            r"condition\.added_embedding=None and condition\.added_dim=8 belong together",
        ),
        ({"condition": {"added_embedding": "image"}}, r"condition\.added_dim=None belong together"),
        ({"condition": {"added_embedding": "image", "added_dim": 8, "added_heads": 2}}, r"added_heads=2 and .*'image'"),
        (
            {"condition": {"added_embedding": "text", "added_dim": 8, "added_heads": 3}},
            r"condition\.added_heads=3 does not divide condition\.added_dim=8",
        ),
        (
            {"condition": {"added_embedding": "text", "added_dim": 8, "added_heads": 2}},
            r"condition\.added_dim=8, but encoder_hidden_states, of which the 'text' is made, are None wide",
        ),
        (
            {"condition": {"added_embedding": "image", "added_dim": 8, "vector_dim": 8}},
            r"condition\.added_embedding='image' and condition\.vector_dim=8 contradict",
        ),
        ({"condition": {"added_embedding": "image_hint", "added_dim": 8}}, r"in_channels=3, but the hint .* takes 4"),
        ({"condition": {"context_projection": "image"}}, r"context_projection='image' needs condition\.context_dim"),
        (
            {"condition": {"activations": ["gelu"]}},
            r"condition\.activations=\('gelu',\) are for resblock\.activate_emb",
        ),
        (
            {"attention": {"context_norm": "layer_norm"}},
            r"attention\.context_norm='layer_norm' .* attention\.context_dim",
        ),
        ({"attention": {"context_dim": 8}, "transformer": {}}, r"attention\.context_dim=8 and transformer contradict"),
        (
            {"attention": {"context_dim": 8}, "mid": {"attention": False}},
            r"attention\.context_dim=8 has no place: nothing attends",
        ),
        (
            {"attention": {"context_dim": 8, "cross_only": [0]}},
            r"attention\.cross_only=\(0,\) names level 0, at which nothing attends",
        ),
        (
            {"num_classes": 3, "condition": {"class_entry": "concat", "vector_dim": 8}},
            r"condition\.vector_dim=8 is added to an embedding that condition\.class_entry='concat'",
        ),
        ({"condition": {"context_dim": 8}}, r"condition\.context_dim=8 is projected .* must be one number"),
        (
            {"condition": {"context_dim": 8}, "transformer": {"context_dim": [4, 4]}},
            r"condition\.context_dim=8 is projected .* must be one number",
        ),
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
        # Attention where nothing attends, or said twice.
        (
            {"depth": [1, 0], "attention_levels": [1], "decoder": {"attention_blocks": [[], []]}},
            r"attention_levels=\(1,\) names level 1, but depth=\(1, 0\) gives the encoder no block there",
        ),
        ({"attention_levels": [1, 0, 1]}, r"attention_levels names 1 more than once, in \(1, 0, 1\)"),
        (
            {"encoder": {"attention_blocks": [[0, 0], [1]]}},
            r"encoder\.attention_blocks of level 0 names 0 more",
        ),
        (
            {"decoder": {"attention_blocks": [[], [2, 2]]}},
            r"decoder\.attention_blocks of level 1 names 2 more",
        ),
        # Transformers that never read their context.
        (
            {"transformer": {"depth": 0, "context_dim": 4}},
            r"transformer\.depth=0 leaves every transformer without",
        ),
        (
            {"transformer": {"depth": [1, 0], "context_dim": 4}, "attention_levels": [1]},
            r"transformer\.depth=\(1, 0\) leaves every transformer without a block",
        ),
        (
            {"transformer": {"depth": [1, 0], "context_dim": 4, "cross_only": [1]}, "attention_levels": [0, 1]},
            r"transformer\.cross_only=\(1,\) names level 1, whose transformers have depth 0",
        ),
        (
            {"transformer": {"context_dim": 4, "cross_only": [1, 1]}, "attention_levels": [1]},
            r"transformer\.cross_only names 1 more than once",
        ),
        (
            {
                "transformer": {"context_dim": 4},
                "attention_levels": [1],
                "mid": {"cross_only": True, "transformer_depth": 0},
            },
            r"mid\.cross_only=True needs a transformer block in the middle",
        ),
        # Depths for blocks that a level does not have: it has 2 in the encoder and 3 in the decoder.
        (
            {"transformer": {"depth": [1, [1, 1, 1]]}, "attention_levels": [1]},
            r"depths \(1, 1, 1\) of level 1 must be one number for each of its blocks, which are 2 in the encoder "
            r"\(transformer\.depth\)",
        ),
        (
            {"transformer": {}, "attention_levels": [1], "decoder": {"transformer_depth": [1, [1, 1, 1, 7]]}},
            r"\(1, 1, 1, 7\) of level 1 .*, which are 3 in the decoder \(decoder\.transformer_depth\)",
        ),
        ({"transformer": {"depth": [1, []]}}, r"depths \(\) of level 1 must be one number for each of its blocks"),
        (
            {"resample": {"padding": "end", "strides": [1, 1]}},
            r"resample\.padding='end' is for axes that are halved, but resample\.strides=\(1, 1\) halves none",
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
        ({"norm": {"eps": math.nan}}, r"norm\.eps must be at least 0, got nan"),
        ({"norm": {"eps": math.inf}}, r"norm\.eps must be at least 0, got inf"),
        ({"time": {"frequency_shift": math.nan}}, r"time\.frequency_shift must be a finite number, got nan"),
        ({"resample": {"kind": "plain", "taps": [1.0, math.nan]}}, r"resample\.taps must be .* a positive sum"),
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
        (lambda: ConditionConfig(class_entry="last"), r"condition\.class_entry must be one of"),
        (lambda: ConditionConfig(class_embedding="mlp"), r"condition\.class_embedding must be one of"),
        (lambda: UNetConfig(encoder=EncoderConfig(resample=("fir", "conv"))), r"encoder\.resample must be one of"),
        (lambda: UNetConfig(decoder=DecoderConfig(resample=("fir", "conv"))), r"decoder\.resample must be one of"),
    ],
)
def test_a_word_that_is_none_of_the_choices_names_its_field(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("name", "beside"),
    [
        ("resblock.residual_scale", {}),
        ("mid.residual_scale", {}),
        ("condition.class_scale", {"num_classes": 3}),
        ("time.fourier_scale", {"time": {"features": "fourier"}}),
    ],
)
@pytest.mark.parametrize("factor", [0.0, -1.0, math.nan, math.inf])
def test_a_factor_that_would_silence_what_it_multiplies_names_its_field(name, beside, factor):
    part, _, field = name.partition(".")
    with pytest.raises(ValueError, match=rf"^{name} must be a finite number above 0, got {factor}"):
        UNetConfig.from_dict({**beside, part: {**beside.get(part, {}), field: factor}})


def test_turning_attention_off_needs_no_second_change():
    for keys in (
        {"attention_levels": [], "attention": {"num_heads": 4}, "decoder": {"num_heads": 2}},
        {**NOWHERE, "attention_levels": [], "attention": {"head_dim": 8, "qk_norm": True}},
    ):
        assert UNetConfig.from_dict(keys).attention_levels == ()


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
