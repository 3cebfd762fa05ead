"""Lists recipes for models of other libraries than diffusers, for `fuse_libraries`.

Each library says where its classes come from: a package of PyPI, or a repository that is cloned beside. Nothing of them
is copied here: what a recipe names is imported from there.
"""

from __future__ import annotations

import importlib
import sys
import types
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch

from benchmarks.fuse_instances import Library, Recipe, image_and_time, positional
from benchmarks.fuse_recipes_openai import AUTOENCODER, COPIES


def without_torchvisions_operators() -> None:
    """Register the operators that torchvision compiles where its wheel is of another build of torch; none is called."""
    try:
        importlib.import_module("torchvision")
    except RuntimeError:
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _kept.append(library)


_kept: list[Any] = []  # torch forgets a library's operators with the object


def without_compiled_resampling() -> None:
    """Put an empty module in the place of score_sde's `op`, which compiles for CUDA on import; FIR filters are off."""
    sys.modules["op"] = types.ModuleType("op")
    vars(sys.modules["op"])["upfirdn2d"] = None


def ddim(**more: Any) -> dict[str, Any]:
    """Return a configuration of ermongroup's ddim."""
    model = {"type": "simple", "ch": 32, "out_ch": 3, "ch_mult": [1, 2], "num_res_blocks": 1, "attn_resolutions": [8]}
    model |= {"in_channels": 3, "resamp_with_conv": True, "dropout": 0.0}
    return {
        "config": SimpleNamespace(
            model=SimpleNamespace(**model | more),
            data=SimpleNamespace(image_size=16),
            diffusion=SimpleNamespace(num_diffusion_timesteps=100),
        )
    }


def score_sde(**more: Any) -> dict[str, Any]:
    """Return a configuration of score_sde."""
    model = {"nf": 32, "ch_mult": (1, 2), "num_res_blocks": 1, "attn_resolutions": (8,), "dropout": 0.0}
    model |= {"resamp_with_conv": True, "conditional": True, "fir": False, "fir_kernel": [1, 3, 3, 1]}
    model |= {"skip_rescale": True, "resblock_type": "biggan", "progressive": "none", "progressive_input": "none"}
    model |= {"embedding_type": "positional", "init_scale": 0.1, "progressive_combine": "sum", "fourier_scale": 16}
    model |= {"scale_by_sigma": False, "nonlinearity": "swish", "num_scales": 10, "sigma_min": 0.01, "sigma_max": 50}
    model |= {"normalization": "GroupNorm", "conv_size": 3, "attention_type": "ddpm", "name": "ncsnpp"}
    return {
        "config": SimpleNamespace(
            model=SimpleNamespace(**model | more),
            data=SimpleNamespace(image_size=16, num_channels=3, centered=True),
            training=SimpleNamespace(continuous=True),
        )
    }


def edm(model: str, **config: Any) -> Recipe:
    """Return the recipe of one of EDM's networks."""
    sizes = {"img_resolution": 16, "in_channels": 3, "out_channels": 3, "model_channels": 32, "channel_mult": [1, 2]}
    sizes |= {"num_blocks": 1, "attn_resolutions": [8]}
    inputs = image_and_time(labels=lambda: None)
    return Recipe(f"{model}", inputs, sizes | config, "", positional, dtype="float32")


def torchvision_with_group_norm() -> dict[str, Any]:
    return {"norm_layer": _group_norm, "weights": None}


def _group_norm(channels: int) -> torch.nn.GroupNorm:
    return torch.nn.GroupNorm(4 if channels % 4 == 0 else 1, channels)


PICTURE: Callable[[], dict[str, Any]] = lambda: {"x": torch.randn(2, 3, 32, 32)}  # noqa: E731  alike of all
VOLUME: Callable[[], dict[str, Any]] = lambda: {"x": torch.randn(1, 1, 16, 16, 16)}  # noqa: E731
MAISI = {"spatial_dims": 3, "in_channels": 1, "out_channels": 1, "num_res_blocks": [1, 1], "num_channels": [32, 64]}

