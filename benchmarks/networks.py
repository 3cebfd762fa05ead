"""Holds the networks that whole programs are measured on, as diffusers describes them, with a batch each.

They are published ones, at their own width where two CPU cores make a step in a second or so, and narrowed elsewhere.
MONAI's have the same plan of channels and attention, as far as MONAI can express it; `monai_differs` says where not.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

WORDS = 77  # tokens of a prompt


@dataclass(frozen=True)
class Network:
    """Describes one network and the batch that a step takes."""

    title: str
    batch: int
    options: dict[str, Any]
    """Arguments of diffusers' class."""
    text: bool = False
    """True for UNet2DConditionModel, which reads a text; else UNet2DModel."""
    monai: dict[str, Any] | None = None
    """Arguments of MONAI's DiffusionModelUNet."""
    monai_differs: str = ""

    @property
    def size(self) -> int:
        """Height and width of what it denoises."""
        return int(self.options["sample_size"])

    def build(self) -> nn.Module:
        """Build diffusers' model with random weights, in training mode."""
        kind = diffusers.UNet2DConditionModel if self.text else diffusers.UNet2DModel
        model: nn.Module = kind(**self.options)
        return model.train()

    def inputs(self) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Draw a batch: noisy images, timesteps, and conditions by diffusers' names, which ours are too."""
        x = torch.randn(self.batch, 4 if self.text else 3, self.size, self.size)
        conditions: dict[str, Tensor] = {}
        if self.text:
            conditions["encoder_hidden_states"] = torch.randn(self.batch, WORDS, self.options["cross_attention_dim"])
        if self.options.get("num_class_embeds"):
            conditions["class_labels"] = torch.arange(self.batch)
        return x, torch.arange(self.batch), conditions

    def at(self, *, batch: int, size: int) -> Network:
        """Return the same network for another batch, and for images of another size."""
        return replace(self, batch=batch, options={**self.options, "sample_size": size})


CIFAR10 = Network(  # google/ddpm-cifar10-32
    "CIFAR-10's (DDPM, 35.7 M parameters)",
    batch=4,
    options={
        "sample_size": 32,
        "block_out_channels": (128, 256, 256, 256),
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": None,
        "downsample_padding": 0,
        "flip_sin_to_cos": False,
        "freq_shift": 1,
        "norm_eps": 1e-6,
    },
    monai={
        "channels": (128, 256, 256, 256),
        "num_res_blocks": 2,
        "attention_levels": (False, True, False, False),
        "num_head_channels": 256,
        "norm_eps": 1e-6,
    },
    monai_differs="convolutions pad both ends where they halve",
)
BUTTERFLIES = Network(  # anton-l/ddpm-butterflies-128
    "butterflies-128's at half its width",
    batch=1,
    options={
        "sample_size": 128,
        "block_out_channels": (64, 64, 128, 128, 256, 256),
        "down_block_types": ("DownBlock2D",) * 4 + ("AttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "AttnUpBlock2D") + ("UpBlock2D",) * 4,
    },
    monai={
        "channels": (64, 64, 128, 128, 256, 256),
        "num_res_blocks": 2,
        "attention_levels": (False,) * 4 + (True, False),
        "num_head_channels": 8,
    },
)
ADM = Network(  # Dhariwal & Nichol 2021's ImageNet-64, as openai/diffusers-cd_imagenet64_l2 has it
    "ADM's for ImageNet-64 at a third of its width",
    batch=1,
    options={
        "sample_size": 64,
        "block_out_channels": (64, 128, 192, 256),
        "down_block_types": ("ResnetDownsampleBlock2D",) + ("AttnDownBlock2D",) * 3,
        "up_block_types": ("AttnUpBlock2D",) * 3 + ("ResnetUpsampleBlock2D",),
        "downsample_type": "resnet",
        "upsample_type": "resnet",
        "layers_per_block": 3,
        "attention_head_dim": 64,
        "num_class_embeds": 1000,
        "resnet_time_scale_shift": "scale_shift",
    },
    monai={
        "channels": (64, 128, 192, 256),
        "num_res_blocks": 3,
        "attention_levels": (False, True, True, True),
        "num_head_channels": 64,
        "num_class_embeds": 1000,
        "resblock_updown": True,
    },
    monai_differs="the time is added, and scales nothing",
)
SD15 = Network(  # runwayml/stable-diffusion-v1-5, which has 320 to 1280 channels
    "Stable Diffusion 1.5's at a quarter of its width, for 256×256",
    batch=1,
    options={
        "sample_size": 32,
        "block_out_channels": (80, 160, 320, 320),
        "norm_num_groups": 16,
        "attention_head_dim": 8,
        "cross_attention_dim": 192,
    },
    text=True,
    monai={
        "in_channels": 4,
        "out_channels": 4,
        "channels": (80, 160, 320, 320),
        "num_res_blocks": 2,
        "attention_levels": (True, True, True, False),
        "num_head_channels": (10, 20, 40, 40),
        "norm_num_groups": 16,
        "with_conditioning": True,
        "cross_attention_dim": 192,
    },
)
NETWORKS = {"cifar10": CIFAR10, "butterflies128": BUTTERFLIES, "adm64": ADM, "sd15": SD15}
TINY = Network(  # of every kind of layer one or two: for tests, which ask for figures and not for their size
    "a tiny one",
    batch=1,
    options={
        "sample_size": 8,
        "block_out_channels": (8, 16),
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "layers_per_block": 1,
        "norm_num_groups": 4,
    },
    monai={
        "channels": (8, 16),
        "num_res_blocks": 1,
        "attention_levels": (False, True),
        "num_head_channels": 8,
        "norm_num_groups": 4,
    },
)


def network_of(name: str) -> Network:
    """Look a network up; "tiny" is the one of tests."""
    return TINY if name == "tiny" else NETWORKS[name]
