"""Builds and runs the models that the tests of `fuse` share: other people's shapes, small, with random weights."""

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tests.fusion.guided import GuidedUNet


@dataclass(frozen=True)
class Case:
    """Holds a model, its inputs, and the number of places where SiLU follows a group norm, by its architecture."""

    make: Callable[[], nn.Module]
    inputs: Callable[[], dict[str, Any]]
    places: int

    def model(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        """Return a copy of the model, which is built once; every call leaves the same state of the random numbers."""
        torch.manual_seed(0)
        return copy.deepcopy(_prototype(self)).to(dtype)

    def run(self, model: nn.Module) -> tuple[Tensor, Tensor]:
        """Return output and concatenated gradient, of parameters and first input, under a fixed random cotangent."""
        torch.manual_seed(1)
        dtype = next(model.parameters()).dtype
        inputs = {name: cast(value, dtype) for name, value in self.inputs().items()}
        first = next(iter(inputs.values())).requires_grad_()
        model.zero_grad()
        torch.manual_seed(2)
        output = torch.cat([tensor.flatten() for tensor in tensors(model(**inputs))])
        torch.manual_seed(3)
        output.backward(torch.randn(output.shape, dtype=torch.float64).to(dtype))
        grads = [p.grad for p in [*model.parameters(), first] if p.grad is not None]
        return output.detach(), torch.cat([grad.flatten() for grad in grads])


@functools.cache
def _prototype(case: Case) -> nn.Module:
    torch.manual_seed(0)
    model = case.make()
    with torch.no_grad():
        for parameter in model.parameters():  # what starts at zero or one would hide differences
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
    torch.manual_seed(0)
    return model


def cast(value: Any, dtype: torch.dtype) -> Any:
    """Convert the floating-point tensors in a value, however nested in dicts."""
    if isinstance(value, dict):
        return {name: cast(item, dtype) for name, item in value.items()}
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def tensors(output: Any) -> list[Tensor]:
    """Return the floating-point tensors of an output, however nested."""
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() else []
    items = output.values() if isinstance(output, dict) else output if isinstance(output, (list, tuple)) else ()
    return [tensor for item in items for tensor in tensors(item)]


def diffusers_model(name: str, **config: Any) -> Callable[[], nn.Module]:
    """Return the function that makes a model of diffusers."""

    def make() -> nn.Module:
        import diffusers

        return getattr(diffusers, name)(**config)

    return make


def monai_model(name: str, **config: Any) -> Callable[[], nn.Module]:
    """Return the function that makes a network of MONAI."""

    def make() -> nn.Module:
        from monai.networks import nets

        return getattr(nets, name)(**config)

    return make


def image(channels: int, size: int, **more: Any) -> Callable[[], dict[str, Any]]:
    return lambda: {"sample": torch.randn(2, channels, size, size), **more}


def denoise(**more: Callable[[], Any]) -> Callable[[], dict[str, Any]]:
    def inputs() -> dict[str, Any]:
        given: dict[str, Any] = {"sample": torch.randn(2, 4, 8, 8), "timestep": torch.tensor(7)}
        given["encoder_hidden_states"] = torch.randn(2, 5, 16)
        return given | {name: make() for name, make in more.items()}

    return inputs


def unet_places(levels: int, depth: int, resampling: int = 0, mid: int = 2, tail: int = 1) -> int:
    """Count two places a residual block, and those of the output norm.

    Residual blocks are: `depth` a level going down, one more going up, those in the middle, and those that resample.
    """
    return 2 * (levels * depth + levels * (depth + 1) + mid + resampling) + tail


CIFAR10_LEVELS = {
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
}
CIFAR10 = {
    **CIFAR10_LEVELS,
    **{"sample_size": 32, "layers_per_block": 2, "attention_head_dim": None, "downsample_padding": 0},
    **{"flip_sin_to_cos": False, "freq_shift": 1, "norm_eps": 1e-6},
}
NARROW = {"norm_num_groups": 8}  # for 16 channels
T2I = {
    **NARROW,
    **{"block_out_channels": (16, 32), "cross_attention_dim": 16, "attention_head_dim": 4, "layers_per_block": 2},
}
SDXL = {
    **T2I,
    **{
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    },
    **{"use_linear_projection": True, "addition_embed_type": "text_time", "addition_time_embed_dim": 8},
    **{"projection_class_embeddings_input_dim": 64, "transformer_layers_per_block": (1, 2)},
}
VAE = {**NARROW, "block_out_channels": (16, 32), "layers_per_block": 2, "latent_channels": 4}

UNET_1D = {
    **{"in_channels": 4, "out_channels": 4, "block_out_channels": (32, 64), "time_embedding_type": "positional"},
    **{"down_block_types": ("DownResnetBlock1D",) * 2, "up_block_types": ("UpResnetBlock1D",)},
    **{"mid_block_type": "MidResTemporalBlock1D", "out_block_type": "OutConv1DBlock", "act_fn": "silu"},
    **{"use_timestep_embedding": True, "time_embedding_dim": 32},
}


def unet_1d_with_silu() -> nn.Module:
    """Make a UNet1DModel with SiLU in its residual blocks, which have Mish, whatever the constructor is asked for."""
    from diffusers import UNet1DModel
    from diffusers.models.resnet import Conv1dBlock

    model = UNet1DModel(**UNET_1D)
    for module in model.modules():
        if isinstance(module, Conv1dBlock):
            module.mish = nn.SiLU()
    return model


CASES = {
    "DDPM cifar10": Case(
        diffusers_model("UNet2DModel", **CIFAR10, **NARROW, block_out_channels=(16, 32, 32, 32)),
        image(3, 16, timestep=torch.tensor(7)),
        unet_places(4, 2),
    ),
    "butterflies": Case(
        diffusers_model(
            "UNet2DModel",
            **NARROW,
            block_out_channels=(16, 16, 32, 32, 32, 32),
            down_block_types=("DownBlock2D",) * 4 + ("AttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "AttnUpBlock2D") + ("UpBlock2D",) * 4,
        ),
        image(3, 32, timestep=torch.tensor(7)),
        unet_places(6, 2),
    ),
    "consistency ImageNet-64": Case(
        diffusers_model(
            "UNet2DModel",
            **NARROW,
            block_out_channels=(16, 32, 32),
            down_block_types=("ResnetDownsampleBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D"),
            **{"resnet_time_scale_shift": "scale_shift", "downsample_type": "resnet", "upsample_type": "resnet"},
            **{"num_class_embeds": 10, "attention_head_dim": 16, "layers_per_block": 2},
        ),
        image(3, 16, timestep=torch.tensor(7), class_labels=torch.tensor([1, 2])),
        unet_places(3, 2, resampling=4),
    ),
    "SD 1.5": Case(
        diffusers_model(
            "UNet2DConditionModel",
            **T2I,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        ),
        denoise(),
        unet_places(2, 2),
    ),
    "SDXL": Case(
        diffusers_model("UNet2DConditionModel", **SDXL),
        denoise(added_cond_kwargs=lambda: {"text_embeds": torch.randn(2, 16), "time_ids": torch.ones(2, 6)}),
        unet_places(2, 2),
    ),
    "UNet1D": Case(
        diffusers_model("UNet1DModel", **UNET_1D),
        lambda: {"sample": torch.randn(2, 4, 16), "timestep": torch.tensor(7)},
        1,  # its residual blocks have Mish, only the tail has the activation that it is asked for
    ),
    "UNet1D with SiLU": Case(
        unet_1d_with_silu,
        lambda: {"sample": torch.randn(2, 4, 16), "timestep": torch.tensor(7)},
        2 * (2 * 2 + 2 + 2) + 1,  # two residual blocks in each of two levels down, the middle and a level up; tail
    ),
    "UNet3D": Case(
        diffusers_model(
            "UNet3DConditionModel",
            **(T2I | {"layers_per_block": 1}),
            down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
            up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
        ),
        lambda: {
            "sample": torch.randn(1, 4, 3, 8, 8),
            "timestep": torch.tensor(7),
            "encoder_hidden_states": torch.randn(1, 5, 16),
        },
        3 * unet_places(2, 1, tail=0) + 1,  # each residual block has a temporal layer of four places beside its two
    ),
    "UNetSpatioTemporal": Case(
        diffusers_model(
            "UNetSpatioTemporalConditionModel",
            **{"block_out_channels": (32, 64), "cross_attention_dim": 16, "num_attention_heads": (2, 4)},
            **{"addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 24, "layers_per_block": 1},
            down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
            up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        ),
        lambda: {
            "sample": torch.randn(1, 2, 8, 8, 8),
            "timestep": torch.tensor(7),
            "encoder_hidden_states": torch.randn(1, 1, 16),
            "added_time_ids": torch.ones(1, 3),
        },
        2 * unet_places(2, 1, tail=0) + 1,  # each block is a spatial and a temporal one
    ),
    "AutoencoderKL": Case(
        diffusers_model(
            "AutoencoderKL",
            **VAE,
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
        ),
        image(3, 16),
        unet_places(2, 2, mid=4, tail=2),  # encoder and decoder each have a middle and an output norm
    ),
    "ControlNet": Case(
        diffusers_model(
            "ControlNetModel",
            **T2I,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            conditioning_embedding_out_channels=(8, 8),
        ),
        denoise(controlnet_cond=lambda: torch.randn(2, 3, 16, 16)),
        2 * (2 * 2 + 2),  # the encoder half and the middle of a U-Net
    ),
    "MONAI DiffusionModelUNet": Case(
        monai_model(
            "DiffusionModelUNet",
            **{"spatial_dims": 2, "in_channels": 1, "out_channels": 1, "channels": (32, 64), "num_res_blocks": (2, 2)},
            **{"attention_levels": (False, True), "num_head_channels": (0, 32), "resblock_updown": True},
        ),
        lambda: {"x": torch.randn(2, 1, 16, 16), "timesteps": torch.tensor([3, 7])},
        unet_places(2, 2, resampling=2),
    ),
    "MONAI DiffusionModelUNet, 3-D": Case(
        monai_model(
            "DiffusionModelUNet",
            **{"spatial_dims": 3, "in_channels": 1, "out_channels": 1, "channels": (32, 32), "num_res_blocks": (1, 1)},
            **{"attention_levels": (False, False), "num_head_channels": (0, 32)},
        ),
        lambda: {"x": torch.randn(1, 1, 8, 8, 8), "timesteps": torch.tensor([3])},
        unet_places(2, 1),
    ),
    "MONAI AutoencoderKL": Case(
        monai_model(
            "AutoencoderKL",
            **{"spatial_dims": 2, "in_channels": 1, "out_channels": 1, "channels": (32, 64), "num_res_blocks": (2, 2)},
            **{"attention_levels": (False, False), "latent_channels": 4},
        ),
        lambda: {"x": torch.randn(2, 1, 16, 16)},
        2 * (2 * 2 + 2 + 2 * 2 + 2),  # its output norms lead into a convolution, without SiLU
    ),
    "guided-diffusion, additive": Case(
        lambda: GuidedUNet(scale_shift=False), lambda: {"x": torch.randn(2, 3, 8, 8), "emb": torch.randn(2, 16)}, 7
    ),
    "guided-diffusion, scale-shift": Case(
        lambda: GuidedUNet(scale_shift=True), lambda: {"x": torch.randn(2, 3, 8, 8), "emb": torch.randn(2, 16)}, 7
    ),
}

SMALL = Case(
    diffusers_model(
        "UNet2DModel",
        **{"block_out_channels": (32,), "layers_per_block": 1, "norm_num_groups": 8, "add_attention": False},
        **{"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)},
    ),
    image(3, 8, timestep=torch.tensor(7)),
    2 * (1 + 2 + 2) + 1,
)