LIBRARIES = [
    Library("EDM", [edm("training.networks.SongUNet"), edm("training.networks.DhariwalUNet")], repository="NVlabs/edm"),
    Library(
        "PhysicsNeMo",
        [
            Recipe(
                "physicsnemo.models.diffusion_unets.SongUNet",
                image_and_time(labels=lambda: None),
                {"img_resolution": 16, "in_channels": 3, "out_channels": 3, "model_channels": 32}
                | {"channel_mult": [1, 2], "num_blocks": 1, "attn_resolutions": [8], "dropout": 0.0},
                "training",
                positional,
                dtype="float32",
                training=True,
            )
        ],
        package="nvidia-physicsnemo",
        prepare=without_torchvisions_operators,
    ),
    Library(
        "ermongroup/ddim",
        [Recipe("models.diffusion.Model", image_and_time(), ddim(), "", positional, dtype="float32")],
        repository="ermongroup/ddim",
    ),
    Library(
        "taming-transformers",
        [
            Recipe(
                "taming.modules.diffusionmodules.model.Decoder",
                lambda: {"z": torch.randn(2, 4, 8, 8)},
                AUTOENCODER,
                "",
                positional,
            )
        ],
        package="taming-transformers-rom1504",
    ),
    Library(
        "score_sde",
        [
            Recipe("models.ncsnpp.NCSNpp", image_and_time(), score_sde(), "biggan", positional, dtype="float32"),
        ],
        repository="yang-song/score_sde_pytorch",
        prepare=without_compiled_resampling,
    ),
    Library(
        "lucidrains' video-diffusion-pytorch",
        [
            Recipe(
                "video_diffusion_pytorch.Unet3D",
                lambda: {"x": torch.randn(1, 3, 2, 16, 16), "time": torch.tensor([3])},
                {"dim": 32, "dim_mults": (1, 2)},
                "",
                positional,
                dtype="float32",
            )
        ],
        package="video-diffusion-pytorch",
        prepare=without_torchvisions_operators,
    ),
    Library(
        "lucidrains' denoising-diffusion-pytorch",
        [
            Recipe(
                "denoising_diffusion_pytorch.Unet",
                image_and_time(),
                {"dim": 32, "dim_mults": (1, 2)},
                "",
                positional,
                dtype="float32",
            )
        ],
        package="denoising-diffusion-pytorch",
        prepare=without_torchvisions_operators,
    ),
    Library(
        "k-diffusion",
        [
            Recipe(
                "k_diffusion.models.image_v1.ImageDenoiserModelV1",
                image_and_time(),
                {"c_in": 3, "feats_in": 32, "depths": [1, 1], "channels": [32, 64], "self_attn_depths": [False, True]}
                | {"has_variance": False, "patch_size": 1},
                "",
                lambda model, inputs: model(inputs["x"], torch.tensor([0.3, 0.7])),
                dtype="float32",
            )
        ],
        package="k-diffusion",
        prepare=without_torchvisions_operators,
    ),
    Library(
        "MONAI",
        [
            Recipe(
                "monai.apps.generation.maisi.networks.autoencoderkl_maisi.AutoencoderKlMaisi",
                VOLUME,
                MAISI
                | {"attention_levels": [False, False], "latent_channels": 4, "num_splits": 1, "norm_float16": False}
                | {"save_mem": False},
                "MAISI",
                positional,
                dtype="float32",
            ),
            Recipe(
                "monai.apps.generation.maisi.networks.diffusion_model_unet_maisi.DiffusionModelUNetMaisi",
                lambda: {"x": torch.randn(1, 1, 16, 16, 16), "time": torch.tensor([3])},
                MAISI | {"attention_levels": [False, True], "num_head_channels": [0, 32]},
                "MAISI",
                positional,
                dtype="float32",
            ),
        ],
        package="monai",
    ),
    Library(
        "MONAI GenerativeModels",
        [
            Recipe(
                "generative.networks.nets.DiffusionModelUNet",
                image_and_time(channels=1),
                {"spatial_dims": 2, "in_channels": 1, "out_channels": 1, "num_res_blocks": (1, 1)}
                | {"num_channels": (32, 64), "attention_levels": (False, True), "num_head_channels": (0, 32)},
                "",
                positional,
                dtype="float32",
            ),
            Recipe(
                "generative.networks.nets.AutoencoderKL",
                lambda: {"x": torch.randn(2, 1, 16, 16)},
                {"spatial_dims": 2, "in_channels": 1, "out_channels": 1, "num_res_blocks": (1, 1)}
                | {"num_channels": (32, 64), "attention_levels": (False, False), "latent_channels": 4},
                "",
                positional,
            ),
        ],
        package="monai-generative",
    ),
    Library(
        "timm",
        [
            Recipe(
                "timm.create_model",
                PICTURE,
                {"model_name": "resnetv2_50d_gn", "act_layer": torch.nn.SiLU, "layers": (1, 1, 1, 1)},
                "resnetv2_50d_gn, SiLU",
                positional,
            )
        ],
        package="timm",
        prepare=without_torchvisions_operators,
    ),
    Library(
        "torchvision",
        [
            Recipe(
                "torchvision.models.efficientnet_b0", PICTURE, torchvision_with_group_norm(), "group norm", positional
            ),
        ],
        package="torchvision",
        prepare=without_torchvisions_operators,
    ),
    *COPIES,
]
