"""MONAI: its forwards are read (the residual blocks of DiffusionModelUNet, AutoencoderKL and their kin)."""

from __future__ import annotations

from unetgn.fusion.rules import read_library, refuse_norm

read_library("monai")

refuse_norm("monai.networks.blocks.spade_norm.SPADE", "its scale and shift vary over space (a segmentation map)")
refuse_norm(
    "monai.apps.generation.maisi.networks.autoencoderkl_maisi.MaisiGroupNorm3D",
    "its block frees memory between the norm and SiLU, group by group: another trade than ours",
)
