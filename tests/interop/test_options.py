"""Checks that every option of another project's network changes ours, is refused, or is said to change nothing."""

import dataclasses
from functools import partial

import pytest

from unetgn.interop import compvis, diffusers_condition, diffusers_unet2d, edm, guided_diffusion, sgm
from unetgn.unet.facts import facts

OPENAI = {
    "in_channels": 3, "model_channels": 32, "out_channels": 3, "num_res_blocks": 1, "attention_resolutions": (2,),
    "channel_mult": (1, 2), "num_heads": 2,
}  # fmt: skip
EDM = {"img_resolution": 16, "in_channels": 3, "out_channels": 3, "model_channels": 64, "channel_mult": (1, 2)}
DIFFUSERS = {"block_out_channels": (32, 64), "layers_per_block": 1, "sample_size": 8}
TRANSFORMER = {"use_spatial_transformer": True, "context_dim": 8}

# Name -> the class of options, how they are translated, and those of a network.
NETWORKS = {
    "guided-diffusion": (
        guided_diffusion.GuidedOptions,
        partial(guided_diffusion.translate, class_name="UNetModel"),
        OPENAI,
    ),
    "compvis": (compvis.CompvisOptions, compvis.translate, OPENAI),
    "compvis with transformers": (compvis.CompvisOptions, compvis.translate, {**OPENAI, **TRANSFORMER}),
    "sgm": (sgm.SgmOptions, sgm.translate, {**OPENAI, "context_dim": 8}),
    "edm dhariwal": (edm.DhariwalOptions, edm.translate_dhariwal, EDM),
    "edm song": (edm.SongOptions, edm.translate_song, EDM),
    "diffusers unet2d": (
        diffusers_unet2d.UNet2DOptions,
        diffusers_unet2d.translate,
        {
            **DIFFUSERS,
            "down_block_types": ("AttnDownBlock2D",) * 2,
            "up_block_types": ("AttnUpBlock2D",) * 2,
        },
    ),
    "diffusers condition": (
        diffusers_condition.ConditionOptions,
        diffusers_condition.translate,
        {
            **DIFFUSERS,
            "attention_head_dim": 2,
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        },
    ),
    "diffusers simple": (
        diffusers_condition.ConditionOptions,
        diffusers_condition.translate,
        {
            **DIFFUSERS,
            "down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
            "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
            "up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
            "cross_attention_dim": 32,
        },
    ),
}
# Options that have no other value of their kind than one that is in question here.
VALUES = {
    "image_size": 24, "attention_resolutions": (1,), "channel_mult": (1, 1), "num_classes": 5, "context_dim": 12,
    "num_heads": 4, "num_head_channels": 16, "num_heads_upsample": 4, "n_embed": 8, "adm_in_channels": 8,
    "disable_self_attentions": (False, True), "num_attention_blocks": (0, 0), "transformer_depth_middle": 3,
    "spatial_transformer_attn_type": "other", "attn_resolutions": (8,), "embedding_type": "fourier",
    "encoder_type": "residual", "decoder_type": "skip", "resample_filter": (1, 3, 3, 1), "model_channels": 128,
    "sample_size": 16, "time_embedding_type": "fourier", "time_embedding_dim": 16, "mid_block_type": None,
    "down_block_types": ("DownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D", "UpBlock2D"),
    "block_out_channels": (32, 32), "downsample_type": "resnet", "upsample_type": "resnet", "act_fn": "gelu",
    "downsample_padding": 0, "norm_num_groups": 16, "attn_norm_num_groups": 16, "class_embed_type": "identity",
    "num_class_embeds": 4, "resnet_time_scale_shift": "scale_shift", "num_train_timesteps": 10,
    "only_cross_attention": (False, True), "cross_attention_dim": 24, "transformer_layers_per_block": 2,
    "reverse_transformer_layers_per_block": ((2, 2), 1), "encoder_hid_dim": 4, "encoder_hid_dim_type": "text_proj",
    "attention_head_dim": 4, "num_attention_heads": 4, "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 8, "time_embedding_act_fn": "silu",
    "timestep_post_act": "silu", "time_cond_proj_dim": 8, "conv_in_kernel": 1, "conv_out_kernel": 1,
    "attention_type": "gated", "mid_block_only_cross_attention": True, "cross_attention_norm": "layer_norm",
}  # fmt: skip
RUNTIME = {"use_checkpoint", "use_fp16", "use_bf16", "label_dropout"}  # how it ran; how it was trained
LOADER = {"use_new_attention_order"}  # the order of rows in the file, which `convert` reads
UNREAD = {  # by the original beside these options, and written by its own published configurations all the same
    "compvis": {"legacy"},
    "compvis with transformers": {"legacy"},
    "sgm": {"legacy"},
    "diffusers unet2d": {"num_train_timesteps"},
    "diffusers condition": {
        "mid_block_only_cross_attention",
        "addition_time_embed_dim",
        "projection_class_embeddings_input_dim",
        "addition_embed_type_num_heads",
        "cross_attention_norm",
    },
    "diffusers simple": {
        "downsample_padding",
        "use_linear_projection",
        "upcast_attention",
        "transformer_layers_per_block",
        "reverse_transformer_layers_per_block",
        "addition_time_embed_dim",
        "projection_class_embeddings_input_dim",
        "addition_embed_type_num_heads",
    },
}
CASES = [(network, field.name) for network, (kind, _, _) in NETWORKS.items() for field in dataclasses.fields(kind)]


def other(value):
    """Return another value of the same kind."""
    return not value if isinstance(value, bool) else value / 2 if isinstance(value, float) and value else value + 1


@pytest.mark.parametrize(("network", "option"), CASES, ids=map("-".join, CASES))
def test_an_option_changes_our_network_or_is_refused_or_is_known_to_change_nothing(network, option):
    kind, translate, options = NETWORKS[network]
    base = kind(**options)
    value = VALUES[option] if option in VALUES else other(getattr(base, option))
    try:
        changed = translate(dataclasses.replace(base, **{option: value}))
    except ValueError:
        return
    same = facts(translate(base)) == facts(changed)
    assert same == (option in RUNTIME | LOADER | UNREAD.get(network, set()))
