"""MONAI: its forwards are read (the residual blocks of DiffusionModelUNet, AutoencoderKL and their kin); its SiLUs."""

from __future__ import annotations

from typing import Any

from unetgn.fusion.recognition import know_silu
from unetgn.fusion.rules import read_library, refuse_norm


def _is_swish_of_one(act: Any) -> bool:
    """Whether x * sigmoid(alpha * x) is SiLU, and alpha nothing that is trained."""
    return isinstance(act.alpha, (int, float)) and act.alpha == 1


read_library("monai")

ACTIVATION = "monai.networks.blocks.activation"
know_silu(f"{ACTIVATION}.Swish.forward", uses=("torch", "sigmoid", "alpha"), where=_is_swish_of_one)
know_silu(f"{ACTIVATION}.MemoryEfficientSwish.forward", uses=("monai_swish", "inplace"))

refuse_norm("monai.networks.blocks.spade_norm.SPADE", "its scale and shift vary over space (a segmentation map)")
refuse_norm(
    "monai.apps.generation.maisi.networks.autoencoderkl_maisi.MaisiGroupNorm3D",
    "its block frees memory between the norm and SiLU, group by group: another trade than ours",
)
