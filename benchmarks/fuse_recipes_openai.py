"""Lists recipes for the copies of one U-Net, OpenAI's, in the libraries that took it over, for `fuse_libraries`.

It came with improved-diffusion (Nichol & Dhariwal 2021, arXiv 2102.09672); latent diffusion's `openaimodel` is a copy,
and those of generative-models, WebUI, ComfyUI and Forge are copies of that.
"""

from __future__ import annotations

import importlib
import sys
from typing import Any

import torch

from benchmarks.fuse_instances import Library, Recipe, image_and_time, positional


def without_arguments() -> None:
    """Put arguments for Forge, which parses them on import, in the place of this program's: there is no GPU."""
    sys.argv = [sys.argv[0], "--always-cpu"]


def without_a_gpu_or_weights() -> None:
    """Tell ComfyUI's code, as Fooocus has it, that there is no GPU, and let its layers draw weights."""
    importlib.import_module("ldm_patched.modules.args_parser").args.always_cpu = -1
    layers = importlib.import_module("ldm_patched.modules.ops").disable_weight_init
    for name in ("Linear", "Conv2d", "Conv3d", "GroupNorm", "LayerNorm"):
        getattr(layers, name).reset_parameters = getattr(torch.nn, name).reset_parameters


def latent_time_context() -> dict[str, Any]:
    """Draw what a latent U-Net reads."""
    return {
        "x": torch.randn(2, 4, 16, 16),
        "timesteps": torch.tensor([3, 7]),
        "context": torch.randn(2, 5, 16),
    }


def openai(path: str, variant: str = "", **config: Any) -> Recipe:
    """Return the recipe of a U-Net with the constructor of improved-diffusion's, which many took over."""
    sizes: dict[str, Any] = {"in_channels": 3, "model_channels": 32, "out_channels": 3, "num_res_blocks": 1}
    sizes |= {"attention_resolutions": [2], "channel_mult": (1, 2), "num_heads": 2}
    return Recipe(path, image_and_time(), sizes | config, variant, positional, dtype="float32")


def glide(variant: str, **config: Any) -> Recipe:
    """Return the recipe of GLIDE's U-Net without its text."""
    sizes = {"in_channels": 3, "model_channels": 32, "out_channels": 3, "num_res_blocks": 1, "channel_mult": (1, 2)}
    sizes |= {"attention_resolutions": (2,), "num_heads": 2, "encoder_channels": None}
    path = "glide_text2im.unet.UNetModel"
    return Recipe(path, image_and_time(), sizes | config, variant, positional, dtype="float32")


LATENT = {"use_spatial_transformer": True, "context_dim": 16, "legacy": False}
BOTH: dict[str, dict[str, Any]] = {
    "additive": {},
    "scale-shift": {"use_scale_shift_norm": True, "resblock_updown": True},
}
COMFY: dict[str, Any] = {
    **{"in_channels": 4, "model_channels": 32, "out_channels": 4, "num_res_blocks": [1, 1]},
    **{"channel_mult": (1, 2), "num_heads": 2, "use_spatial_transformer": True, "context_dim": 16},
    **{"transformer_depth": [0, 1], "transformer_depth_middle": 1, "transformer_depth_output": [0, 0, 1, 1]},
}
AUTOENCODER = {
    **{"ch": 32, "out_ch": 3, "ch_mult": (1, 2), "num_res_blocks": 1, "attn_resolutions": [], "in_channels": 3},
    **{"resolution": 16, "z_channels": 4},
}
SD = "ldm.modules.diffusionmodules"
SGM = "imaginairy.modules.sgm"
WITHOUT_ATTENTION = {"attention_resolutions": [], "disable_middle_transformer": True}
VIDEO = {
    "context_dim": 16,
    "num_heads": -1,
    "num_head_channels": 32,
    "transformer_depth": 1,
    "merge_strategy": "learned",
}
VIDEO |= {"video_kernel_size": [3, 1, 1], "extra_ff_mix_layer": True, "use_spatial_context": True}

