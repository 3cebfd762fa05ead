"""Lists the recipes of `fuse_coverage` for U-Nets and ControlNets, by the path of the class."""

from __future__ import annotations

import torch

from benchmarks.fuse_instances import Recipe, denoise, denoise_video, randn

UNETS = "diffusers.models.unets"
CONTROLNETS = "diffusers.models.controlnets"
T2I = {"block_out_channels": (32, 64), "cross_attention_dim": 16, "attention_head_dim": 8}


UNET_RECIPES = [
    Recipe(
        f"{UNETS}.unet_1d.UNet1DModel",
        lambda: {"sample": torch.randn(2, 4, 64), "timestep": torch.tensor(7)},
        {"sample_size": 64, "in_channels": 4, "out_channels": 4, "extra_in_channels": 64},
        "Dance Diffusion",
    ),
    Recipe(
        f"{UNETS}.unet_1d.UNet1DModel",
        lambda: {"sample": torch.randn(2, 4, 16), "timestep": torch.tensor(7)},
        {
            "in_channels": 4,
            "out_channels": 4,
            "block_out_channels": (32, 64),
            "time_embedding_type": "positional",
            "down_block_types": ("DownResnetBlock1D",) * 2,
            "up_block_types": ("UpResnetBlock1D",),
            "mid_block_type": "MidResTemporalBlock1D",
            "out_block_type": "OutConv1DBlock",
            "act_fn": "silu",
            "use_timestep_embedding": True,
            "time_embedding_dim": 32,
        },
        "RL, act_fn=silu",
    ),
    Recipe(
        f"{UNETS}.unet_2d.UNet2DModel",
        denoise(3, 16, None),
        {
            "block_out_channels": (32, 64),
            "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
            "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        },
        "DDPM",
    ),
    Recipe(
        f"{UNETS}.unet_2d.UNet2DModel",
        denoise(3, 16, None),
        {
            "block_out_channels": (32, 64),
            "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
            "up_block_types": ("AttnUpBlock2D", "ResnetUpsampleBlock2D"),
            "resnet_time_scale_shift": "scale_shift",
            "downsample_type": "resnet",
            "upsample_type": "resnet",
        },
        "consistency, scale-shift",
    ),
    Recipe(
        f"{UNETS}.unet_2d.UNet2DModel",
        denoise(3, 16, None),
        {
            "block_out_channels": (32, 64),
            "down_block_types": ("SkipDownBlock2D", "AttnSkipDownBlock2D"),
            "up_block_types": ("AttnSkipUpBlock2D", "SkipUpBlock2D"),
            "time_embedding_type": "fourier",
        },
        "NCSN++",
    ),
    Recipe(
        f"{UNETS}.unet_2d_condition.UNet2DConditionModel",
        denoise(),
        T2I
        | {
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        },
        "SD 1.5",
    ),
    Recipe(
        f"{UNETS}.unet_2d_condition.UNet2DConditionModel",
        denoise(added_cond_kwargs=lambda: {"text_embeds": torch.randn(2, 16), "time_ids": torch.ones(2, 6)}),
        T2I
        | {
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 64,
            "transformer_layers_per_block": (1, 2),
        },
        "SDXL",
    ),
    Recipe(
        f"{UNETS}.unet_2d_condition.UNet2DConditionModel",
        denoise(),
        T2I
        | {
            "down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
            "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
            "resnet_time_scale_shift": "scale_shift",
            "up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        },
        "Kandinsky 2, DeepFloyd IF",
    ),
    Recipe(
        f"{UNETS}.unet_2d_condition.UNet2DConditionModel",
        denoise(),
        T2I
        | {
            "down_block_types": ("KDownBlock2D", "KCrossAttnDownBlock2D"),
            "mid_block_type": None,
            "block_out_channels": (64, 64),
            "time_embedding_dim": 64,
            "up_block_types": ("KCrossAttnUpBlock2D", "KUpBlock2D"),
            "norm_num_groups": None,
            "act_fn": "silu",
        },
        "K blocks, act_fn=silu",
    ),
    Recipe(
        f"{UNETS}.unet_3d_condition.UNet3DConditionModel",
        denoise_video(),
        T2I
        | {
            "down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D"),
            "up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D"),
            "layers_per_block": 1,
        },
    ),
    Recipe(
        f"{UNETS}.unet_i2vgen_xl.I2VGenXLUNet",
        lambda: (
            denoise_video()()
            | {
                "fps": torch.tensor([8]),
                "image_latents": torch.randn(1, 4, 3, 8, 8),
                "image_embeddings": torch.randn(1, 16),
            }
        ),
        {
            "block_out_channels": (32, 64),
            "cross_attention_dim": 16,
            "attention_head_dim": 8,
            "down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D"),
            "up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D"),
            "layers_per_block": 1,
        },
    ),
    Recipe(
        f"{UNETS}.unet_motion_model.UNetMotionModel",
        denoise_video(contexts=3),
        {
            "block_out_channels": (32, 64),
            "cross_attention_dim": 16,
            "num_attention_heads": 2,
            "down_block_types": ("CrossAttnDownBlockMotion", "DownBlockMotion"),
            "up_block_types": ("UpBlockMotion", "CrossAttnUpBlockMotion"),
            "layers_per_block": 1,
            "motion_num_attention_heads": 2,
        },
    ),
    Recipe(
        f"{UNETS}.unet_spatio_temporal_condition.UNetSpatioTemporalConditionModel",
        lambda: {
            "sample": torch.randn(1, 2, 8, 8, 8),
            "timestep": torch.tensor(7),
            "encoder_hidden_states": torch.randn(1, 1, 16),
            "added_time_ids": torch.ones(1, 3),
        },
        {
            "block_out_channels": (32, 64),
            "cross_attention_dim": 16,
            "num_attention_heads": (2, 4),
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 24,
            "layers_per_block": 1,
            "down_block_types": ("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
            "up_block_types": ("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        },
        "SVD",
    ),
    Recipe(
        f"{UNETS}.unet_kandinsky3.Kandinsky3UNet",
        denoise(encoder_attention_mask=lambda: torch.ones(2, 5)),
        {
            "block_out_channels": (32, 32, 64, 64),
            "groups": 8,
            "attention_head_dim": 8,
            "layers_per_block": 2,
            "time_embedding_dim": 16,
            "cross_attention_dim": 16,
            "encoder_hid_dim": 16,
        },
    ),
    Recipe(
        f"{UNETS}.unet_dreamlite.DreamLiteUNetModel",
        denoise(),
        T2I
        | {
            "down_block_types": ("DreamLiteCrossAttnNoSelfAttnDownBlock2D", "DreamLiteCrossAttnDownBlock2D"),
            "up_block_types": ("DreamLiteCrossAttnUpBlock2D", "DreamLiteUpBlock2D"),
            "layers_per_block": 1,
        },
    ),
    Recipe(
        "diffusers.pipelines.audioldm2.modeling_audioldm2.AudioLDM2UNet2DConditionModel",
        denoise(),
        T2I
        | {
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        },
    ),
    Recipe(
        "diffusers.pipelines.deprecated.versatile_diffusion.modeling_text_unet.UNetFlatConditionModel",
        lambda: denoise()() | {"sample": torch.randn(2, 4, 4, 1)},
        T2I
        | {
            "down_block_types": ("CrossAttnDownBlockFlat", "DownBlockFlat"),
            "up_block_types": ("UpBlockFlat", "CrossAttnUpBlockFlat"),
        },
    ),
]

CONTROLNET_RECIPES = [
    Recipe(
        f"{CONTROLNETS}.controlnet.ControlNetModel",
        denoise(controlnet_cond=randn(2, 3, 64, 64)),
        T2I | {"down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D")},
    ),
    Recipe(
        f"{CONTROLNETS}.controlnet_sparsectrl.SparseControlNetModel",
        lambda: (
            denoise_video(contexts=3)()
            | {"controlnet_cond": torch.randn(1, 4, 3, 8, 8), "conditioning_mask": torch.ones(1, 1, 3, 8, 8)}
        ),
        {
            "block_out_channels": (32, 64),
            "cross_attention_dim": 16,
            "num_attention_heads": 2,
            "down_block_types": ("CrossAttnDownBlockMotion", "DownBlockMotion"),
            "layers_per_block": 1,
            "motion_num_attention_heads": 2,
            "transformer_layers_per_mid_block": 1,
        },
    ),
    Recipe(
        f"{CONTROLNETS}.controlnet_union.ControlNetUnionModel",
        denoise(
            controlnet_cond=lambda: [torch.randn(2, 3, 64, 64)],
            control_type=lambda: torch.tensor([[1, 0, 0, 0, 0, 0]] * 2),
            control_type_idx=lambda: [0],
            added_cond_kwargs=lambda: {"text_embeds": torch.randn(2, 16), "time_ids": torch.ones(2, 6)},
        ),
        T2I
        | {
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "num_trans_channel": 32,
            "num_trans_head": 2,
            "num_proj_channel": 32,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 64,
        },
    ),
    Recipe(
        f"{CONTROLNETS}.controlnet_xs.UNetControlNetXSModel",
        denoise(controlnet_cond=randn(2, 3, 64, 64)),
        {
            "sample_size": 8,
            "block_out_channels": (32, 64),
            "cross_attention_dim": 16,
            "num_attention_heads": 2,
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "ctrl_block_out_channels": (8, 16),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
            "ctrl_num_attention_heads": 2,
        },
    ),
]
