"""Registers MONAI: its forwards are rewritten (those of DiffusionModelUNet, AutoencoderKL, …), its SiLUs are known."""

from __future__ import annotations

from typing import Any

from unetgn.fusion.activations import register_known_silu
from unetgn.fusion.norms import register_unfusable
from unetgn.fusion.rules import register_library


def _is_swish_of_one(act: Any) -> bool:
    """Return True where x * sigmoid(alpha * x) is SiLU, and alpha is not trained."""
    return isinstance(act.alpha, (int, float)) and act.alpha == 1


register_library("monai")

ACTIVATION = "monai.networks.blocks.activation"
register_known_silu(f"{ACTIVATION}.Swish.forward", uses=("torch", "sigmoid", "alpha"), where=_is_swish_of_one)
register_known_silu(f"{ACTIVATION}.MemoryEfficientSwish.forward", uses=("monai_swish", "inplace"))

register_unfusable(
    "monai.networks.blocks.spade_norm.SPADE",
    "it makes scale and shift of a segmentation map itself: unetgn.fuse.rule can give its block a forward",
)
register_unfusable(
    "monai.apps.generation.maisi.networks.autoencoderkl_maisi.MaisiGroupNorm3D",
    "its block frees memory between the norm and SiLU, group by group: another trade than ours",
)
