"""Tries the options of diffusers' U-Nets one at a time: a network loads and computes the same, or is refused by name.

REFUSED lists all values that are not supported; every other one must load.
"""

import json

import pytest

from benchmarks.reach import judge

pytestmark = pytest.mark.filterwarnings("ignore:.*(on the meta device|zero-element).*:UserWarning")
SHARED = {"sample_size": 8, "block_out_channels": [16, 32], "layers_per_block": 1, "norm_num_groups": 4}
NETWORKS = {
    "UNet2DModel": {
        **SHARED,
        "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
        "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
    },
    "UNet2DConditionModel": {
        **SHARED,
        "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
        "attention_head_dim": 4,
        "cross_attention_dim": 12,
    },
}
BOTH = {
    "sample_size": [None, [8, 16]],
    "in_channels": [1, 9],
    "out_channels": [6],
    "flip_sin_to_cos": [False],
    "freq_shift": [1],
    "time_embedding_dim": [20],
    "mid_block_type": [None, "UNetMidBlock2D"],
    "mid_block_scale_factor": [2.0, 1.4142135623730951],
    "layers_per_block": [2],
    "downsample_padding": [0],
    "dropout": [0.1],
    "act_fn": ["swish", "gelu", "relu", "mish"],
    "norm_num_groups": [1, 8],
    "norm_eps": [1e-6],
    "attention_head_dim": [1, 3],
    "resnet_time_scale_shift": ["scale_shift"],
    "class_embed_type": ["timestep", "identity"],
    "num_class_embeds": [4],
}
LOADING = {
    "UNet2DModel": {
        **BOTH,
        "down_block_types": [["AttnDownBlock2D"] * 2, ["ResnetDownsampleBlock2D", "DownBlock2D"]],
        "up_block_types": [["ResnetUpsampleBlock2D", "UpBlock2D"]],
        "downsample_type": ["resnet"],
        "upsample_type": ["resnet"],
        "attention_head_dim": [None, 1, 3],
        "attn_norm_num_groups": [2, 4],
        "add_attention": [False],
        "num_train_timesteps": [10],
    },
    "UNet2DConditionModel": {
        **BOTH,
        "down_block_types": [
            ["SimpleCrossAttnDownBlock2D", "DownBlock2D"],
            ["AttnDownBlock2D", "DownBlock2D"],
            ["ResnetDownsampleBlock2D", "CrossAttnDownBlock2D"],
        ],
        "mid_block_type": [None, "UNetMidBlock2D", "UNetMidBlock2DSimpleCrossAttn"],
        "only_cross_attention": [True, [True, False]],
        "mid_block_only_cross_attention": [True],
        "layers_per_block": [2, [1, 2]],
        "cross_attention_dim": [[12, 12], [12, 16]],
        "transformer_layers_per_block": [2, [1, 2], [2, 1, 3]],
        "reverse_transformer_layers_per_block": [[1, 2], [[1, 2], [2, 1]]],
        "encoder_hid_dim": [7],
        "attention_head_dim": [1, 3, [2, 4]],
        "use_linear_projection": [True],
        "addition_embed_type": ["text_image"],
        "upcast_attention": [True],
        "time_embedding_type": ["fourier"],
        "time_embedding_act_fn": ["silu", "gelu"],
        "timestep_post_act": ["silu", "gelu"],
        "time_cond_proj_dim": [6],
        "conv_in_kernel": [1, 5],
        "conv_out_kernel": [1, 5],
        "attention_type": ["gated", "gated-text-image"],
        "cross_attention_norm": ["layer_norm", "group_norm"],
    },
}
REFUSED = [  # which diffusers builds
    ("UNet2DModel", "center_input_sample", True, "center_input_sample=True is not supported"),
    ("UNet2DModel", "time_embedding_type", "fourier", "time_embedding_type='fourier' is not supported"),
    ("UNet2DModel", "mid_block_type", "other", "mid_block_type='other' is not supported"),
    ("UNet2DModel", "layers_per_block", 0, "layers_per_block=0 is not supported"),
    ("UNet2DModel", "downsample_padding", 2, "downsample_padding=2 is not supported"),
    ("UNet2DModel", "downsample_type", None, "downsample_type=None is not str"),
    ("UNet2DModel", "attention_head_dim", 64, "attention_head_dim=64 must be at least 1, and at most 32"),
    ("UNet2DModel", "class_embed_type", "projection", "class_embed_type='projection' is not supported"),
    ("UNet2DConditionModel", "center_input_sample", True, "center_input_sample=True is not supported"),
    ("UNet2DConditionModel", "layers_per_block", [1, 0], "layers_per_block=[1, 0] is not supported"),
    ("UNet2DConditionModel", "downsample_padding", 2, "downsample_padding=2 is not supported"),
    ("UNet2DConditionModel", "dual_cross_attention", True, "dual_cross_attention=True is not supported"),
    ("UNet2DConditionModel", "class_embed_type", "other", "class_embed_type='other' is not supported"),
    ("UNet2DConditionModel", "transformer_layers_per_block", 0, "leaves every transformer without a block"),
    ("UNet2DConditionModel", "resnet_skip_time_act", True, "resnet_skip_time_act=True is not supported"),
    ("UNet2DConditionModel", "resnet_out_scale_factor", 1.5, "resnet_out_scale_factor=1.5 is not supported"),
]
CASES = [
    (kind, option, value) for kind, options in LOADING.items() for option, values in options.items() for value in values
]
EVERY = 11  # of the long list, so many apart, is tried where the others are left out


@pytest.mark.parametrize(
    ("kind", "option", "value"),
    [pytest.param(*case, marks=[pytest.mark.slow] if index % EVERY else []) for index, case in enumerate(CASES)],
    ids=lambda value: json.dumps(value),
)
def test_a_network_with_one_option_changed_loads_and_computes_the_same(kind, option, value):
    row = judge("it", kind, {**NETWORKS[kind], option: value})
    assert (row.verdict, row.reason) == ("loads", "")


@pytest.mark.parametrize(("kind", "option", "value", "reason"), REFUSED)
def test_an_option_that_is_not_supported_is_the_reason_of_the_refusal(kind, option, value, reason):
    row = judge("it", kind, {**NETWORKS[kind], option: value})
    assert row.verdict == "refused"
    assert reason in row.reason