COPIES = [
    Library(
        "GLIDE",
        [glide(name, **options) for name, options in BOTH.items()],
        repository="openai/glide-text2im",
    ),
    Library(
        "improved-diffusion",
        [
            openai("improved_diffusion.unet.UNetModel", name, use_scale_shift_norm=flag)
            for name, flag in (("additive", False), ("scale-shift", True))
        ],
        repository="openai/improved-diffusion",
    ),
    Library(
        "guided-diffusion",
        [openai("guided_diffusion.unet.UNetModel", name, image_size=16, **options) for name, options in BOTH.items()],
        repository="openai/guided-diffusion",
    ),
    Library(
        "generative-models (imaginAIry's copy)",
        [
            *(
                openai(f"{SGM}.diffusionmodules.openaimodel.UNetModel", name, **options | WITHOUT_ATTENTION)
                for name, options in BOTH.items()
            ),
            Recipe(
                f"{SGM}.diffusionmodules.video_model.VideoUNet",
                lambda: {
                    "x": torch.randn(4, 3, 16, 16),
                    "timesteps": torch.tensor([3, 3, 3, 3]),
                    "context": torch.randn(4, 1, 16),
                    "num_video_frames": 2,
                    "image_only_indicator": torch.zeros(2, 2),
                },
                {"in_channels": 3, "model_channels": 32, "out_channels": 3, "num_res_blocks": 1}
                | {"attention_resolutions": [2], "channel_mult": (1, 2)}
                | VIDEO,
                "SVD",
                dtype="float32",
            ),
            Recipe(
                f"{SGM}.diffusionmodules.model.Decoder",
                lambda: {"z": torch.randn(2, 4, 8, 8)},
                AUTOENCODER | {"attn_type": "vanilla"},
                "",
                positional,
                dtype="float32",
            ),
            Recipe(
                f"{SGM}.autoencoding.temporal_ae.VideoDecoder",
                lambda: {"z": torch.randn(2, 4, 8, 8), "timesteps": 2},
                AUTOENCODER | {"attn_type": "vanilla"},
                "SVD",
                lambda model, inputs: model(inputs["z"], timesteps=inputs["timesteps"]),
                dtype="float32",
            ),
        ],
        package="imaginAIry",
    ),
    Library(
        "CompVis (stable-diffusion-sdkit)",
        [
            Recipe(f"{SD}.model.Encoder", lambda: {"x": torch.randn(2, 3, 16, 16)}, AUTOENCODER, "", positional),
            Recipe(f"{SD}.model.Decoder", lambda: {"z": torch.randn(2, 4, 8, 8)}, AUTOENCODER, "", positional),
            Recipe(
                f"{SD}.model.Model",
                image_and_time(),
                {key: value for key, value in AUTOENCODER.items() if key != "z_channels"},
                "",
                positional,
                dtype="float32",
            ),
            Recipe(
                f"{SD}.openaimodel.UNetModel",
                lambda: {
                    "x": torch.randn(2, 3, 16, 16),
                    "timesteps": torch.tensor([3, 7]),
                    "context": torch.randn(2, 5, 16),
                },
                {"image_size": 16, "in_channels": 3, "model_channels": 32, "out_channels": 3, "num_res_blocks": 1}
                | {"attention_resolutions": [2], "channel_mult": (1, 2), "num_heads": 2}
                | LATENT,
                "SD",
                dtype="float32",
            ),
        ],
        package="stable-diffusion-sdkit",
    ),
    Library(
        "torchcfm",
        [
            Recipe(
                "torchcfm.models.unet.unet.UNetModel",
                image_and_time(),
                {"image_size": 16, "in_channels": 3, "model_channels": 32, "out_channels": 3, "num_res_blocks": 1}
                | {"attention_resolutions": [2], "channel_mult": (1, 2), "num_heads": 2}
                | options,
                name,
                lambda model, inputs: model(inputs["time"], inputs["x"]),
                dtype="float32",
            )
            for name, options in BOTH.items()
        ],
        package="torchcfm",
    ),
    Library(
        "ComfyUI (Fooocus' copy)",
        [
            Recipe(
                "ldm_patched.ldm.modules.diffusionmodules.openaimodel.UNetModel",
                latent_time_context,
                COMFY | {"image_size": 16} | options,
                name,
                dtype="float32",
            )
            for name, options in BOTH.items()
        ],
        repository="lllyasviel/Fooocus",
        prepare=without_a_gpu_or_weights,
    ),
    Library(
        "WebUI (Stability-AI's stablediffusion)",
        [
            Recipe(
                "ldm.modules.diffusionmodules.openaimodel.UNetModel",
                latent_time_context,
                {"image_size": 16, "in_channels": 4, "model_channels": 32, "out_channels": 4, "num_res_blocks": 1}
                | {"attention_resolutions": [2], "channel_mult": (1, 2), "num_heads": 2}
                | LATENT
                | options,
                name,
                dtype="float32",
            )
            for name, options in BOTH.items()
        ],
        repository="Stability-AI/stablediffusion",
    ),
    Library(
        "Forge (ComfyUI's openaimodel)",
        [
            Recipe(
                "backend.nn.unet.IntegratedUNet2DConditionModel",
                latent_time_context,
                COMFY | options,
                name,
                dtype="float32",
            )
            for name, options in BOTH.items()
        ],
        repository="lllyasviel/stable-diffusion-webui-forge",
        prepare=without_arguments,
    ),
]
