"""Lists the recipes of `fuse_coverage` for autoencoders and upsamplers, by the path of the class."""

from __future__ import annotations

import torch

from benchmarks.fuse_instances import Recipe, encoder_alone, encoder_and_decoder, image, video

AUTOENCODERS = "diffusers.models.autoencoders"
VAE = {"block_out_channels": (32, 64), "down_block_types": ("DownEncoderBlock2D",) * 2}
VAE_BOTH = VAE | {"up_block_types": ("UpDecoderBlock2D",) * 2}

AUTOENCODER_RECIPES = [
    Recipe(f"{AUTOENCODERS}.autoencoder_kl.AutoencoderKL", image(), VAE_BOTH, "SD"),
    Recipe(
        f"{AUTOENCODERS}.autoencoder_kl.AutoencoderKL",
        image(),
        VAE_BOTH | {"latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False},
        "SD3, FLUX",
    ),
    Recipe(f"{AUTOENCODERS}.autoencoder_kl_flux2.AutoencoderKLFlux2", image(), VAE_BOTH),
    Recipe(
        f"{AUTOENCODERS}.autoencoder_asym_kl.AsymmetricAutoencoderKL",
        image(mask=torch.ones(2, 1, 16, 16)),
        {
            "down_block_out_channels": (32, 64),
            "down_block_types": ("DownEncoderBlock2D",) * 2,
            "up_block_out_channels": (32, 64),
            "up_block_types": ("UpDecoderBlock2D",) * 2,
        },
    ),
    Recipe(f"{AUTOENCODERS}.vq_model.VQModel", image(), VAE_BOTH),
    Recipe(f"{AUTOENCODERS}.vq_model.VQModel", image(), VAE_BOTH | {"norm_type": "spatial"}, "MoVQ, norm_type=spatial"),
    Recipe(f"{AUTOENCODERS}.autoencoder_kl_temporal_decoder.AutoencoderKLTemporalDecoder", image(num_frames=2), VAE),
    Recipe(
        f"{AUTOENCODERS}.consistency_decoder_vae.ConsistencyDecoderVAE",
        image(size=16),
        {
            "encoder_block_out_channels": (32, 64),
            "encoder_down_block_types": ("DownEncoderBlock2D",) * 2,
            "decoder_block_out_channels": (32, 64),
            "decoder_down_block_types": ("ResnetDownsampleBlock2D",) * 2,
            "decoder_up_block_types": ("ResnetUpsampleBlock2D",) * 2,
            "decoder_layers_per_block": 1,
        },
    ),
    Recipe(
        f"{AUTOENCODERS}.autoencoder_kl_allegro.AutoencoderKLAllegro",
        video(frames=8),
        {"block_out_channels": (32, 32, 32, 32), "layers_per_block": 1},
        run=encoder_and_decoder,
    ),
    Recipe(
        f"{AUTOENCODERS}.autoencoder_kl_cogvideox.AutoencoderKLCogVideoX",
        video(),
        {"block_out_channels": (32, 32, 32, 32), "layers_per_block": 1},
    ),
    Recipe(
        f"{AUTOENCODERS}.autoencoder_kl_cosmos.AutoencoderKLCosmos",
        video(size=32),
        {
            "encoder_block_out_channels": (32, 32, 32, 32),
            "decode_block_out_channels": (32, 32, 32, 32),
            "attention_resolutions": (8,),
            "resolution": 64,
            "num_layers": 1,
            "patch_size": 2,
        },
    ),
    Recipe(
        f"{AUTOENCODERS}.autoencoder_kl_hunyuan_video.AutoencoderKLHunyuanVideo",
        video(frames=5),
        {"block_out_channels": (32, 32, 32, 32), "layers_per_block": 1},
    ),
    Recipe(
        f"{AUTOENCODERS}.autoencoder_kl_hunyuanimage.AutoencoderKLHunyuanImage",
        image(size=32),
        {
            "in_channels": 3,
            "out_channels": 3,
            "latent_channels": 32,
            "block_out_channels": (64, 64),
            "layers_per_block": 1,
            "spatial_compression_ratio": 2,
            "sample_size": 32,
        },
    ),
    Recipe(
        f"{AUTOENCODERS}.autoencoder_kl_kvae.AutoencoderKLKVAE",
        image(),
        {"channels": 32, "num_enc_blocks": 1, "num_dec_blocks": 1, "ch_mult": (1, 2)},
    ),
    Recipe(
        f"{AUTOENCODERS}.autoencoder_kl_kvae_video.AutoencoderKLKVAEVideo",
        video(frames=5),
        {"ch": 32, "ch_mult": (1, 2), "num_res_blocks": 1},
    ),
    Recipe(
        f"{AUTOENCODERS}.autoencoder_kl_ltx2_audio.AutoencoderKLLTX2Audio",
        image(2, 64),
        {"base_channels": 32, "ch_mult": (1, 2), "num_res_blocks": 1, "norm_type": "group", "causality_axis": "none"},
        "norm_type=group",
    ),
    Recipe(
        f"{AUTOENCODERS}.autoencoder_kl_magvit.AutoencoderKLMagvit",
        video(frames=5),
        {
            "block_out_channels": (32, 32),
            "layers_per_block": 1,
            "down_block_types": ("SpatialDownBlock3D", "SpatialTemporalDownBlock3D"),
            "up_block_types": ("SpatialUpBlock3D", "SpatialTemporalUpBlock3D"),
        },
    ),
    Recipe(
        f"{AUTOENCODERS}.autoencoder_kl_minimax_h3.AutoencoderKLMiniMaxH3",
        video(frames=17, size=32),
        {
            "block_out_channels": (32, 32, 32),
            "layers_per_block": 1,
            "spatial_downsample_factors": (2, 2, 2),
            "temporal_downsample_factors": (1, 2, 2),
            "decoder_num_layers": 1,
            "decoder_num_attention_heads": 2,
            "decoder_attention_head_dim": 16,
        },
        run=encoder_alone,
    ),
    Recipe(
        f"{AUTOENCODERS}.autoencoder_kl_mochi.AutoencoderKLMochi",
        video(frames=7),
        {
            "encoder_block_out_channels": (32, 32, 32, 32),
            "decoder_block_out_channels": (32, 32, 32, 32),
            "layers_per_block": (1, 1, 1, 1, 1),
        },
    ),
    Recipe(
        "diffusers.pipelines.ltx.modeling_latent_upsampler.LTXLatentUpsamplerModel",
        lambda: {"hidden_states": torch.randn(1, 8, 3, 4, 4)},
        {"in_channels": 8, "mid_channels": 32, "num_blocks_per_stage": 1},
    ),
    Recipe(
        "diffusers.pipelines.ltx2.latent_upsampler.LTX2LatentUpsamplerModel",
        lambda: {"hidden_states": torch.randn(1, 8, 3, 4, 4)},
        {"in_channels": 8, "mid_channels": 32, "num_blocks_per_stage": 1},
    ),
]
